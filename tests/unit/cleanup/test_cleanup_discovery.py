"""What discovery finds, how it names it, what it leaves alone, and what a plan does with it."""

import asyncio
import concurrent.futures
import gc
import sqlite3
import sys
import threading
import types

import httpx
import psycopg_pool
import pytest
import redis
import redis.asyncio
import requests
import sqlalchemy
from apscheduler.executors.pool import BasePoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from flask import Flask
from flask_apscheduler import APScheduler
from flask_caching import Cache
from flask_redis import FlaskRedis
from flask_session import Session
from flask_sqlalchemy import SQLAlchemy
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from patience import PATIENCE
from werkzeug.local import LocalProxy

from flaskd.cleanup import ACTIONS, DiscoveryRun, Plan, action_specs, build_plan, discover, with_found
from flaskd.cleanup.actions import KINDS
from flaskd.config import load_mapping
from flaskd.errors import ConfigError
from flaskd.process.threads import AppThread


def names(found):
    """Give name → action of what was found."""
    return {each.name: each.use for each in found}


def cleanup_of(**more):
    """Give a cleanup section."""
    return load_mapping({"cleanup": more}, actions=action_specs()).values.cleanup


def planned(found, **more):
    """Give the steps of a plan with this cleanup section and these found objects: step → names of what it ends."""
    cleanup = cleanup_of(**more)
    plan = with_found(build_plan(cleanup), found, cleanup)
    return {step.name: [each.name for each in step.found] if step.found is not None else None for step in plan.steps}


@pytest.fixture
def module(monkeypatch):
    """Give a module that can be imported as `shop_module`."""
    found = types.ModuleType("shop_module")
    monkeypatch.setitem(sys.modules, "shop_module", found)
    return found


@pytest.fixture
def engine():
    made = sqlalchemy.create_engine("sqlite://")
    yield made
    made.dispose()


def test_what_extensions_hold_goes_by_their_key():
    """Engines, redis clients and schedulers of Flask's extensions are found, and named after the extension."""
    app = Flask("shop")
    app.config |= {
        "SQLALCHEMY_DATABASE_URI": "sqlite://",
        "SQLALCHEMY_BINDS": {"other": "sqlite://"},
        "CACHE_TYPE": "RedisCache",
        "SESSION_TYPE": "redis",
        "SESSION_REDIS": redis.Redis(host="sessions"),
    }
    kept = [SQLAlchemy(app), Cache(app), FlaskRedis(app), Session(app), APScheduler()]
    kept[-1].init_app(app)
    kept[-1].start()
    try:
        found = names(discover(app))
    finally:
        kept[-1].shutdown()
    held = ("sqlalchemy", "sqlalchemy-2", "cache", "redis", "session", "apscheduler")
    assert {name: found.get(name) for name in held} == {
        "sqlalchemy": "sqlalchemy.dispose",
        "sqlalchemy-2": "sqlalchemy.dispose",  # of the other bind
        "cache": "redis.close",
        "redis": "redis.close",
        "session": "redis.close",
        "apscheduler": "apscheduler.stop",
    }


def test_what_a_module_holds_goes_by_its_place(module, engine):
    """An object in a module is named as a target would name it; one that nothing names has its type and a number."""
    module.engine, other = engine, sqlalchemy.create_engine("sqlite://")
    found = discover(None, [engine, other, engine])
    assert names(found) == {"shop_module:engine": "sqlalchemy.dispose", "Engine-1": "sqlalchemy.dispose"}
    assert found[0].describe() == {
        "name": "shop_module:engine",
        "kind": "sqlalchemy.engine.base.Engine",
        "use": "sqlalchemy.dispose",
        "left": "",
    }


