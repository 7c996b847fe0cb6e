"""Which object of a module is served, with its wrappers, and which factory is called, once."""

import types
from textwrap import dedent
from types import ModuleType

import flask.cli
import pytest
from flask import Flask

from flaskd.serving.choice import Named, NoAppError, Unnamed
from flaskd.serving.wsgi import find_flask

HEAD = """
    import functools
    from flask import Flask
    calls = []

    def create_app(name="shop", debug=False):
        calls.append(name)
        return Flask(name)

    class BasicAuth:
        "Middleware as many have written it; it names what it wraps as it likes."
        def __init__(self, wrapped):
            self.protected = wrapped
        def __call__(self, environ, start_response):
            return self.protected(environ, start_response)

    class Anything(BasicAuth):
        def __call__(self, *args, **kwargs):
            return self.protected(*args, **kwargs)

    def requires_login(wrapped):
        def serve(*args, **kwargs):
            return wrapped(*args, **kwargs)
        return serve

    def documented(wrapped):
        return functools.wraps(wrapped)(requires_login(wrapped))
"""


def module_of(source, head=HEAD):
    """A module with this source."""
    module = ModuleType("ldshop")
    exec(dedent(head) + dedent(source), vars(module))
    return module


def chosen(source, name=""):
    """The object that is served, and the module."""
    module = module_of(source)
    return (Named(module, "ldshop", name) if name else Unnamed(module, "ldshop")).find(), module


def refused(source, name="", error=NoAppError):
    """The error that says why nothing is served."""
    module = module_of(source)
    with pytest.raises(error) as raised:
        (Named(module, "ldshop", name) if name else Unnamed(module, "ldshop")).find()
    return str(getattr(raised.value, "message", raised.value)), module


@pytest.mark.parametrize("wrapper", ["BasicAuth", "Anything", "requires_login", "documented", "functools.partial"])
@pytest.mark.parametrize("name", ["application", "app"])
@pytest.mark.parametrize("target", ["", "named"])
def test_a_wrapper_is_served_and_its_factory_is_not_called_again(wrapper, name, target):
    """A module's wrapper is served, however it was made; PEP 3333 only asks that it can be called."""
    found, module = chosen(f"{name} = {wrapper}(create_app())", name if target else "")
    assert found.wsgi is getattr(module, name)
    assert found.name == f"ldshop:{name}"
    assert find_flask(found.wsgi).import_name == "shop"
    assert module.calls == ["shop"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (
            "application, app = BasicAuth(create_app()), create_app('other')",
            "comes first; ldshop:app is another object",
        ),
        ("app = create_app()\napplication = BasicAuth(app)", "comes first; ldshop:app is another object"),
        ("app = create_app()\napplication = app.wsgi_app", "comes first; ldshop:app is another object"),
        ("app, application = create_app('a'), create_app('b')", "comes first; ldshop:app is another object"),
        ("app = application = create_app()", "the name that WSGI servers look for"),
        ("application, app = create_app(), 7", "the name that WSGI servers look for"),
    ],
)
def test_application_comes_before_app(source, why):
    """Of two objects, the one under the name that WSGI servers look for is served, and the log names both."""
    found, module = chosen(source)
    assert found.wsgi == module.application
    assert found.name == "ldshop:application"
    assert why in found.why
    assert ("another" in why) is ("another" in found.why)


@pytest.mark.parametrize("application", ["None", "'shop'", "BasicAuth", "type(calls)", "ModuleTypeOfOurs"])
def test_what_cannot_be_called_or_is_a_mere_class_is_passed_over(application):
    """A setting, a submodule or an imported class under a usual name is not taken for the app."""
    found, module = chosen(
        f"import types\nModuleTypeOfOurs = types.ModuleType('x')\napplication = {application}\napp = create_app()"
    )
    assert found.wsgi is module.app


def test_a_class_as_the_standard_has_it():
    """A class whose instances are the answers is an app (PEP 3333)."""
    source = """
        class application:
            def __init__(self, environ, start_response):
                pass
            def __iter__(self):
                yield b""
    """
    found, module = chosen(source)
    assert found.wsgi is module.application
    assert module.calls == []


@pytest.mark.parametrize(
    ("application", "said"),
    [
        ("create_app", 'name what is to be served: "ldshop:application()"'),
        ("functools.partial(create_app)", '"ldshop:application()"'),
        ("functools.cache(create_app)", '"ldshop:application()"'),
        ("lambda: BasicAuth(create_app())", '"ldshop:application()"'),
        ("lambda environ: None", "it cannot be called with (environ, start_response)"),
    ],
)
def test_a_usual_name_for_what_is_no_app_is_refused(application, said):
    """An object under a usual name that is no app is refused: it is not called, and nothing else is served."""
    words, module = refused(f"application = {application}")
    assert words.startswith("ldshop:application: it is no WSGI app")
    assert said in words
    assert module.calls == []


