"""The account of requests: which are in flight, and how all others ended."""

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
"""The accounts of all servers in this process. It is a list because copying it is one step: a loop over a WeakSet fails
when another thread adds to it."""


class Account:
    """Notes each request when all of it has been received, and counts it when it is over; for any thread."""

    def __init__(self, pool: ThreadPool, board: Board | None = None) -> None:
        self.completed = self.rejected = 0
        self.in_hand: dict[int, Request] = {}
        """The requests in flight, by id, oldest first."""
        self.streams: set[Connection] = set()
        """The connections on which a stream (`flaskd.server.streams`) is being sent."""
        self.cut_in_drain: list[Cut] | None = None
        """The list to which the drain under way has cut requests added; None without a drain."""
        self.on_end: Callable[[Request], None] | None = None
        """Called with each request just before it leaves `in_hand`."""
        self.on_answer: Callable[[dict[str, Any]], None] | None = None
        """Called with the access log's fields of each request that was answered."""
        self.on_come: Callable[[Request], None] | None = None
        """Called with each request once all of it has been received; only where there is a board."""
        self.make_id: Callable[[], str] | None = None
        """Makes the X-Request-ID of a request that has none; None: requests are given no id."""
        self._pool = pool
        self._board = board
        self._counts = board.counts if board is not None else Counts()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        accounts.append(weakref.ref(self, accounts.remove))

    def accepted(self, request: Request) -> None:
        """Count a request as in flight."""
        request.id = next(self._ids)
        if not request.complete:
            request.complete = time.monotonic()
        self.in_hand[request.id] = request
        if self._board is not None:
            self._board.enter(request)
            if (on_come := self.on_come) is not None:
                on_come(request)

    def answered(self, request: Request) -> None:
        """Note that the app has finished a request; some of its output may still wait to be sent."""
        self.streams.discard(request.channel)
        if self._pool.lost:
            self._pool.come_back(request)

    def retire(self, request: Request, outcome: Outcome, cut: Cut | None = None, now: float = 0.0) -> bool:
        """Take a request out of flight; False if it was no longer in flight: only the first outcome counts.

        `cut` is added to the account of the drain under way, if there is one. `now` is the time.monotonic() moment, if
        the caller knows it.
        """
        with self._lock:
            if (ident := request.id) not in self.in_hand:
                return False
            if (on_end := self.on_end) is not None:
                on_end(request)
            if outcome == "completed":  # first: a drain reads the count as soon as nothing is in hand
                self.completed += 1
            elif outcome == "rejected":
                self.rejected += 1
            self._counts.add(request, outcome, now or time.monotonic())
            if cut is not None and (cut_in_drain := self.cut_in_drain) is not None:
                cut_in_drain.append(cut)
            del self.in_hand[ident]
            if self._board is not None:
                self._board.leave(request)
        if (on_answer := self.on_answer) is not None and request.status:
            on_answer(request.access_fields())
        return True

    def limited(self, limit: str) -> None:
        """Count that a limit took effect: it refused or gave up a request, or closed a connection."""
        with self._lock:
            self._counts.limited(limit)

    def cut_one(self, request: Request, reason: str) -> bool:
        """Count a request as cut, and write it to the log and to a drain's account; False if it was over already."""
        return self.cut_as(request, request.cut(reason))

    def cut_as(self, request: Request, cut: Cut) -> bool:
        """Do what `cut_one` does, with an entry that was made at the moment when the request was broken off."""
        counted = self._count_as_cut(request, cut)
        if counted:
            log.warning(cut.with_stack(), extra={"fields": cut.as_json()})
        return counted

    def cut_together(self, requests: Iterable[Request], reason: str) -> None:
        """Count several requests as cut; the log has one stack for those that are at the same place."""
        cuts = [(each, each.cut(reason)) for each in requests]
        counted = [cut for each, cut in cuts if self._count_as_cut(each, cut)]
        for cut, told in Cut.all_with_stacks(counted):
            log.warning(told, extra={"fields": cut.as_json()})

    def _count_as_cut(self, request: Request, cut: Cut) -> bool:
        if request.id:
            if not self.retire(request, "cut", cut):
                return False
        elif (cut_in_drain := self.cut_in_drain) is not None:  # only part of it was received, so it was never in flight
            cut_in_drain.append(cut)
        if cut.phase == "running":
            self._pool.lose(request)
        return True

    # --- what others read -----------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many requests were accepted and are not yet completely answered."""
        return len(self.in_hand)

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests have been completed and rejected."""
        return self.completed, self.rejected

    def tally(self) -> Tally:
        """How all requests so far ended; a copy."""
        with self._lock:
            return self._counts.tally()

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """The requests in flight, oldest first; with `stacks`, each with the stack of its thread."""
        requests = list(self.in_hand.values())
        gone = each_closed_by_peer([each.channel.socket for each in requests])
        return [each.snapshot(stack=stacks, gone=left) for each, left in zip(requests, gone, strict=True)]

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """Entries for all requests in flight, as if they were cut now; nothing is counted."""
        return tuple(request.cut(reason) for request in list(self.in_hand.values()))

    def all_are_at(self) -> Hashable | None:
        """A value that stays the same while all threads are busy and none of them makes progress.

        It changes when a request begins or ends, or when a byte of a response is written or sent. None while a thread
        is free, or serves a stream, which is meant to last.
        """
        requests = [each for each in list(self.in_hand.values()) if each.phase == "running"]
        if len(requests) < max(1, self._pool.size) or any(each.channel in self.streams for each in requests):
            return None
        return tuple((each.id, each.channel.flushed, each.channel.total_outbufs_len) for each in requests)
