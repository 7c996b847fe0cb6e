"""The start of the first generation of workers: whether the service is ready, or cannot become so."""

from __future__ import annotations

from collections.abc import Callable

from flaskd.errors import AppError, FlaskdError
from flaskd.pool.crew import Crew
from flaskd.pool.deaths import tell_failure
from flaskd.serving.api import Failed, Ready, ServingEvent

_TOLD_AFTER = 1.0
"""Seconds past the time of the start in which workers that are late tell their stacks, and end."""


class Beginning:
    """In the thread of the daemon's events. Posts Ready or Failed, once."""

    def __init__(self, crew: Crew, post: Callable[[ServingEvent], None]) -> None:
        self._crew, self._post = crew, post
        self._error: FlaskdError | None = None
        """The first one that kept a worker from being ready."""

    def begin(self) -> None:
        """Start the workers that the configuration in force wants."""
        config = self._crew.configuration.values
        self._crew.slots.scale(config.count_workers())
        self._crew.later(config.pool.start_timeout + _TOLD_AFTER, lambda: self.look(late=True))

    def look(self, *, late: bool = False) -> None:
        """Be ready when all of the first generation are, or time is over and one is; fail where none can be."""
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
        """A worker did not become ready; the first error is told where the start fails for it, or once it does not."""
        if self._crew.slots.proven:
            tell_failure(error)
        else:
            self._error = self._error or error
            self._crew.do(self.look)
