"""What kind of callable an object is, by its signature, and which Flask app it holds.

Objects are not called here, and none of their own code runs to read an attribute: a proxy is not resolved, and what an
object loads on access is not loaded.
"""

from __future__ import annotations

import enum
import functools
import gc
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from flaskd.objects import attributes_of, bases

if TYPE_CHECKING:
    from flask import Flask

WSGIApp = Callable[..., Any]

_MAX_WRAPPERS = 32
"""Most nested wrappers that are followed by the names of their attributes."""
_MAX_LOOKED_AT = 20_000
"""Most objects held by a wrapper that are searched for a Flask app."""
_INSIDE = ("app", "wsgi_app", "application", "wsgi", "wsgi_application", "_app", "__wrapped__")
"""The attributes in which middleware keeps the app that it wraps, the most usual ones first."""
_HEAP_TYPE = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: Python code has made the type, so its objects may run any code when an attribute is read."""
_FLAGS = type.__dict__["__flags__"].__get__
_METHODS = (FunctionType, classmethod, staticmethod, property)
_NOT_FOLLOWED = (type, ModuleType, str, bytes, int, float, type(None))


class Kind(enum.Enum):
    """The kinds of callables, by their signatures."""

    WSGI = "can be called with (environ, start_response), and not without"
    OPEN = "takes anything, or does not say what it takes"
    ASGI = "is asynchronous, or takes (scope, receive, send)"
    OTHER = "cannot be called with (environ, start_response), or is made to be called without"


def kind_of(thing: Any) -> Kind:
    """The kind of an object; OTHER if it cannot be called at all.

    A class is a WSGI app if its instances are iterable (PEP 3333, "The Application/Framework Side").
    """
    if not callable(thing):
        return Kind.OTHER
    if _takes(thing, 0) is not True and (_is_asynchronous(thing) or _takes_scope(thing)):
        return Kind.ASGI
    if is_class(thing):
        wsgi = _takes(thing, 2) is True and _takes(thing, 0) is False and hasattr(thing, "__iter__")
        return Kind.WSGI if wsgi else Kind.OTHER
    if _is_asynchronous(thing):  # its arguments are open; without any it is a factory
        return Kind.ASGI if _takes(thing, 3) else Kind.OTHER
    match _takes(thing, 2), _takes(thing, 0):
        case True, False:
            return Kind.WSGI
        case True, True:
            # Arguments with defaults are typical of a factory, unless the object's class defines __call__.
            return Kind.OPEN if _is_variadic(thing) or _call_of(thing) is not None else Kind.OTHER
        case False, _:
            return Kind.OTHER
    return Kind.OPEN


def is_app(thing: Any) -> bool:
    """Whether an object can be served, as far as its signature tells."""
    return kind_of(thing) in {Kind.WSGI, Kind.OPEN}


def is_flask(thing: Any) -> bool:
    """Whether an object is a Flask app itself, not a proxy to one."""
    from flask import Flask  # noqa: PLC0415 - slow to import, and client verbs do not need it

    return issubclass(type(thing), Flask)


def is_class(thing: Any) -> bool:
    """Whether an object is a class, not a proxy that pretends to be one."""
    return issubclass(type(thing), type)


def is_function(thing: Any) -> bool:
    """Whether Flask's loader takes an object for a function: it is one, or its `__class__` says so."""
    try:
        return isinstance(thing, FunctionType)
    except Exception:  # noqa: BLE001 - an object may raise when its __class__ is read
        return False


def binds(thing: Any, *args: Any, **kwargs: Any) -> str:
    """Why an object cannot be called with these arguments; empty if it can, or if its signature is not known."""
    if (known := _signature(thing)) is not None:
        signature, first, more = known
        try:
            signature.bind(*first, *args, **{**more, **kwargs})
        except TypeError as error:
            return str(error)
    return ""


_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""The function that a call runs in the end, and the arguments that it gets in addition to those of the call."""


def _made_of(thing: Any) -> _Call | None:
    """Resolve methods, partials and functools.wraps to a `_Call`; None if that would run code of a proxy."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    for _ in range(_MAX_WRAPPERS):
        if type(thing) is functools.partial:
            thing, args, kwargs = thing.func, (*thing.args, *args), {**thing.keywords, **kwargs}
        elif type(thing) is MethodType:
            thing, args = thing.__func__, (thing.__self__, *args)
        elif (call := _call_of(thing)) is not None:
            thing, args = call, (thing, *args)
        elif (wrapped := attributes_of(thing).get("__wrapped__")) is not None:  # functools.wraps, functools.cache
            thing = wrapped
        elif type(thing) is FunctionType or is_class(thing) or not _FLAGS(type(thing)) & _HEAP_TYPE:
            return thing, args, kwargs
        else:
            break
    return None


def _call_of(thing: Any) -> FunctionType | None:
    """The `__call__` of an object's class, if it is a Python function."""
    call = next((vars(base)["__call__"] for base in bases(type(thing)) if "__call__" in vars(base)), None)
    return call if isinstance(call, FunctionType) else None


