"""Slots: each event in each state of a slot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pool_kit
import pytest
from pool_kit import FakeWorker, World

from flaskd.errors import AppError, FlaskdError, NotNowError
from flaskd.lifecycle import StopReason
from flaskd.pool import messages as say
from flaskd.pool.handle import Phase
from flaskd.pool.pool import Pool
from flaskd.pool.slots import Slot, Slots

WHY = StopReason("recycle", "a test")


@pytest.fixture
def world() -> Iterator[World]:
    with pool_kit.world() as made:
        yield made


class Told:
    """An outcome that keeps what it was called with."""

    def __init__(self) -> None:
        self.all: list[FlaskdError | None] = []

    def __call__(self, error: FlaskdError | None) -> None:
        self.all.append(error)


def only(pool: Pool) -> tuple[Slots, Slot]:
    """The slots of a pool, and its first one."""
    slots = pool_kit.slots_of(pool)
    return slots, slots.slots[0]


def go(world: World, worker: FakeWorker, phase: Phase) -> None:
    """Lead a worker that was started to a phase."""
    while worker.phase is not phase:
        assert worker.step(), f"it stays {worker.phase}"
        world.run()


# --- a slot: empty, filled, being replaced, in its canary ---------------------------------------------------------------


def empty(world: World, pool: Pool) -> None:
    """The slot is empty, and will be filled again later."""
    for _ in range(2):  # the first time it is filled at once
        world.worker(0).dies()
        world.run()


def filled(world: World, pool: Pool) -> None:
    """A worker serves in the slot."""


def filling(world: World, pool: Pool) -> None:
    """A worker is started for the empty slot."""
    world.worker(0).dies()
    world.run()


def replacing(world: World, pool: Pool) -> None:
    """A worker serves, and another one is started to replace it."""
    slots, slot = only(pool)
    slots.replace(slot, 1, WHY)


def in_canary(world: World, pool: Pool) -> None:
    """Both workers are ready, and the new one has its canary time."""
    slots, slot = only(pool)
    slots.replace(slot, 1, WHY, canary=5.0)
    go(world, world.worker(0), Phase.READY)


def held(world: World, pool: Pool) -> None:
    """The service is drained, and the slot's worker died: the next one waits for listeners."""
    pool.begin_drain(5.0, announce=0.0)
    world.run()
    world.worker(0).dies()
    world.run()
    go(world, world.worker(0), Phase.LOADED)


STATES = [empty, filled, filling, replacing, in_canary, held]


def old_dies(world: World, pool: Pool) -> None:
    if (worker := only(pool)[1].worker) is not None:
        assert isinstance(worker, FakeWorker)
        worker.dies()


def new_dies(world: World, pool: Pool) -> None:
    if (worker := only(pool)[1].coming) is not None:
        assert isinstance(worker, FakeWorker)
        worker.dies()


def new_fails(world: World, pool: Pool) -> None:
    if (worker := only(pool)[1].coming) is not None:
        assert isinstance(worker, FakeWorker)
        worker.fails()


def both_die(world: World, pool: Pool) -> None:
    for each in world.alive:
        each.dies()


def replaced(world: World, pool: Pool) -> None:
    slots, slot = only(pool)
    slots.replace(slot, 1, WHY)


def replaced_without_memory(world: World, pool: Pool) -> None:
    world.no_more = True
    replaced(world, pool)
    world.no_more = False


def broken_off(world: World, pool: Pool) -> None:
    only(pool)[0].break_off("a test")


def scaled(world: World, pool: Pool) -> None:
    pool.scale(2, lambda _: None)


def time_passes(world: World, pool: Pool) -> None:
    world.advance(70.0)


EVENTS = [old_dies, new_dies, new_fails, both_die, replaced, replaced_without_memory, broken_off, scaled, time_passes]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", STATES)
def test_each_event_in_each_state(
    world: World, state: Callable[[World, Pool], None], event: Callable[[World, Pool], None]
) -> None:
    """After any event in any state, each outcome is called once, and each slot has one serving worker in the end."""
    pool = world.started(1)
    slots, slot = only(pool)
    told = Told()
    state(world, pool)
    waits = slot.coming is not None
    if waits:
        wait_for(slot, told)
    event(world, pool)
    world.run()
    assert slot.worker or slot.coming or slot.again_at >= time.monotonic()
    for _ in range(4):
        world.settle()
        world.advance(31.0)
    if state is held:
        assert pool.may_resume
        pool.resume()
    world.settle()
    assert len(told.all) == waits
    assert all(each.worker is not None and each.worker.serves and each.coming is None for each in slots)
    assert len(world.alive) == slots.wanted
    assert slots.leaving == {}