def test_the_choice_between_an_object_that_takes_anything_and_an_app():
    """`app` may be a command line next to a Flask app with another name, so flaskd does not guess."""
    source = "class Typer:\n    def __call__(self, *args, **kwargs): pass\napp, server = Typer(), create_app()"
    words, _ = refused(source)
    assert words.endswith('name what is to be served: "ldshop:app" or "ldshop:server"')
    assert chosen(source, "server")[0].wsgi.import_name == "shop"
    assert type(chosen(source, "app")[0].wsgi).__name__ == "Typer"


@pytest.mark.parametrize("secured", ["BasicAuth({})", "requires_login({})", "Anything({})"])
def test_a_wrapper_under_another_name_is_not_lost(secured):
    """Without a Flask app of its own, a module's only wrapper is its app; its factory is not called."""
    found, module = chosen(f"secured = {secured.format('create_app()')}")
    assert found.wsgi is module.secured
    assert module.calls == ["shop"]


def test_an_app_and_its_wrapper_under_other_names():
    """If an app and its wrapper both have other names, flaskd refuses to guess."""
    words, module = refused("shop = create_app()\nsecured = BasicAuth(shop)")
    assert words.endswith('name the one to serve: "ldshop:shop" or "ldshop:secured"')
    assert module.calls == ["shop"]


def test_an_app_under_its_usual_name_and_a_wrapper_under_another():
    """The app under its usual name is served, with a warning that names the wrapper."""
    found, module = chosen("app = create_app()\nsecured = BasicAuth(app)\ndef view(a, b): return app.name")
    assert found.wsgi is module.app
    assert found.doubt == (
        'ldshop:app is served without what is wrapped around it; if that was meant, name "ldshop:secured"'
    )
    assert chosen("app = create_app()\ndef view(a, b): return app.name")[0].doubt == ""
    assert chosen("app = create_app()\nserve = app.wsgi_app")[0].doubt == ""


def test_wrappers_around_each_other():
    """Of two nested wrappers, a warning names the outer one, which has another name."""
    found, module = chosen("app = BasicAuth(create_app())\nsecured = documented(app)")
    assert found.wsgi is module.app
    assert found.doubt.endswith('name "ldshop:secured"')
    found, module = chosen("inner = BasicAuth(create_app())\napplication = BasicAuth(inner)")
    assert found.wsgi is module.application
    assert found.doubt == ""


def test_the_own_method_of_an_app_is_no_wrapper():
    """`serve = shop.wsgi_app` does not count next to the shop; without the shop it is the app."""
    assert chosen("shop = create_app()\nserve = shop.wsgi_app")[0].name == "ldshop:shop"
    found, module = chosen("serve = create_app().wsgi_app")
    assert found.name == "ldshop:serve"
    assert module.calls == ["shop"]


def test_a_factory_that_flask_would_not_call_is_named():
    """The error for a factory that Flask would not call shows the target that calls it."""
    words, module = refused("create_app = functools.cache(create_app)")
    assert words.endswith('name what is to be served: "ldshop:create_app()"')
    assert module.calls == []


def test_one_app_under_two_names_is_one():
    """An app that was imported under a second name counts once."""
    assert chosen("shop = same = create_app()")[0].wsgi.import_name == "shop"


@pytest.mark.parametrize(
    ("source", "calls"),
    [("", ["shop"]), ("make_app = create_app", ["shop"]), ("create_app = requires_login(create_app)", ["shop"])],
)
def test_a_factory_is_called_once(source, calls):
    """What the first factory makes is served, and no other factory is called."""
    found, module = chosen(source)
    assert find_flask(found.wsgi).import_name == calls[0]
    assert module.calls == calls


@pytest.mark.parametrize("source", ["", "make_app = create_app"])
def test_what_a_factory_makes_is_served_whole(source):
    """A factory that wraps its app is called once, and the wrapper is served."""
    wrapping = "inner = create_app\ndef create_app(): return BasicAuth(inner('once'))\n"
    found, module = chosen(wrapping + source)
    assert type(found.wsgi) is module.BasicAuth
    assert module.calls == ["once"]


def test_a_factory_that_makes_nothing_is_not_called_again_under_its_other_name():
    """A factory that makes nothing is not called again under its second name, with which Flask's rule goes on."""
    words, module = refused("def create_app():\n    calls.append(1)\nmake_app = create_app")
    assert "failed to find Flask application or factory" in words
    assert module.calls == [1]


