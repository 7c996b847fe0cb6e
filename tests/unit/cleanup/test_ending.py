"""The actions on live objects, with the real libraries where no server is needed; tests/live/ has the others."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import threading
import types

import httpx
import psycopg_pool
import pytest
import redis
import requests
import sentry_sdk
import sqlalchemy
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.schedulers.base import STATE_PAUSED, STATE_RUNNING
from cleanup_kit import hanging, in_background, run, runner
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from patience import PATIENCE

from flaskd.cleanup import ACTIONS, Fate, Plan, Step, action_specs, build_plan, discover, pause_all, resume_all
from flaskd.config import Phase, load_mapping
from flaskd.errors import ConfigError


def perform(use, *things, timeout=PATIENCE, deadline=PATIENCE, **fields):
    """Run one action on what discovery finds among these objects, or on its target; fields are written as in a file."""
    action = ACTIONS[use]
    step = Step(
        "it", action, action.fields.model_validate(fields), action.default_phase, timeout, found=discover(None, things)
    )
    return run(step, deadline=deadline)["it"]


@pytest.fixture
def module(monkeypatch):
    """Give a module that can be imported as `live_module`."""
    found = types.ModuleType("live_module")
    monkeypatch.setitem(sys.modules, "live_module", found)
    return found


@pytest.fixture
def engines(tmp_path):
    """Give two engines on SQLite, each with a connection in its pool."""
    made = [sqlalchemy.create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in ("one", "two")]
    for engine in made:
        engine.connect().close()
    assert [engine.pool.checkedin() for engine in made] == [1, 1]
    yield made
    for engine in made:
        engine.dispose()


def test_dispose_closes_every_engine(engines):
    """The pooled connections of all engines are closed; doing it again does no harm."""
    for _ in range(2):
        result = perform("sqlalchemy.dispose", *engines)
        assert (result.fate, result.detail) == (Fate.OK, "Engine-1, Engine-2")
        assert [engine.pool.checkedin() for engine in engines] == [0, 0]


def test_one_that_cannot_keeps_none_of_the_others(engines, monkeypatch):
    """An engine that raises is named, and the others are closed all the same."""

    def refuse():
        raise RuntimeError("in use")

    monkeypatch.setattr(engines[0], "dispose", refuse)
    result = perform("sqlalchemy.dispose", *engines)
    assert (result.fate, result.why) == (Fate.FAILED, "Engine-1: RuntimeError: in use")
    assert engines[1].pool.checkedin() == 0


def test_the_only_one_that_cannot_shows_its_traceback(engines, monkeypatch):
    """If there is one object, the step's error is that object's own exception."""

    def refuse():
        raise RuntimeError("in use")

    monkeypatch.setattr(engines[0], "dispose", refuse)
    result = perform("sqlalchemy.dispose", engines[0])
    assert (result.fate, result.why) == (Fate.FAILED, "RuntimeError: in use")
    assert "in refuse" in result.trace


def test_one_that_hangs_keeps_none_of_the_others(engines, monkeypatch):
    """An engine that hangs is named with its stack, and the others are closed all the same."""
    with hanging() as hang:

        def dispose_for_ever():
            hang(None)

        monkeypatch.setattr(engines[0], "dispose", dispose_for_ever)
        result = perform("sqlalchemy.dispose", *engines, timeout=0.2)
        assert result.fate is Fate.TIMED_OUT
        assert result.why == "not done within its timeout of 200ms; not over: Engine-1"
        assert "in dispose_for_ever" in result.trace
        assert engines[1].pool.checkedin() == 0


def test_a_target_is_what_is_ended_and_nothing_else(module, engines):
    """With a target, found objects are left alone; a collection stands for its items, None for no object."""
    module.db = types.SimpleNamespace(engine=engines[0], later=None)
    assert perform("sqlalchemy.dispose", *engines, target="live_module:db.engine").detail == "live_module:db.engine"
    assert [engine.pool.checkedin() for engine in engines] == [0, 1]
    assert perform("sqlalchemy.dispose", *engines, target="live_module:db.later").detail == "there is nothing to end"
    module.all = {"one": engines[0], "two": engines[1]}
    assert perform("sqlalchemy.dispose", target=["live_module:all"]).fate is Fate.OK
    assert [engine.pool.checkedin() for engine in engines] == [0, 0]


def test_a_target_that_is_something_else_fails(module):
    """An object without the needed method fails the step, with the object's name."""
    module.db = "not an engine"
    result = perform("sqlalchemy.dispose", target="live_module:db")
    assert (result.fate, result.why) == (Fate.FAILED, "AttributeError: 'str' object has no attribute 'dispose'")


