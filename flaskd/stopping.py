"""A daemon's stop, from the first event that asks for it to the account of it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flaskd.cleanup import call_in_thread
from flaskd.config import Configuration
from flaskd.holdings import Holdings
from flaskd.inbox import ExitBegan, ExitOver, StopAsked
from flaskd.lifecycle import StopReason
from flaskd.notices import Notices, StepDone, StepsTake, StopBegan, Stopped
from flaskd.present import account_lines
from flaskd.process.descriptors import open_files
from flaskd.process.exit import Unfinished, at_exit
from flaskd.protocol import Reply
from flaskd.serving.api import Account, Serving, StepEnded
from flaskd.stacks import folded

log = logging.getLogger("flaskd.daemon")


class Stopping:
    """The stop of one daemon, in the thread of its events; the first reason wins, and is kept.

    `end_the_app` gives what the app has left to the end of the process its time, and has ExitBegan and ExitOver posted;
    None where the process goes on.
    """

    def __init__(
        self, serving: Serving, holdings: Holdings, notices: Notices, end_the_app: Callable[[], None] | None
    ) -> None:
        self._serving, self._holdings, self._notices = serving, holdings, notices
        self._end_the_app = end_the_app
        self._reason: StopReason | None = None
        self._waiters: list[Reply] = []
        self._exit_left: Callable[[], float] | None = None
        self._unfinished: tuple[Unfinished, ...] = ()
        self.main_is_lost = False
        """Whether the main thread is for good in what the app has left to the end of the process, and was cut."""

    @property
    def begun(self) -> bool:
        """Whether it has begun."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why; None before it has begun."""
        return str(self._reason) if self._reason is not None else None

    @property
    def left(self) -> float | None:
        """Seconds to its deadline; None before it has begun."""
        return self._serving.left if self.begun else None

    @property
    def waiters(self) -> list[Reply]:
        """Who waits for its end."""
        return self._waiters

    def begin(self, reason: StopReason, configuration: Configuration, *, overtaken: Callable[[], None]) -> None:
        """Begin it; whatever cannot be told, it goes on."""
        deadline, drains = configuration.values.shutdown.deadline, self._serving.drain is None
        plan = self._serving.begin_stop(reason, configuration, self._holdings.state.writable)
        self._reason = reason
        open_files.share()
        began = StopBegan(reason, self._serving.in_flight, deadline, self._serving.left, plan, drains)
        for tell in (
            lambda: self._notices.tell(began),
            overtaken,
            self._serving.announce_stop,
            # A disk that hangs must not keep the stop.
            lambda: call_in_thread(lambda: self._holdings.state.stopping(str(reason))).close(0),
        ):
            try:
                tell()
            except BaseException:  # an app's objects, say
                log.exception("cannot tell everybody of the stop")
        self._serving.run_stop()

    def join(self, event: StopAsked) -> None:
        """Answer who asks for it, now or at its end; a hurry cuts it short."""
        if event.now:
            self._serving.hurry()
        in_flight, left = self._serving.in_flight, round(self._serving.left, 1)
        if event.wait:
            self._waiters.append(event.reply)
            event.reply.progress({"in_flight": in_flight, "left": left})
        else:
            fields = {"in_flight": in_flight, "deadline": left}
            event.reply.ok("stopping", fields, hint=self._holdings.undone_by)

    def claim(self) -> None:
        """Tell the service manager what the drain and the steps under way may take: one of them began, or ended.

        Nothing where it is a worker's that is replaced, while the service goes on.
        """
        if not self.begun:
            return
        takes = self._exit_left() if self._exit_left is not None else self._serving.step_left
        self._notices.tell(StepsTake(takes, self._serving.left))

    def step_ended(self, event: StepEnded) -> None:
        """Tell who waits, unless it is a step of a worker that is replaced."""
        if not self.begun:
            return
        self.claim()
        result = event.result
        self._notices.tell(StepDone(result))
        fields = {"policy": result.name, "fate": str(result.fate), "took": round(result.took, 3)}
        if result.why:
            fields["why"] = result.why
        for reply in self._waiters:
            reply.progress(fields)

    def end_the_app(self) -> bool:
        """Let the app's part of the end of the process begin; False where the process goes on."""
        if self._end_the_app is None:
            return False
        self._end_the_app()
        return True

    def exit_began(self, event: ExitBegan) -> None:
        """Claim its time."""
        self._exit_left = event.left
        self.claim()

    @property
    def exit_waits_for(self) -> str:
        """What the end of the process, or of workers, waits for, for people; empty when it has not begun."""
        ours = (", ".join(at_exit()) or "the app") if self._exit_left is not None else ""
        return self._serving.exit_waits_for or ours

    def exit_over(self, event: ExitOver) -> None:
        """Note what was cut at the exit, and name it."""
        self._unfinished, self.main_is_lost = event.unfinished, event.cut
        for each in event.unfinished:
            log.warning(f"cut at the exit: {each.name}\n{folded(each.stack)}".rstrip())

    def conclude(self) -> Account:
        """End the threads, and give the account."""
        self._holdings.close_endpoints(self._serving.left)
        self._holdings.tell_who_waits()
        return self._serving.end(self._unfinished)

    def tell_the_end(self, account: Account, *, failed: bool) -> None:
        """Tell the world and who waits."""
        self._notices.tell(Stopped(account, failed))
        fields = {**account.report.as_json(), "policies": account.steps}
        for reply in self._waiters:
            reply.ok("stopped", fields, lines=account_lines(fields), hint=self._holdings.undone_by)
