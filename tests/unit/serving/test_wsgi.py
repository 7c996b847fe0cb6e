"""Kinds of callables by their signatures, and the Flask app that middleware holds."""

import functools
import inspect
import wsgiref.validate

import pytest
from flask import Flask, current_app
from werkzeug.debug import DebuggedApplication
from werkzeug.exceptions import NotFound
from werkzeug.local import LocalProxy
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.lint import LintMiddleware
from werkzeug.middleware.profiler import ProfilerMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.middleware.shared_data import SharedDataMiddleware

from flaskd.serving.wsgi import Kind, binds, find_flask, kind_of, wraps_flask

APP = Flask("inside")


class Object:
    def __init__(self, app):
        self.hidden = {"somewhere": [(app,)]}

    def __call__(self, environ, start_response):
        return self.hidden["somewhere"][0][0](environ, start_response)


class Slots:
    __slots__ = ("inner",)

    def __init__(self, app):
        self.inner = app

    def __call__(self, *args):
        return self.inner(*args)

    def serve(self, environ, start_response):
        return self.inner(environ, start_response)


class Hostile:
    """Raises when any attribute is read."""

    def __init__(self, app):
        object.__setattr__(self, "hidden", app)

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __call__(self, environ, start_response):
        return object.__getattribute__(self, "hidden")(environ, start_response)


class ByName:
    def __call__(self, environ, start_response):
        return APP(environ, start_response)


class OfItsClass:
    inner = APP

    def __call__(self, environ, start_response):
        return self.inner(environ, start_response)

    @classmethod
    def serve(cls, environ, start_response):
        return cls.inner(environ, start_response)


def closure(app):
    def serve(environ, start_response):
        return app(environ, start_response)

    return serve


def decorated(app):
    def serve(*args, **kwargs):
        return app(*args, **kwargs)

    return serve


def documented(app):
    return functools.wraps(app)(decorated(app))


def by_name(environ, start_response):
    return APP(environ, start_response)


def by_default(environ, start_response, *, app=APP):
    return app(environ, start_response)


def with_app(app, environ, start_response):
    return app(environ, start_response)