def test_nothing_to_end_is_no_failure():
    """If discovery finds nothing, the step succeeds."""
    for use, action in ACTIONS.items():
        if action.takes and use != "threads.stop":
            assert (use, perform(use).why, perform(use).detail) == (use, "", "there is nothing to end")


def test_where_discovery_has_not_run_the_step_looks_itself(monkeypatch):
    """If discovery has not run, the step runs it itself; a step whose policy names its target does not."""
    looked = []
    executor = concurrent.futures.ThreadPoolExecutor()

    def look(app):
        looked.append(app)
        return discover(app, [executor])

    monkeypatch.setattr("flaskd.cleanup.attempt.discover", look)
    action = ACTIONS["executor.stop"]
    steps = [
        Step(name, action, action.fields(target=target), action.default_phase, PATIENCE)
        for name, target in (("named", ["sys:stderr.nothing"]), ("found", []))
    ]
    results = run(*steps)
    assert results["named"].fate is Fate.FAILED
    assert results["found"].detail == "ThreadPoolExecutor-1"
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)
    assert looked == [None]


def test_targets_are_looked_up_before_the_stop(module):
    """The daemon does not start if targets do not exist; the fault names each policy."""
    policies = {
        "gone": {"use": "redis.close", "with": {"target": ["live_module:here", "live_nowhere:client"]}},
        "asks": {"use": "threads.stop", "with": {"stop": "live_module:nobody"}},
    }
    module.here = 1
    plan = build_plan(load_mapping({"cleanup": {"policies": policies}}, actions=action_specs()).values.cleanup)
    with pytest.raises(ConfigError) as caught:
        plan.prepare()
    first, second = sorted(str(caught.value).splitlines())
    assert first.startswith('cleanup.policies.asks: cannot import target "live_module:nobody": AttributeError')
    assert second.startswith('cleanup.policies.gone: cannot import target "live_nowhere:client": ModuleNotFoundError')


def test_psycopg_pool_close_is_final():
    """The pool is closed, and closing it again does no harm."""
    pool = psycopg_pool.ConnectionPool("host=/nonexistent", min_size=0, max_size=1, open=True)
    try:
        assert perform("psycopg_pool.close", pool).fate is Fate.OK
        assert pool.closed
        assert perform("psycopg_pool.close", pool).detail == "there is nothing to end"
    finally:
        pool.close()


class Connection(redis.Connection):
    """A redis connection without a server, which notes that it was closed."""

    closed = False

    def connect(self):
        pass

    def can_read(self, *_):
        return False

    def disconnect(self, *_):
        self.closed = True


def test_redis_close_takes_a_shared_pool_along():
    """The action also closes a pool that a client was given, which the client leaves open, and a pool alone."""
    pools = [redis.ConnectionPool(connection_class=Connection) for _ in range(2)]
    connections = [pool.get_connection() for pool in pools]
    for pool, connection in zip(pools, connections, strict=True):
        pool.release(connection)
    client = redis.Redis(connection_pool=pools[0])
    client.close()
    assert not connections[0].closed
    assert perform("redis.close", client, *pools).fate is Fate.OK
    assert [connection.closed for connection in connections] == [True, True]


def test_http_clients_are_closed():
    """Httpx clients and requests sessions are closed."""
    client, session = httpx.Client(), requests.Session()
    closed = []
    session.get_adapter("http://x").close = lambda: closed.append("session")
    assert perform("http_client.close", client, session).detail == "Client-1, Session-1"
    assert client.is_closed
    assert closed == ["session"]


class Job:
    """A job of a scheduler that signals that it runs, and runs until it is released."""

    def __init__(self):
        self.entered = threading.Event()
        self.released = threading.Event()
        self.over = threading.Event()

    def __call__(self):
        self.entered.set()
        self.released.wait(PATIENCE)
        self.over.set()


@pytest.fixture
def scheduler():
    """Give a running scheduler with a job that is running."""
    made, job = BackgroundScheduler(), Job()
    made.add_job(job)
    made.start()
    assert job.entered.wait(PATIENCE)
    yield made, job
    job.released.set()
    if made.running:
        made.shutdown()


