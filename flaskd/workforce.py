"""Changes of the workers that people ask for: another number of them, or new ones in place of the present ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from flaskd import notices
from flaskd.errors import FlaskdError, NotNowError
from flaskd.inbox import Asked, RestartAsked, ScaleAsked
from flaskd.lifecycle import Lifecycle, State
from flaskd.notices import Notices, Refused
from flaskd.protocol import Reply
from flaskd.serving.api import Outcome, Serving, WorkersStart

log = logging.getLogger("flaskd.daemon")


class Workforce:
    """Carries out what people ask of the workers of one daemon, in the events thread."""

    def __init__(self, serving: Callable[[], Serving], lifecycle: Lifecycle, notices: Notices) -> None:
        self._serving, self._lifecycle, self._notices = serving, lifecycle, notices
        self.waiters: list[Reply] = []
        """The replies that wait until workers are ready."""

    def scale(self, event: ScaleAsked) -> None:
        """Change the number of workers."""
        if self._may(event, "scale", {State.READY, State.RELOADING, State.DRAINING, State.DRAINED}):
            log.info(f"scaling to {event.count} workers")
            self._serving().scale(event.count, self._told(event, "scaled", {"workers": event.count}))

    def restart(self, event: RestartAsked) -> None:
        """Replace the worker of one slot, or all workers."""
        if self._may(event, "restart", {State.READY}):
            fields = {} if event.slot is None else {"slot": event.slot}
            self._serving().restart(event.slot, self._told(event, "restarted", fields))

    def starts(self, event: WorkersStart, others: Sequence[Reply]) -> None:
        """Tell the service manager and waiting clients that workers start; `others` are replies that wait as well."""
        self._notices.tell(notices.WorkersStart(self._lifecycle.state))
        for reply in (*others, *self.waiters):
            reply.progress({"starting": event.count, "age": round(event.age, 1), "left": round(event.left, 1)})

    def trouble_changed(self, status: str) -> None:
        """Tell the service manager what is wrong with the workers, unless it is being told of something else."""
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
                reply.error(error.code, error.whole)

        return tell
