"""The event loop: waitress' channels and dispatcher, turned by flaskd, so that it can be drained and watched.

All methods run in the loop's thread, except those that say "any thread".
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

from waitress import wasyncore
from waitress.adjustments import Adjustments

from flaskd.background_work import tell_no_more, tell_of_ends
from flaskd.errors import CannotCreateError, shortage
from flaskd.ledger import Cut, DrainReport, InFlight
from flaskd.server.acceptor import Acceptor, make_acceptor
from flaskd.server.channel import Channel, Probe, Request
from flaskd.server.draining import Draining
from flaskd.server.idle import IdleWatch
from flaskd.server.poller import make_poller
from flaskd.server.proxies import BehindProxies
from flaskd.server.tally import Tally
from flaskd.server.threads import FunctionTask, ThreadPool
from flaskd.sockets import Listener, each_closed_by_peer, unread

log = logging.getLogger("flaskd.server")

_TURN = 1.0
"""Seconds; the longest the loop waits when nothing happens."""
_FILES_PAUSE = 0.5
"""Seconds without accepting after the process ran out of files."""
_LOOKS = 10
"""How often connections are looked at within the time that they have, which is so kept to a tenth, or to a turn."""

Outcome = Literal["completed", "rejected", "cut", "gone"]


class EventLoop:
    """Serves an app on listeners with worker threads; waitress' settings come as `Adjustments` arguments."""

    reserved = False
    """Whether new connections may have descriptors of the reserve (`flaskd.reserve`)."""

    def __init__(
        self,
        app: Callable[..., Any],
        listeners: Sequence[Listener],
        *,
        threads: int,
        adjustments: Mapping[str, Any],
        on_answer: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.draining = threading.Event()
        self.drains = False
        """The same as a plain attribute, for where it is asked at every event."""
        self.closing = False
        """Whether responses close their connections: while draining, and while a drain is announced."""
        self.refusing = False
        """Whether requests are answered with 503 (drained, on listeners that others share)."""
        self.keepalive_grace = self.stream_grace = 0.0
        self.patience = float("inf")
        """Seconds that a client has for a request, since it connected or had its last answer."""
        self.names_limits = True
        """Whether the log names the setting that a request goes beyond; not where no setting could change that."""
        self.idle: IdleWatch | None = None
        self.health_path = ""
        self.health: Callable[[], tuple[str, str]] = lambda: ("200 OK", "ready")
        self.connections_accepted = 0
        self.probes: dict[int, Channel] = {}
        """Open connections that came through no listener."""
        self.completed = self.rejected = 0
        self.tally = Tally()
        """Guarded by the loop's lock; `tally_now` gives a copy."""
        self.turned = threading.Event()
        self.last_turn = time.monotonic()
        """When the loop last turned, which it does every second when all is well."""
        self.error: BaseException | None = None
        self.poller = make_poller()
        self.acceptors: list[Any] = []
        self.workers = ThreadPool()
        self.alone = threads == 0
        """Whether the loop runs the app itself; for apps that never wait."""
        self._threads = threads
        self._adjustments = adjustments
        self._app = app
        self._listeners = list(listeners)
        self.on_answer = on_answer
        """Is given what the access log tells of each request that was answered; None where nobody wants to know."""
        self._limit = 0
        self._full = self._ending = self._closed = False
        self._pause_until = 0.0
        self._in_hand: dict[int, Request] = {}
        self._lost: set[Request] = set()
        self._streams: set[Channel] = set()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._to_answer: deque[Channel] = deque()
        self._timers: list[tuple[float, int, Channel]] = []
        self._timer_ids = itertools.count()
        self._next_reaping = 0.0
        self._drain: Draining | None = None

    # --- any thread ---------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the loop's thread, soon (any thread)."""
        self._calls.append(function)
        self.wake()

    def wake(self) -> None:
        """Make the loop turn now (any thread)."""
        with self._lock:
            if not self._closed and self.acceptors:
                self.acceptors[0].trigger.pull_trigger()

    def answer_soon(self, channel: Channel) -> None:
        """Answer a connection's next request in the loop's thread, without a worker (any thread)."""
        self._to_answer.append(channel)
        self.wake()

    def accepted(self, request: Request) -> None:
        """Count a request as in flight."""
        request.id = next(self._ids)
        request.complete = time.monotonic()
        self._in_hand[request.id] = request

    def answered(self, request: Request) -> None:
        """Note that the app is done with a request (worker thread)."""
        self._streams.discard(request.channel)
        if self._lost:
            with self._lock:
                if request in self._lost:
                    self._lost.discard(request)
                    if not self._ending:
                        self._replenish()
        if self.drains:
            self.poller.touch(request.channel)

    def lost_thread(self, request: Request) -> None:
        """Note that a thread goes on with a request that is over; it is missing from the pool until it comes back."""
        with self._lock:
            self._lost.add(request)
            if request.over:  # in this moment, and so `answered` did not see it among the lost
                self._lost.discard(request)

    def retire(self, request: Request, outcome: Outcome, cut: Cut | None = None) -> bool:
        """Take a request out of flight; whether it still was, because only the first outcome counts (any thread).

        `cut` is its entry in the account of a drain under way.
        """
        with self._lock:
            if request.id not in self._in_hand:
                return False
            if (idle := self.idle) is not None:
                idle.answered(request)
            if outcome == "completed":  # first: a drain reads the count as soon as nothing is in hand
                self.completed += 1
            elif outcome == "rejected":
                self.rejected += 1
            self.tally.add(request, outcome, time.monotonic())
            if cut is not None and self._drain is not None:
                self._drain.cut.append(cut)
            del self._in_hand[request.id]
        if (on_answer := self.on_answer) is not None and request.status:
            on_answer(request.access_fields())
        return True

    def stream_began(self, channel: Channel) -> None:
        """Note a response that has no end of its own (worker thread)."""
        self._streams.add(channel)
        if self.drains:
            self.call(lambda: self.end_streams_in_time([channel]))

    def client_of(self, peer: str, headers: Mapping[str, str]) -> str:
        """The address of the client of whom a peer tells in a request's headers, if it is believed (any thread)."""
        return self._app.client(peer, headers) if isinstance(self._app, BehindProxies) else ""

    @property
    def in_flight(self) -> int:
        """Requests accepted and not yet completely answered (any thread)."""
        return len(self._in_hand)

    @property
    def connections(self) -> int:
        """Open connections, without those of probes (any thread)."""
        return sum(len(acceptor.active_channels) for acceptor in self.acceptors)

    @property
    def queued(self) -> int:
        """Requests that wait for a worker thread (any thread)."""
        return len(self.workers.queue)

    def in_hand(self) -> list[Request]:
        """The requests in flight, and those still coming whose head is complete (any thread)."""
        # First those still coming: one that has come meanwhile is then among the others.
        arriving = [channel.arriving for channel in self.channels() if not channel.internal]
        return [each for each in arriving if each is not None and each.headers_finished] + list(self._in_hand.values())

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """What is in flight, oldest first, with the stacks of the threads on request (any thread)."""
        requests = list(self._in_hand.values())
        gone = each_closed_by_peer([each.channel.socket for each in requests])
        return [each.snapshot(stack=stacks, gone=left) for each, left in zip(requests, gone, strict=True)]

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that go on with a request that is over, see `lost_thread` (any thread)."""
        with self._lock:
            return {each.thread: each.snapshot() for each in self._lost if each.thread is not None}

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """What is in flight, as cut (any thread)."""
        return tuple(request.cut(reason) for request in list(self._in_hand.values()))

    def tally_now(self) -> Tally:
        """The account of all requests so far (any thread)."""
        with self._lock:
            return self.tally.copy()

    def all_are_at(self) -> Hashable | None:
        """What all worker threads are at; None while one is free, or serves a stream, which is meant to last.

        Two answers differ when a request ended or began between them, or a byte of a response moved (any thread).
        """
        requests = [each for each in list(self._in_hand.values()) if each.phase == "running"]
        if len(requests) < max(1, self._threads) or any(each.channel in self._streams for each in requests):
            return None
        return tuple((each.id, each.channel.flushed, each.channel.total_outbufs_len) for each in requests)

    def moved(self) -> Hashable:
        """How far the requests are: two answers differ when one began or ended, or a byte moved (any thread)."""
        at = tuple((each.id, each.channel.flushed, each.channel.last_activity) for each in self.in_hand())
        return self.completed, self.rejected, at

    def set_threads(self, threads: int) -> None:
        """Change the number of worker threads (any thread).

        Raises CannotCreateError where no more can be had; the number is then what it was.
        """
        before = self.workers.count
        try:
            self.workers.set_thread_count(threads + len(self._lost))
        except RuntimeError as error:
            had = self.workers.count
            self.workers.set_thread_count(before)
            lack = shortage(error)
            raise (CannotCreateError(f"server.threads: {had} of {threads}: {lack}") if lack else error) from error
        self._threads = threads

    def _replenish(self) -> None:
        """Have as many worker threads that are free as there should be, or as many of them as can be had."""
        try:
            self.workers.set_thread_count(self._threads + len(self._lost))
        except RuntimeError as error:
            log.warning(f"{self.workers.count - len(self._lost)} of {self._threads} worker threads: {shortage(error)}")

    def run_in_worker(self, function: Callable[[], None]) -> None:
        """Run a function in a worker thread (any thread)."""
        self.workers.add_task(FunctionTask(function))

    # --- the loop's thread --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Build waitress' servers on the listeners and start the workers; called before the thread starts."""
        adjustments = Adjustments(threads=self._threads, **self._adjustments)
        self._limit = adjustments.connection_limit
        for listener in self._listeners:
            self.acceptors.append(make_acceptor(self, listener, self._app, self.workers, adjustments))
        self.poller.wake = self.wake
        self.accept(on=True)
        self.workers.set_thread_count(self._threads)

    def accept(self, *, on: bool) -> None:
        """Wait for new connections on all open listeners, or leave them to wait.

        In a drain those that others share stay closed, except while it is over and they answer with 503.
        """
        for acceptor in self.acceptors:
            if acceptor.accepting and not (on and self.drains and acceptor.listener.shared and not self.refusing):
                self.poller.listen(acceptor, on=on)

    def run(self) -> None:
        """Turn until told to end; an error that leaves here is kept in `error`."""
        try:
            while not self._ending:
                self.poller.turn(self._patience())
                self.last_turn = time.monotonic()
                if not self.turned.is_set():
                    self.turned.set()
                while self._calls:
                    self._calls.popleft()()
                self.answer()
                self._keep_house(time.monotonic())
        except BaseException as error:
            self.error = error
            log.critical("the serving thread died", exc_info=True)

    def answer(self) -> None:
        """Give the answers that need no worker."""
        while self._to_answer:
            self._to_answer.popleft().serve_here()

    def _patience(self) -> float:
        moments = [self.last_turn + _TURN]
        if self._timers:
            moments.append(self._timers[0][0])
        if self._drain is not None:
            moments.append(self._drain.next_moment)
        if self.idle is not None:
            moments.append(self.idle.next_look)
        return max(0.0, min(moments) - time.monotonic()) if len(moments) > 1 else _TURN

    def _keep_house(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            _, _, channel = heapq.heappop(self._timers)
            if channel._fileno is None:  # noqa: SLF001 - waitress' own name; closed meanwhile
                continue
            if channel.half_closed:
                channel.linger(now)
            else:
                self.consider(channel)
        if self._full and now >= self._pause_until and self.connections < self._limit:
            self._full = False
            log.info("accepting connections again")
            self.accept(on=True)
        if now >= self._next_reaping:
            self._reap(now)
        if self._drain is not None:
            self._drain.advance(now)
        if self.idle is not None and now >= self.idle.next_look:
            self.idle.look(now)

    def _reap(self, now: float) -> None:
        """Close connections that were idle for too long, as waitress' maintenance does, accepting or not.

        Clients that stopped reading, too: waitress would let them keep the worker that waits for them for ever.
        And those that take longer than `patience` over a request.
        """
        for acceptor in self.acceptors:
            shortest = min(acceptor.adj.channel_timeout, self.patience)
            self._next_reaping = now + min(acceptor.adj.cleanup_interval, shortest / _LOOKS)
            cutoff = now - acceptor.adj.channel_timeout
            for channel in list(acceptor.active_channels.values()):
                slow = not channel.requests and now - channel.grace_from > self.patience
                if slow or channel.stalled(cutoff):
                    if channel.requests:
                        seconds = acceptor.adj.channel_timeout
                        log.warning(f"{channel.requests[0].snapshot()}: its client read nothing for {seconds}s: closed")
                    channel.handle_close()

    @property
    def full(self) -> bool:
        """Whether there are as many connections as there may be; then accepting pauses until there are fewer."""
        if not self._full and self.connections >= self._limit:
            self._full = True
            log.warning(f"{self._limit} connections are open, the most there may be; new ones wait")
            self.accept(on=False)
        return self._full

    def out_of_files(self, error: OSError) -> None:
        """Stop accepting for a moment: the process or the machine has no more files to give."""
        if not self._full:
            log.error(f"cannot accept connections: {error.strerror}; new ones wait")
        self._full, self._pause_until = True, time.monotonic() + _FILES_PAUSE
        self.accept(on=False)

    def channels(self) -> Iterator[Channel]:
        """All open connections, those of probes too."""
        for acceptor in self.acceptors:
            yield from list(acceptor.active_channels.values())
        yield from list(self.probes.values())

    def at(self, moment: float, channel: Channel) -> None:
        """Look at a connection again at a time.monotonic() moment."""
        heapq.heappush(self._timers, (moment, next(self._timer_ids), channel))

    def attach(self, sock: Any, *, here: bool = False) -> None:
        """Serve a connection that came through no listener, such as a probe's; it is in no count and no log.

        With `here` the loop itself answers it, and no worker.
        """
        acceptor = self.acceptors[0]
        sock.setblocking(False)
        Probe(acceptor, sock, ("probe", None), acceptor.adj, map=self.poller).here = here

    def watch_idle(self, after: float | None, ignore: Sequence[str], on_idle: Callable[[], None]) -> None:
        """Watch for idleness, see `IdleWatch`; None for never. A new watch goes on where the one before was."""
        before = self.idle
        if after is None:
            self.idle = None
        else:
            self.idle = IdleWatch(self, after, ignore, on_idle)
            if before is not None:
                self.idle.used = before.used

    # --- drain ----------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Go on accepting, but let each response close its connection."""
        self.closing = True

    def begin_drain(
        self, begins: float, deadline: float, over: Callable[[DrainReport], object], counted_from: tuple[int, int]
    ) -> None:
        """Stop accepting and finish what is in hand; `over` is called once, when that is done or the deadline came.

        `begins` and `deadline` are time.monotonic() moments; until it begins it is announced. `counted_from` is how
        many requests had been completed and rejected when the account began.
        """
        self.closing = True
        self._drain = Draining(self, begins, deadline, over, counted_from)
        self._drain.advance(time.monotonic())

    def drain_began(self) -> None:
        """From now on connections are let go of."""
        self.drains = True
        self.draining.set()
        tell_of_ends(self.wake)

    @property
    def streams(self) -> list[Channel]:
        """The connections on which a response without an end of its own is being sent."""
        return list(self._streams)

    def hasten_drain(self, deadline: float) -> None:
        """Bring the begin of the drain under way forward to now, and its deadline to `deadline`."""
        if self._drain is not None:
            self._drain.hasten(deadline)

    def drain_over(self) -> None:
        """Forget the drain: it has reported, or was undone."""
        self._drain = None
        self.refusing = False
        tell_no_more(self.wake)

    def refuse(self, *, on: bool) -> None:
        """Answer 503 on the listeners that others share, or leave them alone again."""
        self.refusing = on
        for acceptor in self.acceptors:
            if acceptor.accepting and acceptor.listener.shared:
                self.poller.listen(acceptor, on=on)

    def pass_the_gate(self) -> None:
        """Let in whose handshake was under way when a drain began, if that is not over yet."""
        if self._drain is not None:
            self._drain.pass_the_gate()

    def close_gates(self) -> None:
        """Deal with listeners that became ours alone after a drain began."""
        if self._drain is not None:
            self._drain.close_gates()
        elif self.drains:  # it is over, and what waited was answered: only nobody new may come
            for acceptor in self.acceptors:
                if acceptor.accepting and not acceptor.listener.shared and not acceptor.listener.gate():
                    acceptor.close_listener()

    def close_listeners(self) -> None:
        """Close the listeners that are ours alone."""
        for acceptor in self.acceptors:
            if not acceptor.listener.shared:
                acceptor.close_listener()

    def resume(self, listeners: Sequence[Listener]) -> None:
        """Accept again, from listeners that stand where the closed ones stood; shared ones were never closed."""
        self.drain_over()
        self.closing = self.drains = self.refusing = False
        if self.idle is not None:
            self.idle.restart()
        self.draining.clear()
        self._listeners = list(listeners)
        for acceptor, listener in zip(self.acceptors, listeners, strict=True):
            if not acceptor.listener.shared:
                acceptor.reopen(listener)
        self.accept(on=True)
        with self._lock:
            # A worker that still runs a request that was cut is missing from the pool.
            self._replenish()

    def consider(self, channel: Channel) -> None:
        """While draining: half-close a connection with nothing in hand, once its grace is over."""
        if not self.drains or channel.internal or channel.half_closed or not channel.idle:
            return
        if channel in self._streams or unread(channel.socket):
            return
        left = channel.grace_left
        if left <= 0:
            channel.half_close()
        else:
            self.at(time.monotonic() + left, channel)

    def end_streams_in_time(self, channels: Sequence[Channel]) -> None:
        """End these streams when their grace, counted from the begin of the drain, is over."""
        if self._drain is not None:
            self._drain.end_streams(channels)

    def cut_all(self, reason: str, *, but: Callable[[Channel], bool] = lambda _: False) -> None:
        """Break off whatever is in hand on all connections `but` some, and close them."""
        channels = [channel for channel in self.channels() if not channel.internal and not but(channel)]
        arriving = [channel.arriving for channel in channels]
        in_hand = [request for request in list(self._in_hand.values()) if not but(request.channel)]
        # A worker may be reading: what still arrived a moment ago may be in hand by now, or over.
        for request in dict.fromkeys([*in_hand, *filter(None, arriving)]):
            self.cut_one(request, reason)
        for channel in channels:
            channel.handle_close()

    def cut_one(self, request: Request, reason: str) -> None:
        """Count a request as cut, and name it in the log and in a drain's account, unless it is over (any thread)."""
        cut = request.cut(reason)
        if request.id:
            if not self.retire(request, "cut", cut):
                return
        elif self._drain is not None:  # it has not come whole, and so was never in flight
            self._drain.cut.append(cut)
        log.warning("\n".join(filter(None, [f"cut {cut}", cut.stack])), extra={"fields": cut.as_json()})
        if cut.phase == "running":
            self.lost_thread(request)

    def forget(self) -> None:
        """Close all sockets, and nothing else: in a forked child they are not ours."""
        for channel in self.channels():
            channel.socket.close()
        for acceptor in self.acceptors:
            acceptor.listener.socket.close()
        self.poller.close()

    # --- the end, in the thread that ends it --------------------------------------------------------------------

    def end(self) -> None:
        """Leave `run` at the next turn (any thread)."""
        self._ending = True
        self.wake()

    def close(self, timeout: float) -> list[threading.Thread]:
        """Join the workers, then close everything; returns the workers that did not end within `timeout` seconds.

        While a worker lives, the trigger stays open: it would write to a closed and perhaps reused descriptor.
        """
        stuck = self.workers.join(timeout)
        if stuck:
            self.workers.when_the_last_ends(self._release)
        else:
            self._release()
        for acceptor in self.acceptors:
            acceptor.listener.close()
        return stuck

    def _release(self) -> None:
        """Give all descriptors back, once nobody writes to them any more."""
        with self._lock:
            self._closed = True
        for channel in self.channels():
            channel.handle_close()  # waitress' own close would leave what waits in temporary files
        wasyncore.close_all(self.poller)
        for acceptor in self.acceptors:
            acceptor.trigger.close()
        self.poller.close()


__all__ = ["Acceptor", "EventLoop"]
