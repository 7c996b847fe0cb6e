"""All workers together: drains, questions to several at once, sums, starts and stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pool_kit
import pytest
from pool_kit import FakeWorker, World, configuration

from flaskd.cleanup import Fate, Frame, Plan, StepResult, overview
from flaskd.errors import AppError, FlaskdError
from flaskd.ledger import DrainReport
from flaskd.lifecycle import StopReason
from flaskd.pool import messages as say
from flaskd.pool import view
from flaskd.pool.handle import Phase
from flaskd.pool.questions import Reply, Round
from flaskd.present import thread_lines
from flaskd.serving.api import Drained, Failed, Ready
from flaskd.sockets import Address, Listener


@pytest.fixture
def world() -> Iterator[World]:
    with pool_kit.world() as made:
        yield made


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener.bind(Address("127.0.0.1", 0))
    made.listen(16)
    yield made
    made.close()


# --- the start ----------------------------------------------------------------------------------------------------------


def begun(world: World, workers: int = 2, **keys: Any) -> Any:
    pool = world.pool()
    pool.start(configuration(workers, **keys))
    world.run()
    return pool


def test_ready_when_all_are(world: World) -> None:
    """Not with the first of them."""
    begun(world)
    for _ in range(2):
        world.worker(0).step()
        world.run()
    assert world.events == []
    world.settle()
    assert world.events == [Ready()]


def test_ready_when_time_is_over_and_one_is(world: World) -> None:
    """The other goes on to be started."""
    begun(world, pool={"start_timeout": "10s"})
    for _ in range(2):
        world.worker(1).step()
        world.run()
    world.advance(9.0)
    assert world.events == []
    world.advance(2.0)
    assert world.events == [Ready()]


def test_none_of_the_first_generation(world: World) -> None:
    """The start fails with the first error, at once when none is left that could become ready."""
    begun(world)
    world.worker(0).fails()
    world.run()
    assert world.events == []
    world.worker(1).dies()
    world.run()
    [failed] = world.events
    assert isinstance(failed, Failed)
    assert "cannot load shop:app" in str(failed.error)
    world.advance(100.0)
    assert world.alive == []


@pytest.mark.parametrize("first_fails", [True, False])
def test_one_of_the_first_generation_fails(world: World, caplog: pytest.LogCaptureFixture, first_fails: bool) -> None:
    """The log says why, once each time, whether it failed before another one was ready or after that."""
    begun(world, pool={"start_timeout": "60s"})
    if first_fails:
        world.worker(0).fails()
    while world.worker(1).step():
        world.run()
    if not first_fails:
        world.worker(0).fails()
    world.run()
    assert caplog.text.count("cannot load shop:app") == 1
    world.advance(1.0)
    world.worker(0).fails()
    world.run()
    assert caplog.text.count("cannot load shop:app") == 2


def test_no_process_for_the_first_generation(world: World) -> None:
    """The start fails, and says what there is none of."""
    world.no_more = True
    begun(world)
    [failed] = world.events
    assert isinstance(failed, Failed)
    assert "there is no memory" in str(failed.error)


def test_a_start_that_is_late_says_where_its_workers_are(world: World) -> None:
    """The first one that hangs, with the stacks of its threads."""
    begun(world, pool={"start_timeout": "10s"})
    world.advance(10.6)
    world.settle()
    [failed] = world.events
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, AppError)
    assert "it was not ready after 10s (pool.start_timeout)" in str(failed.error)
    assert failed.error.traceback_text == "File shop.py, line 1 in slow"


def test_what_failed_in_a_start_that_succeeds_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Each failure once: the first when it is known that the start does not fail for it, others at once."""
    begun(world, pool={"start_timeout": "10s"})
    world.worker(0).fails()
    for _ in range(2):
        world.worker(1).step()
        world.run()
    world.advance(1.1)
    assert caplog.text.count("cannot load shop:app") == 1
    world.worker(0).fails()
    world.run()
    assert caplog.text.count("cannot load shop:app") == 2
    world.no_more = True
    world.advance(11.0)
    assert world.events == [Ready()]
    assert caplog.text.count("cannot load shop:app") == 2


# --- ready, and what is shown -------------------------------------------------------------------------------------------


