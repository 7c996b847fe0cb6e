"""The stop of a daemon: from the first event that asks for it to its account."""

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
    """The stop of one daemon, in the events thread; the first reason is kept.

    `end_the_app` starts the time for the app's exit callbacks and threads, and makes ExitBegan and ExitOver be posted.
    It is None if the process goes on after the stop.
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
        """Whether the main thread hangs in the app's exit callbacks or threads, which were cut."""

    @property
    def begun(self) -> bool:
        """Whether the stop has begun."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """The reason; None before the stop has begun."""
        return str(self._reason) if self._reason is not None else None

    @property
    def left(self) -> float | None:
        """Seconds to the deadline; None before the stop has begun."""
        return self._serving.left if self.begun else None

    @property
    def waiters(self) -> list[Reply]:
        """The replies that wait for the end of the stop."""
        return self._waiters

    def begin(self, reason: StopReason, configuration: Configuration, *, overtaken: Callable[[], None]) -> None:
        """Begin the stop; it goes on even if telling of it fails."""
        deadline, drains = configuration.values.shutdown.deadline, self._serving.drain is None
        plan = self._serving.begin_stop(reason, configuration, self._holdings.state.writable)
        self._reason = reason
        open_files.share()
        began = StopBegan(reason, self._serving.in_flight, deadline, self._serving.left, plan, drains)
        for tell in (
            lambda: self._notices.tell(began),
            overtaken,
            self._serving.announce_stop,
            # In a thread, because a disk that hangs must not delay the stop.
            lambda: call_in_thread(lambda: self._holdings.state.stopping(str(reason))).close(0),
        ):
            try:
                tell()
            except BaseException:  # for example objects of the app
                log.exception("cannot report the stop to all")
        self._serving.run_stop()

    def join(self, event: StopAsked) -> None:
        """Reply to another request to stop, now or at the end; `now` shortens the stop."""
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
        """Tell the service manager how long the drain and the running steps may take, when one of them begins or ends.

        It tells nothing for a worker that is replaced while the service goes on.
        """
        if not self.begun:
            return
        takes = self._exit_left() if self._exit_left is not None else self._serving.step_left
        self._notices.tell(StepsTake(takes, self._serving.left))

    def step_ended(self, event: StepEnded) -> None:
        """Report a step's end to clients that wait, unless it is a step of a worker that is replaced."""
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
        """Let the app's exit callbacks and threads have their time; False if the process goes on after the stop."""
        if self._end_the_app is None:
            return False
        self._end_the_app()
        return True

    def exit_began(self, event: ExitBegan) -> None:
        """Ask the service manager for that time."""
        self._exit_left = event.left
        self.claim()

    @property
    def exit_waits_for(self) -> str:
        """What the exit of the process, or of workers, waits for, for people; empty if it has not begun."""
        ours = (", ".join(at_exit()) or "the app") if self._exit_left is not None else ""
        return self._serving.exit_waits_for or ours

    def exit_over(self, event: ExitOver) -> None:
        """Note and log what was cut at the exit."""
        self._unfinished, self.main_is_lost = event.unfinished, event.cut
        for each in event.unfinished:
            log.warning(f"cut at the exit: {each.name}\n{folded(each.stack)}".rstrip())

    def conclude(self) -> Account:
        """End the threads, and give the account."""
        self._holdings.close_endpoints(self._serving.left)
        self._holdings.tell_who_waits()
        return self._serving.end(self._unfinished)

    def tell_the_end(self, account: Account, *, failed: bool) -> None:
        """Send the notice and the replies about the end."""
        self._notices.tell(Stopped(account, failed))
        fields = {**account.report.as_json(), "policies": account.steps}
        for reply in self._waiters:
            reply.ok("stopped", fields, lines=account_lines(fields), hint=self._holdings.undone_by)
