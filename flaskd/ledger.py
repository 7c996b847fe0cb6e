"""The ledger: the account of every request that a drain or stop dealt with."""

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
"""ASCII that is shown as it is; a client may put anything else into its request, escape sequences included."""


def visible(text: str) -> str:
    """Write what a client sent (as WSGI and http.server give it: bytes as Latin-1) so that it can reach a terminal.

    What cannot be seen is percent-encoded (RFC 3986 §2.1), of a long text only the beginning is there, and ``?`` stands
    where there is nothing.
    """
    return quote(shortened(text).encode("latin-1", "replace"), safe=_VISIBLE) or "?"


class _Here:
    slot: int | None = None


_here = _Here()


def be_worker(slot: int) -> None:
    """Say that this process is the worker of a slot: what is in flight here is in that."""
    _here.slot = slot


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
    sent: int = 0
    """Bytes of its answer that the kernel has taken."""
    worker: int | None = field(default_factory=lambda: _here.slot)
    """The slot of the worker that has it; None where there are no workers."""
    request_id: str = ""
    """Its X-Request-ID, as a trusted proxy or this server has it; empty where there is none."""
    traceparent: str = ""
    """That of W3C Trace Context, likewise from a trusted proxy."""

    def __str__(self) -> str:
        where = f" in {self.thread}" if self.thread else ""
        if self.worker is not None:
            where += f" {'of' if where else 'in'} worker {self.worker}"
        if self.request_id:
            where += f", request_id={self.request_id}"
        return f"{self.method} {self.path} ({self.phase} for {self.age:.1f}s{where})"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `worker`, `request_id` and `traceparent` are there where there is one."""
        return {
            "id": self.id, "client": self.client, "method": self.method, "path": self.path,
            "age": round(self.age, 3), "phase": self.phase, "thread": self.thread, "stack": self.stack,
            "sent": self.sent, "gone": self.gone, **({} if self.worker is None else {"worker": self.worker}),
            **({"request_id": self.request_id} if self.request_id else {}),
            **({"traceparent": self.traceparent} if self.traceparent else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class Cut(InFlight):
    """A request that was broken off, and why."""

    reason: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.reason}"

    def with_stack(self) -> str:
        """What was cut and why, and below it where it was, for people; `stack` itself is whole."""
        return "\n".join(filter(None, [f"cut {self}", folded(self.stack)]))

    @staticmethod
    def all_with_stacks(cuts: Iterable[Cut]) -> Iterator[tuple[Cut, str]]:
        """Each with what the log says of it; those that were at the same place follow each other, with one stack."""
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
    """What a drain did: how many were completed and rejected, which were cut, and how long it took in seconds.

    `took` counts from the moment that the drain was asked for, its announce included; in the account of a stop it is
    that of the whole stop.

    `background` is the work outside any request that still ran when its deadline came; `unaccepted` how many
    connections were left in the backlog of a listener that could not be gated: they are reset, and nobody knows what
    they asked for; `unfinished` is what else was accepted and cut: jobs of an executor, and what the app left to the
    end of the process.
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
        """Whether nothing was cut or left in a backlog, and nothing left running in the background or at the end."""
        return not (self.cut or self.background or self.unaccepted or self.unfinished)

    def with_unfinished(self, more: tuple[Unfinished, ...]) -> DrainReport:
        """The same, and more that was not finished."""
        return replace(self, unfinished=self.unfinished + more) if more else self

    def __str__(self) -> str:
        left = f" background={len(self.background)}" if self.background else ""
        left += f" unaccepted={self.unaccepted}" if self.unaccepted else ""
        left += f" unfinished={len(self.unfinished)}" if self.unfinished else ""
        took = format_duration(round(self.took, 3))  # as answers and the record have it
        return f"completed={self.completed} rejected={self.rejected} cut={len(self.cut)}{left} took={took}"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `background`, `unaccepted` and `unfinished` are there when there is any."""
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
