"""Choosing the object of a module that is served: the one that the target names, or the module's app."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

from flaskd.objects import attributes_of
from flaskd.serving.wsgi import (
    Kind,
    WSGIApp,
    binds,
    closes_over_app,
    find_flask,
    holds,
    is_app,
    is_class,
    is_flask,
    is_function,
    kind_of,
    wraps_flask,
)
from flaskd.values import value

_USUAL = ("application", "app")
"""The name that WSGI servers look for (PEP 3333), and the name that is usual with Flask; in this order."""
_FACTORIES = ("create_app", "make_app")
"""The functions that Flask's own loader calls if a module has no app (flask.cli.find_best_app)."""


class NoAppError(Exception):
    """Why no app was chosen; the caller turns it into a ConfigError that names the target."""


def why_not(thing: Any) -> str:
    """Why an object cannot be served, and what to do about it."""
    if kind_of(thing) is Kind.ASGI:
        return (
            "it is an ASGI app, and flaskd serves WSGI apps; serve it with an ASGI server (uvicorn, hypercorn), or "
            "name a WSGI app around it, such as a2wsgi.ASGIMiddleware(app)"
        )
    return "it is no WSGI app: it cannot be called with (environ, start_response)"


@value
class Choice:
    """The chosen object, its name as a target, why it was chosen, and what else may have been meant (`doubt`)."""

    wsgi: WSGIApp
    name: str
    why: str
    doubt: str = ""


class Named:
    """The object of a module that a target names. Flask's loader gets this object in the place of the module.

    Flask's loader calls functions, and refuses the result if it is not a Flask app. So it gets a function for each
    callable; that function notes what it chose, and this is served even if the loader refuses it.
    """

    def __init__(self, module: ModuleType, name: str, asked: str) -> None:
        self._module = module
        self.__name__ = name  # Flask's loader uses it in messages
        self._asked = asked.strip()
        self._chosen: Any = None

    def find(self) -> Choice:
        """Choose; raises the errors of Flask's loader, NoAppError, and errors of the app's own code."""
        from flask.cli import NoAppException, find_app_by_string  # noqa: PLC0415 - see load_app

        try:
            found = find_app_by_string(self, self._asked)  # type: ignore[arg-type]  # it only reads attributes
        except NoAppException:
            if (found := self._chosen) is None:
                raise
        name, call, _ = self._asked.partition("(")  # its arguments may be secret
        return Choice(found, f"{self.__name__}:{name}" + (call and "()"), "it was named")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not callable(found) or (is_class(found) and kind_of(found) is Kind.OTHER and not self._is_call):
            return found

        def choose(*args: Any, **kwargs: Any) -> Any:
            made = found
            if not self._is_itself_meant(name, found, given=bool(args or kwargs)):
                made = _called(f"{self.__name__}:{name}", found, *args, **kwargs)
            if is_app(made):
                self._chosen = made
            return made if is_flask(made) else None

        return choose

    @property
    def _is_call(self) -> bool:
        return self._asked.endswith(")")

    def _is_itself_meant(self, name: str, found: Any, *, given: bool) -> bool:
        """Whether the object itself is the app, not a factory; Flask's loader takes every function for a factory."""
        place, kind, function = f"{self.__name__}:{name}", kind_of(found), is_function(found)
        if given or (self._is_call and function):
            return False
        if kind is Kind.ASGI:
            raise NoAppError(f"{place}: {why_not(found)}")
        if kind is Kind.WSGI or is_flask(found):
            return True
        if kind is Kind.OPEN and not self._is_call:
            return not function or name in _USUAL or closes_over_app(found)
        if not self._is_call and not function:
            raise NoAppError(f'{place}: {why_not(found)}; to have it called as a factory, name it "{place}()"')
        return False


