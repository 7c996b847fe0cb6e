"""Where a thread is at this moment."""

from __future__ import annotations

import sys
import threading
import traceback

_MOST_FRAMES = 60
"""The innermost frames that are shown of a stack; recursion may make it endless."""


def stack_of(thread: threading.Thread, below: str = "") -> str:
    """The stack of a running thread, innermost call last; empty when the thread has ended.

    With `below` only what comes after the last frame of that file, a path as in ``__file__``.
    """
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - the documented way to see another thread
    frames = traceback.extract_stack(frame, limit=_MOST_FRAMES) if frame else []
    last = max((place for place, each in enumerate(frames) if each.filename == below), default=-1)
    return "\n".join(each.rstrip() for each in traceback.format_list(frames[last + 1 :]))
