"""Random events in a pool: no slot stays empty for ever, and every outcome is called once."""

from __future__ import annotations

import os
import time

import pool_kit
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_kit import WITH_LISTENERS, World

from flaskd.lifecycle import StopReason
from flaskd.serving.api import Renewed

LONG = bool(os.environ.get("FLASKD_LONG"))


class Told:
    """An outcome that counts how often it was called."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, error: object) -> None:
        self.times += 1


class AnyPool(RuleBasedStateMachine):
    """A pool to which random requests of a daemon come, while its workers live and die."""

    def __init__(self) -> None:
        super().__init__()
        self._context = pool_kit.world()
        self.world: World = self._context.__enter__()
        self.told: list[Told] = []
        self.reloads = self.replaced = self.taken = 0
        self.drains: list = []
        self.undone: list = []
        self.drained = False
        self.reloading = False
        self.last = 0

    @initialize(
        workers=st.integers(1, 3),
        surge=st.integers(1, 2),
        canary=st.sampled_from([None, "3s"]),
        limits=st.sampled_from([{}, {"max_requests": 2}, {"max_age": "40s"}]),
    )
    def begin(self, workers: int, surge: int, canary: str | None, limits: dict) -> None:
        self.keys = {"surge": surge, **limits}
        self.surge = surge
        self.pool = self.world.started(workers, pool={**self.keys, "canary": canary})
        self.slots = pool_kit.slots_of(self.pool)

    def _told(self) -> Told:
        self.told.append(Told())
        return self.told[-1]

    def _look(self) -> None:
        """Check whether the reload under way is over, as the daemon does."""
        over = [each for each in self.world.events if isinstance(each, Renewed)]
        if self.reloading and len(over) == self.reloads:
            self.reloading = False

    # --- what workers do ---

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data())
    def worker_goes_on(self, data: st.DataObject) -> None:
        busy = [each for each in self.world.alive if each.to_do]
        if busy:
            data.draw(st.sampled_from(busy)).step()
            self.world.run()

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data(), code=st.sampled_from([0, 3, -9, -11]))
    def worker_dies(self, data: st.DataObject, code: int) -> None:
        data.draw(st.sampled_from(self.world.alive)).dies(code)
        self.world.run()

    @rule(data=st.data())
    def worker_stops_by_itself(self, data: st.DataObject) -> None:
        ready = [each for each in self.world.alive if each.serves]
        if ready:
            data.draw(st.sampled_from(ready)).stops_by_itself()
            self.world.run()

    @rule(data=st.data())
    def worker_fails(self, data: st.DataObject) -> None:
        starting = [each for each in self.world.alive if not each.ready_at]
        if starting:
            data.draw(st.sampled_from(starting)).fails()
            self.world.run()

    @rule(data=st.data())
    def worker_takes_a_request(self, data: st.DataObject) -> None:
        ready = [each for each in self.world.alive if each.serves]
        if ready:
            data.draw(st.sampled_from(ready)).takes()
            self.taken += 1

    @rule(data=st.data())
    def worker_answers_all(self, data: st.DataObject) -> None:
        ready = [each for each in self.world.alive if each.serves]
        if ready:
            data.draw(st.sampled_from(ready)).finish_all()

    @rule()
    def all_go_on(self) -> None:
        self.world.settle()

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.0, 31.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(on=st.booleans())
    def no_more_can_be_started(self, on: bool) -> None:
        self.world.no_more = on

    # --- what the daemon asks for ---

    @precondition(lambda self: not self.reloading and not self.drained)
    @rule(workers=st.sampled_from([None, 1, 2, 3]))
    def reload(self, workers: int | None) -> None:
        config = pool_kit.configuration(workers or self.slots.wanted, pool=self.keys)
        self.reloading = True
        self.reloads += 1
        self.pool.renew(config, only_configuration=False)
        self.world.run()

    @precondition(lambda self: not self.reloading)
    @rule(count=st.integers(1, 4))
    def scale(self, count: int) -> None:
        self.pool.scale(count, self._told())
        self.world.run()

    @precondition(lambda self: not self.reloading and not self.drained)
    @rule(slot=st.sampled_from([None, 0, 1]))
    def restart(self, slot: int | None) -> None:
        self.pool.restart(slot, self._told())
        self.world.run()

    @precondition(lambda self: not self.drained)
    @rule()
    def drain(self) -> None:
        self.pool.break_off_renewal("a drain came first")
        self.drained = True
        self.drains.append(self.pool.begin_drain(20.0, announce=0.0))
        self.world.run()

    @precondition(lambda self: not self.drained)
    @rule(again=st.booleans())
    def drain_and_resume_at_once(self, again: bool) -> None:
        self.undone.append(self.pool.begin_drain(20.0, announce=0.0))
        self.drains.append(self.undone[-1])
        if self.pool.may_resume:  # the workers have not been told of the drain yet
            self.pool.resume()
        else:
            self.undone.pop()
            self.drained = True
        if again and not self.drained:
            self.drained = True
            self.drains.append(self.pool.begin_drain(20.0, announce=0.0))
        self.world.run()

    @precondition(lambda self: self.drained)
    @rule()
    def resume(self) -> None:
        self._resume()

    def _resume(self) -> None:
        if self.pool.may_resume:
            self.undone.append(self.pool.drain)
            self.pool.resume()
            self.drained = False
        self.world.run()

    # --- what is true at any time ---

    @invariant()
    def no_more_workers_than_allowed(self) -> None:
        if not hasattr(self, "pool"):
            return
        self._look()
        serving = [each for each in self.world.alive if each.phase in WITH_LISTENERS]
        assert len(serving) <= self.slots.wanted + self.surge

    @invariant()
    def each_slot_has_an_owner(self) -> None:
        for slot in self.slots if hasattr(self, "pool") else ():
            owned = [each for each in (slot.worker, slot.coming) if each is not None]
            assert all(each.code is None for each in owned)
            assert owned or slot.again_at > time.monotonic() - 1.0

    @invariant()
    def each_worker_has_a_place(self) -> None:
        if hasattr(self, "pool"):
            assert set(self.slots.all_workers) == set(self.world.alive)

    @invariant()
    def each_request_is_accounted_for(self) -> None:
        if hasattr(self, "pool"):
            counted = sum(self.pool.sums.tally().outcomes.values())
            assert counted + self.pool.in_flight == self.taken
            assert counted >= self.last
            self.last = counted

    def teardown(self) -> None:
        try:
            if hasattr(self, "pool"):
                self._end()
        finally:
            self._context.__exit__(None, None, None)

    def _end(self) -> None:
        """When nothing fails any more and time passes, every request comes to its end."""
        self.world.no_more = False
        for _ in range(8):
            self.world.settle()
            self.world.advance(31.0)
            if self.drained:
                self._resume()
        self.world.settle()
        assert all(slot.worker is not None and slot.worker.serves and slot.coming is None for slot in self.slots)
        assert [each.times for each in self.told] == [1] * len(self.told)
        assert sum(isinstance(each, Renewed) for each in self.world.events) == self.reloads
        assert all(each.report is not None or each in self.undone for each in self.drains)
        pool_kit.stop(self.world, self.pool, StopReason("signal", "SIGTERM"))
        assert self.world.alive == []
        assert sum(self.pool.sums.tally().outcomes.values()) == self.taken


AnyPool.TestCase.settings = settings(
    max_examples=1000 if LONG else 40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyPool = pytest.mark.filterwarnings("default")(AnyPool.TestCase)
TestAnyPool.__doc__ = (
    """Crashes, failures, limits, reloads, scales, restarts, drains, resumes and a stop, in any order."""
)