def test_without_a_worker_it_is_not_ready(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Which the log says once, when the last one is gone; with the next one it is ready."""
    pool = world.started(2)
    assert (pool.unready, pool.answers(0)) == ("", True)
    world.worker(0).dies()
    world.run()
    assert pool.unready == ""
    world.worker(1).dies()
    world.run()
    assert (pool.unready, pool.answers(0)) == ("no worker is ready", True), "another one is being started"
    world.no_more = True
    for each in world.alive:
        each.dies()
    world.run()
    assert (pool.unready, pool.answers(0)) == ("no worker is ready", False)
    world.no_more = False
    world.advance(31.0)
    assert caplog.text.count("no worker is ready") == 1
    world.settle()
    assert (pool.unready, pool.answers(0)) == ("", True)


def test_the_watchdog_wants_one_worker_that_beats(world: World) -> None:
    """One is enough; without any the service does not answer, nor does it turn."""
    pool = world.started(2)
    world.hung = {world.worker(0)}
    world.advance(3.0)
    assert pool.answers(0)
    assert pool.turns(0)
    world.hung = set(world.alive)
    world.advance(6.0)
    assert not pool.answers(0)
    assert not pool.turns(0)


def test_a_death_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Each request that it had read is named, its connections are counted, and counts do not fall."""
    pool = world.started(2)
    victim = world.worker(1)
    victim.takes("/done")
    victim.finish_all()
    victim.takes("/one")
    victim.takes("/two")
    victim.board.connect(5)
    victim.dies(-11)
    world.run()
    [death] = pool.deaths()
    assert [each["path"] for each in death["cut"]] == ["/one", "/two"]
    assert (death["how"], death["connections"]) == ("it was killed by SIGSEGV", 5)
    now = pool.snapshot()
    assert (now.deaths, now.cut_by_deaths) == (1, 2)
    assert now.tally.outcomes == {"completed": 1, "rejected": 0, "cut": 2, "gone": 0}
    assert "it held 5 connections, and had read 2 requests" in caplog.text
    assert all(any("cut" in each and path in each for each in caplog.messages) for path in ("/one", "/two"))


def test_one_that_stops_by_itself_dies_once(world: World) -> None:
    """It is told when it begins, with what died with it when it is gone."""
    pool = world.started(1)
    worker = world.worker(0)
    worker.takes("/lost")
    worker.says(say.Leaves(StopReason("failure", "the serving thread died")))
    world.run()
    [death] = pool.deaths()
    assert (death["how"], death["cut"]) == ("it stopped by itself: failure: the serving thread died", [])
    worker.dies(1)
    world.settle()
    [death] = pool.deaths()
    assert (death["how"], [each["path"] for each in death["cut"]]) == ("it left with the exit code 1", ["/lost"])
    now = pool.snapshot()
    assert (now.deaths, now.cut_by_deaths) == (1, 1)


def test_a_log_level_waits_for_what_a_worker_hears_first(world: World) -> None:
    """One that is being started is told once its app is loaded: its first message says what it is."""
    pool = world.started(1)
    pool.restart(None, lambda _: None)
    world.run()
    old, new = world.made
    pool.set_log_level("debug")
    assert [type(each) for each in new.told] == [say.Begin]
    assert say.LogLevel("debug") in old.told
    world.settle()
    assert say.LogLevel("debug") in new.told


def test_one_that_was_told_to_leave_does_not_die(world: World) -> None:
    """Its end is no accident; one that ends by itself is one, whatever its exit code."""
    pool = world.started(2)
    pool.restart(None, lambda _: None)
    world.settle()
    assert pool.deaths() == []
    world.worker(0).dies(0)
    world.settle()
    assert [each["how"] for each in pool.deaths()] == ["it left with the exit code 0"]


# --- drains -------------------------------------------------------------------------------------------------------------


def report_of(world: World) -> DrainReport:
    [drained] = [each for each in world.events if isinstance(each, Drained)]
    assert drained.drain.report is not None
    return drained.drain.report


def test_a_drain_is_over_when_the_last_worker_has_reported(world: World, listener: Listener) -> None:
    """The listeners are closed when no worker has a copy, its report is that of all."""
    pool = world.started(2, [listener])
    one, other = world.made
    one.takes()
    pool.begin_drain(20.0, announce=0.0)
    world.run()
    one.step()
    world.run()
    assert listener.socket.fileno() >= 0
    other.step()
    world.run()
    assert listener.socket.fileno() < 0
    other.step()
    world.run()
    assert not any(isinstance(each, Drained) for each in world.events)
    one.step()
    world.run()
    assert report_of(world).completed == 1
    assert [each.phase for each in world.made] == [Phase.DRAINED] * 2
    listener.socket = type(listener.socket)()


def test_a_worker_that_dies_in_a_drain_is_in_its_account(world: World) -> None:
    """What it had read is cut, with the reason; the drain does not wait for it."""
    pool = world.started(2)
    one, other = world.made
    one.takes("/lost")
    pool.begin_drain(20.0, announce=0.0)
    world.run()
    for _ in range(2):
        other.step()
        world.run()
    one.dies()
    world.run()
    [cut] = report_of(world).cut
    assert (cut.path, cut.worker, cut.reason) == ("/lost", 0, "its worker is gone: it was killed by SIGKILL")


def test_a_worker_that_hangs_in_a_drain_is_killed(world: World) -> None:
    """Soon after the time that the drain has; what it had read is in the account, and resume is not held up."""
    pool = world.started(2, shutdown={"drain": {"timeout": "5s"}})
    hung, other = world.made
    hung.takes("/hangs")
    pool.begin_drain(5.0, announce=2.0)
    world.run()
    for _ in range(2):
        other.step()
        world.run()
    world.advance(8.0)
    assert not hung.killed_for
    world.advance(1.0)
    assert hung.killed_for == "its drain did not end in time"
    hung.step()
    world.run()
    assert [each.path for each in report_of(world).cut] == ["/hangs"]
    assert pool.may_resume


def test_a_resume_ends_the_time_of_a_drain(world: World) -> None:
    """A worker that had not reported when the drain was undone is not killed for it."""
    pool = world.started(1)
    pool.begin_drain(5.0, announce=0.0)
    world.run()
    worker = world.worker(0)
    worker.step()
    world.run()
    assert pool.may_resume
    pool.resume()
    world.advance(20.0)
    assert world.alive == [worker]
    assert not worker.killed_for


def test_a_resume_at_once_after_a_drain(world: World) -> None:
    """Before the workers were told: they are not told to drain any more."""
    pool = world.started(1)
    drain = pool.begin_drain(5.0, announce=0.0)
    assert pool.may_resume
    pool.resume()
    world.settle()
    assert drain.report is None
    assert not any(isinstance(each, say.DrainNow) for each in world.worker(0).told)
    assert world.worker(0).phase is Phase.READY


def test_a_drain_a_resume_and_a_drain_at_once(world: World) -> None:
    """Before the workers were told of the first: they drain once, and none is killed for that one's time."""
    pool = world.started(2)
    pool.begin_drain(5.0, announce=0.0)
    pool.resume()
    pool.begin_drain(5.0, announce=0.0)
    world.run()
    assert [sum(isinstance(each, say.DrainNow) for each in worker.told) for worker in world.made] == [1, 1]
    world.settle()
    assert pool.may_resume
    pool.resume()
    world.advance(20.0)
    assert [(each.killed_for, each.phase) for each in world.made] == [("", Phase.READY)] * 2


def test_no_listeners_for_workers_that_have_them(world: World, listener: Listener) -> None:
    """Copies that no worker accepts from would keep the listeners, which are open, from being closed later."""
    pool = world.started(1, [listener])
    pool.begin_drain(5.0, announce=0.0)
    assert list(pool.resume()) == [listener]
    assert listener.socket.fileno() >= 0
    world.settle()
    assert not any(isinstance(each, say.Resume) for each in world.worker(0).told)


def test_the_end_of_a_drain_that_was_undone_is_not_that_of_the_next(world: World) -> None:
    """What a worker says before it has closed its listeners anew is late; the next drain waits for what is in hand."""
    pool = world.started(1)
    worker = world.worker(0)
    for over_at_once in (False, True):
        pool.begin_drain(20.0, announce=0.0)
        world.run()
        assert worker.step()
        world.run()
        pool.resume()
        worker.to_do.clear()
        if over_at_once:
            pool.begin_drain(20.0, announce=0.0)
            world.run()
        worker.says(say.DrainOver(DrainReport()))
        world.run()
    worker.takes("/slow")
    assert worker.step()  # it has closed its listeners
    world.run()
    assert not any(isinstance(each, Drained) for each in world.events)
    worker.step()
    world.run()
    assert report_of(world).completed == 1


def test_a_configuration_that_a_drain_broke_off(world: World) -> None:
    """Where a worker has it not yet, or had another one, it gets the one in force with the resume."""
    pool = world.started(2)
    config = configuration(2)
    pool.renew(config, only_configuration=True)
    world.run()
    pool.begin_drain(5.0, announce=0.0)
    for each, error in zip(world.made, (None, FlaskdError("the reload was broken off by a drain")), strict=True):
        [order] = [each for each in each.told if isinstance(each, say.Renew)]
        each.to_do.clear()
        each.says(say.Answer(order.number, error=error))
    world.run()
    assert [each.configuration is config for each in world.made] == [True, False]
    for each in world.made:
        each.to_do[:] = [lambda each=each: each._drained()]  # type: ignore[misc]  # noqa: SLF001 - of the kit
    world.settle()
    pool.resume()
    world.settle()
    assert len({id(each.configuration) for each in world.made}) == 1


def test_a_crash_while_drained(world: World) -> None:
    """The slot is filled again; the new worker has no listeners before the resume."""
    pool = world.started(1)
    pool.begin_drain(5.0, announce=0.0)
    world.settle()
    world.worker(0).dies()
    world.settle()
    new = world.worker(0)
    assert new.phase is Phase.LOADED
    assert not any(isinstance(each, say.Serve) for each in new.told)
    assert pool.may_resume
    pool.resume()
    world.settle()
    assert new.phase is Phase.READY


# --- the stop -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_in_the_stop_is_in_its_record(world: World) -> None:
    """With how it died, what it had read is cut; nothing is started in its place."""
    pool = world.started(2)
    victim = world.worker(1)
    victim.takes("/lost")

    def die(message: Any) -> None:
        if isinstance(message, say.StopNow):
            victim.to_do[:] = [lambda: victim.dies(-11)]

    send = victim.send
    victim.send = lambda message, descriptors=(): (send(message, descriptors), die(message))[0]  # type: ignore[method-assign]
    pool_kit.stop(world, pool, StopReason("signal", "SIGTERM"))
    account = pool.end(())
    assert [each.path for each in account.report.cut] == ["/lost"]
    assert not account.report.clean
    assert [each.get("died") for each in account.record["workers"]] == [None, "it was killed by SIGSEGV"]
    assert len(world.made) == 2


def test_the_steps_of_all_workers_are_shown_until_the_end(world: World) -> None:
    """Those that run, and those that are over, also of a worker that has ended before the others."""
    pool = world.started(2)
    first = world.worker(0)
    shown: list[Any] = []

    def cleans_up(message: Any) -> None:
        if isinstance(message, say.StopNow):
            result = StepResult("close-db", "close", "sqlalchemy.dispose", Fate.OK)
            first.to_do[1:1] = [
                lambda: first.says(say.StepBegins(5.0, ("close-db",))),
                lambda: shown.append(pool.snapshot()),
                lambda: first.says(say.StepOver(result)),
                lambda: first.says(say.StepBegins(0.0)),
            ]

    send = first.send
    first.send = lambda message, descriptors=(): (send(message, descriptors), cleans_up(message))[0]  # type: ignore[method-assign]
    pool_kit.stop(world, pool, StopReason("signal", "SIGTERM"))
    during, after = shown[0], pool.snapshot()
    assert (during.cleanup, during.steps) == (("close-db (worker 0)",), {})
    assert (after.cleanup, {name: step["fate"] for name, step in after.steps.items()}) == (
        (),
        {"close-db (worker 0)": "ok"},
    )


# --- questions ----------------------------------------------------------------------------------------------------------


def asked(workers: list[FakeWorker]) -> tuple[Round, list[Any], list[list[Reply]]]:
    told: list[Any] = []
    over: list[list[Reply]] = []
    return Round(workers, lambda _, answered: told.append(answered), over.append), told, over


def test_a_round_is_over_with_the_last_answer(world: World) -> None:
    """Once, with one reply for each worker, in the order in which they were asked."""
    world.started(2)
    made, told, over = asked(world.made)
    told[1]("second", None)
    told[1]("again", None)
    assert over == []
    told[0]("first", None)
    made.give_up()
    assert [[each.value for each in replies] for replies in over] == [["first", "second"]]
    assert made.wait(0) == over[0]


def test_who_does_not_answer_is_named(world: World) -> None:
    """A round that is given up has an error for it; what comes later changes nothing."""
    world.started(2)
    made, told, over = asked(world.made)
    told[0]("first", None)
    made.give_up()
    told[1]("late", None)
    [[_, missing]] = over
    assert isinstance(missing.error, FlaskdError)
    assert "worker 1" in str(missing.error)


def test_what_a_worker_has_in_flight_that_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown with the others, oldest first, and why it has no stack; so is the worker in the place of its threads."""
    monkeypatch.setattr(view, "_PATIENCE", 0.0)
    pool = world.started(2)
    silent, other = world.worker(0), world.worker(1)
    silent.takes("/hangs")
    other.takes("/runs")
    [mine] = [each for each in pool.requests() if each.worker == 1]

    def answers(what: str, answered: Any, **_: Any) -> None:
        answered(
            {"requests": [replace(mine, stack="in shop.py")], "threads": [{"name": "MainThread", "id": 9}]}[what], None
        )

    monkeypatch.setattr(other, "ask_for", answers)
    assert [(each.path, each.stack) for each in pool.requests(stacks=True)] == [
        ("/hangs", f"{silent} does not answer"),
        ("/runs", "in shop.py"),
    ]
    assert [(each["worker"], each["name"]) for each in pool.threads()] == [
        (0, f"{silent} does not answer"),
        (1, "MainThread"),
    ]
    assert thread_lines(pool.threads()[:1]) == [f"{silent} does not answer"]


def test_the_plan_has_what_the_exit_of_each_worker_waits_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that one worker has started is in it, whichever worker is asked first."""
    pool = world.started(2)
    for worker, waits in (world.worker(0), []), (world.worker(1), ["thread/mailer"]):

        def answers(_what: str, answered: Any, waits: list[str] = waits, **_: Any) -> None:
            answered(overview(Plan(), Frame.of(configuration().values), waits), None)

        monkeypatch.setattr(worker, "ask_for", answers)
    plan = pool.plan(configuration())
    assert plan["exit"] == ["worker 1: thread/mailer"]
    assert plan["text"].splitlines()[-1] == "the exit waits at most 5s for: worker 1: thread/mailer"


def test_a_round_without_workers_is_over(world: World) -> None:
    """Nobody is asked, and nobody waits."""
    made, _, over = asked([])
    assert over == [[]]
    assert made.wait(0) == []


# --- sums ---------------------------------------------------------------------------------------------------------------


def test_the_youngest_beat_counts(world: World) -> None:
    """A service is as silent as the worker that turned last."""
    pool = world.started(2)
    world.hung = set(world.alive)
    world.advance(3.0)
    world.worker(1).board.turned(time.monotonic())
    assert pool.silent_for < 1
    world.advance(3.0)
    assert pool.silent_for == pytest.approx(3.0, abs=0.5)


def test_a_request_in_a_worker_that_leaves_keeps_the_service_from_being_idle(world: World) -> None:
    """However late that worker notes it; from its end on the service is idle."""
    pool = world.started(1)
    old = world.worker(0)
    old.takes("/export")
    old.board.use(time.monotonic())
    pool.restart(0, lambda _: None)
    world.run()
    new = world.worker(0)
    while new.step():
        world.run()
    assert (old.phase, new.phase) == (Phase.LEAVING, Phase.READY)
    world.advance(60.0)
    assert pool.sums.idle_for == 0.0
    old.finish_all()
    old.board.use(time.monotonic())
    old.dies(0)
    world.run()
    world.advance(5.0)
    assert 5.0 <= pool.sums.idle_for < 10.0
