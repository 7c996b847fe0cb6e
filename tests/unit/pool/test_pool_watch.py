"""Workers that hang: they are noticed, logged with their stacks, and replaced; and what is not their fault."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator

import pool_kit
import pytest
from pool_kit import FakeWorker, World

from flaskd.pool import messages as say
from flaskd.pool.handle import Phase


@pytest.fixture
def world() -> Iterator[World]:
    with pool_kit.world() as made:
        yield made


def beat(world: World, seconds: float, *, without: FakeWorker | None = None, at: Hashable | None = None) -> None:
    """Let seconds pass in which the loops of all workers turn, except one."""
    world.hung = {without} if without is not None else set()
    for _ in range(int(seconds)):
        for each in set(world.alive) - world.hung:
            each.board.look(moved=0, stuck_at=at, background=0, lost=0)
        world.advance(1.0)


def test_a_loop_that_does_not_turn(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """After ten seconds without a turn its stacks are logged, and it is replaced."""
    world.started(2)
    hung = world.worker(0)
    beat(world, 8, without=hung)
    assert "hangs" not in caplog.text
    beat(world, 4, without=hung)
    assert hung.asked_for_stacks == 1
    assert "its loop has not turned for" in caplog.text
    assert "line 1 in slow" in caplog.text
    assert [each.phase for each in world.alive] == [Phase.READY, Phase.READY, Phase.LOADING]
    new = world.worker(0)
    new.step()
    world.run()
    new.step()
    world.run()
    assert new.phase is Phase.READY
    assert hung.phase is Phase.LEAVING
    assert isinstance(hung.told[-1], say.StopNow)
    assert hung.told[-1].leave


def test_one_that_does_not_leave_is_killed_last(world: World) -> None:
    """A hanging worker that was replaced is killed only after its stop's deadline."""
    world.started(1, shutdown={"deadline": "5s"})
    hung = world.worker(0)
    beat(world, 12, without=hung)
    new = world.worker(0)
    assert new is not hung
    for _ in range(2):
        new.step()
        world.run()
    beat(world, 5, without=hung)
    assert not hung.killed_for
    beat(world, 2, without=hung)
    assert "did not end in time" in hung.killed_for


def test_a_replacement_that_fails_is_tried_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A failed replacement is tried again every 30 seconds; the log names the hanging worker once."""
    world.started(1)
    hung = world.worker(0)
    beat(world, 12, without=hung)
    world.worker(0).fails()
    beat(world, 10, without=hung)
    assert world.alive == [hung]
    beat(world, 25, without=hung)
    assert len(world.alive) == 2
    assert caplog.text.count("hangs:") == 1


def test_threads_that_are_all_in_the_same_requests(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond pool.stuck_after the worker is replaced; a request that ends or moves begins the time anew."""
    world.started(1, pool={"stuck_after": "5s"})
    beat(world, 4, at="one")
    beat(world, 4, at="two")
    beat(world, 4, at=None)
    assert len(world.made) == 1
    beat(world, 8, at="two")
    assert len(world.made) == 2
    assert "all of its threads have been in the same requests for" in caplog.text


def test_without_stuck_after_threads_may_hang(world: World) -> None:
    """Without pool.stuck_after, busy threads never count as hanging."""
    world.started(1)
    beat(world, 100, at="one")
    assert len(world.made) == 1


def test_a_service_that_was_stopped_as_a_whole(world: World) -> None:
    """If the supervisor's own look is late, the time of all workers begins anew."""
    world.started(2, pool={"stuck_after": "5s"})
    beat(world, 3, at="one")
    world.hung = set(world.alive)  # the supervisor looks before they turn
    world.sleep(100.0)
    world.run()
    beat(world, 3, at="one")
    assert len(world.made) == 2
    beat(world, 9, without=world.made[0])
    assert len(world.made) == 3, "and still is found out when it hangs"


def test_one_that_comes_to_itself_may_hang_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Each time a worker hangs is logged; while its replacement is under way, no other one is begun."""
    world.started(1)
    hung = world.worker(0)
    beat(world, 12, without=hung)
    beat(world, 2)
    beat(world, 12, without=hung)
    assert caplog.text.count("hangs:") == 2
    assert len(world.made) == 2


def test_a_drained_worker_is_looked_at_when_it_serves_again(world: World) -> None:
    """A drained worker does not count as hanging; after the resume its time begins anew."""
    pool = world.started(1)
    pool.begin_drain(5.0, announce=0.0)
    world.settle()
    drained = world.worker(0)
    beat(world, 20, without=drained)
    assert len(world.made) == 1
    assert pool.may_resume
    pool.resume()
    beat(world, 12, without=drained)
    assert len(world.made) == 2


def test_a_worker_whose_wire_has_ended(world: World) -> None:
    """A worker that has closed its wire has the deadline of a stop to end, and is killed then."""
    world.started(1, shutdown={"deadline": "5s"})
    worker = world.worker(0)
    worker.deaf_since = time.monotonic()
    beat(world, 4)
    assert not worker.killed_for
    beat(world, 3)
    assert "connection to the supervisor" in worker.killed_for


def test_nothing_is_replaced_in_a_stop(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """In a stop no worker is replaced, because each has a deadline."""
    pool = world.started(1)
    hung = world.worker(0)
    caplog.set_level(logging.ERROR)
    pool_kit.slots_of(pool).end()
    beat(world, 15, without=hung)
    assert world.made == [hung]