def wait_for(slot: Any, told: Told) -> None:
    """Add an outcome for the worker that is started for a slot."""
    if hasattr(slot, "outcomes"):
        slot.outcomes.append(told)
    else:
        slot.outcome = told


# --- one by one ---------------------------------------------------------------------------------------------------------


def test_a_replacement_is_ready_before_the_old_one_leaves(world: World) -> None:
    """The old worker is told to stop when the new one has its place; then the outcome is called."""
    pool = world.started(1)
    slots, slot = only(pool)
    old, told = world.worker(0), Told()
    slots.replace(slot, 1, WHY, told)
    new = world.worker(0)
    go(world, new, Phase.STARTING)
    assert (slot.worker, old.phase, told.all) == (old, Phase.READY, [])
    go(world, new, Phase.READY)
    assert (slot.worker, old.phase, told.all) == (new, Phase.LEAVING, [None])
    assert isinstance(old.told[-1], say.StopNow)
    assert (old.told[-1].reason, old.told[-1].leave) == (WHY, True)


def test_the_app_is_that_of_the_worker_that_serves(world: World) -> None:
    """The name of the app is that of a serving worker, not of an old one that is stopping."""
    pool = world.started(1)
    slots, slot = only(pool)
    old = world.worker(0)
    old.target = "before:app"
    slots.replace(slot, 1, WHY)
    new = world.worker(0)
    go(world, new, Phase.STARTING)
    assert (new.target, pool.target) == ("shop:app", "before:app")
    go(world, new, Phase.READY)
    assert (old.phase, pool.target) == (Phase.LEAVING, "shop:app")


@pytest.mark.parametrize("end", [FakeWorker.fails, FakeWorker.dies])
def test_a_replacement_that_fails_leaves_the_old_one(world: World, end: Callable[[FakeWorker], None]) -> None:
    """If the new worker fails, the old one stays, the outcome gets the error, and it is not tried again."""
    pool = world.started(1)
    slots, slot = only(pool)
    old, told = world.worker(0), Told()
    slots.replace(slot, 1, WHY, told)
    end(world.worker(0))
    world.run()
    [error] = told.all
    assert error is not None
    assert ("cannot load shop:app" in str(error)) or ("was killed by SIGKILL before it was ready" in str(error))
    world.advance(100.0)
    assert world.alive == [old]
    assert old.phase is Phase.READY


def schedulers(worker: FakeWorker) -> list[str]:
    """The messages about schedulers that a worker got."""
    return [type(each).__name__ for each in worker.told if "Schedulers" in type(each).__name__]


def test_the_schedulers_of_the_old_one_are_paused_first(world: World) -> None:
    """The old worker's schedulers are paused before the new one loads the app, and stay so when that has its place."""
    pool = world.started(1)
    slots, slot = only(pool)
    old = world.worker(0)
    slots.replace(slot, 1, WHY)
    assert schedulers(old) == ["PauseSchedulers"]
    go(world, new := world.worker(0), Phase.READY)
    new.dies()
    world.run()
    assert old.phase is Phase.LEAVING
    assert schedulers(old) == ["PauseSchedulers"]


@pytest.mark.parametrize("canary", [False, True])
def test_the_schedulers_go_on_where_the_old_one_stays(world: World, canary: bool) -> None:
    """If the new worker fails, the old one's schedulers go on once the new one's process has ended."""
    pool = world.started(1)
    slots, slot = only(pool)
    old = world.worker(0)
    slots.replace(slot, 1, WHY)
    given_up = world.worker(0)
    slots.replace(slot, 1, WHY, canary=5.0)
    new = world.worker(0)
    given_up.dies()
    world.run()
    assert schedulers(old) == ["PauseSchedulers"] * 2
    if canary:
        go(world, new, Phase.READY)
    new.says(say.NotReady(FlaskdError("cannot load shop:app")))
    world.run()
    assert schedulers(old) == ["PauseSchedulers"] * 2
    new.dies(70)
    world.run()
    assert schedulers(old) == ["PauseSchedulers"] * 2 + ["ResumeSchedulers"]
    assert old.phase is Phase.READY