class Unnamed:
    """The object of a module that is served if the target does not name one.

    It is the module's own WSGI callable, else its only Flask app, else what a factory returns that Flask's loader would
    call. Each attribute is read once: a module may create it when it is read (PEP 562).
    """

    def __init__(self, module: ModuleType, name: str) -> None:
        self._module = module
        self._name = name  # not module.__name__: sys.modules may have another object
        there = list(attributes_of(module).items())
        self._flask_apps = [(name, value) for name, value in there if is_flask(value)]
        # Next to a Flask app, a callable with open arguments may be a task or a command; without one it is the app.
        kinds = (Kind.WSGI,) if self._flask_apps else (Kind.WSGI, Kind.OPEN)
        own = {id(value) for _, value in self._flask_apps}
        self._wrappers = [
            (name, value)
            for name, value in there
            if wraps_flask(value, kinds) and not (type(value) is MethodType and id(value.__self__) in own)
        ]

    def find(self) -> Choice:
        """Choose; raises NoAppError, and errors of the app's own code."""
        return self._usual() or self._only() or self._made()

    def _usual(self) -> Choice | None:
        for name in _USUAL:
            found = getattr(self._module, name, None)
            if callable(found) and not (is_class(found) and kind_of(found) is Kind.OTHER):
                self._check(name, found)
                return Choice(found, f"{self._name}:{name}", self._why(name, found), self._doubt(name, found))
        return None

    def _check(self, name: str, found: Any) -> None:
        """Raise NoAppError for what is not a WSGI app: to serve another object of the module would be a guess."""
        place, others = f"{self._name}:{name}", [f"{self._name}:{each}" for each, _ in self._flask_apps]
        kind = kind_of(found)
        unsure = (
            kind is Kind.OPEN and name != _USUAL[0] and others and find_flask(found) is None and not is_flask(found)
        )
        if unsure:
            what = f"{place} takes anything, so it may be a WSGI app or something else"
        elif kind in {Kind.WSGI, Kind.OPEN}:
            return
        else:
            what = f"{place}: {why_not(found)}"
        ways = [*([place] if unsure else [] if binds(found) else [f"{place}()"]), *others]
        raise NoAppError(f"{what}; name what is to be served: {_quoted(ways)}" if ways else what)

    def _why(self, name: str, found: Any) -> str:
        other = attributes_of(self._module).get("app")
        if name == _USUAL[0]:
            if other is None or other is found or not callable(other):
                return "the name that WSGI servers look for"
            return (
                f"the name that WSGI servers look for comes first; {self._name}:app is another object, and not served"
            )
        return f'the module has "{name}", and no "{_USUAL[0]}"'

    def _doubt(self, name: str, found: Any) -> str:
        """A warning if other names of the module wrap the chosen object: one of them may have been meant."""
        around = [each for each, value in self._wrappers if value is not found and holds(value, found)]
        if not around:
            return ""
        places = _quoted([f"{self._name}:{each}" for each in around])
        return f"{self._name}:{name} is served without what is wrapped around it; if that was meant, name {places}"

    def _only(self) -> Choice | None:
        there = list({id(value): (name, value) for name, value in [*self._flask_apps, *self._wrappers]}.values())
        if len(there) > 1:
            places = _quoted([f"{self._name}:{name}" for name, _ in there])
            what = "Flask applications" if not self._wrappers else "WSGI applications"
            raise NoAppError(f"detected multiple {what} in module '{self._name}'; name the one to serve: {places}")
        for name, found in there:
            return Choice(found, f"{self._name}:{name}", "the only app in the module")
        return None

    def _made(self) -> Choice:
        tried: list[Any] = []
        for name in _FACTORIES:
            factory: Any = getattr(self._module, name, None)
            if not is_function(factory) or factory in tried:
                continue
            place = f"{self._name}:{name}"
            if binds(factory):
                raise NoAppError(
                    f"detected factory '{name}' in module '{self._name}', but could not call it without arguments; "
                    f'name it with them: "{place}(args)"'
                )
            tried.append(factory)
            if is_app(made := _called(place, factory)):
                return Choice(made, f"what {place}() made", "the module has this factory, and no app")
        there = attributes_of(self._module)
        uncalled = [name for name in _FACTORIES if callable(there.get(name)) and not is_function(there[name])]
        places = _quoted([f"{self._name}:{name}()" for name in uncalled] or [f"{self._name}:NAME"])
        raise NoAppError(
            f"failed to find Flask application or factory in module '{self._name}'; name what is to be served: {places}"
        )


def _called(place: str, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a factory; raises NoAppError if the arguments do not fit, it is asynchronous, or it makes an ASGI app."""
    if why := binds(factory, *args, **kwargs):
        raise NoAppError(f'the factory "{place.partition(":")[2]}" cannot be called like that: {why}')
    made = factory(*args, **kwargs)
    if inspect.iscoroutine(made):
        made.close()
        raise NoAppError(f"{place} is an asynchronous function; a factory of a WSGI app is a plain one")
    if kind_of(made) is Kind.ASGI:
        raise NoAppError(f"{place}() made {type(made).__name__}: {why_not(made)}")
    return made


def _quoted(names: list[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)
