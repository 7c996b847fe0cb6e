"""Discovery: finds what the app holds and a stop should close, without any configuration.

`discover` asks the garbage collector what refers to the known types, because all of their objects do
(gc.get_referrers; about 10 ms for 100,000 objects). It does not ask for all objects (gc.get_objects), because among
these are tuples that other threads are still building: holding one of them makes ``tuple(...)`` raise SystemError in
the middle of a request. The types are looked up in sys.modules, so a library that the app has not imported is not
imported here. Of a found object only attributes that tell whether it is open are read. Modules are read through their
``__dict__``, because some load things or raise when an attribute is asked for.
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
"""A look around that took N seconds is followed by the next one after this many times N at the earliest."""
_DEEPEST = 6
_MOST_FOLLOWED = 20_000
"""Below the extensions of the app: how many references are followed one after the other, and how many objects."""
_NOT_FOLLOWED = (type, ModuleType, FunctionType, MethodType, logging.Logger, str, bytes, int, float, type(None))


def discover(app: Any, objects: Iterable[object] | None = None) -> tuple[Found, ...]:
    """Find what the app holds among `objects`; default: all objects that the garbage collector knows.

    `app` is the Flask app, or None; its extensions give names to what is found. An object that belongs to another found
    object is left to that. This takes time and holds the interpreter's lock, so it must not run while a request waits.
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
    """The answer of one of the app's objects, or `otherwise` if it raises, as half-built and broken objects may."""
    try:
        return question(thing)
    except BaseException:  # noqa: BLE001 - see above; SystemExit would silently end discovery
        return otherwise


def _candidates(app: Any) -> Iterable[object]:
    """What refers to objects of known types; for kinds that count only if named, everything that has a name."""
    types = [
        each for kind in KINDS if not kind.named for known in kind.types for each in _with_subtypes(_loaded(known))
    ]
    yield from _referrers(types)
    for _, value in (*_attributes(), *_held(app)):
        yield value


def _referrers(types: list[type]) -> list[Any]:
    """What refers to the types. Objects that the app has frozen (gc.freeze) are included, and are frozen again.

    The collector skips frozen objects, so they are unfrozen first. Freezing again also freezes objects made since then;
    the garbage among those is collected before.
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
    """The objects of known types, each once. Their types are compared, not isinstance() asked: a proxy may lie to that.

    The types are compared by id(), because a type whose metaclass defines equality may not be hashable.
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
    """The type, if its module has been imported, else None."""
    module, _, name = path.partition(":")
    known = contents_of(module).get(name)
    return known if issubclass(type(known), type) else None


def _found(name: str, thing: Any, use: str, left: str = "") -> Found:
    its_type = type(thing)
    try:
        refer: Callable[[], Any] = weakref.ref(thing)
    except TypeError:  # it cannot have a weak reference
        refer = lambda: thing  # noqa: E731 - the other branch assigns, too
    kind = _asked(lambda its_type: f"{its_type.__module__}.{its_type.__qualname__}", its_type, "an unknown type")
    return Found(name, kind, use, left, refer)


def _sentry() -> list[Found]:
    """The active Sentry client of the global scope, if there is one (sentry_sdk.get_client)."""
    client = _asked(lambda sdk: sdk["get_client"](), contents_of("sentry_sdk"), None)
    active = _asked(lambda client: client.is_active(), client, False)
    return [_found("sentry", client, "sentry.flush")] if active else []


def _threads() -> list[Found]:
    """The threads that the exit of the process waits for, without those of executors."""
    executors = contents_of("concurrent.futures.thread").get("_threads_queues", {})
    left = "a thread cannot be ended from outside; threads.stop asks one to end"
    return [
        _found(f"thread/{name_of(thread)}", thread, "threads.stop", left)
        for thread in waited_for()
        if thread not in executors and type(thread).__module__ != "concurrent.futures.process"
    ]


def _children(executors: list[Any]) -> list[Found]:
    """The living multiprocessing children, without those of executors."""
    theirs = {pid for each in executors for pid in vars(each).get("_processes", None) or ()}
    left = "a process is ended only by a policy that says so; processes.stop"
    return [
        _found(f"process/{child.name}", child, "processes.stop", left)
        for child in _asked(lambda module: module["active_children"](), contents_of("multiprocessing"), [])
        if child.pid not in theirs
    ]


class _Names:
    """Gives names to the objects with these ids."""

    def __init__(self, ids: set[int], app: Any) -> None:
        self._names: dict[int, str] = {}
        self._counted: Counter[str] = Counter()
        if ids:
            for name, value in _attributes():
                if id(value) in ids and ":_" in self._names.get(id(value), ":_"):  # a public name is preferred
                    self._names[id(value)] = name
            for name, value in _held(app):
                if id(value) in ids and id(value) not in self._names:
                    self._names[id(value)] = self._numbered(name, first="")

    def knows(self, thing: Any) -> bool:
        """Whether a module or an extension holds the object."""
        return id(thing) in self._names

    def of(self, thing: Any) -> str:
        """The object's name; only an object that a module or an extension holds has the same name at every look."""
        return self._names.get(id(thing)) or self._numbered(
            _asked(lambda it: type(it).__name__, thing, "object"), first="-1"
        )

    def _numbered(self, name: str, *, first: str) -> str:
        self._counted[name] += 1
        count = self._counted[name]
        return name + (first if count == 1 else f"-{count}")


def _attributes() -> Iterator[tuple[str, object]]:
    # Copies, which are made at once: listing the items makes a tuple for each, and at any of them the garbage collector
    # may run code of the app that imports a module.
    for module_name, module in sys.modules.copy().items():
        if issubclass(type(module), ModuleType):  # sys.modules may hold any object
            for name, value in attributes_of(module).copy().items():
                yield f"{module_name}:{name}", value


def _held(app: Any) -> Iterator[tuple[str, object]]:
    """What the extensions of the app hold, each with the extension's key; the nearest first.

    gc.get_referents follows the references without calling the objects, so a proxy is not resolved.
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
    """One run of discovery in a thread of its own; `took` is its length in seconds, `then` gets the result."""

    def __init__(self, app: Any, then: Callable[[tuple[Found, ...]], None] = lambda _: None) -> None:
        self._app, self._then = app, then
        self._found: tuple[Found, ...] | None = None
        self._began = time.monotonic()
        self.took = 0.0
        self._thread = threading.Thread(target=self._work, name="flaskd-discovery", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread can be had; a stop works without discovery
            log.warning(f"cannot look for what the app holds: {error}")

    def _work(self) -> None:
        try:
            with AppCode():
                self._found = discover(self._app)
            self._then(self._found)
        except BaseException:  # the app's objects may raise anything; a stop works without discovery
            log.exception("cannot look for what the app holds")
        self.took = time.monotonic() - self._began

    @property
    def stale(self) -> bool:
        """Whether discovery may run again: it uses a small part of the time only, however often it is asked for."""
        return not self._thread.is_alive() and time.monotonic() - self._began > _COST * self.took

    def found(self, timeout: float = 0.0) -> tuple[Found, ...] | None:
        """What it found, after waiting up to `timeout` seconds; None if it is not done by then, or failed."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return self._found
