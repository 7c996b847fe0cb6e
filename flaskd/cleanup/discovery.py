"""Discovery: what the app holds that a stop should close, found without a line of configuration.

`discover` asks the garbage collector once what refers to the known types, as all their objects do (gc.get_referrers;
some 10 ms for 100,000 objects). To ask it for all objects (gc.get_objects) would do harm: among them are the tuples
that other threads are just building, and one that is held elsewhere, too, cannot be finished: ``tuple(...)`` raises
SystemError, in the middle of a request. The types are taken from sys.modules alone: a library that the app has not
imported costs nothing and is not imported here. Nothing is called on what is found but attributes that tell whether it
is open; modules are looked into past what they do when they are asked, for some load themselves then, and some raise.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import weakref
from collections import Counter
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from flaskd.cleanup.actions import KINDS
from flaskd.cleanup.found import Found
from flaskd.objects import attributes_of, bases, contents_of
from flaskd.process.forks import AppCode
from flaskd.process.threads import name_of, waited_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from flaskd.cleanup.kinds import Kind

log = logging.getLogger("flaskd.cleanup")

_COST = 20.0
"""How many times its own length a look around is away from the one before, however often it is asked for."""
_DEEPEST = 6
_MOST_FOLLOWED = 20_000
"""How far below an extension of the app its objects are looked for, and among how many."""
_NOT_FOLLOWED = (type, ModuleType, FunctionType, MethodType, logging.Logger, str, bytes, int, float, type(None))


def discover(app: Any, objects: Iterable[object] | None = None) -> tuple[Found, ...]:
    """Find what the app holds, among `objects`; default: all objects that the garbage collector knows.

    `app` is the Flask app, or None: its extensions give names to what is found. What belongs to something else that was
    found is left to that. It takes some time and the interpreter's lock with it, so it has no place on a request's way.
    """
    picked = list(_picked(_candidates(app) if objects is None else objects))
    owned = {id(inner) for kind, each in picked for inner in _asked(kind.owns, each, ())}
    wanted = [(kind, each) for kind, each in picked if id(each) not in owned and not _asked(kind.ended, each, True)]
    names = _Names({id(each) for _, each in wanted}, app)
    found = [
        _found(names.of(each), each, kind.use, _asked(kind.left, each, "it cannot be looked at"))
        for kind, each in wanted
        if names.knows(each) or not kind.named
    ]
    found += _sentry()
    found += _threads()
    found += _children([each for kind, each in picked if kind.use == "executor.stop"])
    return tuple(found)


def _asked(question: Callable[[Any], Any], thing: Any, otherwise: Any) -> Any:
    """The answer of an object of the app's; one that raises is half built, or broken, and not ours to mend."""
    try:
        return question(thing)
    except BaseException:  # noqa: BLE001 - see above; SystemExit would end the whole look without a word
        return otherwise


def _candidates(app: Any) -> Iterable[object]:
    """What holds all objects of known types; of those that count by their name alone, all that have one."""
    types = [
        each for kind in KINDS if not kind.named for known in kind.types for each in _with_subtypes(_loaded(known))
    ]
    yield from _referrers(types)
    for _, value in (*_attributes(), *_held(app)):
        yield value


def _referrers(types: list[type]) -> list[Any]:
    """What refers to the types; objects that the app has frozen (gc.freeze) are among it, and are frozen again.

    The collector does not look at frozen objects. Those made since are frozen with them, so what is garbage among them
    goes before.
    """
    if not gc.get_freeze_count():
        return gc.get_referrers(*types)
    gc.collect()
    gc.unfreeze()
    try:
        return gc.get_referrers(*types)
    finally:
        gc.freeze()


def _with_subtypes(known: type | None) -> Iterator[type]:
    if known is not None:
        yield known
        subtypes: list[type] = type.__subclasses__(known)
        for each in subtypes:
            yield from _with_subtypes(each)


def _picked(objects: Iterable[object]) -> Iterator[tuple[Kind, Any]]:
    """The objects of known types, each once. Only their types are looked at: a proxy may answer to isinstance().

    Types by their id(): one whose metaclass has its own idea of equality may not be hashable.
    """
    kinds: dict[int, Kind | None] = {}
    for one in KINDS:
        kinds |= {id(known): one for known in map(_loaded, one.types) if known is not None}
        kinds |= {id(known): None for known in map(_loaded, one.but) if known is not None}
    if not kinds:
        return
    by_type: dict[int, Kind | None] = {}
    seen = set()
    for each in objects:
        its_type = id(type(each))
        if its_type not in by_type:
            by_type[its_type] = next((kinds[id(base)] for base in bases(type(each)) if id(base) in kinds), None)
        if (kind := by_type[its_type]) is not None and id(each) not in seen:
            seen.add(id(each))
            yield kind, each


def _loaded(path: str) -> type | None:
    """The type, if its module has been imported."""
    module, _, name = path.partition(":")
    known = contents_of(module).get(name)
    return known if issubclass(type(known), type) else None


