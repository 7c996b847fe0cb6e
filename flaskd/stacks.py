"""Where a thread is at this moment: the whole stack for programs, a folded one for people."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

_MOST_FRAMES = 60
"""How many frames of a stack are shown, the innermost ones; recursion can make a stack very long."""

_HERE = f"{Path(__file__).parent}/"
_FRAME = re.compile(r'^  File "(.*)", line \d+', re.MULTILINE)
_THREAD = re.compile(
    r"^((?:Current thread|Thread) 0x\w+[^\n(]*?) ?\(most recent call first\):\n((?:  .*\n)*)", re.MULTILINE
)
_LIBRARY = re.compile(r"/(?:site|dist)-packages/(\w+)|/lib/python3[^/]*/(?!(?:site|dist)-packages/)(\w+)|<frozen (\w+)")
_BETWEEN = "\n\n"
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

    What the app calls in the standard library or in an installed package becomes one line with the number of calls. So
    do successive calls of flaskd, Waitress, Werkzeug, Flask, Click and `threading`. If there is no call of the app, the
    innermost call stays. Several stacks, with a blank line between them, are folded one by one; equal ones are shown
    once. Text that is no stack is left as it is.
    """
    places = [_folded(_frames(each)[::-1]) for each in stack.split(_BETWEEN)]
    if not all(places):
        return stack.rstrip()
    several = [f"  {count} threads:\n{place}" if count > 1 else place for place, count in Counter(places).items()]
    return _BETWEEN.join(several)


def together(stacks: Iterable[str]) -> str:
    """Several stacks as one text that `folded` understands."""
    return _BETWEEN.join(filter(None, (each.rstrip() for each in stacks)))


def folded_dump(dump: str) -> str:
    """The stacks that faulthandler wrote for all threads of a process, each folded as `folded` does it."""
    heads: dict[str, list[str]] = {}
    for head, body in _THREAD.findall(f"{dump}\n"):
        heads.setdefault(_folded(_frames(body)) or body.rstrip(), []).append(head)
    return (
        "\n".join(
            f"{f'{len(alike)} threads' if len(alike) > 1 else alike[0]}:\n{place}" for place, alike in heads.items()
        )
        or dump.rstrip()
    )


def _frames(stack: str) -> list[str]:
    """The frames of one stack in their order; none if the text is no stack."""
    starts = [each.start() for each in _FRAME.finditer(stack)]
    if not starts or starts[0]:
        return []
    return [stack[start:end].rstrip() for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _folded(frames: list[str]) -> str:
    """Frames, the innermost first, as text for people."""
    if not frames:
        return ""
    of_the_app = (place for place, each in enumerate(frames) if not _package(each) and not _library(each))
    first = next(of_the_app, None)
    if first is None:
        first = next((place for place, each in enumerate(frames) if not _package(each)), 0)
    shown = [frames[first], *_fold("calls", frames[:first])]
    for is_folded, run in groupby(frames[first + 1 :], lambda each: bool(_package(each))):
        outer = list(run)
        shown += _fold("called by", outer) if is_folded else outer
    return "\n".join(shown)


def _fold(how: str, frames: list[str]) -> list[str]:
    packages = [_package(each) or _library(each) for each in frames]
    number = f"{len(packages)} frame{'s' if len(packages) > 1 else ''}"
    return [f"  ... {how} {number} of {', '.join(dict.fromkeys(packages))}"] if packages else []


def _library(frame: str) -> str:
    """The module of the standard library or the installed package of a frame; empty if the frame is the app's."""
    found = _LIBRARY.search(_path(frame))
    return found[found.lastindex or 0] if found and "/flaskd/demo/" not in found.string else ""


def _path(frame: str) -> str:
    found = _FRAME.match(frame)
    return found[1] if found else ""


def _package(frame: str) -> str:
    """The package for which a frame is folded; empty if the frame is the app's, or of a library that the app calls."""
    path = _path(frame)
    if "/flaskd/demo/" in path:
        return ""
    installed = _INSTALLED.search(path)
    return installed[installed.lastindex or 0] if installed else "flaskd" if path.startswith(_HERE) else ""
