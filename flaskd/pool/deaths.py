"""Why a worker died, and the log lines that say so."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path

from flaskd.errors import FlaskdError
from flaskd.ledger import Cut
from flaskd.pool.handle import Handle
from flaskd.pool.spawn import how

log = logging.getLogger("flaskd.pool")


_TOGETHER = 2.0
"""Seconds for which an OOM kill explains the death of a worker: several may have been killed at once."""


class Deaths:
    """Logs the deaths of workers, and finds out whether the kernel's OOM killer did it (cgroup v2, memory.events)."""

    def __init__(self, events: Path | None = None) -> None:
        self._events = events if events is not None else _memory_events()
        self._oom_kills = self._read()
        self._unexplained = 0
        """OOM kills that do not explain any worker's death yet."""
        self._seen_at = 0.0

    def _read(self) -> int:
        try:
            lines = self._events.read_text(encoding="ascii").splitlines() if self._events else []
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def how(self, worker: Handle) -> str:
        """How a worker's process ended, in words."""
        assert worker.code is not None
        text = f"flaskd killed it ({worker.killed_for})" if worker.killed_for else how(worker.code)
        if worker.code == -signal.SIGKILL and not worker.killed_for and self._oom_killed():
            text += ": the kernel had no memory left for it (oom_kill in memory.events; see MemoryMax=)"
        return text

    def _oom_killed(self) -> bool:
        """Whether the kernel has killed one more process because there was no memory left."""
        before, self._oom_kills, now = self._oom_kills, self._read(), time.monotonic()
        if self._oom_kills > before:
            left = self._unexplained if now - self._seen_at < _TOGETHER else 0
            self._unexplained, self._seen_at = left + self._oom_kills - before, now
        if not self._unexplained or now - self._seen_at >= _TOGETHER:
            return False
        self._unexplained -= 1
        return True

    def tell(self, worker: Handle, how: str, cut: tuple[Cut, ...]) -> None:
        """Log that a worker died, and each request that it had completely read."""
        board = worker.board
        lost = f"; it held {board.connections} connections, and had read {len(cut)} requests"
        more = f" and {board.unnamed} more" if board.unnamed else ""
        log.error(f"{worker} is gone: {how}{lost}{more}", extra={"fields": {"worker": worker.slot, "how": how}})
        for each in cut:
            log.error(f"cut {each}", extra={"fields": each.as_json()})


def tell_failure(error: FlaskdError) -> None:
    """Log why a worker did not become ready, with the app's traceback."""
    log.error(error.whole)


def _memory_events() -> Path | None:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    group = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    return Path("/sys/fs/cgroup") / group.lstrip("/") / "memory.events" if group is not None else None
