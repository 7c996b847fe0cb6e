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
    """The service is ready when all workers are, not with the first one."""
    begun(world)
    for _ in range(2):
        world.worker(0).step()
        world.run()
    assert world.events == []
    world.settle()
    assert world.events == [Ready()]


def test_ready_when_time_is_over_and_one_is(world: World) -> None:
    """At the start timeout the service is ready if one worker is; the other one is still started."""
    begun(world, pool={"start_timeout": "10s"})
    for _ in range(2):
        world.worker(1).step()
        world.run()
    world.advance(9.0)
    assert world.events == []
    world.advance(2.0)
    assert world.events == [Ready()]


def test_none_of_the_first_generation(world: World) -> None:
    """If no worker can become ready, the start fails with the first error, and at once."""
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
    """The log has the error of a failed worker once, whether another one was ready before or not."""
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
    """If no process can be started, the start fails, and says what is missing."""
    world.no_more = True
    begun(world)
    [failed] = world.events
    assert isinstance(failed, Failed)
    assert "there is no memory" in str(failed.error)


def test_a_start_that_is_late_says_where_its_workers_are(world: World) -> None:
    """At the start timeout, the error names the first hanging worker and has its stacks."""
    begun(world, pool={"start_timeout": "10s"})
    world.advance(10.6)
    world.settle()
    [failed] = world.events
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, AppError)
    assert "it was not ready after 10s (pool.start_timeout)" in str(failed.error)
    assert failed.error.details == "File shop.py, line 1 in slow"


def test_what_failed_in_a_start_that_succeeds_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """In a start that succeeds, each failure is logged once: the first one when success is certain, others at once."""
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
    """When the last worker is gone the service is not ready, and the log says so once; a new worker ends that."""
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
    """One worker whose loop turns is enough for the watchdog; without any the service does not answer."""
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
    """A death is logged with each request that was read and the number of connections; counts do not fall."""
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
    """A worker that stops by itself counts as one death, with its requests once it is gone."""
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
    """A worker that is loading gets a new log level once its app is loaded."""
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
    """The end of a worker that was told to stop is not a death; any other end is, whatever its exit code."""
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
    """A drain is over when the last worker has reported and the listeners are closed; the reports are added."""
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
    """A worker that dies in a drain counts its requests as cut, with the reason; the drain does not wait for it."""
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
    """A worker that hangs in a drain is killed soon after the deadline, and does not delay a resume."""
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
    """After a resume, a worker that had not reported is not killed."""
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
    """If a resume comes before the workers were told of a drain, they are not told to drain."""
    pool = world.started(1)
    drain = pool.begin_drain(5.0, announce=0.0)
    assert pool.may_resume
    pool.resume()
    world.settle()
    assert drain.report is None
    assert not any(isinstance(each, say.DrainNow) for each in world.worker(0).told)
    assert world.worker(0).phase is Phase.READY


def test_a_drain_a_resume_and_a_drain_at_once(world: World) -> None:
    """A drain, a resume and a drain before the workers are told lead to one drain, with the second one's time."""
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
    """Workers whose listeners are open do not get copies again, which would keep listeners open later."""
    pool = world.started(1, [listener])
    pool.begin_drain(5.0, announce=0.0)
    assert list(pool.resume()) == [listener]
    assert listener.socket.fileno() >= 0
    world.settle()
    assert not any(isinstance(each, say.Resume) for each in world.worker(0).told)


def test_the_end_of_a_drain_that_was_undone_is_not_that_of_the_next(world: World) -> None:
    """A report that comes before a worker has closed its new listeners belongs to an old drain, and is ignored."""
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
    """After a resume, a worker without the configuration in force gets it."""
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
    """A worker that dies while the service is drained is replaced by one without listeners, until the resume."""
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
    """A worker that dies in a stop is in the record, with how it died; its requests are cut, and it is not replaced."""
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
    """A round calls `over` once, with one reply for each worker, in the order in which they were asked."""
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
    """If a round is given up, missing answers are errors that name the worker; later answers are ignored."""
    world.started(2)
    made, told, over = asked(world.made)
    told[0]("first", None)
    made.give_up()
    told[1]("late", None)
    [[_, missing]] = over
    assert isinstance(missing.error, FlaskdError)
    assert "worker 1" in str(missing.error)


def test_what_a_worker_has_in_flight_that_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a worker that does not answer are shown with the others, and why they have no stack."""
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
    """The plan lists what the exit of each worker waits for, whichever worker is asked first."""
    pool = world.started(2)
    for worker, waits in (world.worker(0), []), (world.worker(1), ["thread/mailer"]):

        def answers(_what: str, answered: Any, waits: list[str] = waits, **_: Any) -> None:
            answered(overview(Plan(), Frame.of(configuration().values), waits), None)

        monkeypatch.setattr(worker, "ask_for", answers)
    plan = pool.plan(configuration())
    assert plan["exit"] == ["worker 1: thread/mailer"]
    assert plan["text"].splitlines()[-1] == "the exit waits at most 5s for: worker 1: thread/mailer"


def test_a_round_without_workers_is_over(world: World) -> None:
    """A round without workers is over at once."""
    made, _, over = asked([])
    assert over == [[]]
    assert made.wait(0) == []


# --- sums ---------------------------------------------------------------------------------------------------------------


def test_the_youngest_beat_counts(world: World) -> None:
    """`silent_for` is that of the worker that turned last."""
    pool = world.started(2)
    world.hung = set(world.alive)
    world.advance(3.0)
    world.worker(1).board.turned(time.monotonic())
    assert pool.silent_for < 1
    world.advance(3.0)
    assert pool.silent_for == pytest.approx(3.0, abs=0.5)


def test_a_request_in_a_worker_that_leaves_keeps_the_service_from_being_idle(world: World) -> None:
    """A request in a worker that is stopping keeps the service from being idle until that worker's end."""
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
