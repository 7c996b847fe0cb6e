"""What a stop would do now: the policies, what the app registered in code, and what it was last found to hold."""

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
"""Seconds that a question for the plan waits to hear what the app holds."""


class Forecast:
    """Kept while the daemon serves; a stop takes its `plan` and its `discovery`, and goes on by itself."""

    def __init__(self, *, leaves: bool = False) -> None:
        self._leaves = leaves  # whether the process ends with the stop
        self.policies = Plan()
        """Those of the configuration."""
        self._cleanup = Config.model_validate({}).cleanup
        self._loaded: LoadedApp | None = None
        self._discovery: DiscoveryRun | None = None
        self._paused: list[Any] = []
        self._told: set[str] = set()  # the plan is asked for again and again

    def set(self, policies: Plan, cleanup: CleanupConfig, app: LoadedApp) -> None:
        """Take over what a start or a reload has prepared."""
        self.policies, self._cleanup, self._loaded = policies, cleanup, app

    @property
    def _app(self) -> Flask | None:
        return self._loaded.flask if self._loaded is not None else None

    @property
    def plan(self) -> Plan:
        """The policies, and what the app registered in code until now; without that where it cannot be planned."""
        try:
            timeout = self._cleanup.defaults.timeout
            return with_callbacks(self.policies, self._app, timeout=timeout, told=self._told)
        except BaseException:  # whatever the app has registered, a stop goes on
            log.exception("cannot plan all of the cleanup: the policies alone are run")
            return self.policies

    def look_around(self) -> None:
        """Find out what the app holds, beside the requests, and say so in the log."""
        self._discovery = DiscoveryRun(self._app, _tell) if self._wanted("auto", "report") else None

    @property
    def discovery(self) -> DiscoveryRun | None:
        """What a stop takes into its plan; None where nothing that is found is to be closed."""
        return (self._discovery or DiscoveryRun(self._app)) if self._wanted("auto") else None

    def pause_schedulers(self) -> None:
        """Pause the schedulers that a stop would end, until `resume_schedulers`; may take its time.

        One at a time with that.
        """
        if "apscheduler" in sys.modules:  # else there are none, and a search would take the interpreter's time
            run = DiscoveryRun(self._app) if self._wanted("auto") else None
            found = run.found(_LOOK_AROUND) if run is not None else None
            if found is None and self._discovery is not None:
                found = self._discovery.found()
            pause_all(with_found(self.policies, found or (), self._cleanup).steps, self._paused)

    def resume_schedulers(self) -> None:
        """Let those that were paused go on."""
        paused, self._paused = self._paused, []
        resume_all(paused)

    def _wanted(self, *modes: str) -> bool:
        """Whether anybody wants to know what the app holds: discovery in one of these modes, or a policy."""
        return self._cleanup.discovery.mode in modes or any(each.takes for each in self.policies.steps)

    def steps(self, plan: Plan) -> list[dict[str, Any]]:
        """The steps of a plan, with those for what is known to be held; asks nobody."""
        found = self._discovery.found() if self._discovery is not None else None
        return with_found(plan, found or (), self._cleanup).describe()

    def overview(self, config: Config, *, fresh: bool) -> dict[str, Any]:
        """The plan as it stands now, for programs and for people; with `fresh` what the app holds is looked for anew.

        See `flaskd.cleanup.overview`.
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
