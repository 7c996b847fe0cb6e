"""Workers that reach a limit: which one is replaced, when, by what it is said, and when none is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from unittest import mock

import pool_kit
import pytest
from pool_kit import FakeWorker, World

from flaskd.lifecycle import StopReason
from flaskd.pool import messages as say
from flaskd.pool import recycling
from flaskd.pool.handle import Phase
from flaskd.pool.pool import Pool
from flaskd.serving.api import Renewed, TroubleChanged

MIB = 1024**2


class Memory:
    """What the kernel tells of the memory of each process, in MiB; a process that is not named has 30."""

    def __init__(self) -> None:
        self.pss: dict[int, float] = {}
        self.resident: dict[int, float] = {}
        self.every = 30.0
        self.readings = 0
        self.fault: OSError | None = None

    def read_pss(self, pid: int) -> int:
        self.readings += 1
        if self.fault is not None:
            raise self.fault
        return int(self.pss.get(pid, self.every) * MIB)

    def read_resident(self, pid: int) -> int:
        return int(self.resident.get(pid, self.pss.get(pid, self.every)) * MIB)


@pytest.fixture
def world() -> Iterator[World]:
    with pool_kit.world() as made:
        yield made


@pytest.fixture(autouse=True)
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The shares of the limits that workers draw, in their order; then 1."""
    drawn: list[float] = []
    monkeypatch.setattr(recycling.random, "uniform", lambda _low, high: drawn.pop(0) if drawn else high)
    return drawn


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    monkeypatch.setattr(recycling, "read_pss", made.read_pss)
    monkeypatch.setattr(recycling, "resident", made.read_resident)
    monkeypatch.setattr(recycling, "exists", lambda _pid: True)
    monkeypatch.setattr(recycling, "aside", lambda _name, work: work())
    return made


def started(world: World, workers: int = 2, **limits: object) -> Pool:
    """A pool with limits, whose workers have lived for a while; no look is due just now."""
    pool = world.started(workers, pool=limits)
    world.advance(20.25)
    return pool


def phases(world: World) -> list[Phase]:
    """Of all workers that are alive, in the order of their starts."""
    return [each.phase for each in world.alive]


def reason_of(worker: FakeWorker) -> StopReason:
    """Why a worker was told to stop."""
    assert isinstance(worker.told[-1], say.StopNow)
    return worker.told[-1].reason


