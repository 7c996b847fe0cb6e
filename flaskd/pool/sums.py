"""Figures of all workers together, read from their boards, without asking the workers."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Any

from flaskd.cleanup import results_as_json
from flaskd.ledger import Cut, InFlight
from flaskd.pool.handle import Handle, Phase
from flaskd.server import Tally
from flaskd.units import timestamp

log = logging.getLogger("flaskd.pool")

_REMEMBERED = 20
"""How many deaths of workers are kept for the verb `workers`."""


class Sums:
    """Sums over the boards of all living workers, and over the last counts of dead ones; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: list[Handle] = []
        self._past = Tally()
        self._used = time.monotonic()
        """When a dead worker gave its last answer that counts for the idle stop, or when the count began anew."""
        self.deaths: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        """The last workers that died without being told to end, each with the requests that died with it."""
        self.died = 0
        """How many workers died so."""
        self.lost = 0
        """How many requests that were completely read died with them."""
        self.recycled = dict.fromkeys(("max_requests", "max_age", "max_memory", "request_timeout"), 0)
        """How many workers were replaced because they had reached a limit, by the limit's key."""
        self.trouble = ""
        """Why the limits of workers cannot be kept, in words; empty while they can."""

    def add(self, worker: Handle) -> None:
        """Add a worker that was started."""
        with self._lock:
            self._alive.append(worker)

    @property
    def alive(self) -> list[Handle]:
        """All workers that have not ended."""
        with self._lock:
            return list(self._alive)

    def gone(self, worker: Handle, reason: str) -> tuple[Cut, ...]:
        """Keep the counts of a worker that has ended; its requests in flight count as cut, and are returned."""
        cut = tuple(as_cut(each, reason) for each in requests_of(worker))
        with self._lock:
            self._past += worker.board.tally()
            lost = len(cut) + worker.board.unnamed
            self._past.outcomes["cut"] += lost
            self.lost += lost
            self._used = max(self._used, _used_at(worker) or 0.0)
            if worker in self._alive:
                self._alive.remove(worker)
        return cut

    def note_death(self, worker: Handle, how: str, cut: tuple[Cut, ...]) -> None:
        """Describe the death of a worker that was not told to end: when it stops by itself, and when it has ended."""
        known = {
            "time": timestamp(time.time()), "slot": worker.slot, "generation": worker.generation, "pid": worker.pid,
            "how": how, "connections": worker.board.connections, "unnamed": worker.board.unnamed,
            "cut": [each.as_json() for each in cut],
        }  # fmt: skip
        if worker.death:
            worker.death.update(known)
        else:
            worker.death = known
            self.died += 1
            self.deaths.append(known)

    def tally(self) -> Tally:
        """How all requests of this service ended."""
        with self._lock:
            whole = self._past
            for each in self._alive:
                whole += each.board.tally()
        return whole

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests have been completed and rejected."""
        outcomes = self.tally().outcomes
        return outcomes["completed"], outcomes["rejected"]

    def in_flight(self) -> list[InFlight]:
        """All requests in flight, oldest first."""
        found = [request for worker in self.alive for request in requests_of(worker)]
        return sorted(found, key=lambda each: -each.age)

    def total(self, what: str) -> int:
        """The sum of one number over all boards; `what` is its name in `Board`."""
        return sum(getattr(each.board, what) for each in self.alive)

    @property
    def silent_for(self) -> float:
        """Seconds since any serving worker's event loop last turned; 0 if no worker serves."""
        beats = [each.board.last_turn for each in self.alive if each.ready_at]
        return max(0.0, time.monotonic() - max(beats)) if beats else 0.0

    def used(self) -> None:
        """Count idleness from now on."""
        self._used = time.monotonic()

    @property
    def idle_for(self) -> float:
        """Seconds since the last answer that counts for the idle stop; 0 while a request that counts is in hand."""
        now = time.monotonic()
        with self._lock:
            last = max([self._used, *filter(None, (_used_at(each) for each in self._alive))])
        return max(0.0, now - last)

    def moved(self) -> Hashable:
        """A value that changes when a request begins or ends, or a byte of one is received or sent."""
        return tuple((each.pid, each.board.moved()) for each in self.alive)

    def workers(self) -> list[dict[str, Any]]:
        """A description of each worker, in the order of the slots; keys are stable."""
        return sorted(map(_shown, self.alive), key=lambda each: (each["slot"], each["generation"]))


def _used_at(worker: Handle) -> float | None:
    """When a worker last had a request that counts for the idle stop; None for a worker that has had none so far.

    The start of a replacement does not count as use. A worker that is stopping may follow an old configuration, and so
    may note late that a request is in hand: all its requests count.
    """
    if worker.phase is Phase.LEAVING and worker.board.in_flight():
        return time.monotonic()
    idle = worker.board.idle_for() if worker.ready_at else None
    if idle is None or (idle and not any(worker.board.tally().statuses) and not worker.board.in_flight()):
        return None
    return time.monotonic() - idle


def requests_of(worker: Handle) -> list[InFlight]:
    """The requests that are in flight in one worker."""
    return [replace(each, worker=worker.slot) for each in worker.board.in_flight()]


def all_steps(workers: Iterable[Handle]) -> dict[str, Any]:
    """The results of all workers' cleanup steps, by ``NAME (worker SLOT)``."""
    return {
        f"{name} (worker {each.slot})": fate
        for each in workers
        for name, fate in results_as_json(list(each.results)).items()
    }


def as_cut(request: InFlight, reason: str) -> Cut:
    """The ledger's entry for cutting a request."""
    return Cut(**vars(request), reason=reason)


def _shown(worker: Handle) -> dict[str, Any]:
    board = worker.board
    outcomes = board.tally().outcomes
    silent = time.monotonic() - board.last_turn if worker.ready_at and worker.phase is not Phase.GONE else None
    return {
        "slot": worker.slot, "pid": worker.pid, "generation": worker.generation, "state": str(worker.phase),
        "age": round(worker.age, 3), "in_flight": len(board.in_flight()), "answered": outcomes["completed"],
        "busy": board.busy, "queued": board.queued, "connections": board.connections,
        "silent": None if silent is None else round(max(0.0, silent), 3),
    }  # fmt: skip
