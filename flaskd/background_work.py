"""Work outside any request: who does it says so with `background`, and a drain waits for it.

The account is the process', not a server's: a drain of any server waits for all of it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from flaskd.stacks import folded
from flaskd.text import printable, shortened

log = logging.getLogger("flaskd.work")

_Function = TypeVar("_Function", bound=Callable[..., Any])
_numbers = itertools.count()


@dataclass(frozen=True)
class Background:
    """Work in the background as it is shown; `age` is in seconds, `stack` where its thread is, if that was asked."""

    name: str
    age: float
    thread: str
    stack: str = ""

    def __str__(self) -> str:
        return f"{self.name} (for {self.age:.1f}s in {self.thread})"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `stack` is there when it was asked for."""
        stack = {"stack": self.stack} if self.stack else {}
        return {"name": self.name, "age": round(self.age, 3), "thread": self.thread, **stack}


@dataclass(frozen=True, eq=False)
class _Entry:
    name: str
    thread: threading.Thread = field(default_factory=threading.current_thread)
    began: float = field(default_factory=time.monotonic)


# Changed by single operations that the interpreter makes whole: no lock, so none that a fork could find held.
_entries: dict[int, _Entry] = {}
_told: set[Callable[[], None]] = set()


class background(contextlib.ContextDecorator):  # noqa: N801 - used like contextlib.suppress
    """Mark work outside a request, from any thread: ``with flaskd.background("export"): …``, or as a decorator.

    A drain waits for it as for a request, until its deadline; what still runs then is named in the log with its stack,
    and the drain is not clean. `flaskd status` shows what is under way. A function that is a coroutine or a generator
    cannot be decorated (the mark would end before its work begins): TypeError.
    """

    def __init__(self, name: str) -> None:
        self.name = str(name)
        self._open: list[int] = []

    def __call__(self, function: _Function) -> _Function:
        """Mark each call of a function."""
        if any(test(function) for test in _NOT_DONE_WHEN_CALLED):
            raise TypeError(
                f'cannot mark "{getattr(function, "__qualname__", function)}" as background work: it is a coroutine or '
                "generator function, whose work comes after its call; use the with statement inside it"
            )
        return super().__call__(function)

    def _recreate_cm(self) -> Self:
        return type(self)(self.name)  # one for each call of a decorated function: calls overlap

    def __enter__(self) -> Self:
        number = next(_numbers)
        _entries[number] = _Entry(self.name)
        self._open.append(number)
        return self

    def __exit__(self, *_: object) -> None:
        here = threading.current_thread()
        mine = [number for number in self._open.copy() if (entry := _entries.get(number)) and entry.thread is here]
        if mine:
            self._open.remove(mine[-1])
        # Else it is left by another thread than it was entered by, or a forked child: none of it is there.
        _entries.pop(mine[-1] if mine else self._open.pop(), None)
        for tell in _told.copy():
            tell()


_NOT_DONE_WHEN_CALLED = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def on_one_line(name: str) -> str:
    """A name that the app chose, maybe of what a client sent, as it can stand in a log, an answer and a terminal."""
    return printable(shortened(name), "?")


def in_background() -> bool:
    """Whether any work is under way in the background."""
    return bool(_entries)


def background_work(*, stacks: bool = False) -> tuple[Background, ...]:
    """What is under way, oldest first."""
    now = time.monotonic()
    frames = sys._current_frames() if stacks else {}  # noqa: SLF001 - public in all but its name
    found = []
    for each in _entries.copy().values():
        frame = frames.get(each.thread.ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        found.append(Background(on_one_line(each.name), now - each.began, on_one_line(each.thread.name), stack))
    return tuple(found)


def left_behind() -> tuple[Background, ...]:
    """What is under way when a drain is over, with its stacks; each is named in the log."""
    found = background_work(stacks=True)
    for each in found:
        text = f"the drain is over, and in the background there is still: {each}"
        log.warning(f"{text}\n{folded(each.stack)}".rstrip(), extra={"fields": each.as_json()})
    return found


def tell_of_ends(tell: Callable[[], None]) -> None:
    """Call `tell` whenever some work ends, in the thread that did it, until `tell_no_more`."""
    _told.add(tell)


def tell_no_more(tell: Callable[[], None]) -> None:
    """Undo `tell_of_ends`."""
    _told.discard(tell)


def _forget() -> None:
    """In a forked child: the threads that did it are not there."""
    _entries.clear()
    _told.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
