"""The start of the first generation of workers: whether the service is ready, or cannot become so."""

from __future__ import annotations

from collections.abc import Callable

from flaskd.errors import AppError, FlaskdError
from flaskd.pool.crew import Crew
from flaskd.pool.deaths import tell_failure
from flaskd.serving.api import Failed, Ready, ServingEvent

_TOLD_AFTER = 1.0
"""Seconds after `pool.start_timeout` in which late workers still write their stacks and end."""


class Beginning:
    """Posts Ready or Failed, once; all methods run in the thread of the daemon's events."""

    def __init__(self, crew: Crew, post: Callable[[ServingEvent], None]) -> None:
        self._crew, self._post = crew, post
        self._error: FlaskdError | None = None
        """The first error with which a worker did not become ready."""

    def begin(self) -> None:
        """Start the workers that the configuration in force wants."""
        config = self._crew.configuration.values
        self._crew.slots.scale(config.count_workers())
        self._crew.later(config.pool.start_timeout + _TOLD_AFTER, lambda: self.look(late=True))

    def look(self, *, late: bool = False) -> None:
        """Post Ready once all workers are ready, or one is when the time is over; post Failed if none can be ready."""
        crew, slots = self._crew, self._crew.slots
        if slots.proven and self._error is not None:
            tell_failure(self._error)
            self._error = None
        if not crew.starting:
            return
        serving = [each for each in slots if each.worker is not None]
        coming = [each for each in slots if each.coming is not None]
        if len(serving) == slots.wanted or (late and serving):
            crew.starting = False
            self._post(Ready())
        elif not serving and (late or (not coming and self._error is not None)):
            crew.starting = False
            crew.end()
            seconds = crew.configuration.values.pool.start_timeout
            late_error = AppError(f"cannot start: no worker is ready after {seconds:g}s (pool.start_timeout)")
            self._post(Failed(self._error or late_error))

    def not_filled(self, error: FlaskdError) -> None:
        """Note that a worker did not become ready: log the error, or keep the first one until the start is decided."""
        if self._crew.slots.proven:
            tell_failure(error)
        else:
            self._error = self._error or error
            self._crew.do(self.look)
