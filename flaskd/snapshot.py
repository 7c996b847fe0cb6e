"""All facts about the daemon at one moment; control, admin, ``top`` and STATUS read only this."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import field
from itertools import zip_longest
from typing import Any

from flaskd.lifecycle import State
from flaskd.notices import DrainBegan, Notice, ReloadEnded, Resumed, StopBegan
from flaskd.process.usage import resident
from flaskd.protocol import summary
from flaskd.serving.api import ServingSnapshot
from flaskd.units import timestamp
from flaskd.values import value
from flaskd.version import __version__

_RECENT = 60.0
_NOTED_EVERY = 10.0
"""Seconds for which answers count as recent, and between two notes of their number."""


class Counts:
    """Counts events of the daemon's life; it listens to notices."""

    def __init__(self) -> None:
        self.recent = Recent()
        self.drains = self.reloads = self.failed_reloads = 0
        self.last_reload: dict[str, Any] | None = None
        """When the last reload ended, whether it succeeded, and its fault."""
        self.trace = ""
        """The app's traceback if its code made the last reload fail."""
        self.drain: dict[str, Any] | None = None
        """When the present drain began and who asked for it; None if there is none to undo."""

    def heard(self, notice: Notice) -> None:
        """Count a notice."""
        match notice:
            case DrainBegan(by=by):
                self.drains += 1
                self.drain = {"time": timestamp(time.time()), "by": by}
            case StopBegan(drains=True):
                self.drains += 1
            case Resumed():
                self.drain = None
            case ReloadEnded(fault=fault, trace=trace):
                self.trace = trace.strip("\n")
                self.reloads, self.failed_reloads = self.reloads + (not fault), self.failed_reloads + bool(fault)
                self.last_reload = {
                    "time": timestamp(time.time()),
                    "ok": not fault,
                    **({"fault": fault} if fault else {}),
                }


class Recent:
    """Counts the answers of the last minute: `note` keeps the counts now and then, `since` compares with the oldest.

    Counts only grow, so the difference of two is the number of answers between them.
    """

    def __init__(self) -> None:
        self._noted: deque[tuple[float, list[int]]] = deque([(time.monotonic(), [])])

    def note(self, counts: Callable[[], Sequence[int]]) -> None:
        """Keep the present counts of answers by their length, at most once in ten seconds (one thread)."""
        now = time.monotonic()
        if now - self._noted[-1][0] < _NOTED_EVERY:
            return
        self._noted.append((now, list(counts())))
        while now - self._noted[0][0] > _RECENT:
            self._noted.popleft()

    def since(self, counts: Sequence[int]) -> dict[str, Any]:
        """The seconds since the oldest counts that are kept, and the answers in each bucket since then (any thread)."""
        moment, before = self._noted[0]
        found = [count - past for count, past in zip_longest(counts, before, fillvalue=0)]
        return {"seconds": round(time.monotonic() - moment, 3), "counts": found}


@value
class Held:
    """What the daemon has apart from the app: addresses, and what is known of the run before this one."""

    listen: tuple[str, ...] = ()
    url: str | None = None
    admin: tuple[str, ...] = ()
    agent: tuple[str, ...] = ()
    shutdown_endpoints: tuple[str, ...] = ()
    previous: str | None = None
    """How the run before this one died; None if it ended properly."""
    last_stop: dict[str, Any] | None = None
    """The record of the stop before this run."""


@value
class Snapshot:
    """The daemon at one moment. `since` and `started` are Unix times, `age` and `uptime` are seconds."""

    name: str
    state: State
    since: float
    age: float
    started: float
    uptime: float
    reason: str | None
    app: str | None
    threads: int
    serving: ServingSnapshot
    held: Held
    log_level: str
    config: str | None
    counts: Counts = field(repr=False)
    left: float | None = None
    """Seconds that the running drain or stop may still take at most; None if there is none."""
    instance: str = ""
    """The name of this flaskd."""

    @property
    def progress(self) -> dict[str, Any]:
        """The progress of a drain or stop, for clients that wait for it."""
        serving = self.serving
        progress: dict[str, Any] = {"in_flight": len(serving.in_flight)}
        if self.left is not None:
            progress["left"] = round(self.left, 1)
        if (oldest := serving.oldest) is not None:
            progress["oldest"] = oldest.as_json()
        if serving.background:
            progress["background"] = len(serving.background)
        if serving.cleanup:
            progress["cleanup"] = list(serving.cleanup)
        return progress

    @property
    def all_threads(self) -> int:
        """How many requests can run at the same time."""
        return self.threads * max(1, self.serving.wanted)

    @property
    def workers(self) -> dict[str, Any] | None:
        """The workers in a few numbers; None if the app runs in the daemon itself."""
        serving = self.serving
        if not serving.wanted:
            return None
        ready = [each for each in serving.workers if each["state"] == "ready"]
        generations = sorted({each["generation"] for each in ready})
        return {
            "ready": len(ready),
            "wanted": serving.wanted,
            "generations": generations,
            "died": serving.deaths,
            "recycled": serving.recycled,
        }

    def __str__(self) -> str:
        """One line for people, as ``systemctl status`` shows it."""
        serving, workers = self.serving, self.workers
        text = f"{self.state}: {len(serving.in_flight)} in flight"
        if workers is not None and self.state is State.READY:
            text += f", {workers['ready']} of {workers['wanted']} workers ready"
        if (oldest := serving.oldest) is not None:
            text += f", oldest {oldest}"
        if serving.background:
            text += f"; background: {', '.join(each.name for each in serving.background)}"
        if serving.cleanup:
            text += f"; cleanup: {', '.join(serving.cleanup)}"
        if serving.trouble and self.state is State.READY:
            text += f"; {serving.trouble}"
        return text

    def as_json(self) -> dict[str, Any]:
        """The fields of ``status`` under stable keys; `memory` is the RSS of this process alone, in bytes."""
        serving, idle = self.serving, self.serving.idle
        oldest, outcomes = serving.oldest, serving.tally.outcomes
        return {
            "state": str(self.state),
            "since": timestamp(self.since),
            "for": round(self.age, 3),
            "uptime": round(self.uptime, 3),
            "reason": self.reason,
            "drain": self.counts.drain,
            "left": None if self.left is None else round(self.left, 3),
            "version": __version__,
            "pid": os.getpid(),
            "memory": resident(os.getpid()),
            "name": self.name,
            "instance": self.instance,
            "app": self.app,
            "listen": list(self.held.listen),
            "url": self.held.url,
            "admin": list(self.held.admin),
            "agent": list(self.held.agent),
            "in_flight": len(serving.in_flight),
            "oldest": str(oldest) if oldest else None,
            "background": [each.as_json() for each in serving.background],
            "queued": serving.queued,
            "connections": serving.connections,
            "threads": self.all_threads,
            "busy": serving.busy,
            "workers": self.workers,
            "trouble": serving.trouble or None,
            "completed": outcomes["completed"],
            "rejected": outcomes["rejected"],
            "limited": {limit: count for limit, count in serving.tally.limited.items() if count} or None,
            "tally": serving.tally.as_json(),
            "recent": self.counts.recent.since(serving.tally.took.counts),
            "shutdown_endpoint": list(self.held.shutdown_endpoints),
            "idle_for": round(idle[0], 3) if idle else None,
            "idle_stop_at": timestamp(time.time() + idle[1]) if idle and self.state is State.READY else None,
            "cleanup": list(serving.cleanup),
            "previous": self.held.previous,
            "last_reload": self.counts.last_reload,
            "last_stop": summary(self.held.last_stop),
            "log_level": self.log_level,
            "config": self.config,
        }
