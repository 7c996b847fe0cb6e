"""The pipeline: the drain of a server, and its stop, which contains a drain.

The daemon, `ServerThread` and the shutdown endpoint of an app all drain and stop their server with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flaskd.background_work import in_background
from flaskd.cleanup import DiscoveryRun, Plan, Spare, StepResult, Times
from flaskd.config import CleanupConfig, ShutdownConfig
from flaskd.errors import described
from flaskd.lifecycle import StopReason
from flaskd.server import DRAIN_GUARD, Drain, Drainable
from flaskd.serving.stop import Stop

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger("flaskd.stop")


class Pipeline:
    """Drains a server, and stops it once (any thread).

    `drained` is called with each drain that is over, in the thread that found it out. With `waits_again`, a stop after
    a drain waits for the background work that is under way by then.
    """

    def __init__(
        self,
        server: Drainable,
        *,
        drained: Callable[[Drain], None] = lambda _: None,
        waits_again: bool = False,
        guard: float = DRAIN_GUARD,
    ) -> None:
        self.drain: Drain | None = None
        """The drain that was begun last; None if there was none, or it was undone."""
        self.stop: Stop | None = None
        """The stop, once it has begun."""
        self._server = server
        self._drained = drained
        self._waits_again = waits_again
        self._guard = guard
        self._lock = threading.RLock()

    def begin_drain(
        self,
        timeout: float,
        *,
        announce: float = 0.0,
        counted_from: tuple[int, int] | None = None,
        earlier: Drain | None = None,
    ) -> Drain:
        """Begin a drain, or shorten the one under way to `timeout` more seconds; returns it (see `Drain`)."""
        with self._lock:
            if self.drain is not None and earlier is None:
                self.drain.shorten(timeout)
                return self.drain
            drain = Drain(
                self._server,
                timeout,
                announce=announce,
                counted_from=counted_from,
                earlier=earlier,
                guard=self._guard,
                over=self._drained,
            ).begin()
            self.drain = drain  # set only now: a drain that could not begin does not count
            return drain

    def give_up(self, why: str) -> None:
        """End the drain, which is made if there is none: the server is dead, all requests in flight count as cut."""
        with self._lock:
            if self.drain is None:
                self.drain = Drain(self._server, 0, over=self._drained)
        self.drain.give_up(why)

    def undo_drain(self) -> None:
        """Forget the drain, because the server serves again; threads that wait for it get an error."""
        with self._lock:
            drain, self.drain = self.drain, None
        if drain is not None:
            drain.undo()

    def begin_stop(
        self,
        reason: StopReason,
        *,
        plan: Plan,
        app: Flask | None,
        shutdown: ShutdownConfig,
        cleanup: CleanupConfig,
        announce: float = 0.0,
        state: Path | None = None,
        discovery: DiscoveryRun | None = None,
        spare: Spare | None = None,
        on_step: Callable[[StepResult], None] | None = None,
        on_begin: Callable[[], None] | None = None,
        drain_began: Callable[[], None] = lambda: None,
        after_drain: Callable[[], None] = lambda: None,
        times: Times | None = None,
    ) -> Stop:
        """Make the stop; `Stop.run` carries it out, in a thread that may wait.

        Its drain is announced until `announce` seconds from now; its account begins now. `drain_began` is called when
        the drain has begun, or was over before; `on_begin` then, too, and when a step has begun.
        """
        counted = self._server.counted
        with self._lock:
            self.stop = Stop(
                reason,
                plan=plan,
                app=app,
                shutdown=shutdown,
                cleanup=cleanup,
                state=state,
                discovery=discovery,
                spare=spare,
                on_step=on_step,
                on_begin=on_begin,
                begin_drain=lambda: self._begin_last_drain(announce, counted, on_begin, drain_began),
                after_drain=after_drain,
                times=times,
            )
            return self.stop

    def _begin_last_drain(
        self,
        announce: float,
        counted_from: tuple[int, int],
        on_begin: Callable[[], None] | None,
        drain_began: Callable[[], None],
    ) -> Drain:
        """Begin the drain of a stop; if it cannot begin, requests in flight count as cut, and the error is logged."""
        try:
            return self._drain_to_stop(announce, counted_from)
        except BaseException as error:  # whatever was raised, the stop must go on
            log.exception("the drain cannot begin")
            self.give_up(f"the drain could not begin: {described(error)}")
            assert self.drain is not None
            return self.drain
        finally:
            drain_began()
            if on_begin is not None:
                on_begin()

    def hurry(self, *, others: float = 0.0) -> None:
        """End the drain now; all remaining cleanup has one second in total, and other processes have `others` more."""
        with self._lock:
            if self.stop is not None and not self.stop.hurried:
                self.stop.hurry(others=others)
                if self.drain is not None:
                    self.drain.shorten(0)

    def _drain_to_stop(self, announce: float, counted_from: tuple[int, int]) -> Drain:
        """The drain of a stop: a new one, or the one under way, limited to the stop's time, or the one that is over.

        If background work is under way after a drain, a new drain waits for it, and continues the earlier account.
        """
        with self._lock:
            assert self.stop is not None
            stop, drain = self.stop, self.drain
            if drain is None:
                left = 0.0 if stop.hurried else max(0.0, announce - stop.took)
                return self.begin_drain(stop.drain_time, announce=left, counted_from=counted_from)
            if self._waits_again and drain.report is not None and in_background() and not self._server.dead:
                return self.begin_drain(stop.drain_time, earlier=drain)
            drain.shorten(stop.drain_time)
            return drain