def test_a_canary_that_dies(world: World) -> None:
    """If the new worker dies in its canary time, the old one stays, and has served all the time."""
    pool = world.started(1)
    slots, slot = only(pool)
    old, told = world.worker(0), Told()
    slots.replace(slot, 1, WHY, told, canary=5.0)
    new = world.worker(0)
    go(world, new, Phase.READY)
    world.advance(4.0)
    assert (old.phase, told.all) == (Phase.READY, [])
    new.dies(-11)
    world.run()
    assert "pool.canary: it was killed by SIGSEGV" in str(told.all[0])
    assert world.alive == [old]


def test_an_empty_slot_is_filled_at_once_and_then_later_and_later(world: World) -> None:
    """An empty slot is filled at once, then after 0.5 s, doubled up to 30 s; at once again after 30 s of life."""
    pool = world.started(1)
    pauses = []
    for _ in range(10):
        world.worker(0).dies()
        world.run()
        began = time.monotonic()
        while not world.alive:
            world.advance(0.05)
        pauses.append(time.monotonic() - began)
        world.settle()
    assert pauses == pytest.approx([0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30], abs=0.2)
    world.advance(31.0)
    world.worker(0).dies()
    world.run()
    assert len(world.alive) == 1
    assert only(pool)[1].coming is world.worker(0)


def test_a_slot_whose_worker_never_starts_is_tried_for_ever(world: World) -> None:
    """After two thousand failures the pause is the same as after ten."""
    pool = world.started(1)
    _, slot = only(pool)
    world.worker(0).dies()
    world.run()
    for _ in range(2000):
        world.worker(0).fails()
        world.run()
        assert slot.again_at - time.monotonic() <= 30.0
        world.advance(30.1)
    assert len(world.alive) == 1


def test_without_memory_for_a_worker_the_slot_is_tried_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """If no process can be started for lack of memory, the log says so, and the slot is tried again."""
    world.started(1)
    world.no_more = True
    world.worker(0).dies()
    world.advance(10.0)
    assert "there is no memory" in caplog.text
    world.no_more = False
    world.advance(10.0)
    assert len(world.alive) == 1


def test_one_that_is_not_ready_in_time(world: World) -> None:
    """A late worker writes its stacks and is killed; the outcome gets an error with the stacks."""
    pool = world.started(1, pool={"start_timeout": "5s"})
    slots, slot = only(pool)
    told = Told()
    slots.replace(slot, 1, WHY, told)
    new = world.worker(0)
    world.advance(5.1)
    assert (new.asked_for_stacks, new.killed_for) == (1, "")
    world.advance(0.6)
    assert "pool.start_timeout" in new.killed_for
    world.settle()
    [error] = told.all
    assert isinstance(error, AppError)
    assert "not ready after 5s (pool.start_timeout)" in str(error)
    assert error.details == "File shop.py, line 1 in slow"


def test_one_that_is_late_before_it_can_tell_its_stacks(world: World) -> None:
    """If the signal for stacks kills a late worker, the outcome still says that it was late."""
    pool = world.started(1, pool={"start_timeout": "5s"})
    slots, slot = only(pool)
    told = Told()
    slots.replace(slot, 1, WHY, told)
    world.advance(5.1)
    world.worker(0).dies(-62)
    world.run()
    assert "not ready after 5s (pool.start_timeout)" in str(told.all[0])


def test_one_that_waits_while_it_is_drained_has_its_time_after_the_resume(world: World) -> None:
    """The start timeout of a worker that waits for a resume begins when it gets its listeners."""
    pool = world.started(1, pool={"start_timeout": "5s"})
    held(world, pool)
    waiting = world.worker(0)
    world.advance(4.9)
    assert pool.may_resume
    pool.resume()
    world.advance(3.0)
    assert (waiting.phase, waiting.killed_for) == (Phase.STARTING, "")
    world.advance(3.0)
    assert "pool.start_timeout" in waiting.killed_for


