"""The drains of a daemon: from the event that asks for one to its account, and the resume that undoes it."""

from __future__ import annotations

import time
from collections.abc import Callable

from flaskd.config import Configuration
from flaskd.errors import FlaskdError, NotNowError
from flaskd.holdings import Holdings
from flaskd.inbox import DrainAsked, Inbox, ResumeAsked, Tick
from flaskd.lifecycle import Event, Lifecycle, State
from flaskd.notices import DrainBegan, DrainEnded, Notices, Refused, Resumed
from flaskd.present import account_lines
from flaskd.protocol import Reply
from flaskd.reload import Reload
from flaskd.serving.api import Drained, Serving

_SOON = 0.01
"""Seconds between two tries to resume while the workers are not ready."""


class Drains:
    """The drains of one daemon, in the events thread; `status` is the line for people that says flaskd is ready."""

    def __init__(
        self,
        serving: Callable[[], Serving],
        holdings: Holdings,
        lifecycle: Lifecycle,
        notices: Notices,
        inbox: Inbox,
        *,
        reload: Reload,
        status: Callable[[], str],
    ) -> None:
        self._serving, self._holdings, self._lifecycle = serving, holdings, lifecycle
        self._notices, self._inbox, self._reload, self._status = notices, inbox, reload, status
        self.waiters: list[Reply] = []
        """The replies that wait for the end of the running drain."""
        self._resuming = False
        """Whether a resume waits for workers."""

    @property
    def left(self) -> float | None:
        """Seconds that the running drain may still take at most; None if there is none."""
        drain = self._serving().drain
        return drain.left if drain is not None and self._lifecycle.state is State.DRAINING else None

    def asked(self, event: DrainAsked, configuration: Configuration, tick: Callable[[], None]) -> None:
        """Begin a drain, or join the running one; `tick` begins to report its progress."""
        before, shutdown, serving = self._lifecycle.state, configuration.values.shutdown, self._serving()
        if self._resuming:  # the resume was asked for before
            self._inbox.post_at(time.monotonic() + _SOON, event)
            return
        try:
            state = self._lifecycle.handle(Event.DRAIN)
        except NotNowError as error:
            self.refuse(event.reply, error)
            return
        if before is State.RELOADING:
            self._reload.overtaken("drain")
        if before in {State.READY, State.RELOADING}:
            self._notices.tell(DrainBegan(serving.in_flight, shutdown.drain.timeout, event.by))
            drain = serving.begin_drain(shutdown.drain.timeout, announce=shutdown.announce)
            self._inbox.post_at(drain.looked_at, Tick())
            tick()
        present = serving.drain
        assert present is not None  # in both states a drain is there
        if event.wait and state is State.DRAINING:
            self.waiters.append(event.reply)
            event.reply.progress({"in_flight": serving.in_flight, "left": round(present.left, 1)})
        elif state is State.DRAINING:
            fields = {"in_flight": serving.in_flight, "deadline": round(present.left, 1)}
            event.reply.ok("draining", fields, hint="undo: resume")
        else:
            account = present.account()
            event.reply.ok("drained", account, lines=account_lines(account), hint="undo: resume")

    def refuse(self, reply: Reply, error: FlaskdError) -> None:
        """Reply that the present state does not allow what was asked for, and log it."""
        self._notices.tell(Refused(str(error)))
        reply.error(error.code, str(error))

    def over(self, event: Drained) -> State | None:
        """Reply to all that wait for the drain; gives the state after it, or None if a resume came first."""
        if event.drain is not self._serving().drain:
            return None
        report = event.drain.report
        assert report is not None
        state = self._lifecycle.handle(Event.DRAIN_OVER)
        self._notices.tell(DrainEnded(report, state))
        account = event.drain.account()
        for reply in self._take_waiters():
            reply.ok("drained", account, lines=account_lines(account))
        return state

    def _take_waiters(self) -> list[Reply]:
        waiters, self.waiters = self.waiters, []
        return waiters

    def resume_asked(self, event: ResumeAsked) -> None:
        """Undo a drain."""
        before, serving = self._lifecycle.state, self._serving()
        try:
            self._lifecycle.check(Event.RESUME)
            if before is not State.READY:
                self._resuming = not serving.may_resume
                if self._resuming:
                    self._inbox.post_at(time.monotonic() + _SOON, event)
                    return
                self._holdings.listeners[:] = serving.resume()
        except FlaskdError as error:
            self._resuming = False
            self.refuse(event.reply, error)
            return
        self._lifecycle.handle(Event.RESUME)
        for waiter in self._take_waiters():
            waiter.error("not-now", "the drain was undone by resume")
        self._notices.tell(Resumed(self._status(), before))
        event.reply.ok("ready")