def test_so_many_requests(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Another worker is started, the old one leaves when that is ready; limit, value and worker are in the log."""
    caplog.set_level(logging.INFO)
    pool = started(world, max_requests=100)
    old = world.worker(1)
    old.answers(99)
    world.advance(1.0)
    assert len(world.made) == 2
    old.answers(3)
    world.advance(1.0)
    assert phases(world) == [Phase.READY, Phase.READY, Phase.LOADING]
    new = world.worker(1)
    new.step()
    world.run()
    assert old.serves
    new.step()
    world.run()
    assert (old.phase, new.phase) == (Phase.LEAVING, Phase.READY)
    assert reason_of(old).kind == "recycle"
    words = "it has dealt with 102 requests (pool.max_requests is 100; its own limit 100)"
    assert reason_of(old).detail == words
    assert f"{old} is replaced (recycle: {words})" in caplog.text
    world.settle()
    assert pool.snapshot().recycled == {"max_requests": 1, "max_age": 0, "max_memory": 0, "request_timeout": 0}
    assert pool.snapshot().trouble == ""


def test_an_age(world: World) -> None:
    """Counted from the start of the worker, as `flaskd workers` shows it."""
    pool = started(world, 1, max_age="1m")
    world.advance(37.0)
    assert len(world.made) == 1
    world.advance(3.0)
    world.settle()
    assert "it is 1m old (pool.max_age is 1m; its own limit 1m)" in reason_of(world.made[0]).detail
    assert pool.snapshot().recycled["max_age"] == 1


def test_a_thread_that_is_lost(world: World) -> None:
    """A worker is replaced that has lost a thread in a request that was given up; one whose thread is back is not."""
    pool = started(world)
    hung, back = world.worker(0), world.worker(1)
    back.board.look(moved=0, stuck_at=None, background=0, lost=1)
    back.board.look(moved=0, stuck_at=None, background=0, lost=0)
    hung.board.look(moved=0, stuck_at=None, background=0, lost=1)
    world.advance(1.0)
    world.settle()
    assert world.alive == [back, world.worker(0)]
    assert reason_of(hung).detail == "1 of its threads hangs in requests that were given up"
    assert pool.snapshot().recycled["request_timeout"] == 1


def test_workers_that_lose_threads_all_the_time(world: World) -> None:
    """Workers are not replaced as often as requests hang: the pauses grow, and what is wrong is said."""
    pool = started(world)
    for _ in range(5):
        for each in world.alive:
            each.board.look(moved=0, stuck_at=None, background=0, lost=1)
        world.advance(1.0)
        world.settle()
    assert pool.snapshot().recycled["request_timeout"] < 5
    assert "server.request_timeout" in pool.snapshot().trouble
    assert "workers cannot be replaced so often; the log has the stacks of what hangs" in pool.snapshot().trouble


def test_memory(world: World, memory: Memory) -> None:
    """By what is the worker's own of it: what it shares with others counts in part."""
    pool = started(world, max_memory="150MiB")
    grown, shares_much = world.worker(0), world.worker(1)
    memory.pss |= {grown.pid: 151, shares_much.pid: 60}
    memory.resident[shares_much.pid] = 200
    while not memory.readings:
        world.advance(0.02)
    assert world.worker(0).is_coming, "as soon as it was read"
    world.settle()
    assert reason_of(grown).detail == "its memory is 151 MiB (pool.max_memory is 150 MiB; its own limit 150 MiB)"
    assert pool.snapshot().recycled["max_memory"] == 1
    world.advance(30.0)
    assert shares_much.serves


def test_memory_is_read_only_where_it_may_have_reached_the_limit(world: World, memory: Memory) -> None:
    """The resident set is no smaller and costs nothing: only where that is large the kernel has to walk the pages."""
    started(world, max_memory="150MiB")
    world.advance(60.0)
    assert memory.readings == 0
    memory.resident[world.worker(0).pid] = 140
    world.advance(10.0)
    assert memory.readings == 0
    memory.resident[world.worker(0).pid] = 151
    world.advance(10.0)
    assert 90 <= memory.readings <= 101
    assert len(world.made) == 2


def test_a_small_worker_is_looked_at_rarely(world: World, memory: Memory) -> None:
    """Twice a second, and closely once it has half of what it may have."""
    asked = []
    started(world, 1, max_memory="100MiB")
    with mock.patch.object(recycling, "resident", lambda pid: asked.append(pid) or memory.read_resident(pid)):
        world.advance(10.0)
        assert 19 <= len(asked) <= 21
        asked.clear()
        memory.resident[world.worker(0).pid] = 51
        world.advance(10.0)
        assert 90 <= len(asked) <= 101


def test_one_that_grows_is_replaced_before_it_is_there(world: World, memory: Memory) -> None:
    """By what it grows until another one is ready, as it did so far and as long as its own start took."""
    pool = world.pool()
    config = pool_kit.configuration(1, pool={"max_memory": "100MiB"})
    pool.start(config)
    world.advance(5.0)  # its start
    world.settle()
    pool.started(config)
    old = world.worker(0)
    memory.pss[old.pid] = 30
    for _ in range(100):
        world.advance(1.0)
        if len(world.made) == 2:
            break
        memory.pss[old.pid] += 2
    assert 88 <= memory.pss[old.pid] <= 93, "10 MiB in 5 s"
    world.settle()
    assert "MiB more when another worker is ready" in reason_of(old).detail


@pytest.mark.parametrize(("start", "loaded"), [(1.0, 87), (50.0, 80)])
def test_what_is_loaded_at_first_is_no_growth(world: World, memory: Memory, start: float, loaded: int) -> None:
    """The first request may load much in a moment: that is reckoned over 5 s, or three times its start."""
    pool = world.pool()
    config = pool_kit.configuration(1, pool={"max_memory": "100MiB"})
    pool.start(config)
    world.advance(start)
    world.settle()
    pool.started(config)
    world.advance(0.5)
    memory.pss[world.worker(0).pid] = loaded
    world.advance(60.0)
    assert len(world.made) == 1


def test_a_large_worker_is_read_rarely(world: World, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reading took is at most 2 % of the time: here 0.1 s."""
    started(world, 1, max_memory="150MiB")

    def slow(pid: int) -> int:
        world.sleep(0.1)
        return memory.read_pss(pid)

    monkeypatch.setattr(recycling, "read_pss", slow)
    memory.resident[world.worker(0).pid] = 200
    world.advance(60.0)
    assert 10 <= memory.readings <= 12


def test_each_worker_draws_its_own_limit(world: World, shares: list[float], memory: Memory) -> None:
    """Workers that began together and have done the same do not end together."""
    shares += [0.95, 0.9]
    started(world, max_requests=1000, max_memory="100MiB")
    for each in world.alive:
        each.answers(899)
    world.advance(1.0)
    assert len(world.made) == 2
    for each in world.alive:
        each.answers(2)
    world.advance(1.0)
    assert [each.slot for each in world.made] == [0, 1, 1]
    world.settle()
    memory.pss[world.worker(0).pid] = 95.5
    world.advance(1.0)
    assert [each.slot for each in world.made] == [0, 1, 1, 0]


def test_what_is_drawn_is_up_to_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never above the limit."""
    monkeypatch.undo()
    drawn = [recycling._Seen().share for _ in range(1000)]  # noqa: SLF001 - the room's own test
    assert 0.9 <= min(drawn) < 0.92
    assert 0.98 < max(drawn) <= 1.0


def test_one_at_a_time_over_the_whole_pool(world: World) -> None:
    """All have reached it: the next one begins when the one before has its place, whoever is farthest beyond first."""
    pool = started(world, 3, max_requests=10)
    for number, each in enumerate(world.alive):
        each.answers(20 + number)
    order = []
    for _ in range(3):
        world.advance(5.0)
        [coming] = [each for each in world.alive if each.is_coming]
        order.append(coming.slot)
        for _ in range(2):
            coming.step()
            world.run()
    assert order == [2, 1, 0]
    world.settle()
    world.advance(30.0)
    assert len(world.made) == 6
    assert pool.snapshot().recycled["max_requests"] == 3


def test_not_more_leave_than_there_are_to_be(world: World) -> None:
    """Old workers with streams may take long: memory is bounded, as is the number of processes."""
    started(world, 1, max_requests=10)
    old = world.worker(0)
    old.answers(10)
    world.advance(1.0)
    new = world.worker(0)
    for _ in range(2):
        new.step()
        world.run()
    world.advance(5.0)
    new.answers(10)
    world.advance(5.0)
    assert world.alive == [old, new]
    world.settle()
    world.advance(1.0)
    assert len(world.alive) == 2


def test_a_replacement_that_fails_leaves_the_old_worker(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It is tried again, after pauses that double; it is said, and it is over when one succeeds."""
    pool = started(world, 1, max_requests=10)
    old = world.worker(0)
    old.answers(10)
    began = []
    for seconds in range(40):
        if len(world.alive) == 2:
            began.append(seconds)
            world.worker(0).fails()
        world.advance(1.0)
    assert old.serves
    assert 4 <= len(began) <= 6
    assert began[-1] - began[-2] > began[2] - began[1]
    assert "cannot load shop:app" in caplog.text
    assert "its replacement did not become ready" in pool.snapshot().trouble
    assert world.events == [TroubleChanged()]
    assert pool.snapshot().recycled["max_requests"] == 0
    while len(world.alive) == 1:
        world.advance(1.0)
    world.settle()
    assert not old.serves
    assert pool.snapshot().trouble == ""
    assert len(world.events) == 2


def test_a_limit_below_what_the_app_needs(world: World, memory: Memory, caplog: pytest.LogCaptureFixture) -> None:
    """If each new worker reaches the limit right after its start, flaskd says so and replaces workers rarely."""
    memory.every = 200.0
    pool = world.started(2, pool={"max_memory": "150MiB"})
    for _ in range(600):
        memory.every += 0.01
        world.advance(1.0)
        world.settle()
    assert 5 <= len(world.made) - 2 <= 10
    assert "the app needs that much right after its start" in pool.snapshot().trouble
    assert "pool.max_memory (150MiB)" in caplog.text
    assert "in 256s at the earliest" in caplog.text
    assert "and no other one is ready yet" not in caplog.text
    assert len(world.alive) == 2


def test_a_limit_that_is_reached_at_once(world: World) -> None:
    """So for requests: a handful a second must not become as many new processes."""
    pool = world.started(2, pool={"max_requests": 5})
    for _ in range(60):
        for each in world.alive:
            each.answers(5)
        world.advance(1.0)
        world.settle()
    assert len(world.made) - 2 <= 7
    assert "workers cannot be replaced so often" in pool.snapshot().trouble


def test_lives_that_are_shorter_than_it_takes_to_replace_all(world: World, memory: Memory) -> None:
    """A new worker needs 6 s until it is ready, two of them 12 s: they must not reach the limit within 10 s."""
    pool = world.started(2, pool={"max_memory": "150MiB"})
    world.advance(10.0)
    memory.pss[world.worker(0).pid] = 151
    world.advance(7.0)
    world.settle()
    assert "grows faster than workers can be replaced" in pool.snapshot().trouble
    memory.pss[world.worker(1).pid] = 151
    world.advance(0.6)
    assert world.worker(1).is_coming, "without a pause, in which it would go on growing"
    world.settle()
    world.advance(30.0)
    memory.pss[world.worker(1).pid] = 151
    world.advance(7.0)
    world.settle()
    assert pool.snapshot().trouble == "", "this one lived for longer"


def test_one_that_grows_faster_than_it_can_be_replaced(
    world: World, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """Its replacement takes long: at 1.3 times the limit it is said, once, in log and status."""
    pool = started(world, 1, max_memory="100MiB")
    old = world.worker(0)
    for grown in range(100, 180, 5):
        memory.pss[old.pid] = grown
        world.advance(1.0)
    assert len(world.alive) == 2
    assert caplog.text.count(f"{old} grows faster than it can be replaced: its memory is 130 MiB, 1.3 times") == 1
    assert "grows faster" in pool.snapshot().trouble
    world.settle()
    assert not old.serves
    world.advance(59.0)
    assert "grows faster" in pool.snapshot().trouble
    world.advance(3.0)
    assert pool.snapshot().trouble == ""


def test_new_limits_begin_anew(world: World, memory: Memory) -> None:
    """A reload of the configuration with a limit that can be kept ends the pauses, and what was said."""
    memory.every = 200.0
    pool = started(world, 1, max_memory="150MiB")
    for _ in range(20):
        world.advance(1.0)
        world.settle()
    assert pool.snapshot().trouble
    pool.renew(pool_kit.configuration(1, pool={"max_memory": "300MiB"}), only_configuration=True)
    world.settle()
    pool.apply(pool_kit.configuration(1, pool={"max_memory": "300MiB"}), pool.policies)
    made = len(world.made)
    world.advance(1.0)
    assert pool.snapshot().trouble == ""
    memory.every = 301.0
    world.advance(2.0)
    assert len(world.made) == made + 1


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_memory_that_cannot_be_read(
    world: World, memory: Memory, caplog: pytest.LogCaptureFixture, fault: OSError
) -> None:
    """It is said once that the limit has no effect; the other limits hold."""
    memory.every, memory.fault = 200.0, fault
    started(world, max_memory="150MiB", max_requests=10)
    assert caplog.text.count("cannot read the memory of worker") == 1
    assert "pool.max_memory has no effect" in caplog.text
    assert len(world.made) == 2
    world.worker(0).answers(10)
    world.advance(1.0)
    assert len(world.made) == 3


def test_a_worker_that_has_just_ended_has_no_memory(
    world: World, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """That is no fault of the kernel's, and nothing is said."""
    memory.every, memory.fault = 200.0, ProcessLookupError(3, "No such process")
    started(world, max_memory="150MiB")
    assert "cannot read" not in caplog.text


def test_no_thread_for_a_reading(
    world: World, memory: Memory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and tried again."""

    def none(_name: str, _work: object) -> None:
        raise RuntimeError("can't start new thread")

    memory.every = 200.0
    with monkeypatch.context() as patched:
        patched.setattr(recycling, "aside", none)
        started(world, max_memory="150MiB")
    assert caplog.text.count("cannot read the memory of worker 0") == 1
    world.advance(1.0)
    assert len(world.made) == 3


# --- beside all else that is done to workers -------------------------------------------------------------------------


def due(world: World, pool: Pool) -> None:
    """Let all workers reach their limit of ten requests."""
    for each in pool_kit.slots_of(pool).workers:
        assert isinstance(each, FakeWorker)
        each.answers(10)


def test_none_while_drained(world: World) -> None:
    """What is under way is broken off, for nothing serves; after the resume it is gone on with."""
    pool = started(world, max_requests=10)
    due(world, pool)
    world.advance(1.0)
    assert len(world.alive) == 3
    pool.begin_drain(5.0, announce=0.0)
    world.settle()
    world.advance(30.0)
    assert phases(world) == [Phase.DRAINED, Phase.DRAINED]
    assert pool.may_resume
    pool.resume()
    world.advance(1.0)
    assert phases(world) == [Phase.READY, Phase.READY, Phase.LOADING]


def test_none_during_a_reload_which_breaks_off_one(world: World) -> None:
    """All workers get new anyway; no more are started than the reload may start."""
    pool = started(world, 2, max_requests=10)
    world.worker(1).answers(10)
    world.advance(1.0)
    assert world.worker(1).is_coming
    pool.renew(pool_kit.configuration(2, pool={"max_requests": 10}), only_configuration=False)
    world.run()
    coming = [each for each in world.alive if each.is_coming]
    assert [(each.slot, each.generation) for each in coming] == [(0, 2)]
    world.settle()
    assert [(each.slot, each.generation) for each in world.alive] == [(0, 2), (1, 2)]
    assert pool.snapshot().recycled["max_requests"] == 0


def test_none_between_two_steps_of_a_reload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first old worker still accepts, none is started, and the next step is the reload's."""
    pool = started(world, 2, max_requests=10)
    monkeypatch.setattr(world.worker(0), "send", lambda *_: True)  # it does not say that it has closed its listeners
    world.worker(1).answers(10)
    pool.renew(pool_kit.configuration(2, pool={"max_requests": 10}), only_configuration=False)
    world.settle()
    world.advance(0.6)
    assert [each.generation for each in world.made] == [1, 1, 2]
    world.advance(1.0)
    assert [each.generation for each in world.made] == [1, 1, 2, 2]


def test_a_worker_that_leaves_while_a_configuration_comes(world: World) -> None:
    """It need not take that any more: the reload succeeds, and the one in its place has it."""
    pool = started(world, 1, max_requests=10)
    old = world.worker(0)
    due(world, pool)
    world.advance(1.0)
    new = world.worker(0)
    config = pool_kit.configuration(1, pool={"max_requests": 20})
    pool.renew(config, only_configuration=True)
    old.to_do.clear()  # it does not answer
    for _ in range(2):
        new.step()
        world.run()
    old.dies(0)
    world.settle()
    assert [each.error for each in world.events if isinstance(each, Renewed)] == [None]
    pool.apply(config, pool.policies)
    world.settle()
    assert new.configuration is config


def test_a_worker_that_dies_of_a_configuration(world: World) -> None:
    """That is a fault of the reload, as ever."""
    pool = started(world, 1, max_requests=10)
    pool.renew(pool_kit.configuration(1), only_configuration=True)
    world.worker(0).dies()
    world.settle()
    [over] = [each for each in world.events if isinstance(each, Renewed)]
    assert "is gone" in str(over.error)


def test_a_canary_is_waited_for(world: World) -> None:
    """While the first new worker of a reload has to live, none is replaced for a limit."""
    pool = started(world, 2, max_requests=10, canary="9s")
    keys = {"max_requests": 10, "canary": "9s"}
    pool.renew(pool_kit.configuration(2, pool=keys), only_configuration=False)
    world.settle()
    world.worker(1).answers(10)
    world.advance(5.0)
    assert [each.slot for each in world.made] == [0, 1, 0]
    world.advance(5.0)
    world.settle()
    assert [each.generation for each in world.alive] == [2, 2]


def test_a_limit_takes_no_canary(world: World) -> None:
    """Without new code the old worker leaves as soon as the new one is ready."""
    pool = started(world, 1, max_requests=10, canary="9s")
    due(world, pool)
    world.advance(1.0)
    world.settle()
    assert len(world.alive) == 1


def test_none_while_a_place_is_empty(world: World) -> None:
    """A crash is mended first: an app that does not load must not cost a worker that serves."""
    pool = started(world, 2, max_requests=10)
    world.worker(0).dies()
    world.run()
    world.worker(1).answers(10)
    world.advance(5.0)
    assert [each.slot for each in world.made] == [0, 1, 0]
    assert pool.snapshot().recycled["max_requests"] == 0
    world.settle()
    world.advance(1.0)
    assert [each.slot for each in world.made] == [0, 1, 0, 1]


def test_the_old_worker_dies_meanwhile(world: World) -> None:
    """The one that was to replace it has its place; that was a death, and no recycling."""
    pool = started(world, 1, max_requests=10)
    due(world, pool)
    world.advance(1.0)
    world.made[0].dies()
    world.settle()
    assert phases(world) == [Phase.READY]
    assert (pool.snapshot().recycled["max_requests"], pool.snapshot().deaths) == (0, 1)
    due(world, pool)
    world.advance(5.0)
    assert len(world.alive) == 2, "and the next one is replaced as ever"


def test_fewer_workers_meanwhile(world: World) -> None:
    """The slot is gone, with both of its workers; the others go on."""
    pool = started(world, 2, max_requests=10)
    world.worker(1).answers(10)
    world.advance(1.0)
    pool.scale(1, lambda _: None)
    world.settle()
    assert [each.slot for each in world.alive] == [0]
    due(world, pool)
    world.advance(1.0)
    assert len(world.alive) == 2


def test_more_workers_come_first(world: World) -> None:
    """While `scale` starts workers none is replaced for a limit."""
    pool = started(world, 1, max_requests=10)
    pool.scale(2, lambda _: None)
    due(world, pool)
    world.advance(2.0)
    assert [each.slot for each in world.made] == [0, 1]
    world.settle()
    world.advance(1.0)
    assert [each.slot for each in world.made] == [0, 1, 0]


def test_none_in_a_stop(world: World) -> None:
    """One that is under way ends with the stop, and no other is begun."""
    pool = started(world, 1, max_requests=10)
    due(world, pool)
    world.advance(1.0)
    pool_kit.stop(world, pool, StopReason("signal", "SIGTERM"))
    assert world.alive == []
    world.advance(5.0)
    assert len(world.made) == 2