WRAPPERS = {
    "a debugger": (DebuggedApplication(APP), Kind.WSGI),
    "a dispatcher's mount": (DispatcherMiddleware(NotFound(), {"/shop": APP}), Kind.WSGI),
    "a linter": (LintMiddleware(APP), Kind.OPEN),
    "a profiler": (ProfilerMiddleware(APP), Kind.WSGI),
    "proxy headers": (ProxyFix(APP), Kind.WSGI),
    "shared files": (SharedDataMiddleware(APP, {}), Kind.WSGI),
    "the standard library's validator": (wsgiref.validate.validator(APP), Kind.OPEN),
    "an object whose class has it": (OfItsClass(), Kind.WSGI),
    "a method of a class": (OfItsClass.serve, Kind.WSGI),
    "an object that hides it": (Object(APP), Kind.WSGI),
    "an object with slots": (Slots(APP), Kind.OPEN),
    "a method of an object": (Slots(APP).serve, Kind.WSGI),
    "an object that raises at every question": (Hostile(APP), Kind.WSGI),
    "an object that names it": (ByName(), Kind.WSGI),
    "a closure": (closure(APP), Kind.WSGI),
    "a decorator": (decorated(APP), Kind.OPEN),
    "a decorator with functools.wraps": (documented(APP), Kind.WSGI),
    "decorators": (decorated(documented(closure(APP))), Kind.OPEN),
    "a function that names it": (by_name, Kind.WSGI),
    "a function's default": (by_default, Kind.WSGI),
    "a lambda": (lambda environ, start_response: [*APP(environ, start_response)], Kind.WSGI),
    "a partial": (functools.partial(with_app, APP), Kind.WSGI),
    "its own method": (APP.wsgi_app, Kind.WSGI),
    "a proxy": (LocalProxy(lambda: APP), Kind.OPEN),
    "many": (ProxyFix(Object(decorated(wsgiref.validate.validator(ProfilerMiddleware(Slots(APP)))))), Kind.WSGI),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_app_inside_is_found(name):
    """The Flask app is found in any wrapper, and the wrapper counts as a WSGI app."""
    wrapper, kind = WRAPPERS[name]
    assert find_flask(wrapper) is APP
    assert kind_of(wrapper) is kind


@pytest.mark.parametrize(
    ("package", "name", "kind"),
    [
        ("a2wsgi", "WSGIMiddleware", Kind.ASGI),
        ("asgiref.wsgi", "WsgiToAsgi", Kind.ASGI),
        ("opentelemetry.instrumentation.wsgi", "OpenTelemetryMiddleware", Kind.WSGI),
        ("sentry_sdk.integrations.wsgi", "SentryWsgiMiddleware", Kind.WSGI),
        ("whitenoise", "WhiteNoise", Kind.WSGI),
        ("wrapt", "CallableObjectProxy", Kind.OPEN),
    ],
)
@pytest.mark.filterwarnings("ignore")  # other packages, which may warn about others
def test_the_app_inside_published_middleware_is_found(package, name, kind):
    """The same for widely used middleware."""
    wrapper = getattr(pytest.importorskip(package), name)(APP)
    assert find_flask(wrapper) is APP
    assert kind_of(wrapper) is kind


def test_the_main_app_comes_before_the_mounted_ones():
    """The main app of a dispatcher is found, however deep, and no mounted app is taken for it."""
    main = ProxyFix(SharedDataMiddleware(ProfilerMiddleware(Slots(APP)), {}))
    assert find_flask(DispatcherMiddleware(main, {"/other": Flask("mounted")})) is APP


@pytest.mark.parametrize(
    "thing", [print, None, 7, Flask, current_app, LocalProxy(dict), object()], ids=lambda thing: type(thing).__name__
)
def test_nothing_is_found_where_there_is_nothing(thing):
    """If no Flask app is held, None is returned, and no code of a proxy runs."""
    assert find_flask(thing) is None
    assert not wraps_flask(thing, Kind)


class Asgi:
    async def __call__(self, scope, receive, send):
        raise NotImplementedError


class DoubleAsgi:
    def __init__(self, scope):
        raise NotImplementedError

    async def __call__(self, receive, send):
        raise NotImplementedError


class Iterable:
    """PEP 3333's example of a class that is an app."""

    def __init__(self, environ, start_response):
        self.start_response = start_response

    def __iter__(self):
        yield b""


async def asgi(scope, receive, send):
    raise NotImplementedError


async def asynchronous_wsgi(environ, start_response):
    raise NotImplementedError


async def asynchronous_answer(environ, start_response):
    yield b""


async def asynchronous_factory(config=None):
    raise NotImplementedError


def factory(config=None, debug=False):
    raise NotImplementedError


class Factory:
    def __call__(self):
        raise NotImplementedError


class Defaults:
    def __call__(self, environ=None, start_response=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("thing", "kind"),
    [
        (APP, Kind.WSGI),
        (by_name, Kind.WSGI),
        (Iterable, Kind.WSGI),
        (lambda environ, start_response, more=None: None, Kind.WSGI),
        (lambda *args: None, Kind.OPEN),
        (Defaults(), Kind.OPEN),
        (Asgi(), Kind.ASGI),
        (Asgi().__call__, Kind.ASGI),
        (DoubleAsgi, Kind.ASGI),
        (asgi, Kind.ASGI),
        (functools.partial(asgi), Kind.ASGI),
        (functools.wraps(asgi)(lambda *args: None), Kind.ASGI),
        (lambda scope: None, Kind.ASGI),
        (lambda scope, receive, send: None, Kind.ASGI),
        (asynchronous_wsgi, Kind.ASGI),
        (asynchronous_answer, Kind.ASGI),
        (asynchronous_factory, Kind.OTHER),
        (factory, Kind.OTHER),
        (functools.partial(factory), Kind.OTHER),
        (functools.lru_cache(factory), Kind.OTHER),
        (Factory(), Kind.OTHER),
        (Flask, Kind.OTHER),
        (Object, Kind.OTHER),
        (lambda: None, Kind.OTHER),
        (lambda environ: None, Kind.OTHER),
        (inspect, Kind.OTHER),
        ("app", Kind.OTHER),
    ],
    ids=lambda thing: thing.name if isinstance(thing, Kind) else type(thing).__name__,
)
def test_kinds(thing, kind):
    """Two positional arguments are WSGI (PEP 3333); three, the scope alone, or an asynchronous function are ASGI."""
    assert kind_of(thing) is kind


@pytest.mark.parametrize(("package", "name"), [("fastapi", "FastAPI"), ("quart", "Quart"), ("starlette.applications", "Starlette")])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_published_asgi_apps(package, name):
    """Apps of asynchronous frameworks are recognised as ASGI."""
    make = getattr(pytest.importorskip(package), name)
    assert kind_of(make("shop") if name == "Quart" else make()) is Kind.ASGI


def test_a_proxy_is_not_asked():
    """Looking at a proxy does not create what it stands for."""
    made = []
    proxy = LocalProxy(lambda: made.append(1))
    assert kind_of(proxy) is Kind.OPEN
    assert binds(proxy, 1, 2, 3) == ""
    assert find_flask(proxy) is None
    assert made == []


def test_who_is_a_wrapper():
    """A function that closes over an app is a wrapper; one that only uses the app's name is a view."""

    def view(first, second):
        return APP.name

    class Extension:
        def __init__(self):
            self.app = APP

        def cached(self, function):
            @functools.wraps(function)
            def call(*args):
                return self.app.name, function(*args)

            return call

    assert not wraps_flask(view)
    assert not wraps_flask(Extension().cached(view))
    assert not wraps_flask(Extension())
    assert not wraps_flask(APP)
    assert wraps_flask(decorated(documented(APP)))
    assert wraps_flask(Object(APP))
    assert not wraps_flask(LintMiddleware(APP))
    assert wraps_flask(LintMiddleware(APP), Kind)
