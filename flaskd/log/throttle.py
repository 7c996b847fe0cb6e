"""Bounds the lines of a log that others can cause at will: so many in a window of time, the others are counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass

BURST = 50
"""Lines of one kind that are written in one window."""
WINDOW = 10.0
"""Seconds."""
_KINDS = 256
"""Kinds that have a window at a time; those that come then share one."""
_OTHERS = "lines"


@dataclass
class _Window:
    begin: float
    written: int = 0
    left_out: int = 0


class Throttle:
    """Lets the first `BURST` lines of a kind through in each window; any thread may ask, a signal's handler too."""

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}
        self._lock = threading.RLock()

    def admits(self, kind: str, now: float) -> bool:
        """Whether one more line of this kind is written, `now` on the monotonic clock; else it is counted."""
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
        """Whether something was left out that `take_over` has not told yet."""
        return any(window.left_out for window in list(self._windows.values()))

    def take_over(self, now: float, *, all_of_them: bool = False) -> list[str]:
        """What was left out in windows that are over, or in all of them: a line for each; it begins anew."""
        with self._lock:
            over = [kind for kind, each in self._windows.items() if all_of_them or now - each.begin >= WINDOW]
            ended = {kind: self._windows.pop(kind) for kind in over}
        return [
            f"{each.left_out} more {kind} in {now - each.begin:.0f}s: counted, and not listed one by one"
            for kind, each in ended.items()
            if each.left_out
        ]

    def forget(self) -> None:
        """In a forked child: another thread may hold the lock, and what was counted is the parent's."""
        self._windows, self._lock = {}, threading.RLock()