def test_raw_objects_are_found(engine):
    """Engines, pools, clients, sessions and executors are found wherever they are."""
    with (
        concurrent.futures.ThreadPoolExecutor() as executor,
        httpx.Client() as client,
        requests.Session() as session,
        psycopg_pool.ConnectionPool(open=True, min_size=0, max_size=1) as pool,
    ):
        providers = [each(shutdown_on_exit=False) for each in (TracerProvider, MeterProvider, LoggerProvider)]
        things = [engine, pool, redis.Redis(), redis.ConnectionPool(), client, session, executor, *providers]
        assert sorted(each.use for each in discover(None, things)) == [
            "executor.stop", "http_client.close", "http_client.close", "otel.shutdown", "otel.shutdown", "otel.shutdown",
            "psycopg_pool.close", "redis.close", "redis.close", "sqlalchemy.dispose",
        ]  # fmt: skip
        by_sweep = {id(each.object) for each in discover(None)}
        for provider in providers:
            provider.shutdown()
        assert {id(each) for each in things} <= by_sweep, "the garbage collector knows them all"


def test_what_is_closed_already_is_not_listed():
    """Closed clients and pools, shut-down executors and schedulers that do not run are not listed."""
    with httpx.Client() as client, concurrent.futures.ThreadPoolExecutor() as executor:
        pass
    pool = psycopg_pool.ConnectionPool(open=False, min_size=0, max_size=1)
    assert discover(None, [client, executor, pool, BackgroundScheduler()]) == ()


class ExecutorAround(BasePoolExecutor):
    """A scheduler's executor that wraps one of the standard library."""

    def __init__(self, executor):
        super().__init__(executor)


def test_what_belongs_to_something_found_is_left_to_it(engine):
    """A scheduler's executor, a client's pool, a second view of an engine and a loop's executor are not listed."""
    theirs, loops = (concurrent.futures.ThreadPoolExecutor() for _ in range(2))
    scheduler, client, loop = BackgroundScheduler(), redis.Redis(), asyncio.new_event_loop()
    scheduler.add_executor(ExecutorAround(theirs))
    scheduler.start()
    loop.set_default_executor(loops)
    try:
        found = discover(
            None,
            [
                theirs, scheduler, client.connection_pool, client, client.pipeline(), engine, engine.execution_options(),
                loop, loops,
            ],
        )  # fmt: skip
        assert [each.use for each in found] == ["apscheduler.stop", "redis.close", "sqlalchemy.dispose"]
        assert [each.object for each in found] == [scheduler, client, engine]
    finally:
        scheduler.shutdown()
        loops.shutdown()
        loop.close()


def test_what_no_step_can_end_is_listed_with_the_reason():
    """Asynchronous clients and pools are recognized and listed, and never ended."""
    things = [
        httpx.AsyncClient(),
        redis.asyncio.Redis(),
        redis.asyncio.RedisCluster(host="nowhere"),
        sqlalchemy.create_engine("postgresql+psycopg_async://"),
    ]
    found = discover(None, things)
    assert [each.left for each in found] == ["asynchronous: only its own event loop can close it"] * len(things)
    assert planned(found) == {}


def test_connections_of_their_own_are_listed(module, engine):
    """A connection that a module holds is listed; the connections of a pool are not, because the pool closes them."""
    module.connection, unnamed = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
    try:
        found = discover(None, [module.connection, unnamed])
    finally:
        module.connection.close()
        unnamed.close()
    assert [(each.name, each.use, each.left != "") for each in found] == [("shop_module:connection", "", True)]
    assert planned(found) == {}


def test_survivors_are_listed_and_not_touched():
    """A thread that is no daemon thread is listed with the action that could end it; only a policy does end it."""
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait, name="mailer"), AppThread(target=stop.wait, name="own")]
    for thread in threads:
        thread.start()
    try:
        found = [each for each in discover(None, []) if each.name.startswith("thread/")]
        assert [(each.name, each.use) for each in found] == [("thread/mailer", "threads.stop")]
        assert planned(found) == {}
        policy = {"use": "threads.stop", "with": {"stop": "shop:stop"}}
        assert planned(found, policies={"mail": policy}) == {"mail": ["thread/mailer"]}
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)


def test_nothing_is_asked_of_a_stranger(monkeypatch, engine):
    """Objects that lie about their class, or raise at every attribute, do no harm and are not listed."""

    class Liar:
        @property
        def __class__(self):
            raise RuntimeError("asked")

        def __getattr__(self, name):
            raise RuntimeError("asked")

    class Meta(type):
        __hash__ = None

        def __eq__(cls, other):
            raise RuntimeError("asked")

    class Odd(metaclass=Meta):
        pass

    proxied = redis.Redis()
    app = types.SimpleNamespace(extensions={"liar": Liar(), "proxy": LocalProxy(lambda: proxied)})
    monkeypatch.setitem(sys.modules, "liar", Liar())
    assert names(discover(app, [Liar(), LocalProxy(lambda: proxied), Odd(), engine])) == {
        "Engine-1": "sqlalchemy.dispose"
    }