def test_apscheduler_pauses_first_and_waits_for_its_job(scheduler, module):
    """The policy pauses the scheduler in the phase announce; in quiesce it waits for running jobs and shuts it down."""
    made, job = scheduler
    module.scheduler = made
    policies = {"jobs": {"use": "apscheduler.stop", "with": {"target": "live_module:scheduler"}}}
    plan = build_plan(load_mapping({"cleanup": {"policies": policies}}, actions=action_specs()).values.cleanup)
    assert [(step.name, str(step.phase)) for step in plan.steps] == [("jobs:pause", "announce"), ("jobs", "quiesce")]
    states = []

    def watch(result):
        states.append((result.name, made.state))
        job.released.set()  # paused: now it may end

    results = run(*plan.steps, on_progress=watch)
    assert {name: each.fate for name, each in results.items()} == {"jobs:pause": Fate.OK, "jobs": Fate.OK}
    assert states[0][0] == "jobs:pause"
    assert job.over.is_set()
    assert not made.running
    assert {each.fate for each in run(*plan.steps).values()} == {Fate.OK}, "a second time there is nothing wrong"


def test_a_scheduler_in_the_middle_of_a_round():
    """Stopping a scheduler whose thread is about to start a job raises nothing in that thread."""
    entered, going, released = threading.Event(), threading.Event(), threading.Event()

    class Store(MemoryJobStore):
        def get_due_jobs(self, now):
            entered.set()
            assert released.wait(PATIENCE)
            return super().get_due_jobs(now)

    class Scheduler(BackgroundScheduler):
        def get_jobs(self, *args, **more):
            going.set()
            return super().get_jobs(*args, **more)

        def shutdown(self, *args, **more):
            going.set()
            super().shutdown(*args, **more)

    faults = []
    threading.excepthook, before = lambda fault: faults.append(fault.exc_value), threading.excepthook
    try:
        made = Scheduler(jobstores={"default": Store()})
        made.add_job(int)
        made.start()
        assert entered.wait(PATIENCE)
        with in_background(lambda: perform("apscheduler.stop", made)) as results:
            assert going.wait(PATIENCE)
            released.set()
        assert results[0].fate is Fate.OK
    finally:
        threading.excepthook = before
    assert faults == []


def test_a_job_that_never_ends_does_not_hold_the_stop(scheduler):
    """shutdown(wait=True) has no timeout: the step's timeout ends the wait, and the stack shows where it hangs."""
    made, job = scheduler
    result = perform("apscheduler.stop", made, timeout=0.2)
    assert result.fate is Fate.TIMED_OUT
    assert "executor.shutdown(wait)" in result.trace
    job.released.set()


def test_an_executor_finishes_what_it_has_taken():
    """Waiting jobs run and are waited for like running ones, and new jobs are refused."""
    job, pool, done = Job(), concurrent.futures.ThreadPoolExecutor(1), []
    pool.submit(job)
    waiting = [pool.submit(done.append, number) for number in range(7)]
    assert job.entered.wait(PATIENCE)
    with in_background(lambda: perform("executor.stop", pool)) as results:
        job.released.set()
    (result,) = results
    assert (result.fate, result.detail, result.cut) == (Fate.OK, "ThreadPoolExecutor-1", ())
    assert done == list(range(7))
    assert all(future.done() for future in waiting)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(int)
    assert perform("executor.stop", pool).detail == "there is nothing to end"


def test_an_executor_that_runs_out_of_time_tells_how_much_was_not_begun():
    """At the step's timeout the waiting jobs are cancelled, counted exactly, and reported as cut work."""
    job, pool = Job(), concurrent.futures.ThreadPoolExecutor(1)
    pool.submit(job)
    waiting = [pool.submit(int) for _ in range(3)]
    assert job.entered.wait(PATIENCE)
    try:
        result = perform("executor.stop", pool, timeout=0.2)
        assert (result.fate, result.cut) == (Fate.TIMED_OUT, ("ThreadPoolExecutor-1: 3 jobs not begun",))
        assert all(future.cancelled() for future in waiting)
    finally:
        job.released.set()


def test_an_executor_of_processes_finishes_what_it_has_taken():
    """The queue of a process pool is finished before its processes end."""
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    jobs = [pool.submit(os.getpid) for _ in range(5)]
    assert perform("executor.stop", pool).fate is Fate.OK
    assert len({each.result(0) for each in jobs}) == 1


def test_an_executor_that_stays_busy_is_told_with_the_stack_of_its_job():
    """A job that never ends does not hold up the stop, and the log shows the job's stack."""
    job, pool = Job(), concurrent.futures.ThreadPoolExecutor(1)
    pool.submit(job)
    pool.submit(int)
    assert job.entered.wait(PATIENCE)
    try:
        result = perform("executor.stop", pool, timeout=0.2)
        assert result.fate is Fate.TIMED_OUT
        assert result.why.endswith("ThreadPoolExecutor-1: 1 still busy, 1 cancelled")
        assert "self.released.wait(PATIENCE)" in result.trace
    finally:
        job.released.set()