@pytest.mark.parametrize(
    "made",
    [
        "functools.partial(create_app)",
        "functools.cache(create_app)",
        "type('F', (), {'__call__': lambda self: create_app()})()",
    ],
)
def test_what_flask_would_not_call_is_called_when_the_target_says_so(made):
    """A callable that is not a function is called, once, if the target has parentheses."""
    words, module = refused(f"make = {made}", "make")
    assert words.endswith('to have it called as a factory, name it "ldshop:make()"')
    assert module.calls == []
    found, module = chosen(f"make = {made}", "make()")
    assert found.wsgi.import_name == "shop"
    assert module.calls == ["shop"]


def test_a_named_factory_is_called_with_what_was_named():
    """A named factory is called with the named arguments, as in Flask, and its result is served with its wrappers."""
    found, module = chosen(
        "def make(name, *, times=1): return BasicAuth(create_app(name * times))", "make('x', times=2)"
    )
    assert type(found.wsgi) is module.BasicAuth
    assert module.calls == ["xx"]
    assert found.name == "ldshop:make()", "arguments may be secret"


def test_a_module_that_makes_what_it_is_asked_for_is_asked_once():
    """An attribute that `__getattr__` of a module makes (PEP 562) is made once."""
    found, module = chosen("def __getattr__(name):\n    if name == 'app': return BasicAuth(create_app())\n    raise AttributeError(name)")  # fmt: skip
    assert found.name == "ldshop:app"
    assert module.calls == ["shop"]
    assert find_flask(found.wsgi).import_name == "shop"
    source = "def __getattr__(name):\n    if name == 'application': return BasicAuth(create_app())\n    raise AttributeError(name)\napp = create_app('plain')"
    found, module = chosen(source)
    assert found.name == "ldshop:application"
    assert module.calls == ["plain", "shop"]


@pytest.mark.parametrize("name", ["", "app", "create_app", "create_app()"])
def test_an_object_in_a_modules_place(name):
    """A module may have replaced itself by another object in sys.modules."""
    place = types.SimpleNamespace()
    if name in {"", "app"}:
        place.app = Flask("shop")
    else:
        place.create_app = lambda: Flask("shop")
    found = (Named(place, "ldshop", name) if name else Unnamed(place, "ldshop")).find()
    assert found.wsgi.import_name == "shop"


ASGI = """
class FastAPI:
    async def __call__(self, scope, receive, send): pass
async def plain(scope, receive, send): pass
def unclear(scope, receive, send): pass
"""


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("app = FastAPI()", ""),
        ("application = FastAPI()", ""),
        ("app = FastAPI()", "app"),
        ("app = FastAPI()", "app()"),
        ("api = FastAPI()", "api"),
        ("", "plain"),
        ("", "unclear"),
        ("app = functools.partial(plain)", ""),
        ("app = create_app()\napplication = FastAPI()", ""),
        ("app = FastAPI()\nflask_app = create_app()", ""),
        ("def create_app(): return FastAPI()", ""),
        ("def make(): return plain", "make"),
        ("def make(n): return FastAPI()", "make(1)"),
    ],
)
def test_an_asgi_app_is_refused_with_the_next_step(source, name):
    """An ASGI app is refused with advice, because it would answer every request with an error."""
    words, _ = refused(ASGI + source, name)
    assert "it is an ASGI app, and flaskd serves WSGI apps; serve it with an ASGI server (uvicorn, hypercorn)" in words


@pytest.mark.parametrize("name", ["", "create_app", "create_app()"])
def test_an_asynchronous_factory_is_refused(name):
    """An asynchronous factory is refused, and its coroutine is closed."""
    words, _ = refused("async def create_app(): return Flask('x')", name)
    assert words == "ldshop:create_app is an asynchronous function; a factory of a WSGI app is a plain one"


@pytest.mark.parametrize(
    "source",
    [
        "app = create_app()",
        "application = create_app()",
        "front = create_app()",
        "app, other = create_app(), create_app('o')",
        "app = 7\nfront = create_app()",
        "",
        "def make_app(): return Flask('made')\ndel create_app",
    ],
)
def test_flasks_own_choice(source):
    """If a module has only Flask apps and factories, and not two usual names, the choice is that of Flask."""
    ours, module = chosen(source)
    assert isinstance(ours.wsgi, Flask)
    theirs = flask.cli.find_best_app(module)
    assert theirs is ours.wsgi or (ours.why.endswith("and no app") and theirs.import_name == ours.wsgi.import_name)
