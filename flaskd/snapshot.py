"""What there is to know of the daemon at one moment; control, admin, ``top`` and STATUS read this and nothing else."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from flaskd.lifecycle import State
from flaskd.notices import DrainBegan, Notice, ReloadEnded, StopBegan
from flaskd.protocol import summary
from flaskd.serving.api import ServingSnapshot
from flaskd.units import timestamp


class Counts:
    """What is counted of the life of the daemon; hears its notices."""

    def __init__(self) -> None:
        self.drains = self.reloads = self.failed_reloads = 0
        self.last_reload: dict[str, Any] | None = None
        """When the last reload was over, whether it succeeded, and its fault."""

    def heard(self, notice: Notice) -> None:
        """Count it."""
        match notice:
            case DrainBegan() | StopBegan(drains=True):
                self.drains += 1
            case ReloadEnded(fault=fault):
                self.reloads, self.failed_reloads = self.reloads + (not fault), self.failed_reloads + bool(fault)
                self.last_reload = {
                    "time": timestamp(time.time()),
                    "ok": not fault,
                    **({"fault": fault} if fault else {}),
                }


@dataclass(frozen=True)
class Held:
    """What the daemon holds beside the app: addresses, and what is known of the run before this one."""

    listen: tuple[str, ...] = ()
    url: str | None = None
    admin: tuple[str, ...] = ()
    agent: tuple[str, ...] = ()
    shutdown_endpoints: tuple[str, ...] = ()
    previous: str | None = None
    """How the run before this one died; None when it came to its end."""
    last_stop: dict[str, Any] | None = None
    """The record of the stop before this run."""


@dataclass(frozen=True)
class Snapshot:
    """The daemon at one moment. `since` and `started` are times on the wall clock, `age` and `uptime` seconds."""

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
    instance: str = ""
    """What this flaskd is called among others."""

    @property
    def progress(self) -> dict[str, Any]:
        """How far a drain or stop is, for who waits for it."""
        serving = self.serving
        progress: dict[str, Any] = {"in_flight": len(serving.in_flight)}
        if (oldest := serving.oldest) is not None:
            progress["oldest"] = oldest.as_json()
        if serving.background:
            progress["background"] = len(serving.background)
        if serving.cleanup:
            progress["cleanup"] = list(serving.cleanup)
        return progress

    @property
    def all_threads(self) -> int:
        """How many requests can run at once."""
        return self.threads * max(1, self.serving.wanted)

    @property
    def workers(self) -> dict[str, Any] | None:
        """The workers in a few numbers; None where the app runs in the daemon itself."""
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
        """A line for people, as ``systemctl status`` shows it."""
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
        """What ``status`` tells; keys are stable."""
        serving, idle = self.serving, self.serving.idle
        oldest, outcomes = serving.oldest, serving.tally.outcomes
        return {
            "state": str(self.state),
            "since": timestamp(self.since),
            "for": round(self.age, 3),
            "uptime": round(self.uptime, 3),
            "reason": self.reason,
            "pid": os.getpid(),
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