def test_what_other_threads_are_building_is_left_alone():
    """Discovery holds no tuple under construction, because that makes the building thread raise SystemError."""
    over, faults, interval = threading.Event(), [], sys.getswitchinterval()

    def build():
        while not over.is_set():
            try:
                for _ in range(100):
                    tuple(number for number in range(50))
            except SystemError as error:
                faults.append(error)

    threads = [threading.Thread(target=build) for _ in range(3)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(8):
            discover(None)
    finally:
        over.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join(PATIENCE)
    assert faults == []


def test_an_object_that_is_half_built_does_no_harm():
    """An object of a known type that lacks its attributes, because it is half built, is skipped."""
    half = [
        redis.Redis.__new__(redis.Redis),
        httpx.Client.__new__(httpx.Client),
        BackgroundScheduler.__new__(BackgroundScheduler),
    ]
    engine = sqlalchemy.Engine.__new__(sqlalchemy.Engine)
    found = discover(None, [*half, engine])
    assert all(each.left == "it cannot be looked at" for each in found if each.use == "sqlalchemy.dispose")


def test_finding_keeps_nothing_alive():
    """Discovery keeps no object alive after the app has dropped it."""
    session = requests.Session()
    [found] = discover(None, [session])
    assert found.object is session
    del session
    gc.collect()
    assert found.object is None


def test_nothing_that_writes_or_deletes_is_ever_automatic():
    """The actions that discovery may choose only close, stop and flush."""
    automatic = {
        "sqlalchemy.dispose", "psycopg_pool.close", "redis.close", "http_client.close", "apscheduler.stop", "executor.stop",
        "sentry.flush", "otel.shutdown",
    }  # fmt: skip
    assert {kind.use for kind in KINDS} - {""} <= automatic
    assert {"threads.stop", "processes.stop"} == {name for name, each in ACTIONS.items() if each.takes} - automatic


def test_a_step_for_each_kind(engine):
    """Without a policy each kind gets one step with the defaults; a scheduler is paused first."""
    scheduler = BackgroundScheduler()
    scheduler.start()
    try:
        found = discover(None, [engine, redis.Redis(), redis.Redis(), scheduler])
    finally:
        scheduler.shutdown()
    assert planned(found) == {
        "found:apscheduler.stop:pause": ["BackgroundScheduler-1"],
        "found:apscheduler.stop": ["BackgroundScheduler-1"],
        "found:sqlalchemy.dispose": ["Engine-1"],
        "found:redis.close": ["Redis-1", "Redis-2"],
    }, "in the order of their phases"
    cleanup = cleanup_of(defaults={"timeout": "7s", "retries": 2, "on_failure": "abort"})
    steps = {step.name: step for step in with_found(Plan(), found, cleanup).steps}
    step = steps["found:redis.close"]
    assert (step.timeout, step.retries, step.on_failure, str(step.phase)) == (7.0, 2, "continue", "close")
    assert str(steps["found:apscheduler.stop:pause"].phase) == "announce"


def test_a_policy_beats_discovery(module, engine):
    """A policy without a target takes all of its kind; an object that a policy's target names is left to that policy."""
    module.engine, other = engine, sqlalchemy.create_engine("sqlite://")
    found = discover(None, [engine, other])
    dispose = {"use": "sqlalchemy.dispose"}
    assert planned(found, policies={"db": dispose}) == {"db": ["shop_module:engine", "Engine-1"]}
    named = {**dispose, "with": {"target": "shop_module:engine"}}
    assert planned(found, policies={"db": named}) == {"db": None, "found:sqlalchemy.dispose": ["Engine-1"]}
    assert planned(found, policies={"db": {**named, "enabled": False}}) == {
        "found:sqlalchemy.dispose": ["shop_module:engine", "Engine-1"]
    }


def test_what_nobody_asked_to_end_comes_last_in_its_phase(engine):
    """Steps for found objects run after their phase's policies, which may use them, and even if those fail."""
    scheduler = BackgroundScheduler()
    scheduler.start()
    with concurrent.futures.ThreadPoolExecutor() as executor:
        found = discover(None, [engine, executor, scheduler])
    scheduler.shutdown()
    call = {"use": "call", "with": {"target": "shop:stop"}, "on_failure": "skip_dependents"}
    cleanup = cleanup_of(policies={"own": {**call, "phase": "quiesce"}, "save": {**call, "phase": "close"}})
    plan = with_found(build_plan(cleanup), found, cleanup)
    assert {step.name: step.after for step in plan.steps if step.discovered} == {
        "found:apscheduler.stop:pause": (),
        "found:apscheduler.stop": ("own",),
        "found:executor.stop": ("own", "found:apscheduler.stop"),
        "found:sqlalchemy.dispose": ("save",),
    }
    assert plan.dependents("own") == plan.dependents("save") == ()


def test_report_and_off_end_nothing_by_themselves(engine):
    """With report and off only policies end anything; they still end what is found."""
    found = discover(None, [engine])
    for mode in ("report", "off"):
        assert planned(found, discovery=mode) == {}
        assert planned(found, discovery={"mode": mode}, policies={"db": {"use": "sqlalchemy.dispose"}}) == {
            "db": ["Engine-1"]
        }


def test_excludes(module, engine):
    """What is excluded, by name or by action, is left alone, even by policies without a target."""
    module.engine, other = engine, sqlalchemy.create_engine("sqlite://")
    found = discover(None, [engine, other, redis.Redis()])
    by_name = {"exclude": "shop_module:engine"}
    assert planned(found, discovery=by_name) == {
        "found:sqlalchemy.dispose": ["Engine-1"],
        "found:redis.close": ["Redis-1"],
    }
    module.same = engine
    assert planned(found, discovery={"exclude": "shop_module:same"}) == planned(found, discovery=by_name), (
        "any of its names"
    )
    assert planned(found, discovery={"exclude": ["shop_module:gone", "nowhere:x"]})["found:redis.close"] == ["Redis-1"]
    assert planned(found, discovery={"exclude": ["sqlalchemy.dispose"]}) == {"found:redis.close": ["Redis-1"]}
    assert planned(found, discovery=by_name, policies={"db": {"use": "sqlalchemy.dispose"}})["db"] == ["Engine-1"]


@pytest.mark.parametrize(
    ("discovery", "words"),
    [
        ("sometimes", 'cleanup.discovery: expected one of auto, report, off, got "sometimes"'),
        (3, "cleanup.discovery: expected a mapping, got 3"),
        ({"mod": "off"}, 'cleanup.discovery.mod: expected a known key, got "mod"; did you mean "mode"?'),
        ({"mode": "on"}, 'cleanup.discovery.mode: expected one of auto, report, off, got "on"'),
    ],
)
def test_the_shape_of_discovery(discovery, words):
    """Discovery is one word, or a mapping of mode and exclude; anything else is a fault at its place."""
    assert cleanup_of().discovery.mode == "auto"
    assert cleanup_of(discovery="off").discovery.mode == "off"
    with pytest.raises(ConfigError) as caught:
        cleanup_of(discovery=discovery)
    assert words in str(caught.value)


def test_a_sweep_tells_what_it_found_and_when_to_look_again(engine):
    """Discovery runs in a thread of its own; after a run another may begin only after many times its length."""
    told = []
    sweep = DiscoveryRun(None, told.append)
    found = sweep.found(PATIENCE)
    assert engine in [each.object for each in found]
    assert told == [found]
    assert not sweep.stale
    sweep.took = 0.0
    assert sweep.stale


def test_a_sweep_that_fails_is_told_and_no_more(monkeypatch, caplog):
    """If discovery fails, it is logged, and the stop goes on without it."""

    def fail(_app):
        raise RuntimeError("no look")

    monkeypatch.setattr("flaskd.cleanup.discovery.discover", fail)
    assert DiscoveryRun(None).found(PATIENCE) is None
    assert "cannot look for what the app holds" in caplog.text
