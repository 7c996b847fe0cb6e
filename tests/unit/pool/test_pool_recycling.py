"""Workers that reach a limit: which one is replaced, when, what the log says, and when none is replaced."""

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
    """The memory of each process in MiB, as the kernel would report it; 30 for processes that are not named."""

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
    """The parts of the limits that workers draw, in their order; then 1."""
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
    """A pool with limits, whose workers have lived for a while; no look is due now."""
    pool = world.started(workers, pool=limits)
    world.advance(20.25)
    return pool


def phases(world: World) -> list[Phase]:
    """The phases of all living workers, in the order of their starts."""
    return [each.phase for each in world.alive]


def reason_of(worker: FakeWorker) -> StopReason:
    """The reason that a worker was given for its stop."""
    assert isinstance(worker.told[-1], say.StopNow)
    return worker.told[-1].reason


def test_so_many_requests(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A worker at max_requests is replaced; limit, value and worker are in the log."""
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
    """The age counts from the start of the worker, as `flaskd workers` shows it."""
    pool = started(world, 1, max_age="1m")
    world.advance(37.0)
    assert len(world.made) == 1
    world.advance(3.0)
    world.settle()
    assert "it is 1m old (pool.max_age is 1m; its own limit 1m)" in reason_of(world.made[0]).detail
    assert pool.snapshot().recycled["max_age"] == 1


def test_a_thread_that_is_lost(world: World) -> None:
    """A worker is replaced if one of its threads is lost in a given-up request; not if the thread is back."""
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
    """If workers lose threads all the time, the pauses between replacements grow, and flaskd says so."""
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
    """Memory is the PSS: what a worker shares with others counts in part."""
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
    """PSS is read only if the resident set, which is never smaller and quick to read, has reached the limit."""
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
    """A worker is looked at twice a second, and more often once it uses half of max_memory."""
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
    """A growing worker is replaced early, by the growth that is expected while another one starts."""
    pool = world.pool()
    config = pool_kit.configuration(1, pool={"max_memory": "100MiB"})
    pool.start(config)
    world.advance(5.0)  # the length of its start
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
    """What the first request loads is averaged over 5 s, or three times the length of the start."""
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
    """Reading PSS takes at most 2 % of the time: here a reading takes 0.1 s."""
    started(world, 1, max_memory="150MiB")

    def slow(pid: int) -> int:
        world.sleep(0.1)
        return memory.read_pss(pid)

    monkeypatch.setattr(recycling, "read_pss", slow)
    memory.resident[world.worker(0).pid] = 200
    world.advance(60.0)
    assert 10 <= memory.readings <= 12


def test_each_worker_draws_its_own_limit(world: World, shares: list[float], memory: Memory) -> None:
    """Workers that began together and have done the same work do not reach a limit together."""
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
    """A worker's own limit is up to a tenth below the limit, and never above it."""
    monkeypatch.undo()
    drawn = [recycling._Seen().share for _ in range(1000)]  # noqa: SLF001 - the room's own test
    assert 0.9 <= min(drawn) < 0.92
    assert 0.98 < max(drawn) <= 1.0


def test_one_at_a_time_over_the_whole_pool(world: World) -> None:
    """If all workers have reached a limit, they are replaced one after the other, the farthest beyond first."""
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
    """At most as many workers as there should be are stopping at a time, so memory is bounded."""
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
    """A failed replacement leaves the old worker; it is tried again after pauses that double, until one succeeds."""
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
    """If workers reach max_requests at once, a few requests a second do not become as many new processes."""
    pool = world.started(2, pool={"max_requests": 5})
    for _ in range(60):
        for each in world.alive:
            each.answers(5)
        world.advance(1.0)
        world.settle()
    assert len(world.made) - 2 <= 7
    assert "workers cannot be replaced so often" in pool.snapshot().trouble


def test_lives_that_are_shorter_than_it_takes_to_replace_all(world: World, memory: Memory) -> None:
    """A new worker takes 6 s to be ready, two take 12 s: workers must not reach a limit within 10 s."""
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
    """A worker at 1.3 times the limit, whose replacement takes long, is named once in log and status."""
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
    """A reload with other limits ends the pauses and the warning."""
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
    """If memory cannot be read, the log says once that max_memory has no effect; other limits hold."""
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
    """If a worker ends while its memory is read, nothing is logged."""
    memory.every, memory.fault = 200.0, ProcessLookupError(3, "No such process")
    started(world, max_memory="150MiB")
    assert "cannot read" not in caplog.text


def test_no_thread_for_a_reading(
    world: World, memory: Memory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started for a reading, the log says so, and it is tried again."""

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
    """A drain breaks off a replacement; after the resume it begins again."""
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
    """A reload breaks off a replacement, and no other worker is started for a limit."""
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
    """Between two steps of a reload, no worker is replaced for a limit."""
    pool = started(world, 2, max_requests=10)
    monkeypatch.setattr(world.worker(0), "send", lambda *_: True)  # it does not report that it has closed its listeners
    world.worker(1).answers(10)
    pool.renew(pool_kit.configuration(2, pool={"max_requests": 10}), only_configuration=False)
    world.settle()
    world.advance(0.6)
    assert [each.generation for each in world.made] == [1, 1, 2]
    world.advance(1.0)
    assert [each.generation for each in world.made] == [1, 1, 2, 2]


def test_a_worker_that_leaves_while_a_configuration_comes(world: World) -> None:
    """A worker that is stopping need not take a new configuration; its replacement has it, and the reload succeeds."""
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
    """If a worker dies when it gets a new configuration, the reload fails."""
    pool = started(world, 1, max_requests=10)
    pool.renew(pool_kit.configuration(1), only_configuration=True)
    world.worker(0).dies()
    world.settle()
    [over] = [each for each in world.events if isinstance(each, Renewed)]
    assert "is gone" in str(over.error)


def test_a_canary_is_waited_for(world: World) -> None:
    """While the first new worker of a reload has its canary time, no worker is replaced for a limit."""
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
    """A replacement for a limit has no canary time: the old worker stops as soon as the new one is ready."""
    pool = started(world, 1, max_requests=10, canary="9s")
    due(world, pool)
    world.advance(1.0)
    world.settle()
    assert len(world.alive) == 1


def test_none_while_a_place_is_empty(world: World) -> None:
    """While a slot is empty, no worker is replaced for a limit: one that serves might be lost for a broken app."""
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
    """If the old worker dies before it is replaced, the new one takes the slot; that counts as a death."""
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
    """If the slot is removed meanwhile, both of its workers stop, and the others go on."""
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
    """While `scale` starts workers, no worker is replaced for a limit."""
    pool = started(world, 1, max_requests=10)
    pool.scale(2, lambda _: None)
    due(world, pool)
    world.advance(2.0)
    assert [each.slot for each in world.made] == [0, 1]
    world.settle()
    world.advance(1.0)
    assert [each.slot for each in world.made] == [0, 1, 0]


def test_none_in_a_stop(world: World) -> None:
    """A stop ends a replacement, and no other one begins."""
    pool = started(world, 1, max_requests=10)
    due(world, pool)
    world.advance(1.0)
    pool_kit.stop(world, pool, StopReason("signal", "SIGTERM"))
    assert world.alive == []
    world.advance(5.0)
    assert len(world.made) == 2