def _found(name: str, thing: Any, use: str, left: str = "") -> Found:
    its_type = type(thing)
    try:
        refer: Callable[[], Any] = weakref.ref(thing)
    except TypeError:  # it has no place for one
        refer = lambda: thing  # noqa: E731 - two words for one thing
    kind = _asked(lambda its_type: f"{its_type.__module__}.{its_type.__qualname__}", its_type, "an unknown type")
    return Found(name, kind, use, left, refer)


def _sentry() -> list[Found]:
    """The client of the global scope, if there is an active one (sentry_sdk.get_client)."""
    client = _asked(lambda sdk: sdk["get_client"](), contents_of("sentry_sdk"), None)
    active = _asked(lambda client: client.is_active(), client, False)
    return [_found("sentry", client, "sentry.flush")] if active else []


def _threads() -> list[Found]:
    """Threads that the exit waits for, but an executor's."""
    executors = contents_of("concurrent.futures.thread").get("_threads_queues", {})
    left = "a thread cannot be ended from outside; threads.stop asks one to end"
    return [
        _found(f"thread/{name_of(thread)}", thread, "threads.stop", left)
        for thread in waited_for()
        if thread not in executors and type(thread).__module__ != "concurrent.futures.process"
    ]


def _children(executors: list[Any]) -> list[Found]:
    """Processes of multiprocessing that are alive, without those of an executor."""
    theirs = {pid for each in executors for pid in vars(each).get("_processes", None) or ()}
    left = "a process is ended only by a policy that says so; processes.stop"
    return [
        _found(f"process/{child.name}", child, "processes.stop", left)
        for child in _asked(lambda module: module["active_children"](), contents_of("multiprocessing"), [])
        if child.pid not in theirs
    ]


class _Names:
    """Names for the objects with these ids."""

    def __init__(self, ids: set[int], app: Any) -> None:
        self._names: dict[int, str] = {}
        self._counted: Counter[str] = Counter()
        if ids:
            for name, value in _attributes():
                if id(value) in ids and ":_" in self._names.get(id(value), ":_"):  # a public name, if there is one
                    self._names[id(value)] = name
            for name, value in _held(app):
                if id(value) in ids and id(value) not in self._names:
                    self._names[id(value)] = self._numbered(name, first="")

    def knows(self, thing: Any) -> bool:
        """Whether a module or an extension holds it."""
        return id(thing) in self._names

    def of(self, thing: Any) -> str:
        """Its name; nothing but a module or an extension that holds it makes a lasting one."""
        return self._names.get(id(thing)) or self._numbered(
            _asked(lambda it: type(it).__name__, thing, "object"), first="-1"
        )

    def _numbered(self, name: str, *, first: str) -> str:
        self._counted[name] += 1
        count = self._counted[name]
        return name + (first if count == 1 else f"-{count}")


def _attributes() -> Iterator[tuple[str, object]]:
    # Copies, which are made at once: to list the items makes a tuple for each, in which the garbage collection may run
    # code of the app that imports something.
    for module_name, module in sys.modules.copy().items():
        if issubclass(type(module), ModuleType):  # there may be anything in sys.modules
            for name, value in attributes_of(module).copy().items():
                yield f"{module_name}:{name}", value


def _held(app: Any) -> Iterator[tuple[str, object]]:
    """What the extensions of the app hold, each by its key; the nearest first.

    Followed by gc.get_referents, which asks nothing of the objects: a proxy stays a proxy.
    """
    level = [
        *_asked(lambda app: [(str(key), each) for key, each in list(app.extensions.items())], app, []),
        ("apscheduler", _asked(lambda app: app.apscheduler, app, None)),  # Flask-APScheduler
        ("session", _asked(lambda app: app.session_interface, app, None)),  # Flask-Session
    ]
    seen = {id(app)}
    for _ in range(_DEEPEST):
        following = []
        for name, value in level:
            if id(value) in seen or issubclass(type(value), _NOT_FOLLOWED) or len(seen) > _MOST_FOLLOWED:
                continue
            seen.add(id(value))
            yield name, value
            following += [(name, inner) for inner in gc.get_referents(value)]
        level = following


class DiscoveryRun:
    """One look around, in a thread of its own; it takes `took` seconds, and gives what it found to `then`."""

    def __init__(self, app: Any, then: Callable[[tuple[Found, ...]], None] = lambda _: None) -> None:
        self._app, self._then = app, then
        self._found: tuple[Found, ...] | None = None
        self._began = time.monotonic()
        self.took = 0.0
        self._thread = threading.Thread(target=self._work, name="flaskd-discovery", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads; the stop can do without
            log.warning(f"cannot look for what the app holds: {error}")

    def _work(self) -> None:
        try:
            with AppCode():
                self._found = discover(self._app)
            self._then(self._found)
        except BaseException:  # whatever the app has done to its objects, the stop can do without
            log.exception("cannot look for what the app holds")
        self.took = time.monotonic() - self._began

    @property
    def stale(self) -> bool:
        """Whether another may be made: however often it is asked for, looking around costs a small part of the time."""
        return not self._thread.is_alive() and time.monotonic() - self._began > _COST * self.took

    def found(self, timeout: float = 0.0) -> tuple[Found, ...] | None:
        """What it found; waits up to `timeout` seconds, and None when it has not found anything out by then."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return self._found