def test_one_that_waits_for_its_template_has_its_time_once_it_is_forked(world: World) -> None:
    """The start timeout of a worker begins after its fork; the template has a timeout of its own."""
    pool = world.started(1, pool={"start_timeout": "5s"})
    slots, slot = only(pool)
    world.forks = False
    slots.replace(slot, 1, WHY)
    new = world.worker(0)
    world.advance(20.0)
    assert (new.asked_for_stacks, new.killed_for) == (0, "")
    new.is_made()
    world.advance(4.9)
    assert (new.asked_for_stacks, new.killed_for) == (0, "")
    world.advance(1.0)
    assert "pool.start_timeout" in new.killed_for


def test_one_that_is_started_while_the_whole_service_is_stopped(world: World) -> None:
    """Time in which the whole service stood still does not count for the start timeout."""
    pool = world.started(1, pool={"start_timeout": "5s"})
    slots, slot = only(pool)
    slots.replace(slot, 1, WHY)
    new = world.worker(0)
    world.advance(2.0)
    world.sleep(60.0)
    world.run()
    world.advance(1.5)
    assert (new.asked_for_stacks, new.killed_for) == (0, "")
    world.advance(4.0)
    assert "pool.start_timeout" in new.killed_for


def test_a_canary_that_stops_by_itself(world: World) -> None:
    """If the new worker stops in its canary time, the old one stays."""
    pool = world.started(1)
    slots, slot = only(pool)
    old, told = world.worker(0), Told()
    slots.replace(slot, 1, WHY, told, canary=5.0)
    new = world.worker(0)
    go(world, new, Phase.READY)
    new.says(say.Leaves(StopReason("failure", "SystemExit")))
    world.advance(6.0)
    assert (slot.worker, slot.coming, new.phase) == (old, None, Phase.LEAVING)
    assert "within pool.canary: it stopped by itself: failure: SystemExit" in str(told.all[0])
    assert old.phase is Phase.READY


def test_nothing_is_started_once_it_ends(world: World) -> None:
    """After the end, a replacement gets an error, and an empty slot stays empty."""
    pool = world.started(1)
    slots, slot = only(pool)
    told = Told()
    slots.end()
    slots.replace(slot, 1, WHY, told)
    world.worker(0).dies()
    world.advance(100.0)
    assert world.alive == []
    [error] = told.all
    assert isinstance(error, NotNowError)


def test_who_waits_for_more_workers_is_told_that_there_are_fewer(world: World) -> None:
    """If a new slot is removed before its worker is ready, the outcome says that the worker cannot be started."""
    pool, told = world.started(1), Told()
    pool.scale(2, told)
    pool.scale(1, Told())
    assert [str(each) for each in told.all] == ["cannot start worker 1: there are fewer workers now"]


def test_sigterm_replaces_one_worker(world: World) -> None:
    """SIGTERM makes a worker ask for its replacement; a second one meanwhile changes nothing."""
    world.started(2)
    old = world.worker(1)
    for _ in range(2):
        old.says(say.Wants("replace", WHY))
        world.run()
    assert len(world.alive) == 3
    world.settle()
    assert [each.code for each in world.made] == [None, 0, None]


def test_who_waits_for_a_replacement_is_told_when_the_old_one_accepts_no_more(world: World) -> None:
    """The outcome is called when the old worker has closed its listeners, or after a second at most."""
    pool = world.started(1)
    slots, slot = only(pool)
    old, told = world.worker(0), Told()
    old.says = lambda message: None  # type: ignore[method-assign]
    slots.replace(slot, 1, WHY, told)
    go(world, world.worker(0), Phase.READY)
    assert (old.phase, told.all) == (Phase.LEAVING, [])
    world.advance(1.01)
    assert told.all == [None]


# --- rollouts -----------------------------------------------------------------------------------------------------------


def renewed(world: World) -> list[Any]:
    return [each for each in world.events if type(each).__name__ == "Renewed"]


def test_a_rollout_begins_with_one_and_goes_on_with_as_many_as_may(world: World) -> None:
    """A rollout replaces one worker first, then `pool.surge` at a time; its outcome comes with the last."""
    pool = world.started(5, pool={"surge": 2})
    pool.renew(pool_kit.configuration(5, pool={"surge": 2}), only_configuration=False)
    at_a_time = []
    while not renewed(world):
        coming = [each for each in world.alive if each.generation == 2 and not each.ready_at]
        at_a_time.append(len(coming))
        go(world, coming[0], Phase.READY)
    assert at_a_time == [1, 2, 2, 2, 1]
    assert renewed(world)[0].error is None
    world.settle()
    assert {each.generation for each in world.alive} == {2}


