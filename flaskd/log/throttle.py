"""Limits log lines that clients can cause at will: a number in each window of time is written, the rest is counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass

BURST = 50
"""How many lines of one kind are written in one window."""
WINDOW = 10.0
"""The length of a window in seconds."""
_KINDS = 256
"""How many kinds have a window of their own; all further kinds share one."""
_OTHERS = "lines"


@dataclass
class _Window:
    begin: float
    written: int = 0
    left_out: int = 0


class Throttle:
    """Admits the first `BURST` lines of a kind in each window; any thread and signal handler may call it."""

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}
        self._lock = threading.RLock()

    def admits(self, kind: str, now: float) -> bool:
        """Whether one more line of this kind is to be written (else it is counted); `now` is monotonic."""
        with self._lock:
            window = self._windows.get(kind)
            if window is None:
                if len(self._windows) >= _KINDS:
                    kind = _OTHERS
                window = self._windows.setdefault(kind, _Window(now))
            if now - window.begin >= WINDOW and not window.left_out:
                window.begin, window.written = now, 0
            if window.written < BURST:
                window.written += 1
                return True
            window.left_out += 1
            return False

    @property
    def counting(self) -> bool:
        """Whether `take_over` has lines to report that were left out."""
        return any(window.left_out for window in list(self._windows.values()))

    def take_over(self, now: float, *, all_of_them: bool = False) -> list[str]:
        """One line for each kind that was left out in windows that are over, or in all; the counts begin anew."""
        with self._lock:
            over = [kind for kind, each in self._windows.items() if all_of_them or now - each.begin >= WINDOW]
            ended = {kind: self._windows.pop(kind) for kind in over}
        return [
            f"{each.left_out} more {kind} in {now - each.begin:.0f}s: counted, and not listed one by one"
            for kind, each in ended.items()
            if each.left_out
        ]

    def forget(self) -> None:
        """To be called in a forked child: another thread may hold the lock, and the counts belong to the parent."""
        self._windows, self._lock = {}, threading.RLock()
