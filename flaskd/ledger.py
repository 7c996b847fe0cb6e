"""The ledger: what became of each request during a drain or stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from flaskd.background_work import Background
from flaskd.process.exit import Unfinished
from flaskd.stacks import folded
from flaskd.text import shortened
from flaskd.units import format_duration

_VISIBLE = bytes(range(0x21, 0x7F))
"""The ASCII characters that are shown unchanged; a client may send any others, escape sequences included."""


def visible(text: str) -> str:
    """Make a text from a client safe for a terminal; WSGI and http.server give bytes decoded as Latin-1.

    Other characters are percent-encoded (RFC 3986 §2.1), a long text is cut, and an empty one becomes ``?``.
    """
    return quote(shortened(text).encode("latin-1", "replace"), safe=_VISIBLE) or "?"


class _Here:
    slot: int | None = None


_here = _Here()


def be_worker(slot: int) -> None:
    """Note that this process is the worker of a slot; its requests in flight are shown with that slot."""
    _here.slot = slot


@dataclass(frozen=True)
class InFlight:
    """A request in flight, as it is shown; `age` is in seconds."""

    id: int
    client: str
    method: str
    path: str
    age: float
    phase: str
    """``queued``, ``running`` or ``sending`` (the app is done, and output remains)."""
    thread: str = ""
    stack: str = ""
    gone: bool = False
    """Whether its client has closed the connection or its sending side, so probably nothing waits for the answer."""
    sent: int = 0
    """How many bytes of its answer the kernel has accepted."""
    worker: int | None = field(default_factory=lambda: _here.slot)
    """The slot of its worker; None if there are no workers."""
    request_id: str = ""
    """Its X-Request-ID, from a trusted proxy or made by this server; empty if there is none."""
    traceparent: str = ""
    """Its traceparent (W3C Trace Context), from a trusted proxy; empty if there is none."""

    def __str__(self) -> str:
        where = f" in {self.thread}" if self.thread else ""
        if self.worker is not None:
            where += f" {'of' if where else 'in'} worker {self.worker}"
        if self.request_id:
            where += f", request_id={self.request_id}"
        return f"{self.method} {self.path} ({self.phase} for {self.age:.1f}s{where})"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `worker`, `request_id` and `traceparent` only if there is one."""
        return {
            "id": self.id, "client": self.client, "method": self.method, "path": self.path,
            "age": round(self.age, 3), "phase": self.phase, "thread": self.thread, "stack": self.stack,
            "sent": self.sent, "gone": self.gone, **({} if self.worker is None else {"worker": self.worker}),
            **({"request_id": self.request_id} if self.request_id else {}),
            **({"traceparent": self.traceparent} if self.traceparent else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class Cut(InFlight):
    """A request that was broken off, and the reason."""

    reason: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.reason}"

    def with_stack(self) -> str:
        """The request, the reason and its stack, folded, as text for people; `stack` itself is complete."""
        return "\n".join(filter(None, [f"cut {self}", folded(self.stack)]))

    @staticmethod
    def all_with_stacks(cuts: Iterable[Cut]) -> Iterator[tuple[Cut, str]]:
        """Each request with its text for the log; those at the same place are together, the last with the stack."""
        places: dict[str, list[Cut]] = {}
        for each in cuts:
            places.setdefault(folded(each.stack), []).append(each)
        for place, (*others, last) in places.items():
            yield from ((each, f"cut {each}") for each in others)
            where = f"  {len(others) + 1} requests were here:\n{place}" if others else place
            yield last, f"cut {last}\n{where}" if place else f"cut {last}"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs."""
        return {**super().as_json(), "reason": self.reason}


@dataclass(frozen=True)
class DrainReport:
    """The result of a drain: how many requests were completed and rejected, which were cut, and `took` in seconds.

    `took` counts from the moment that the drain was asked for, its announce included; in the account of a stop it is
    that of the whole stop.

    `background` is the work outside any request that still ran at the deadline. `unaccepted` is how many connections
    were left in the backlog of a listener that could not be gated: they are reset, and their requests are not known.
    `unfinished` is other accepted work that was cut: jobs of an executor, and the app's exit callbacks and threads.
    """

    completed: int = 0
    rejected: int = 0
    cut: tuple[Cut, ...] = ()
    took: float = 0.0
    background: tuple[Background, ...] = ()
    unaccepted: int = 0
    unfinished: tuple[Unfinished, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing was cut, left in a backlog, left running in the background, or unfinished."""
        return not (self.cut or self.background or self.unaccepted or self.unfinished)

    def with_unfinished(self, more: tuple[Unfinished, ...]) -> DrainReport:
        """The same report with more unfinished work."""
        return replace(self, unfinished=self.unfinished + more) if more else self

    def __str__(self) -> str:
        left = f" background={len(self.background)}" if self.background else ""
        left += f" unaccepted={self.unaccepted}" if self.unaccepted else ""
        left += f" unfinished={len(self.unfinished)}" if self.unfinished else ""
        took = format_duration(round(self.took, 3))  # as answers and the record have it
        return f"completed={self.completed} rejected={self.rejected} cut={len(self.cut)}{left} took={took}"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `background`, `unaccepted` and `unfinished` only if there is any."""
        left: dict[str, Any] = {"background": [each.as_json() for each in self.background]} if self.background else {}
        if self.unaccepted:
            left["unaccepted"] = self.unaccepted
        if self.unfinished:
            left["unfinished"] = [each.as_json() for each in self.unfinished]
        return {
            "completed": self.completed,
            "rejected": self.rejected,
            "cut": [each.as_json() for each in self.cut],
            **left,
            "took": round(self.took, 3),
        }
