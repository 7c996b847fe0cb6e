"""Where a thread is at this moment: the whole stack for programs, a folded one for people."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from itertools import groupby
from pathlib import Path

_MOST_FRAMES = 60
"""How many frames of a stack are shown, the innermost ones; recursion can make a stack very long."""

_HERE = f"{Path(__file__).parent}/"
_FRAME = re.compile(r'^  File "(.*)", line \d+', re.MULTILINE)
_INSTALLED = re.compile(
    r"/(?:site|dist)-packages/(flaskd|waitress|werkzeug|flask|click)/|/python3[^/]*/(threading)\.py$"
    r"|/bin/(flaskd)$|<frozen (runpy)>"
)


def stack_of(thread: threading.Thread, below: str = "") -> str:
    """The stack of a running thread, the innermost call last; empty if the thread has ended.

    With `below` only the frames after the last frame of that file, a path as in ``__file__``.
    """
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - the documented way to see another thread
    frames = traceback.extract_stack(frame, limit=_MOST_FRAMES) if frame else []
    last = max((place for place, each in enumerate(frames) if each.filename == below), default=-1)
    return "\n".join(each.rstrip() for each in traceback.format_list(frames[last + 1 :]))


def folded(stack: str) -> str:
    """A stack for people: the app's innermost call first, each call followed by its caller.

    Successive calls of flaskd, Waitress, Werkzeug, Flask, Click and `threading` become one line with their number. If
    there are only such calls, the innermost one stays. Text that is no stack is left as it is.
    """
    starts = [each.start() for each in _FRAME.finditer(stack)]
    if not starts or starts[0]:
        return stack.rstrip()
    frames = [stack[start:end].rstrip() for start, end in zip(starts, [*starts[1:], None], strict=True)][::-1]
    first = next((place for place, each in enumerate(frames) if not _package(each)), 0)
    shown = [frames[first], *_fold("calls", frames[:first])]
    for is_folded, run in groupby(frames[first + 1 :], lambda each: bool(_package(each))):
        outer = list(run)
        shown += _fold("called by", outer) if is_folded else outer
    return "\n".join(shown)


def _fold(how: str, frames: list[str]) -> list[str]:
    packages = [_package(each) for each in frames]
    number = f"{len(packages)} frame{'s' if len(packages) > 1 else ''}"
    return [f"  ... {how} {number} of {', '.join(dict.fromkeys(packages))}"] if packages else []


def _package(frame: str) -> str:
    """The package for which a frame is folded; empty if the frame is the app's, or of a library that the app calls."""
    found = _FRAME.match(frame)
    path = found[1] if found else ""
    if "/flaskd/demo/" in path:
        return ""
    installed = _INSTALLED.search(path)
    return installed[installed.lastindex or 0] if installed else "flaskd" if path.startswith(_HERE) else ""
