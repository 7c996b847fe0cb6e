"""Workers are asked for: another number of them, or new ones in the place of those that there are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from flaskd import notices
from flaskd.errors import AppError, FlaskdError, NotNowError
from flaskd.inbox import Asked, RestartAsked, ScaleAsked
from flaskd.lifecycle import Lifecycle, State
from flaskd.notices import Notices, Refused
from flaskd.protocol import Reply
from flaskd.serving.api import Outcome, Serving, WorkersStart

log = logging.getLogger("flaskd.daemon")


class Workforce:
    """What people ask of the workers of one daemon, in the thread of its events."""

    def __init__(self, serving: Callable[[], Serving], lifecycle: Lifecycle, notices: Notices) -> None:
        self._serving, self._lifecycle, self._notices = serving, lifecycle, notices
        self.waiters: list[Reply] = []
        """Who waits for workers to be ready."""

    def scale(self, event: ScaleAsked) -> None:
        """Have so many workers."""
        if self._may(event, "scale", {State.READY, State.RELOADING, State.DRAINING, State.DRAINED}):
            log.info(f"scaling to {event.count} workers")
            self._serving().scale(event.count, self._told(event, "scaled", {"workers": event.count}))

    def restart(self, event: RestartAsked) -> None:
        """Replace workers."""
        if self._may(event, "restart", {State.READY}):
            fields = {} if event.slot is None else {"slot": event.slot}
            self._serving().restart(event.slot, self._told(event, "restarted", fields))

    def starts(self, event: WorkersStart, others: Sequence[Reply]) -> None:
        """Tell who waits for workers that are being started: the service manager, and people; `others` wait, too."""
        self._notices.tell(notices.WorkersStart(self._lifecycle.state))
        for reply in (*others, *self.waiters):
            reply.progress({"starting": event.count, "age": round(event.age, 1), "left": round(event.left, 1)})

    def trouble_changed(self, status: str) -> None:
        """Tell the service manager what is not as it should be, unless it hears of other things just now."""
        if self._lifecycle.state is State.READY:
            self._notices.tell(notices.StatusChanged(status))

    def _may(self, event: Asked, what: str, states: set[State]) -> bool:
        state, why = self._lifecycle.state, ""
        if not self._serving().renews:
            why = "there are no workers (server.workers is 0): the app runs in the daemon itself"
        elif state not in states:
            why = f"flaskd is {state}"
        if why:
            error = NotNowError(f"cannot {what}: {why}")
            self._notices.tell(Refused(str(error)))
            event.reply.error(error.code, str(error))
        return not why

    def _told(self, event: Asked, word: str, fields: dict[str, Any]) -> Outcome:
        reply = event.reply
        self.waiters.append(reply)

        def tell(error: FlaskdError | None) -> None:
            self.waiters = [each for each in self.waiters if each is not reply]
            if error is None:
                reply.ok(word, fields)
            else:
                trace = f"\n{error.traceback_text}".rstrip() if isinstance(error, AppError) else ""
                reply.error(error.code, f"{error}{trace}")

        return tell
