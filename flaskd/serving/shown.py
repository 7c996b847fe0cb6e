"""What flaskd shows of an app that is served in this process; for any thread."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

from flaskd.background_work import background_work, on_one_line
from flaskd.cleanup import Frame, Plan, build_plan, overview
from flaskd.config import Config, Configuration
from flaskd.config.action_spec import Scope
from flaskd.ledger import InFlight
from flaskd.server import WaitressThread
from flaskd.serving.api import Outcome, ServingSnapshot
from flaskd.serving.code import source_files
from flaskd.serving.forecast import Forecast
from flaskd.serving.pipeline import Pipeline
from flaskd.serving.stop import Stop
from flaskd.slow_query import ASKED
from flaskd.stacks import stack_of


class Alone:
    """The methods of `Serving` that are about workers, for an app that is served without them."""

    renews = False
    may_resume = True

    def renew(self, configuration: Configuration, *, only_configuration: bool) -> None:
        """Never called: see `renews`."""
        raise NotImplementedError

    def break_off_renewal(self, why: str) -> None:
        """Do nothing: without workers there is no renewal."""

    def scale(self, count: int, told: Outcome) -> None:
        """Never called: see `renews`."""
        raise NotImplementedError

    def restart(self, number: int | None, told: Outcome) -> None:
        """Never called: see `renews`."""
        raise NotImplementedError

    def workers(self) -> list[dict[str, Any]]:
        """No workers."""
        return []

    def deaths(self) -> list[dict[str, Any]]:
        """No deaths of workers."""
        return []

    def set_log_level(self, level: str) -> None:
        """Do nothing: there are no workers."""


class Shown(Alone):
    """The part of `InProcess` that shows and changes nothing; `scope` says whose cleanup steps run in this process."""

    def __init__(self, forecast: Forecast, scope: Scope | None) -> None:
        self._forecast, self._scope = forecast, scope
        self._server: WaitressThread | None = None
        self._pipeline: Pipeline | None = None

    @property
    def in_flight(self) -> int:
        """How many requests are in flight."""
        return self._server.in_flight if self._server is not None else 0

    @property
    def silent_for(self) -> float:
        """Seconds since the serving thread last turned."""
        return self._server.silent_for if self._server is not None else 0.0

    @property
    def unready(self) -> str:
        """Why requests cannot be answered as they should: threads are missing; empty if none is."""
        short = self._server.short if self._server is not None else 0
        return f"{short} of its threads {'are' if short > 1 else 'is'} lost in requests that hang" if short else ""

    def snapshot(self) -> ServingSnapshot:
        """All figures at this moment."""
        server, stop = self._server, self._stop
        if server is None:
            return ServingSnapshot(background=background_work())
        in_flight = tuple(server.requests())
        return ServingSnapshot(
            in_flight=in_flight,
            background=background_work(),
            queued=server.queued,
            connections=server.connections,
            busy=len({each.thread for each in in_flight if each.thread}),
            tally=server.tally(),
            idle=server.idle,
            cleanup=stop.running if stop is not None else (),
            steps=stop.policies if stop is not None else {},
            trouble=self.unready,
        )

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """The requests in flight, oldest first."""
        return self._server.requests(stacks=stacks) if self._server is not None else []

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that still run a request that is over, and that request."""
        return self._server.left_behind() if self._server is not None else {}

    def threads(self, *, stacks: bool = False) -> list[dict[str, Any]]:
        """Each thread of this process, with its request; without the thread that asks this (`SlowQuery`)."""
        doing = {each.thread: str(each) for each in self.requests()}
        over = {each.name: f"{request}; it is over, its thread goes on" for each, request in self.left_behind().items()}
        return [
            {
                "name": on_one_line(thread.name),
                "id": thread.native_id,
                "daemon": thread.daemon,
                "request": over.get(thread.name) or doing.get(thread.name),
                **({"stack": stack_of(thread)} if stacks else {}),
            }
            for thread in threading.enumerate()
            if not thread.name.startswith(ASKED)
        ]

    def source_files(self) -> set[str]:
        """The app's own files that this process has imported."""
        return source_files()

    def plan(self, configuration: Configuration) -> dict[str, Any]:
        """The cleanup plan at this moment, with what the app holds."""
        config = configuration.values
        if self._server is not None:
            return self._forecast.overview(config, fresh=self._stop is None)
        answer = {"discovery": config.cleanup.discovery.mode, **overview(self._plan(config), Frame.of(config))}
        answer["text"] += "\nflaskd is starting: a stop would end it at once now, and run none of these"
        return answer

    def describe_stop(self) -> dict[str, Any]:
        """The answer of a shutdown endpoint: the stop to come or under way."""
        plan = self._stop.plan if self._stop is not None else self._forecast.plan
        return {"plan": plan.id, "steps": self._forecast.steps(plan), "in_flight": self.in_flight}

    def turns(self, timeout: float) -> bool:
        """Whether the serving thread turns within `timeout` seconds."""
        return self._running.turns(timeout)

    def answers(self, timeout: float) -> bool:
        """Whether the serving thread answers a request within `timeout` seconds."""
        return self._running.answers(timeout)

    def all_are_at(self) -> Hashable | None:
        """A value that stays the same while all threads are busy and none moves on; else None."""
        return self._running.all_are_at()

    def moved(self) -> Hashable:
        """A value that changes when any request moves on."""
        return self._server.moved() if self._server is not None else None

    @property
    def _running(self) -> WaitressThread:
        assert self._server is not None
        return self._server

    @property
    def _pipe(self) -> Pipeline:
        assert self._pipeline is not None
        return self._pipeline

    @property
    def _stop(self) -> Stop | None:
        return self._pipeline.stop if self._pipeline is not None else None

    def _plan(self, config: Config) -> Plan:
        return build_plan(config.cleanup, self._scope)