def test_an_executor_of_processes_is_ended():
    """Its processes are gone when the step is over."""
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    pid = pool.submit(os.getpid).result(PATIENCE)
    assert perform("executor.stop", pool).fate is Fate.OK
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("ask", ["event", "function"])
def test_threads_are_asked_and_joined(module, ask):
    """The event is set, or the function called, and the thread has ended when the step has."""
    module.stop = threading.Event()
    module.ask = module.stop.set
    module.thread = threading.Thread(target=module.stop.wait, args=(PATIENCE,))
    module.thread.start()
    stop = "live_module:stop" if ask == "event" else "live_module:ask"
    assert perform("threads.stop", stop=stop, target="live_module:thread").fate is Fate.OK
    assert not module.thread.is_alive()


def test_a_thread_that_does_not_listen_is_told_with_its_stack(module):
    """A thread that does not end is reported with its stack, because threads cannot be killed."""
    module.stop = threading.Event()
    job = Job()
    module.threads = [threading.Thread(target=job, daemon=True)]
    module.threads[0].start()
    assert job.entered.wait(PATIENCE)
    result = perform("threads.stop", stop="live_module:stop", target="live_module:threads", timeout=0.2)
    assert result.fate is Fate.TIMED_OUT
    assert "self.released.wait(PATIENCE)" in result.trace
    job.released.set()
    module.threads[0].join(PATIENCE)


def test_what_asks_must_be_able_to(module):
    """If `stop` is neither an Event nor a function, the error says what it is."""
    module.stop = 3
    result = perform("threads.stop", stop="live_module:stop")
    assert result.why == 'target "live_module:stop": expected an Event or a function, got int'


@pytest.mark.parametrize("deaf", [False, True])
def test_processes_are_terminated_then_killed(module, deaf):
    """A process gets SIGTERM; one that ignores it is killed after its grace, within the timeout, and reported."""
    code = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN if %r else signal.SIG_DFL); print('up', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code % deaf], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "up\n"
        module.child = process
        result = perform("processes.stop", target="live_module:child", kill_grace="200ms")
        assert (result.fate, result.detail) == (Fate.OK, f"live_module:child{': killed' if deaf else ''}")
        assert process.returncode == (-9 if deaf else -15)
        assert perform("processes.stop", target="live_module:child").detail == "live_module:child"


def test_a_child_of_multiprocessing_is_ended(module):
    """Multiprocessing's processes are ended in the same way."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    module.child = context.Process(target=theirs.recv)
    module.child.start()
    assert perform("processes.stop", target="live_module:child").fate is Fate.OK
    assert module.child.exitcode == -15
    ours.close()
    theirs.close()
    module.child.close()


class Transport(sentry_sdk.transport.Transport):
    """Takes events and notes how long a flush may take."""

    flushed: list[float]

    def capture_envelope(self, envelope):
        pass

    def flush(self, timeout, callback=None):
        self.flushed.append(timeout)


def test_sentry_is_flushed_within_the_timeout():
    """The client of the global scope is found, and its flush has the step's time."""
    Transport.flushed = []
    sentry_sdk.init("http://key@localhost/1", transport=Transport, default_integrations=False)
    try:
        assert perform("sentry.flush", timeout=7.0).detail == "sentry"
        assert len(Transport.flushed) == 1
        assert 6.0 < Transport.flushed[0] <= 7.0
    finally:
        sentry_sdk.get_client().close()
        sentry_sdk.get_global_scope().set_client(None)
    assert perform("sentry.flush").detail == "there is nothing to end"


class Exporter(SpanExporter):
    """An exporter whose shutdown calls a function of the test."""

    def __init__(self, shutdown):
        self._shutdown = shutdown

    def export(self, _spans):
        return SpanExportResult.SUCCESS

    def shutdown(self):
        self._shutdown()


def provider(shutdown):
    """Give a provider that exports to an exporter with this shutdown."""
    made = TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(SimpleSpanProcessor(Exporter(shutdown)))
    return made


def test_an_exporter_that_hangs_is_left_at_the_timeout():
    """OpenTelemetry's shutdown has no timeout: the step's ends it, other providers are shut down, the stack is told."""
    calls = []
    with hanging() as hang:

        def export_for_ever():
            hang(None)

        providers = [provider(export_for_ever), provider(lambda: calls.append("shutdown"))]
        result = perform("otel.shutdown", *providers, timeout=0.2)
        assert result.fate is Fate.TIMED_OUT
        assert result.why.endswith("not over: TracerProvider-1")
        assert "in export_for_ever" in result.trace
    assert calls == ["shutdown"]


