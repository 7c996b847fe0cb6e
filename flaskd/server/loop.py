"""The event loop: flaskd runs waitress' channels in a loop of its own, which can be drained and watched.

"The loop's thread" is the thread that leads at the moment (`flaskd.server.threads`): one at a time, but not always the
same one. All methods run there, except those that say "any thread".
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments

from flaskd.background_work import background_work, tell_no_more, tell_of_ends
from flaskd.errors import NotNowError
from flaskd.ledger import DrainReport
from flaskd.server.acceptor import make_acceptor
from flaskd.server.admission import Admission
from flaskd.server.board import Board
from flaskd.server.connections import Connections
from flaskd.server.context import Context
from flaskd.server.draining import Draining
from flaskd.server.idle import IdleWatch
from flaskd.server.limit_watch import LimitWatch
from flaskd.server.limits import Limits
from flaskd.server.request import Connection
from flaskd.server.threads import Task
from flaskd.server.timers import NEVER
from flaskd.sockets import Listener

log = logging.getLogger("flaskd.server")

_TURN = 1.0
"""Most seconds for which the loop waits when nothing happens."""
_PARDON = 1.0
"""Seconds after an error within which a second error ends the loop."""


class EventLoop:
    """Serves an app on listeners with a pool of threads; `adjustments` are arguments of waitress' `Adjustments`."""

    def __init__(
        self,
        app: Callable[..., Any],
        listeners: Sequence[Listener],
        *,
        threads: int,
        adjustments: Mapping[str, Any],
        board: Board | None = None,
    ) -> None:
        self.context = Context(app, threads, board)
        self.context.on_stream = self._end_stream_in_time
        self.account = self.context.account
        self.connections = Connections(self.context)
        self.admission = Admission(self.connections)
        self.idle: IdleWatch | None = None
        self._limit_watch: LimitWatch | None = None
        self.turned = threading.Event()
        self.ended = threading.Event()
        """Set once the loop has ended: it was told to, or failed."""
        self.last_turn = time.monotonic()
        """The time.monotonic() moment at which the loop last turned; a loop that is well turns every second."""
        self.error: BaseException | None = None
        """The error that ended the loop."""
        self.on_death: Callable[[BaseException], None] = lambda _: None
        """Called with `error` in the thread that led, when the loop has failed."""
        self._app = app
        self._listeners = list(listeners)
        self._adjustments = adjustments
        self._drain: Draining | None = None
        self._failed_at, self._attended = -_PARDON, self.last_turn
        self._board = board
        self._next_noting = self._next_due = 0.0

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the loop's thread, soon (any thread)."""
        self.context.call(function)

    def open(self, *, accepting: bool = True) -> None:
        """Make waitress' server objects for the listeners, and begin to accept if `accepting`; before `start`."""
        context = self.context
        # Waitress looks up `listen`, which flaskd does not use; for "*" it needs no codec for host names.
        adjustments = Adjustments(**{"listen": "*:0", "threads": context.pool.size, **self._adjustments})
        self.admission.limit = adjustments.connection_limit
        context.ident, context.url_prefix = adjustments.ident or "", adjustments.url_prefix
        for listener in self._listeners:
            context.acceptors.append(make_acceptor(self.admission, listener, self._app, adjustments))
        self.admission.held = not accepting
        self.admission.accept(on=accepting)
        self.admission.share()

    def start(self, name: str) -> None:
        """Start the threads; `name` is the name of the only thread, where the loop runs the app itself."""
        self.context.pool.start(self._lead, self.context.wake, name)

    @property
    def alive(self) -> bool:
        """Whether the loop was started and has not ended (any thread)."""
        return self.context.pool.leader is not None and not self.ended.is_set()

    def _lead(self) -> Task | None:
        """Turn the loop until a request can be run, and return its task; None when this thread is to end.

        A second error within `_PARDON` seconds ends the loop, and is stored in `error`. A first one is only logged: the
        app may have caused it, as it can raise errors in any thread (PyThreadState_SetAsyncExc).
        """
        while True:
            try:
                if (task := self._turn_until_task()) is not None:
                    return task
            except BaseException as error:
                now, before = time.monotonic(), self._failed_at
                self._failed_at = now
                if now - before >= _PARDON:
                    log.exception("the serving thread failed, and goes on")
                    continue
                self.error = error
                log.critical("the serving thread died", exc_info=True)
                self.context.pool.end()
            if self.context.pool.ending and not self.ended.is_set():
                self.ended.set()
                if self.error is not None:
                    self.turned.set()
                    self.on_death(self.error)
            return None

    def _turn_until_task(self) -> Task | None:
        pool, poller, queue = self.context.pool, self.context.poller, self.context.pool.queue
        task: Task | None
        while not pool.ending:
            if queue and (task := pool.take()) is not None:
                return task
            if poller.events:
                task = poller.handle()
                if task is not None:
                    return task
                continue
            if pool.surplus:
                return None
            patience = self._attend()
            if queue and (task := pool.take()) is not None:
                return task
            poller.wait(patience)
            self.last_turn = now = time.monotonic()
            if self._board is not None:
                self._board.turned(now)
            if not self.turned.is_set():
                self.turned.set()
        return None

    def _attend(self) -> float:
        """Run what is due: calls, answers, and all that depends on time; returns the seconds until more is due."""
        context = self.context
        if context.calls or context.answers:
            context.run_calls()
            context.answer()
            self._next_due = 0.0  # whatever they changed
        now = time.monotonic()
        before, self._attended = self._attended, now
        due = min(self._next_due, context.timers.next_moment)
        if now < due and not self.admission.paused:
            return due - now
        self._run_timed(now, before)
        patience = self._patience()
        # Where requests and connections decide when something is due, each turn has to look.
        each_turn = self._drain or self.idle or self.admission.aside
        self._next_due = 0.0 if each_turn else now + patience
        return patience

    def _patience(self) -> float:
        watches = (self.context.timers, self._drain, self.idle, self._limit_watch, self.admission.aside)
        moment: float = min(each.next_moment for each in watches if each is not None)
        return _TURN if moment == NEVER else max(0.0, min(moment, self.last_turn + _TURN) - time.monotonic())

    def _run_timed(self, now: float, before: float) -> None:
        if now >= self.context.timers.next_moment:
            self.context.timers.run(now)
        if self.admission.paused:
            self.admission.look_for_room(now)
        if now >= self.connections.next_reaping:
            self.connections.reap(now)
        if self._drain is not None:
            self._drain.advance(now)
        if self.idle is not None and now >= self.idle.next_moment:
            self.idle.look(now)
        if self._limit_watch is not None and now >= self._limit_watch.next_moment:
            self._limit_watch.look(now, before)
        if self._board is not None and now >= self._next_noting:
            self._note(self._board, now)
        if self.admission.aside is not None and not self.context.drains:
            self.admission.aside.look(now)

    def _note(self, board: Board, now: float) -> None:
        """Write to the board, once a second, what would cost too much at each change."""
        self._next_noting = now + _TURN
        moved, stuck_at, lost = self.connections.moved(), self.account.all_are_at(), len(self.context.pool.lost)
        board.look(moved=moved, stuck_at=stuck_at, background=len(background_work()), lost=lost)

    def limit(self, limits: Limits) -> None:
        """Enforce these limits from now on."""
        self.context.limits = limits
        self.connections.next_reaping = 0.0
        self._limit_watch = LimitWatch(self.connections, limits) if limits.shortest < NEVER else None

    def watch_idle(self, after: float | None, ignore: Sequence[str], on_idle: Callable[[], None] | None) -> None:
        """Watch for idleness (`IdleWatch`); `after` None: do not. A new watch continues the count of the old one."""
        before, watch = self.idle, None
        if after is not None:
            watch = IdleWatch(self.connections, after, ignore, on_idle)
            watch.go_on(before)
        self.idle = watch
        self.account.on_end = self.account.on_come = watch.note if watch is not None else None

    # --- drain ----------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Go on accepting, but close each connection after its next response."""
        self.context.closing = True

    def begin_drain(
        self, begins: float, deadline: float, over: Callable[[DrainReport], object], counted_from: tuple[int, int]
    ) -> None:
        """Begin a drain at `begins`, announced until then; call `over` once, when it is done or the deadline came.

        `begins` and `deadline` are time.monotonic() moments. `counted_from` is how many requests had been completed
        and rejected when the drain's account began.
        """

        def reported(report: DrainReport) -> None:
            self._drain_over()
            over(report)

        self.context.closing = True
        self._drain = Draining(
            self.admission, begins, deadline, began=self._drain_began, over=reported, counted_from=counted_from
        )
        self.account.cut_in_drain = self._drain.cut
        self._drain.advance(time.monotonic())

    def _drain_began(self) -> list[Connection]:
        """Let idle connections close from now on, and tell streams and background work; returns the open streams."""
        self.context.drains = True
        if self.admission.aside is not None:
            self.admission.aside.end()
        self.context.draining.set()
        tell_of_ends(self.context.wake)
        return list(self.account.streams)

    def hasten_drain(self, deadline: float) -> None:
        """Let the drain under way begin now, and end at `deadline`, a time.monotonic() moment, at the latest."""
        if self._drain is not None:
            self._drain.hasten(deadline)

    def end_announce(self) -> None:
        """Let the drain under way begin now, if it is still announced."""
        if self._drain is not None:
            self._drain.hasten(self._drain.deadline)

    def undo_announce(self) -> None:
        """Cancel a drain that is still announced, and serve as before."""
        self._drain_over()
        self.context.closing = False

    def _drain_over(self) -> None:
        """Forget the drain, which has ended or was undone."""
        self._drain = self.account.cut_in_drain = None
        self.context.refusing = False
        tell_no_more(self.context.wake)

    def _end_stream_in_time(self, channel: Connection) -> None:
        if self._drain is not None:
            self._drain.end_streams([channel])

    def close_listeners(self) -> None:
        """During or after a drain, close the listeners that are not shared; accept connections at the gate first."""
        if not self.context.drains:
            raise NotNowError("cannot close the listeners: no drain has begun")
        if self._drain is not None:
            with self.admission.beyond_the_limit():
                self._drain.pass_the_gate()
        self.admission.close_listeners()

    def close_gates(self) -> None:
        """Close the gates of listeners that other processes have stopped sharing since a drain began."""
        if self._drain is not None:
            self._drain.close_gates()
        elif self.context.drains:
            self.admission.close_gates()

    def resume(self, listeners: Sequence[Listener]) -> None:
        """Accept again, from new listeners in the order of the closed ones; shared ones were never closed."""
        self._drain_over()
        self.context.closing = self.context.drains = False
        if self.idle is not None:
            self.idle.restart()
        self.context.draining.clear()
        self.admission.reopen(listeners)
        self.admission.share()
        self.context.pool.replenish()  # replaces a thread that still runs a cut request

    # --- the end, in the thread that ends all ---------------------------------------------------------------------

    def end(self) -> None:
        """Stop turning, and let the threads end (any thread)."""
        self.context.pool.end()

    def close(self, timeout: float) -> list[threading.Thread]:
        """Join the threads, then close everything; returns the threads that did not end within `timeout` seconds.

        The trigger stays open until the last of them ends: the thread would write to a descriptor that may belong to
        another file by then.
        """
        pool = self.context.pool
        stuck = pool.join(timeout)
        if stuck:
            pool.when_the_last_ends(self._release)
        else:
            self._release()
        for acceptor in self.context.acceptors:
            acceptor.listener.close()
        return stuck

    def _release(self) -> None:
        """Close all descriptors; by now no thread writes to them."""
        self.context.close()
        for channel in self.connections.channels():
            channel.handle_close()  # waitress' close_all would leave temporary files of unsent output open
        wasyncore.close_all(self.context.poller)
        for acceptor in self.context.acceptors:
            acceptor.trigger.close()
        self.context.poller.close()

    def forget(self) -> None:
        """In a forked child, close its copies of all sockets, and nothing else."""
        self.connections.forget()
        for acceptor in self.context.acceptors:
            acceptor.listener.socket.close()
        self.context.poller.close()
