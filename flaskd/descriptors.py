"""How many descriptors this process may have open: the soft RLIMIT_NOFILE, raised while it is needed (setrlimit(2)).

Programs that the app starts inherit the soft limit, and some cannot do with a large one: what uses select(2), or closes
each number up to the limit. So it stays as it was until descriptors come near it, and falls back when they do not.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

_WITHOUT_A_LIMIT = 512


class _Limit:
    """The limit of this process, if it is flaskd's to raise; `own` is the soft one that it was started with."""

    own = 0
    raised = False


def open_files_limit(*, raised: bool = False) -> int:
    """The soft limit; with `raised` the hard one, which `make_room` may set from now on; 512 where there is none."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return _WITHOUT_A_LIMIT
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not raised:
        return soft
    if not _Limit.own and soft != hard:
        # Tried once: a number that it says can be had must be one that can.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            _Limit.own = soft
    return hard if _Limit.own else soft


def make_room(fd: int | None = None) -> bool:
    """Raise the limit when the descriptor that was just opened is near it, or none could be (None); whether it was.

    The kernel gives the lowest free number (open(2)), so there are at least as many open as the number says.
    """
    if _Limit.raised or not _Limit.own or (fd is not None and fd < _Limit.own - _Limit.own // 4):
        return False
    _Limit.raised = _set(highest=True)
    return _Limit.raised


def adjust() -> None:
    """Look how many are open, once in a while: raise the limit for what the app has opened, or take it back."""
    if not _Limit.own:
        return
    try:
        free = os.dup(2)
    except OSError as error:
        if error.errno == errno.EMFILE:
            make_room()
        return
    os.close(free)
    make_room(free)
    if _Limit.raised and free < _Limit.own // 2:
        with contextlib.suppress(OSError):
            if len(list(Path("/proc/self/fd").iterdir())) < _Limit.own // 2:
                _Limit.raised = not _set(highest=False)


def _set(*, highest: bool) -> bool:
    import resource  # noqa: PLC0415 - see open_files_limit

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if highest else min(_Limit.own, hard), hard))
    except (ValueError, OSError):
        return False
    return True


def _forget() -> None:
    """In a forked child: the limit is what it was before us."""
    if _Limit.raised:
        _set(highest=False)
    _Limit.own, _Limit.raised = 0, False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