def test_a_library_that_is_not_there_is_a_fault_of_the_policy(monkeypatch):
    """A missing library is a fault at the action's name; if the policy is disabled, it is none."""
    monkeypatch.setitem(ACTIONS["redis.close"].needs, "nosuch_redis", "nosuch-redis")
    monkeypatch.delitem(ACTIONS["redis.close"].needs, "redis")
    policy = {"use": "redis.close"}
    with pytest.raises(ConfigError) as caught:
        load_mapping({"cleanup": {"policies": {"x": policy}}}, actions=action_specs())
    assert str(caught.value) == (
        "<mapping> cleanup.policies.x.use: expected nosuch-redis to be installed where flaskd is, for this action needs it, "
        'got "redis.close"'
    )
    for fine in ({}, {"x": {**policy, "enabled": False}}):
        load_mapping({"cleanup": {"policies": fine}}, actions=action_specs())


def test_looking_for_a_library_does_not_import_it():
    """Checking a file that uses every action imports none of their libraries."""
    code = """
import sys
from flaskd.cleanup import ACTIONS, action_specs, build_plan, discover, with_found
from flaskd.config import load_mapping
use = {name.replace(".", "-"): {"use": name, "with": {"stop": "a:b"} if name == "threads.stop" else {}} for name, each in ACTIONS.items() if each.takes}
cleanup = load_mapping({"cleanup": {"policies": use}}, actions=action_specs()).values.cleanup
with_found(build_plan(cleanup), discover(None), cleanup)
print(*({"sqlalchemy", "psycopg_pool", "redis", "httpx", "requests", "apscheduler", "sentry_sdk", "opentelemetry.sdk", "opentelemetry.trace"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (
            {"use": "redis.close", "with": {"target": "no colon"}},
            "target: expected MODULE:ATTRIBUTE, such as shop.db:pool",
        ),
        ({"use": "apscheduler.stop", "with": {"wait": "perhaps"}}, "wait: expected true or false"),
        ({"use": "threads.stop"}, "stop: expected a value"),
        ({"use": "processes.stop", "with": {"kill_grace": "soon"}}, "kill_grace: expected a duration"),
        ({"use": "sqlalchemy.dispose", "with": {"bind": "x"}}, 'got "bind"'),
    ],
)
def test_fields_refuse_what_makes_no_sense(policy, words):
    """A value that an action cannot use is a configuration fault with the field's name."""
    with pytest.raises(ConfigError) as caught:
        load_mapping({"cleanup": {"policies": {"x": policy}}}, actions=action_specs())
    assert words in str(caught.value)


def test_hurry_reaches_what_is_being_ended():
    """A hurried stop abandons a hanging object at once, however long its timeout is."""
    asked = threading.Event()

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def shutdown(self, *args, **more):
            super().shutdown(*args, **more)
            asked.set()

    job, pool = Job(), Pool(1)
    pool.submit(job)
    assert job.entered.wait(PATIENCE)
    action = ACTIONS["executor.stop"]
    step = Step("it", action, action.fields(), Phase.QUIESCE, PATIENCE, found=discover(None, [pool]))
    stop = runner(*Plan((step,)).steps)
    try:
        with in_background(lambda: stop.run(Phase)) as results:
            assert asked.wait(PATIENCE)
            stop.hurry(0.1)
        assert results[0][0].fate is Fate.TIMED_OUT
        assert results[0][0].took < PATIENCE / 2
    finally:
        job.released.set()


def test_schedulers_are_paused_and_go_on(module):
    """Running schedulers that a policy names are paused and resumed; one paused by the app stays; one may fail."""
    module.schedulers = first, paused, broken, last = [BackgroundScheduler() for _ in range(4)]
    for each in module.schedulers:
        each.start()
    paused.pause()
    broken.pause = lambda: 1 / 0
    action = ACTIONS["apscheduler.stop"]
    fields = action.fields(target=["live_module:schedulers"])
    kept = []
    with pytest.raises(ZeroDivisionError):
        pause_all([Step("jobs", action, fields, action.default_phase, PATIENCE)], kept)
    states = [each.state for each in (first, paused, last)]
    resume_all(kept)
    assert states == [STATE_PAUSED] * 3
    assert [each.state for each in (first, paused, last)] == [STATE_RUNNING, STATE_PAUSED, STATE_RUNNING]
    for each in module.schedulers:
        each.shutdown()