def test_a_stop_overtakes_another_number_of_workers(world: World) -> None:
    """If a stop comes while workers are to be removed, they are told to stop as all others."""
    pool = world.started(2)
    pool.renew(pool_kit.configuration(1), only_configuration=True)
    pool_kit.slots_of(pool).end()
    world.settle()
    assert "flaskd stops" in str(renewed(world)[0].error)
    assert not any(isinstance(order, say.StopNow) for each in world.made for order in each.told)


def test_a_rollout_ends_with_the_first_failure(world: World) -> None:
    """If the first new worker fails, no new one stays, and empty slots get the old generation."""
    pool = world.started(3)
    pool.renew(pool_kit.configuration(3), only_configuration=False)
    world.alive[-1].fails()
    world.run()
    assert "cannot load shop:app" in str(renewed(world)[0].error)
    world.worker(1).dies()
    world.settle()
    assert [each.generation for each in world.alive] == [1, 1, 1]


@pytest.mark.parametrize("how", ["fails", "drained", "broken off"])
def test_a_rollout_that_was_to_bring_more_workers(world: World, how: str) -> None:
    """If a rollout ends after its first worker, the new slots are filled all the same."""
    pool = world.started(1)
    pool.renew(pool_kit.configuration(4), only_configuration=False)
    go(world, world.alive[-1], Phase.READY)
    [coming] = [each for each in world.alive if not each.ready_at]
    if how == "fails":
        coming.fails()
    elif how == "drained":
        pool.begin_drain(5.0, announce=0.0)
        world.settle()
        assert pool.may_resume
        pool.resume()
    else:
        pool.break_off_renewal("a test")
    world.run()
    world.settle()
    world.advance(1.0)
    world.settle()
    assert [slot.worker is not None and slot.worker.generation for slot in pool_kit.slots_of(pool)] == [2] * 4


def test_a_rollout_that_fails_half_way(world: World) -> None:
    """If a later one fails, the new workers stay, the error has their number, and empty slots get new ones."""
    pool = world.started(3)
    pool.renew(pool_kit.configuration(3), only_configuration=False)
    go(world, world.alive[-1], Phase.READY)
    world.alive[-1].fails()
    world.run()
    assert "; 1 " in str(renewed(world)[0].error)
    world.settle()
    assert sorted(each.generation for each in world.alive) == [1, 1, 2]
    world.worker(1).dies()
    world.settle()
    assert sorted(each.generation for each in world.alive) == [1, 2, 2]


def test_a_reload_while_a_restart_is_under_way(world: World) -> None:
    """A reload ends a restart, whose outcome gets an error; the reload comes to its end."""
    pool = world.started(2)
    told = Told()
    pool.restart(None, told)
    pool.renew(pool_kit.configuration(2), only_configuration=False)
    world.settle()
    assert len(told.all) == 1
    assert told.all[0] is not None
    assert [each.error for each in renewed(world)] == [None]
    assert {each.generation for each in world.alive} == {2}


# --- processes that were forked early -----------------------------------------------------------------------------------


class EarlyProcess:
    ended = False

    def end(self) -> None:
        self.ended = True


def test_the_first_workers_get_the_processes_that_were_forked_early(world: World) -> None:
    """Each gets one, in order; one too many is ended when the service is ready. Later workers are new processes."""
    first, second, _ = world.early = [EarlyProcess() for _ in range(3)]
    pool = world.started(2)
    assert [each.early for each in world.made] == [first, second]
    assert [each.ended for each in world.early] == [False, False, True]
    world.worker(0).dies()
    world.settle()
    pool.scale(3, lambda _: None)
    world.settle()
    assert [each.early for each in world.made[2:]] == [None, None]


def test_a_start_that_fails_leaves_no_process_that_was_forked_early(world: World) -> None:
    """They are ended with the pool."""
    world.early = [EarlyProcess() for _ in range(3)]
    world.no_more = True
    pool = world.pool()
    pool.start(pool_kit.configuration(1))
    world.advance(100)
    pool.abandon()
    assert [each.ended for each in world.early[1:]] == [True, True]
