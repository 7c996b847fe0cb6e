"""The ledger: the account of every request that a drain or stop dealt with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InFlight:
    """A request in hand, as it is shown; `age` is in seconds."""

    id: int
    client: str
    method: str
    path: str
    age: float
    phase: str
    """``queued``, ``running`` or ``sending`` (the app is done, output is not)."""
    thread: str = ""
    stack: str = ""
    gone: bool = False
    """Whether its client has closed its side: nobody seems to wait for the answer any more."""

    def __str__(self) -> str:
        where = f" in {self.thread}" if self.thread else ""
        return f"{self.method} {self.path} ({self.phase} for {self.age:.1f}s{where})"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs."""
        return {
            "id": self.id, "client": self.client, "method": self.method, "path": self.path,
            "age": round(self.age, 3), "phase": self.phase, "thread": self.thread, "stack": self.stack,
        }  # fmt: skip


@dataclass(frozen=True)
class Cut(InFlight):
    """A request that was broken off, and why."""

    reason: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs."""
        return {**super().as_json(), "reason": self.reason}


@dataclass(frozen=True)
class DrainReport:
    """What a drain did: how many were completed and rejected, which were cut, and how long it took in seconds."""

    completed: int = 0
    rejected: int = 0
    cut: tuple[Cut, ...] = ()
    took: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing was cut."""
        return not self.cut

    def __str__(self) -> str:
        return f"completed={self.completed} rejected={self.rejected} cut={len(self.cut)} took={self.took:.1f}s"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs."""
        return {
            "completed": self.completed,
            "rejected": self.rejected,
            "cut": [each.as_json() for each in self.cut],
            "took": round(self.took, 3),
        }
