"""What the supervisor shows of its workers, for any thread. Most is read from boards; some methods ask the workers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from flaskd.background_work import Background
from flaskd.cleanup import Frame, Plan, overview, with_service
from flaskd.config import Configuration
from flaskd.ledger import InFlight
from flaskd.pool.handle import Handle
from flaskd.pool.idleness import Idleness
from flaskd.pool.questions import Reply, Round
from flaskd.pool.sums import Sums, all_steps, requests_of
from flaskd.process.usage import cpu_seconds, pss
from flaskd.server import Drain
from flaskd.serving.api import ServingSnapshot
from flaskd.serving.pipeline import Pipeline

_PATIENCE = 1.0
"""Most seconds that a question waits for the answers of workers."""
_BEATS = 5.0
"""Seconds without a turn after which a worker's event loop counts as standing still."""


class View:
    """The part of `Pool` that shows workers and changes nothing."""

    def __init__(self, pipeline: Callable[[Sums], Pipeline]) -> None:
        self.sums = Sums()
        self._pipeline = pipeline(self.sums)
        self._policies = Plan()
        self.idleness: Idleness
        self.wanted: Callable[[], int] = lambda: 0
        """How many workers there should be."""
        self.templates: Callable[[], list[dict[str, Any]]] = list
        """The descriptions of the templates from which workers are forked."""
        self.stopped: Callable[[], list[Handle]] = list
        """The workers that have stopped with the service."""

    @property
    def target(self) -> str | None:
        """The name of the app, from a serving worker if there is one; None before any worker has loaded it."""
        those_that_serve_first = sorted(self.sums.alive, key=lambda each: not each.serves)
        return next((each.target for each in those_that_serve_first if each.target), None)

    @property
    def drain(self) -> Drain | None:
        """The drain under way, or the last one that was not undone."""
        return self._pipeline.drain

    @property
    def policies(self) -> Plan:
        """The service's plan of the configuration in force."""
        return self._policies

    @property
    def in_flight(self) -> int:
        """How many requests are in flight."""
        return len(self.sums.in_flight()) + self.sums.total("unnamed")

    @property
    def unready(self) -> str:
        """Why no request can be answered now; empty while one can."""
        return "" if any(each.serves for each in self.sums.alive) else "no worker is ready"

    @property
    def silent_for(self) -> float:
        """Seconds since any serving worker's event loop last turned; 0 if no worker serves."""
        return self.sums.silent_for

    def snapshot(self) -> ServingSnapshot:
        """All figures at this moment."""
        stop, sums = self._pipeline.stop, self.sums
        workers = sums.alive
        steps, running = all_steps(sorted([*self.stopped(), *workers], key=lambda each: each.slot)), []
        if stop is not None:
            steps |= stop.policies
            running = [f"{name} (worker {each.slot})" for each in workers for name in each.running] + [*stop.running]
        after, idle_for = self.idleness.after, sums.idle_for
        idle = None if after is None else (idle_for, max(0.0, after - idle_for))
        return ServingSnapshot(
            in_flight=tuple(sums.in_flight()),
            background=tuple(
                Background(f"in worker {each.slot}", 0.0, "") for each in workers for _ in range(each.board.background)
            ),
            queued=sums.total("queued"),
            connections=sums.total("connections"),
            busy=sums.total("busy"),
            tally=sums.tally(),
            idle=idle,
            cleanup=tuple(running),
            steps=steps,
            workers=tuple(self.sums.workers()),
            wanted=self.wanted(),
            deaths=self.sums.died,
            cut_by_deaths=self.sums.lost,
            recycled=dict(self.sums.recycled),
            trouble=self.sums.trouble,
        )

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """The requests in flight, oldest first; for `stacks` the workers are asked, and have a second to answer.

        If a worker does not answer, its requests come from its board, with the error in the place of the stack.
        """
        found = self.sums.in_flight()
        if not stacks or not found:
            return found
        found = []
        for reply in self._ask("requests", stacks=True):
            if reply.error is None:
                found += reply.value
            else:
                found += [replace(each, stack=str(reply.error)) for each in requests_of(reply.worker)]
        return sorted(found, key=lambda each: -each.age)

    def threads(self, *, stacks: bool = False) -> list[dict[str, Any]]:
        """The threads of all workers; for a worker that does not answer within a second, one entry that says so."""
        found: list[dict[str, Any]] = []
        for reply in self._ask("threads", stacks=stacks):
            if reply.error is not None:
                slot = reply.worker.slot
                found.append({"name": str(reply.error), "id": None, "daemon": False, "request": None, "worker": slot})
            else:
                found += [{**each, "worker": reply.worker.slot} for each in reply.value]
        return found

    def _ask(self, what: str, *, stacks: bool = False) -> list[Reply]:
        asked = Round(
            [each for each in self.sums.alive if each.ready_at],
            lambda worker, told: worker.ask_for(what, told, stacks=stacks),
        )
        return asked.wait(_PATIENCE)

    def workers(self) -> list[dict[str, Any]]:
        """Descriptions of all workers and templates, with their memory (bytes) and processor time (seconds)."""
        found = [{**each, "memory": pss(each["pid"]), "cpu": cpu_seconds(each["pid"])} for each in self.sums.workers()]
        return [*found, *self.templates()]

    def source_files(self) -> set[str]:
        """The app's own files that workers have imported; only from workers that answer within a second."""
        return {file for each in self._ask("files") if each.error is None for file in each.value}

    def deaths(self) -> list[dict[str, Any]]:
        """The last workers that died without being told to end."""
        return list(self.sums.deaths)

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """No threads: the supervisor runs no requests."""
        return {}

    def plan(self, configuration: Configuration) -> dict[str, Any]:
        """The cleanup plan at this moment: the service's steps, and the workers' steps as one worker reports them.

        All workers are asked; notes name those that do not answer within a second, or have another plan. What the exit
        waits for is listed for each worker.
        """
        config = configuration.values
        replies = self._ask("plan")
        said = [each for each in replies if each.error is None]
        answer = {"discovery": config.cleanup.discovery.mode, **overview(self._policies, Frame.of(config))}
        notes = [str(each.error) for each in replies if each.error is not None]
        if said:
            exits = [f"worker {each.worker.slot}: {name}" for each in said for name in each.value["exit"]]
            answer |= with_service({**said[0].value, "exit": exits}, self._policies, Frame.of(config))
            policies = said[0].value["policies"]
            others = [str(each.worker) for each in said if each.value["policies"] != policies]
            if others:
                notes.append(f"this is the plan of {said[0].worker}; these have another plan: {', '.join(others)}")
        elif not replies:
            notes.append("no worker is ready: what workers do at the stop is not known")
        answer["text"] = "\n".join([answer["text"], *notes])
        return answer

    def describe_stop(self) -> dict[str, Any]:
        """The answer of a shutdown endpoint: the steps of one worker (all have the same), and those of the service."""
        plan = self._pipeline.stop.plan if self._pipeline.stop is not None else self._policies
        ready = [each for each in self.sums.alive if each.ready_at][:1]
        replies = Round(ready, lambda worker, told: worker.ask_for("stop", told)).wait(_PATIENCE)
        theirs = [step for each in replies if each.error is None for step in each.value["steps"]]
        return {"plan": plan.id, "steps": theirs + plan.describe(), "in_flight": self.in_flight}

    @property
    def exit_waits_for(self) -> str:
        """What the ends of the workers' processes wait for, in words."""
        waiting = [each for each in self.sums.alive if each.exit_waits_for]
        return "; ".join(f"{each.exit_waits_for} of worker {each.slot}" for each in waiting)

    def turns(self, timeout: float) -> bool:  # noqa: ARG002 - the boards are read at once
        """Whether any serving worker's event loop turns; True if no worker serves."""
        return self.sums.silent_for < _BEATS

    def answers(self, timeout: float) -> bool:  # noqa: ARG002
        """Whether a worker serves and its event loop turns, or one is being started."""
        return any(each.is_coming or (each.serves and each.silent_for < _BEATS) for each in self.sums.alive)

    def all_are_at(self) -> Hashable | None:
        """Always None: workers that hang are replaced one by one."""
        return None

    def moved(self) -> Hashable:
        """A value that changes when a request begins or ends, or a byte of one is received or sent."""
        return self.sums.moved()

    def close_gates(self) -> None:
        """Do nothing: workers deal with listeners that are no longer shared when they are told to stop."""
