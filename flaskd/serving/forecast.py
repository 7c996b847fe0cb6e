"""The plan of a stop at this moment: the policies, functions that the app registered, and what it was found to hold."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from flaskd.cleanup import (
    DiscoveryRun,
    Found,
    Frame,
    Plan,
    names,
    overview,
    pause_all,
    resume_all,
    with_callbacks,
    with_found,
)
from flaskd.config import CleanupConfig, Config
from flaskd.process.exit import at_exit

if TYPE_CHECKING:
    from flask import Flask

    from flaskd.serving.loading import LoadedApp

log = logging.getLogger("flaskd.forecast")

_LOOK_AROUND = 1.0
"""Most seconds that a question for the plan waits for the search of what the app holds."""


class Forecast:
    """Kept up to date while the daemon serves; a stop takes `plan` and `discovery` from it."""

    def __init__(self, *, leaves: bool = False) -> None:
        self._leaves = leaves  # whether the process ends with the stop
        self.policies = Plan()
        """The policies of the configuration."""
        self._cleanup = Config.model_validate({}).cleanup
        self._loaded: LoadedApp | None = None
        self._discovery: DiscoveryRun | None = None
        self._paused: list[Any] = []
        self._told: set[str] = set()  # warnings that were logged: `plan` is read again and again

    def set(self, policies: Plan, cleanup: CleanupConfig, app: LoadedApp) -> None:
        """Set what a start or a reload has prepared."""
        self.policies, self._cleanup, self._loaded = policies, cleanup, app

    @property
    def _app(self) -> Flask | None:
        return self._loaded.flask if self._loaded is not None else None

    @property
    def plan(self) -> Plan:
        """The policies, and the functions that the app has registered so far; if that fails, the policies alone."""
        try:
            timeout = self._cleanup.defaults.timeout
            return with_callbacks(self.policies, self._app, timeout=timeout, told=self._told)
        except BaseException:  # whatever the app has registered, a stop must go on
            log.exception("cannot plan all of the cleanup: the policies alone are run")
            return self.policies

    def look_around(self) -> None:
        """Begin to find out what the app holds, in another thread, which logs it."""
        self._discovery = DiscoveryRun(self._app, _tell) if self._wanted("auto", "report") else None

    @property
    def discovery(self) -> DiscoveryRun | None:
        """The search whose results a stop adds to its plan; None if found objects are not to be closed."""
        return (self._discovery or DiscoveryRun(self._app)) if self._wanted("auto") else None

    def pause_schedulers(self) -> None:
        """Pause the schedulers that a stop would end, until `resume_schedulers`; may wait.

        The two methods must not run at the same time.
        """
        if "apscheduler" in sys.modules:  # without it there are no schedulers, and a search takes time
            run = DiscoveryRun(self._app) if self._wanted("auto") else None
            found = run.found(_LOOK_AROUND) if run is not None else None
            if found is None and self._discovery is not None:
                found = self._discovery.found()
            pause_all(with_found(self.policies, found or (), self._cleanup).steps, self._paused)

    def resume_schedulers(self) -> None:
        """Let the paused schedulers go on."""
        paused, self._paused = self._paused, []
        resume_all(paused)

    def _wanted(self, *modes: str) -> bool:
        """Whether to find out what the app holds: for discovery in one of these modes, or for a policy."""
        return self._cleanup.discovery.mode in modes or any(each.takes for each in self.policies.steps)

    def steps(self, plan: Plan) -> list[dict[str, Any]]:
        """The steps of a plan, with steps for objects that are known already; does not search."""
        found = self._discovery.found() if self._discovery is not None else None
        return with_found(plan, found or (), self._cleanup).describe()

    def overview(self, config: Config, *, fresh: bool) -> dict[str, Any]:
        """The plan at this moment, for programs and for people (`flaskd.cleanup.overview`).

        With `fresh`, the app's objects are searched again if the last search is old.
        """
        discovery = self._discovery
        found = () if discovery is None else discovery.found(_LOOK_AROUND)
        if discovery is not None and discovery.stale and fresh:
            self._discovery = DiscoveryRun(self._app)
            anew = self._discovery.found(_LOOK_AROUND)
            found = found if anew is None else anew
        plan = with_found(self.plan, found or (), config.cleanup)
        left = [each.name for each in plan.left if each.use == "executor.stop"]
        waits_for = [*left, *at_exit()] if self._leaves else []
        answer = {"discovery": config.cleanup.discovery.mode, **overview(plan, Frame.of(config), waits_for)}
        if found is None:
            answer["text"] += "\nwhat the app holds is not known yet"
        return answer


def _tell(found: tuple[Found, ...]) -> None:
    if found:
        kinds: dict[str, list[Found]] = {}
        for each in found:
            kinds.setdefault(each.use or each.kind, []).append(each)
        log.info(f"the app holds {'; '.join(f'{names(each)} ({kind})' for kind, each in kinds.items())}")