def _signature(thing: Any) -> tuple[inspect.Signature, tuple[Any, ...], dict[str, Any]] | None:
    if (made := _made_of(thing)) is None:
        return None
    called, args, kwargs = made
    try:
        return inspect.signature(called, follow_wrapped=type(called) is not FunctionType), args, kwargs
    except Exception:  # noqa: BLE001 - C code without a signature, or a class that raises
        return None


def _takes(thing: Any, count: int) -> bool | None:
    """Whether an object can be called with `count` arguments; None if its signature is not known."""
    return None if _signature(thing) is None else not binds(thing, *range(count))


def _is_variadic(thing: Any) -> bool:
    known = _signature(thing)
    return known is not None and any(each.kind is each.VAR_POSITIONAL for each in known[0].parameters.values())


def _is_asynchronous(thing: Any) -> bool:
    made = _made_of(thing)
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return made is not None and type(made[0]) is FunctionType and any(each(made[0]) for each in kinds)


def _takes_scope(thing: Any) -> bool:
    """Whether an object takes the arguments of an ASGI app: three, or (ASGI 2) the scope alone."""
    if _takes(thing, 2) is False and _takes(thing, 3):
        return True
    known = _signature(thing)
    return known is not None and not _takes(thing, 2) and list(known[0].parameters)[len(known[1]) :][:1] == ["scope"]


def find_flask(wsgi: Any, *, by_name: bool = True) -> Flask | None:
    """The Flask app in a WSGI callable: the callable itself, or the nearest one that its middleware holds.

    Wrappers are followed by their usual attributes first. Then all that the innermost wrapper holds is searched, and
    after that all that the outermost holds: attributes, closures, arguments of partials, containers, and with `by_name`
    the globals that functions use.
    """
    innermost = wsgi
    for _ in range(_MAX_WRAPPERS):
        if is_flask(innermost) or (following := _wrapped_in(innermost)) is None:
            break
        innermost = following
    found: Flask | None = _nearest(is_flask, innermost, by_name=by_name) or _nearest(is_flask, wsgi, by_name=by_name)
    return found


def holds(wsgi: Any, other: Any) -> bool:
    """Whether a WSGI callable holds another one, in any of the ways that `find_flask` searches, except by name."""
    return _nearest(lambda each: each is other, wsgi, by_name=False) is not None


def _nearest(wanted: Callable[[Any], bool], thing: Any, *, by_name: bool) -> Any:
    """The nearest object, by the number of references, for which `wanted` is true; None if there is none."""
    seen, level = {id(thing)}, [thing]
    while level and len(seen) < _MAX_LOOKED_AT:
        for each in level:
            if wanted(each):
                return each
        held = {id(inner): inner for each in level for inner in _held_by(each, by_name=by_name)}
        level = [inner for key, inner in held.items() if key not in seen]
        seen |= held.keys()
    return None


def wraps_flask(thing: Any, kinds: Collection[Kind] = (Kind.WSGI,)) -> bool:
    """Whether an object wraps a Flask app: it is of one of these kinds, or is a function that closes over one."""
    if is_flask(thing) or is_class(thing):
        return False
    if issubclass(type(thing), FunctionType):
        return is_app(thing) and closes_over_app(thing)
    return kind_of(thing) in kinds and find_flask(thing, by_name=False) is not None


def closes_over_app(function: Any, depth: int = _MAX_WRAPPERS) -> bool:
    """Whether a function wraps an app: it closes over one, or over a function that does."""
    if depth and issubclass(type(function), FunctionType):
        for each in _contents(function.__closure__ or ()):
            if issubclass(type(each), FunctionType):
                if closes_over_app(each, depth - 1):
                    return True
            elif is_flask(each) or wraps_flask(each):
                return True
    return False


def _contents(cells: Iterable[CellType]) -> Iterator[Any]:
    for cell in cells:
        yield from gc.get_referents(cell)  # an empty cell refers to nothing


def _wrapped_in(thing: Any) -> Any:
    """What an object keeps in one of the usual attributes; for a bound method or a partial, what it is made of."""
    if issubclass(type(thing), MethodType):
        return thing.__self__
    if type(thing) is functools.partial:
        return thing.func
    attributes = {} if issubclass(type(thing), _NOT_FOLLOWED) else attributes_of(thing)
    return next((attributes[name] for name in _INSIDE if attributes.get(name) is not None), None)


def _held_by(thing: Any, *, by_name: bool) -> Iterator[Any]:
    """What an object refers to; if its class defines `__call__`, also that function and the attributes of the class."""
    if issubclass(type(thing), FunctionType):
        yield from _held_by_function(thing, by_name=by_name)
        return
    for each in gc.get_referents(thing):
        if not issubclass(type(each), _NOT_FOLLOWED):
            yield each
    if (call := _call_of(thing)) is not None:
        yield call
        for base in bases(type(thing)):  # middleware may keep the app in its class
            yield from (each for each in vars(base).values() if not issubclass(type(each), _NOT_FOLLOWED + _METHODS))


def _held_by_function(function: FunctionType, *, by_name: bool) -> Iterator[Any]:
    yield from _contents(function.__closure__ or ())
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from function.__dict__.values()
    if by_name:
        known = function.__globals__
        for name in _names_in(function.__code__):
            if name in known and not issubclass(type(known[name]), _NOT_FOLLOWED):
                yield known[name]


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names_in(each)
