"""What an app's modules and objects may do to discovery, and what discovery must not do to them."""

import atexit
import contextlib
import functools
import gc
import importlib.util
import sys
import threading
import types

import httpx
import pytest
import sqlalchemy
from apscheduler.schedulers.background import BackgroundScheduler
from cleanup_kit import run
from patience import PATIENCE

from flaskd.cleanup import ACTIONS, Fate, Plan, Step, action_specs, build_plan, discover, with_found
from flaskd.config import load_mapping


@pytest.fixture
def engine():
    made = sqlalchemy.create_engine("sqlite://")
    yield made
    made.dispose()


def found_in(app=None):
    """The objects that discovery finds."""
    return [each.object for each in discover(app)]


class Raising(types.ModuleType):
    def __getattribute__(self, name):
        raise RuntimeError(name)


class Lying(types.ModuleType):
    @property
    def __dict__(self):
        raise SystemExit(1)


@pytest.mark.parametrize("kind", [Raising, Lying])
@pytest.mark.parametrize("name", ["trap", "sentry_sdk", "multiprocessing", "redis", "concurrent.futures.thread"])
def test_a_module_that_raises_when_it_is_asked(kind, name, engine, monkeypatch):
    """A module that raises at every attribute, or stands in for a known library, does not end discovery."""
    module = kind(name)
    types.ModuleType.__dict__["__dict__"].__get__(module)["pool"] = engine
    monkeypatch.setitem(sys.modules, name, module)
    assert {f"{name}:pool": "sqlalchemy.dispose"}.items() <= {each.name: each.use for each in discover(None)}.items()


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    """Makes modules that load at the first attribute (importlib.util.LazyLoader), and then fail."""

    def make(name):
        path = tmp_path / f"{name.rpartition('.')[2]}.py"
        path.write_text("raise RuntimeError('loaded')")
        spec = importlib.util.spec_from_file_location(name, path)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return make


def is_unloaded(module):
    """Whether a lazy module is still unloaded."""
    return type(module).__name__ == "_LazyModule"


@pytest.mark.parametrize(
    "name", ["ldlazy", "sentry_sdk", "multiprocessing", "psycopg_pool", "concurrent.futures.thread"]
)
def test_a_lazy_module_stays_unloaded(name, lazy, engine):
    """Neither discovery nor an exclude loads a lazy module."""
    module = lazy(name)
    assert engine in found_in()
    cleanup = load_mapping(
        {"cleanup": {"discovery": {"exclude": f"{name}:pool"}}}, actions=action_specs()
    ).values.cleanup
    with_found(build_plan(cleanup), discover(None, [engine]), cleanup)
    assert is_unloaded(module)


def test_what_a_module_makes_when_it_is_asked_is_not_made(engine, monkeypatch):
    """An excluded name does not make a module create the object of that name (PEP 562)."""
    module, made = types.ModuleType("ldmaking"), []
    module.__getattr__ = made.append
    monkeypatch.setitem(sys.modules, "ldmaking", module)
    cleanup = load_mapping(
        {"cleanup": {"discovery": {"exclude": "ldmaking:pool"}}}, actions=action_specs()
    ).values.cleanup
    assert with_found(Plan(), discover(None, [engine]), cleanup).steps
    assert made == []


def test_frozen_objects_are_found_and_stay_frozen():
    """Discovery finds objects that `gc.freeze()` hides from the collector, and leaves them frozen."""

    def hidden():
        engine = sqlalchemy.create_engine("sqlite://")
        return lambda: engine

    keep = hidden()
    gc.collect()
    gc.freeze()
    try:
        later = sqlalchemy.create_engine("sqlite://")
        frozen = gc.get_freeze_count()
        assert gc.get_referrers(sqlalchemy.Engine).count(keep()) == 0
        found = found_in()
        assert keep() in found
        assert later in found
        assert gc.get_freeze_count() >= frozen
    finally:
        gc.unfreeze()
    assert found_in().count(keep()) == 1
    assert gc.get_freeze_count() == 0


def test_objects_that_raise_at_every_question(engine):
    """An object, a class or a thread that raises at every attribute does not end discovery."""

    class Meta(type):
        def __getattribute__(cls, name):
            raise RuntimeError(name)

    class Client(httpx.Client, metaclass=Meta):
        pass

    class Leaving(httpx.Client):
        @property
        def is_closed(self):
            raise SystemExit(1)

    over, raising = threading.Event(), threading.Event()

    class Nameless(threading.Thread):
        def __getattribute__(self, name):
            if raising.is_set() and name in {"name", "daemon"}:
                raise LookupError(name)
            return super().__getattribute__(name)

    class App:
        def __getattr__(self, name):
            raise RuntimeError(name)

    threads = [threading.Thread(target=over.wait, name="ldmailer"), Nameless(target=over.wait)]
    for thread in threads:
        thread.start()
    raising.set()
    try:
        found = discover(App(), [object.__new__(Client), Leaving(), engine])
        assert engine in [each.object for each in found]
        assert "thread/ldmailer" in [each.name for each in found]
    finally:
        raising.clear()
        over.set()
        for thread in threads:
            thread.join(PATIENCE)


@pytest.fixture
def scheduler():
    made = BackgroundScheduler()
    made.start()
    yield made
    if made.running:
        made.shutdown()


def stop(scheduler):
    """Stop it as a stop does."""
    action = ACTIONS["apscheduler.stop"]
    step = Step("it", action, action.fields(), action.default_phase, PATIENCE, found=discover(None, [scheduler]))
    assert run(step)["it"].fate is Fate.OK
    assert not scheduler.running


def at_exit():
    """The registered exit callbacks; atexit compares each of them with the one to unregister."""
    seen = []

    class Looking:
        __hash__ = None

        def __eq__(self, callback):
            seen.append(callback)
            return False

    atexit.unregister(Looking())
    return seen


@pytest.mark.parametrize("made", [lambda it: it.shutdown, lambda it: functools.partial(it.shutdown, wait=False)])
def test_a_schedulers_own_shutdown_at_exit_is_forgotten(made, scheduler):
    """After a stop, `atexit.register(scheduler.shutdown)` does not raise at exit, because it is unregistered."""

    def other():
        raise NotImplementedError

    mine = made(scheduler)
    with contextlib.ExitStack() as after:
        for callback in (mine, other):
            atexit.register(callback)
            after.callback(atexit.unregister, callback)
        assert {mine, other} <= set(at_exit())
        stop(scheduler)
        assert mine not in at_exit()
        assert other in at_exit()


def test_a_scheduler_that_was_stopped_may_be_stopped_again(scheduler):
    """After a stop the app's own functions may shut the scheduler down again, and one that is restarted shuts down."""
    stop(scheduler)
    scheduler.shutdown()
    scheduler.shutdown(wait=False)
    scheduler.start()
    assert scheduler.running
    scheduler.shutdown()
    assert not scheduler.running
