"""Changes to workers that are asked for: a reload, a restart, a new configuration, another number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flaskd.cleanup import build_plan
from flaskd.config import Configuration
from flaskd.errors import ConfigError, FlaskdError, NotNowError, UsageError
from flaskd.lifecycle import StopReason
from flaskd.pool import messages as say
from flaskd.pool.deaths import tell_failure
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.questions import Reply, Round
from flaskd.pool.rollout import Rollout
from flaskd.pool.slots import Slots
from flaskd.serving.api import Outcome, Renewed, ServingEvent

_RENEWAL = 10.0
"""Seconds that workers have to put a new configuration into force."""


class Renewals:
    """Carries them out, in the thread of the daemon's events; `do` calls a function there, `later` after a time.

    `settled` is called with the generation of which all workers are started from then on.
    """

    def __init__(
        self,
        slots: Slots,
        post: Callable[[ServingEvent], None],
        do: Callable[[Callable[[], None]], None],
        later: Callable[[float, Callable[[], None]], None],
        *,
        settled: Callable[[int], None],
    ) -> None:
        self._settled = settled
        self._slots, self._post, self._do, self._later = slots, post, do, later
        self._generation = 1
        """The last generation that was begun."""
        self._configurations: dict[int, Configuration] = {}
        """The configurations of the generations of which workers may be started."""
        self._rollout: Rollout | None = None

    @property
    def configuration(self) -> Configuration:
        """The configuration in force, which a worker gets that fills an empty slot."""
        return self._configurations[self._slots.generation]

    @configuration.setter
    def configuration(self, configuration: Configuration) -> None:
        self._configurations[self._slots.generation] = configuration

    def configuration_of(self, generation: int) -> Configuration:
        """The configuration of a generation of which workers may be started."""
        return self._configurations[generation]

    def take(self, configuration: Configuration) -> None:
        """Take a configuration as the one in force, and bring it to the workers that do not have it."""
        self.configuration = configuration
        for each in self._slots.workers:
            self.keep_up(each)

    def keep_up(self, worker: Handle) -> None:
        """Bring a worker the configuration in force, if it was started with another one or could not take this one."""
        configuration = self.configuration
        if worker.serves and worker.configuration is not configuration and worker.generation == self._slots.generation:
            self._bring(worker, configuration, lambda _, error: tell_failure(error) if error is not None else None)

    def _bring(
        self, worker: Handle, configuration: Configuration, told: Callable[[Any, FlaskdError | None], None]
    ) -> None:
        def answered(value: Any, error: FlaskdError | None) -> None:
            if error is None:
                worker.configuration = configuration
            told(value, error)

        worker.ask(lambda number: say.Renew(number, configuration), answered)

    @property
    def under_way(self) -> bool:
        """Whether a reload or a restart is under way."""
        return self._rollout is not None

    def renew(self, configuration: Configuration, *, only_configuration: bool) -> None:
        """Replace all workers by new ones with this configuration, or bring it to the present ones; posts Renewed."""
        if only_configuration:
            self._tell_all(configuration)
            return
        self.break_off("a reload was asked for")
        self._generation += 1
        generation = self._generation
        self._configurations[generation] = configuration
        before = self.configuration.values.count_workers()

        def proven() -> None:  # from now on empty slots are filled with the new generation, too
            self._slots.generation = generation
            if configuration.values.count_workers() != before:
                self._slots.resize(configuration.values.count_workers())

        def over(error: FlaskdError | None, replaced: int) -> None:
            self._post(Renewed(configuration, error, replaced))

        reason = StopReason("reload", f"generation {generation}")
        self._roll_out(lambda: self._slots.not_of(generation), generation, reason, over, proven)

    def _roll_out(
        self,
        numbers: Callable[[], Iterable[int]],
        generation: int,
        reason: StopReason,
        told: Callable[[FlaskdError | None, int], None],
        proven: Callable[[], None] = lambda: None,
    ) -> None:
        def over(error: FlaskdError | None, replaced: int) -> None:
            self._rollout = None
            self._configurations = {self._slots.generation: self.configuration}
            self._settled(self._slots.generation)
            told(error, replaced)

        pool = self._configurations[generation].values.pool
        self._rollout = Rollout(
            self._slots,
            numbers,
            generation,
            reason,
            surge=pool.surge,
            canary=pool.canary or 0.0,
            proven=proven,
            over=over,
        )
        self._slots.break_off("a reload or a restart was asked for")
        self._rollout.begin()

    def break_off(self, why: str) -> None:
        """End the reload or restart under way, if there is one; its callers get `why` in an error."""
        if self._rollout is not None:
            self._rollout.break_off(NotNowError(f"cannot go on replacing workers: {why}"))

    def _tell_all(self, configuration: Configuration) -> None:
        """Bring a configuration to the present workers; if one cannot take it, bring all of them the old one again."""
        before = self.configuration

        def over(replies: list[Reply]) -> None:  # may run in any thread
            self._do(
                lambda: decide(next((each.error for each in replies if each.error and not left(each.worker)), None))
            )

        def left(worker: Handle) -> bool:  # replaced meanwhile by a worker with the configuration in force
            return worker.phase in {Phase.LEAVING, Phase.GONE} and not worker.death

        def decide(error: FlaskdError | None) -> None:
            count = configuration.values.count_workers()
            if error is not None or self._slots.ending:
                end(error or NotNowError("flaskd stops"))
            elif count == before.values.count_workers():
                end(None)
            else:
                wanted = self._slots.wanted
                self.configuration = configuration
                self._slots.scale(count, lambda error: end(error, wanted))

        def end(error: FlaskdError | None, wanted: int | None = None) -> None:
            if error is not None:
                self.take(before)
                if wanted is not None:
                    self._slots.resize(wanted)
            self._post(Renewed(configuration, error))

        workers = [each for each in self._slots.workers if each.serves]
        asked = Round(workers, lambda worker, told: self._bring(worker, configuration, told), over)
        self._later(_RENEWAL, asked.give_up)

    def scale(self, count: int, told: Outcome) -> None:
        """Change the number of workers; `told` is called when the new ones are ready, or with an error."""
        plan = build_plan(self.configuration.values.cleanup, scope="worker")
        if count > 1 and (names := plan.one_file()):
            told(ConfigError(f"cannot scale: {', '.join(names)}: more than one worker needs {{worker}} in the path"))
        else:
            self._slots.scale(count, told)

    def restart(self, number: int | None, told: Outcome) -> None:
        """Replace the worker of one slot, or of all (None), one after the other; `told` is called at the end."""
        if number is not None and number not in self._slots.slots:
            told(UsageError(f"restart: expected a slot from 0 to {self._slots.wanted - 1}, got {number}"))
            return
        if self._rollout is not None:
            told(NotNowError("cannot restart: a reload or a restart is under way"))
            return

        def over(error: FlaskdError | None, replaced: int) -> None:
            gone = error is None and not replaced
            told(NotNowError(f"cannot restart: there is no worker {number} any more") if gone else error)

        numbers = self._slots.slots.keys() if number is None else [number]
        self._roll_out(lambda: numbers, self._slots.generation, StopReason("recycle", "restart"), over)
