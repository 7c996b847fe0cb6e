"""The account of requests: what is in flight, and what became of all others."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from flaskd.ledger import Cut, InFlight
from flaskd.server.board import Board
from flaskd.server.request import Connection, Outcome, Request
from flaskd.server.tally import Counts, Tally
from flaskd.server.threads import ThreadPool
from flaskd.sockets import each_closed_by_peer

log = logging.getLogger("flaskd.server")

accounts: list[weakref.ref[Account]] = []
"""Those of all servers of this process. A list, because its copy is made at once: what goes through a WeakSet fails
where another thread adds to it."""


class Account:
    """Counts each request twice: when it has come whole, and when it is over; all methods are for any thread."""

    def __init__(self, pool: ThreadPool, board: Board | None = None) -> None:
        self.completed = self.rejected = 0
        self.in_hand: dict[int, Request] = {}
        """What is in flight, by its id, oldest first."""
        self.streams: set[Connection] = set()
        """The connections on which a response without an end of its own is being sent."""
        self.cut_in_drain: list[Cut] | None = None
        """Where the drain under way wants to have what is cut; None without a drain."""
        self.on_end: Callable[[Request], None] | None = None
        """Is called with each request before it is out of flight."""
        self.on_answer: Callable[[dict[str, Any]], None] | None = None
        """Is called with what the access log tells of each request that was answered."""
        self.on_come: Callable[[Request], None] | None = None
        """Is called with each request that has come whole, where there is a board."""
        self.make_id: Callable[[], str] | None = None
        """Makes the X-Request-ID of a request that comes without one; None where requests are given none."""
        self._pool = pool
        self._board = board
        self._counts = board.counts if board is not None else Counts()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        accounts.append(weakref.ref(self, accounts.remove))

    def accepted(self, request: Request) -> None:
        """Count a request as in flight."""
        request.id = next(self._ids)
        request.complete = time.monotonic()
        self.in_hand[request.id] = request
        if self._board is not None:
            self._board.enter(request)
            if (on_come := self.on_come) is not None:
                on_come(request)

    def answered(self, request: Request) -> None:
        """Note that the app is done with a request; its output may still wait to be sent."""
        self.streams.discard(request.channel)
        if self._pool.lost:
            self._pool.come_back(request)

    def retire(self, request: Request, outcome: Outcome, cut: Cut | None = None) -> bool:
        """Take a request out of flight; whether it still was, because only the first outcome counts.

        `cut` is its entry in the account of a drain under way.
        """
        with self._lock:
            if request.id not in self.in_hand:
                return False
            if (on_end := self.on_end) is not None:
                on_end(request)
            if outcome == "completed":  # first: a drain reads the count as soon as nothing is in hand
                self.completed += 1
            elif outcome == "rejected":
                self.rejected += 1
            self._counts.add(request, outcome, time.monotonic())
            if cut is not None and (cut_in_drain := self.cut_in_drain) is not None:
                cut_in_drain.append(cut)
            del self.in_hand[request.id]
            if self._board is not None:
                self._board.leave(request)
        if (on_answer := self.on_answer) is not None and request.status:
            on_answer(request.access_fields())
        return True

    def limited(self, limit: str) -> None:
        """Count what a limit did: a request that it refused or gave up, or a connection that it closed."""
        with self._lock:
            self._counts.limited(limit)

    def cut_one(self, request: Request, reason: str) -> bool:
        """Count a request as cut, and name it in the log and in a drain's account, unless it is over: then False."""
        return self.cut_as(request, request.cut(reason))

    def cut_as(self, request: Request, cut: Cut) -> bool:
        """The same, as it was in the moment in which it was broken off."""
        counted = self._count_as_cut(request, cut)
        if counted:
            log.warning(cut.with_stack(), extra={"fields": cut.as_json()})
        return counted

    def cut_together(self, requests: Iterable[Request], reason: str) -> None:
        """Count several requests as cut at once: of those that are at the same place the log has one stack."""
        cuts = [(each, each.cut(reason)) for each in requests]
        counted = [cut for each, cut in cuts if self._count_as_cut(each, cut)]
        for cut, told in Cut.all_with_stacks(counted):
            log.warning(told, extra={"fields": cut.as_json()})

    def _count_as_cut(self, request: Request, cut: Cut) -> bool:
        if request.id:
            if not self.retire(request, "cut", cut):
                return False
        elif (cut_in_drain := self.cut_in_drain) is not None:  # it has not come whole, and so was never in flight
            cut_in_drain.append(cut)
        if cut.phase == "running":
            self._pool.lose(request)
        return True

    # --- what is shown of it --------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many requests were accepted and are not yet completely answered."""
        return len(self.in_hand)

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests have been completed and rejected."""
        return self.completed, self.rejected

    def tally(self) -> Tally:
        """What became of all requests so far; a copy."""
        with self._lock:
            return self._counts.tally()

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """What is in flight, oldest first, with the stacks of the threads on request."""
        requests = list(self.in_hand.values())
        gone = each_closed_by_peer([each.channel.socket for each in requests])
        return [each.snapshot(stack=stacks, gone=left) for each, left in zip(requests, gone, strict=True)]

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """What is in flight, as if it were cut now; nothing is counted."""
        return tuple(request.cut(reason) for request in list(self.in_hand.values()))

    def all_are_at(self) -> Hashable | None:
        """What all threads are at; None while one is free, or serves a stream, which is meant to last.

        Two answers differ when a request ended or began between them, or a byte of a response moved.
        """
        requests = [each for each in list(self.in_hand.values()) if each.phase == "running"]
        if len(requests) < max(1, self._pool.size) or any(each.channel in self.streams for each in requests):
            return None
        return tuple((each.id, each.channel.flushed, each.channel.total_outbufs_len) for each in requests)
