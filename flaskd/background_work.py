"""Work outside any request: the app marks it with `background`, and a drain waits for it.

The account belongs to the process, not to a server: a drain of any server waits for all of the work.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from flaskd.stacks import folded, stack_of
from flaskd.text import printable, shortened
from flaskd.values import value

log = logging.getLogger("flaskd.work")

_Function = TypeVar("_Function", bound=Callable[..., Any])
_numbers = itertools.count()


@value
class Background:
    """Work in the background; `age` is in seconds, `stack` is that of its thread, if it was asked for."""

    name: str
    age: float
    thread: str
    stack: str = ""

    def __str__(self) -> str:
        return f"{self.name} (for {self.age:.1f}s in {self.thread})"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `stack` only if it was asked for."""
        stack = {"stack": self.stack} if self.stack else {}
        return {"name": self.name, "age": round(self.age, 3), "thread": self.thread, **stack}


@dataclass(frozen=True, eq=False)
class _Entry:
    name: str
    thread: threading.Thread = field(default_factory=threading.current_thread)
    began: float = field(default_factory=time.monotonic)


# Changed only by single atomic operations, without a lock that a fork could copy while it is held.
_entries: dict[int, _Entry] = {}
_told: set[Callable[[], None]] = set()


class background(contextlib.ContextDecorator):  # noqa: N801 - used like contextlib.suppress
    """Mark work outside a request, in any thread: ``with flaskd.background("export"): …``, or as a decorator.

    A drain waits for the work as for a request, until its deadline. Work that still runs then is named in the log with
    its stack, and the drain is not clean. `flaskd status` shows running work. Raises TypeError for a coroutine or
    generator function as a decorated function, because the mark would end before its work begins.
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
        return type(self)(self.name)  # each call of a decorated function has its own, because calls overlap

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
        # Otherwise another thread leaves it than entered it, or a forked child does, which has no entries.
        _entries.pop(mine[-1] if mine else self._open.pop(), None)
        for tell in _told.copy():
            tell()


_NOT_DONE_WHEN_CALLED = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def on_one_line(name: str) -> str:
    """A name from the app, which may contain a client's text, as one line that is safe in logs and terminals."""
    return printable(shortened(name), "?")


def in_background() -> bool:
    """Whether any work runs in the background."""
    return bool(_entries)


def background_work(*, stacks: bool = False) -> tuple[Background, ...]:
    """The running work, the oldest first."""
    now = time.monotonic()
    found = []
    for each in _entries.copy().values():
        stack = stack_of(each.thread) if stacks else ""
        found.append(Background(on_one_line(each.name), now - each.began, on_one_line(each.thread.name), stack))
    return tuple(found)


def left_behind() -> tuple[Background, ...]:
    """The work that still runs when a drain is over, with its stacks; logs a warning for each."""
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
    """To be called in a forked child, which does not have the threads that did the work."""
    _entries.clear()
    _told.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
