import importlib
import os
import sys
from pathlib import Path
from textwrap import dedent

import flask.cli
import pytest
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from flaskd.errors import EX_CONFIG, EX_SOFTWARE, AppError, ConfigError
from flaskd.serving.loading import choose_target, load_app
from flaskd.serving.wsgi import find_flask

FACTORY = """
    from flask import Flask
    from werkzeug.middleware.proxy_fix import ProxyFix
    calls = []

    def create_app(name="shop", *, debug=False):
        calls.append(name)
        app = Flask(name)
        app.debug = debug
        return app

    def wrapped(name="wrapped"):
        calls.append(name)
        return ProxyFix(Flask(name))
"""
NAMED = """
    from flask import Flask
    app, other = Flask("one"), Flask("two")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes modules into a directory and works there; afterwards they are removed from sys.modules."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("FLASK_RUN_FROM_CLI", "false")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def write(files=(), **modules):
        for name, source in {**dict(files), **modules}.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(source))
        importlib.invalidate_caches()
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def fault(target, kind):
    """Load a target that cannot be loaded; returns the error, which has one line."""
    with pytest.raises(kind) as raised:
        load_app(target)
    assert str(raised.value).startswith(f"cannot load {target}: ")
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize(
    ("source", "target", "name"),
    [
        (NAMED, "ldshop", "one"),
        (NAMED, "ldshop:app", "one"),
        (NAMED, "ldshop:other", "two"),
        (NAMED, "ldshop.py", "one"),
        (NAMED, "ldshop.py:other", "two"),
        (NAMED, "./ldshop.py", "one"),
        (FACTORY, "ldshop", "shop"),
        (FACTORY, "ldshop:create_app", "shop"),
        (FACTORY, "ldshop:create_app()", "shop"),
        (FACTORY, 'ldshop:create_app("x", debug=True)', "x"),
        (FACTORY, "ldshop.py:create_app('y')", "y"),
        ("from flask import Flask\napplication = Flask('x')", "ldshop", "x"),
        ("from flask import Flask\nfront_door = Flask('x')", "ldshop", "x"),
        ("from flask import Flask\ndef make_app(): return Flask('x')", "ldshop", "x"),
        ("from flask import Flask\ndef create_app(name=None): return Flask('x')", "ldshop", "x"),
    ],
)
def test_flasks_own_grammar(source, target, name, project):
    """What Flask's own command would serve is served."""
    project(ldshop=source)
    loaded = load_app(target)
    assert isinstance(loaded.wsgi, Flask)
    assert loaded.flask is loaded.wsgi
    assert loaded.wsgi.import_name == name
    assert loaded.target == target
    assert loaded.wsgi.debug is ("debug=True" in target)


@pytest.mark.parametrize("target", ["ldpkg", "ldpkg:app", "ldpkg/__init__.py", "ldpkg/", "ldpkg.inner:app"])
def test_packages(target, project):
    """A package is named as a module, or by its path."""
    source = "from flask import Flask\napp = Flask(__name__)"
    project({"ldpkg/__init__": source, "ldpkg/inner": source})
    assert load_app(target).wsgi.import_name == ("ldpkg.inner" if "inner" in target else "ldpkg")


def test_a_file_in_a_package_is_a_part_of_it(project):
    """A path into a package imports the package, so relative imports work."""
    project(
        {
            "src/ldpkg/__init__": "",
            "src/ldpkg/parts": "NAME = 'from parts'",
            "src/ldpkg/wsgi": "from flask import Flask\nfrom .parts import NAME\napp = Flask(NAME)",
        }
    )
    assert load_app("src/ldpkg/wsgi.py").wsgi.import_name == "from parts"


def test_an_absolute_path(project):
    """A file anywhere is found by its path."""
    directory = project({"elsewhere/ldshop": "from flask import Flask\napp = Flask('far')"})
    assert load_app(f"{directory}/elsewhere/ldshop.py").wsgi.import_name == "far"


def test_the_working_directory_is_on_the_path(project):
    """An app may import its neighbours, however it was named itself."""
    directory = project(
        {"sub/ldshop": "from flask import Flask\nfrom ldneighbour import NAME\napp = Flask(NAME)"},
        ldneighbour="NAME = 'next door'",
    )
    assert load_app("sub/ldshop.py").wsgi.import_name == "next door"
    assert str(directory) in sys.path


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("def application(environ, start_response): return 'answer'", "ldshop"),
        ("def app(environ, start_response): return 'answer'", "ldshop"),
        ("def application(environ, start_response): return 'answer'", "ldshop:application"),
        ("def front(environ, start_response, *, more=1): return 'answer'", "ldshop:front"),
        ("class C:\n  def __call__(self, e, s): return 'answer'\napplication = C()", "ldshop"),
        ("class C:\n  def __call__(self, e, s): return 'answer'\nfront = C()", "ldshop:front"),
        ("class C:\n  def serve(self, e, s): return 'answer'\nfront = C().serve", "ldshop:front"),
        ("class C:\n  def __call__(self, e, s): return 'answer'\ndef make(): return C()", "ldshop:make"),
        ("class C:\n  def __call__(self, e, s): return 'answer'\ndef make(x): return C()", "ldshop:make(1)"),
        ("def make(): return lambda e, s: 'answer'", "ldshop:make()"),
    ],
)
def test_any_wsgi_callable(source, target, project):
    """An app that is not a Flask app is served, by every form of target."""
    project(ldshop=source)
    loaded = load_app(target)
    assert loaded.flask is None
    assert loaded.wsgi({}, None) == "answer"


@pytest.mark.parametrize("name", ["fixed", "mounted"])
def test_a_wrapped_app_is_served_wrapped(name, project):
    """Middleware around a Flask app is served with it, and the Flask app inside is found."""
    project(
        ldshop="""
            from flask import Flask
            from werkzeug.middleware.dispatcher import DispatcherMiddleware
            from werkzeug.middleware.proxy_fix import ProxyFix
            shop = Flask("inside")
            fixed = ProxyFix(shop)
            mounted = DispatcherMiddleware(fixed, {})
        """
    )
    loaded = load_app(f"ldshop:{name}")
    assert type(loaded.wsgi) is {"fixed": ProxyFix, "mounted": DispatcherMiddleware}[name]
    assert loaded.flask.import_name == "inside"


def test_a_wrapped_app_under_a_usual_name_keeps_its_middleware(project):
    """Without a name in the target, `app = ProxyFix(shop)` is served with the middleware."""
    project(
        ldshop="""
            from flask import Flask
            from werkzeug.middleware.proxy_fix import ProxyFix
            shop = Flask("inside")
            app = ProxyFix(shop)
        """
    )
    loaded = load_app("ldshop")
    assert type(loaded.wsgi) is ProxyFix
    assert loaded.flask.import_name == "inside"


@pytest.mark.parametrize("target", ["ldshop:wrapped", "ldshop:wrapped()", 'ldshop:wrapped("wrapped")'])
def test_a_factory_of_a_wrapped_app_is_called_once(target, project):
    """What a factory makes is served, and the factory is called once."""
    project(ldshop=FACTORY)
    loaded = load_app(target)
    assert isinstance(loaded.wsgi, ProxyFix)
    assert loaded.flask.import_name == "wrapped"
    assert sys.modules["ldshop"].calls == ["wrapped"]


@pytest.mark.parametrize("target", ["ldshop", "ldshop:create_app"])
def test_a_factory_is_called_once(target, project):
    """A factory, which may open connections, is called once."""
    project(ldshop=FACTORY)
    load_app(target)
    assert sys.modules["ldshop"].calls == ["shop"]


def test_flask_apps_are_found_inside_their_middleware():
    """Through `.app`, `.wsgi_app` and the bound method that `app.wsgi_app = Middleware(app.wsgi_app)` passes."""

    class Holder:
        def __init__(self, **held):
            vars(self).update(held)

    app = Flask("inside")
    assert find_flask(app) is app
    assert find_flask(ProxyFix(app)) is app
    assert find_flask(app.wsgi_app) is app
    assert find_flask(ProxyFix(app.wsgi_app)) is app
    assert find_flask(Holder(wsgi_app=ProxyFix(app))) is app
    assert find_flask(Holder(app=None, wsgi_app=app)) is app
    assert find_flask(DispatcherMiddleware(ProxyFix(app), {"/x": Flask("mounted")})) is app
    assert find_flask(print) is None
    endless = Holder()
    endless.app = endless
    assert find_flask(endless) is None


def test_a_stray_run_does_nothing(project):
    """`app.run()` at the end of a module does not serve."""
    project(ldshop="from flask import Flask\napp = Flask('x')\napp.run(port=1)")
    assert load_app("ldshop").wsgi.import_name == "x"
    assert os.environ["FLASK_RUN_FROM_CLI"] == "true"


def test_a_dotenv_file_is_not_read(project, monkeypatch):
    """A .env file is not read: the service manager sets flaskd's environment."""
    monkeypatch.delenv("LD_SECRET", raising=False)
    directory = project(ldshop="from flask import Flask\napp = Flask('x')")
    (directory / ".env").write_text("LD_SECRET=1")
    (directory / ".flaskenv").write_text("LD_SECRET=1")
    load_app("ldshop")
    assert "LD_SECRET" not in os.environ


# --- faults of the configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        ("ldmissing", "ldmissing"),
        ("ldmissing:app", "ldmissing"),
        ("ldmissing.wsgi:app", "ldmissing"),
        ("ldpkg.missing", "ldpkg.missing"),
        ("ldmissing.py", "ldmissing"),
        ("nowhere/ldmissing.py", "ldmissing"),
    ],
)
def test_a_module_that_is_not_there(target, missing, project):
    """A missing module is a ConfigError that names where it was looked for."""
    directory = project({"ldpkg/__init__": ""})
    error = fault(target, ConfigError)
    assert error.exit_code == EX_CONFIG
    assert f'there is no module "{missing}" in {directory}' in str(error)


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("", "ldshop", "failed to find Flask application or factory"),
        ("", "ldshop:app", "failed to find attribute 'app'"),
        ("", "ldshop:create_app()", "failed to find attribute 'create_app'"),
        ("app = 7", "ldshop:app", "a valid Flask application was not obtained"),
        ("app = 7", "ldshop", "failed to find"),
        ("class App: pass", "ldshop:App", "a valid Flask application was not obtained"),
        ("class app: pass", "ldshop", "failed to find"),
        ("def make(): return 7", "ldshop:make", "a valid Flask application was not obtained"),
        ("def make(): pass", "ldshop:make()", "a valid Flask application was not obtained"),
        (FACTORY, "ldshop:create_app(1, 2)", 'the factory "create_app" cannot be called like that'),
        (FACTORY, "ldshop:create_app(colour='red')", "unexpected keyword argument 'colour'"),
        ("def make(x): return 7", "ldshop:make", "missing a required argument: 'x'"),
        ("def create_app(x): return 7", "ldshop", "could not call it without arguments"),
        (FACTORY, "ldshop:create_app(name)", "failed to parse arguments as literal values"),
        (FACTORY, "ldshop:create_app(", "failed to parse"),
        (FACTORY, "ldshop:a.b", "failed to parse"),
        (FACTORY, "ldshop:a.b()", "function reference must be a simple name"),
        ("from flask import Flask\na, b = Flask('a'), Flask('b')", "ldshop", "detected multiple Flask applications"),
    ],
)
def test_an_app_that_is_not_there(source, target, why, project):
    """A missing attribute, or one that cannot be served, is an error of one line."""
    project(ldshop=source)
    assert why in str(fault(target, ConfigError))


# --- faults of the app -------------------------------------------------------------------------------------------------


def app_fault(target, said):
    """Load an app whose own code fails; returns the lines of its traceback, which begins in the app."""
    error = fault(target, AppError)
    assert error.exit_code == EX_SOFTWARE
    assert said in str(error)
    lines = error.details.splitlines()
    assert not [line for line in lines if "importlib" in line or "flaskd" in line or f"flask{os.sep}cli" in line]
    return lines


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("raise LookupError('gone')", "the app raised LookupError: gone"),
        ("raise LookupError('gone\\nand more')", "the app raised LookupError: gone"),
        ("raise LookupError", "the app raised LookupError"),
        ("1 / 0", "the app raised ZeroDivisionError: division by zero"),
        ("import ldabsent", "the app raised ModuleNotFoundError: No module named 'ldabsent'"),
        ("import ldshop.part", "ModuleNotFoundError: No module named 'ldshop.part'"),
        ("from os import ldabsent", "the app raised ImportError: cannot import name 'ldabsent'"),
        ("raise SystemExit(3)", "the app raised SystemExit: 3"),
        ("import sys; sys.exit()", "the app raised SystemExit"),
    ],
)
def test_a_module_that_raises(statement, said, project):
    """A module that raises is an AppError, with a traceback from the app's first line on."""
    directory = project(ldshop=f"VALUE = 1\n{statement}\n")
    lines = app_fault("ldshop", said)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{directory / "ldshop.py"}", line 2, in <module>'


@pytest.mark.parametrize("target", ["ldshop:make", "ldshop:make()", "ldshop:make(1)"])
def test_a_named_factory_that_raises(target, project):
    """A factory that raises is reported from its own frame on; a TypeError inside is no wrong argument."""
    directory = project(ldshop="def make(x=1):\n    return len(7)\n")
    lines = app_fault(target, "the app raised TypeError: object of type 'int' has no len()")
    assert lines[1] == f'  File "{directory / "ldshop.py"}", line 2, in make'


@pytest.mark.parametrize("statement", ["return len(7)", "raise SystemExit(1)", "import ldabsent"])
def test_a_factory_found_by_its_name_that_raises(statement, project):
    """The same for a factory that the target did not name."""
    directory = project(ldshop=f"def create_app():\n    {statement}\n")
    lines = app_fault("ldshop", "the app raised ")
    assert lines[1] == f'  File "{directory / "ldshop.py"}", line 2, in create_app'


def test_a_missing_import_deeper_down(project):
    """If a module of the app lacks an import, that is an AppError, not a ConfigError."""
    directory = project(ldshop="import ldinner", ldinner="import ldabsent")
    lines = app_fault("ldshop", "No module named 'ldabsent'")
    places = [line.split('"')[1] for line in lines if line.startswith("  File")]
    assert places == [str(directory / "ldshop.py"), str(directory / "ldinner.py")]


def test_a_syntax_error_shows_the_place_and_no_machinery(project):
    """A syntax error is reported with its place, without frames of flaskd and importlib."""
    directory = project(ldshop="def (:\n")
    lines = app_fault("ldshop", "the app raised SyntaxError: ")
    assert lines[0].strip() == f'File "{directory / "ldshop.py"}", line 1'
    assert lines[-1].startswith("SyntaxError: ")


def test_a_chained_error_is_shown_whole(project):
    """The whole chain of an app's errors is reported."""
    project(
        ldshop="""
            try:
                {}["key"]
            except KeyError as error:
                raise LookupError("gone") from error
        """
    )
    text = "\n".join(app_fault("ldshop", "LookupError: gone"))
    assert "KeyError: 'key'" in text
    assert "The above exception was the direct cause" in text


def test_ctrl_c_goes_through(project):
    """KeyboardInterrupt is passed on to the caller."""
    project(ldshop="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_app("ldshop")


# --- which app ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "environ", "files", "expected"),
    [
        ("shop:app", {"FLASK_APP": "env"}, ["wsgi.py"], "shop:app"),
        (None, {"FLASK_APP": "env"}, ["wsgi.py"], "env"),
        ("", {"FLASK_APP": ""}, ["wsgi.py", "app.py"], "wsgi.py"),
        (None, {}, ["app.py"], "app.py"),
    ],
)
def test_the_order_of_choice(configured, environ, files, expected, tmp_path):
    """The target comes first, then FLASK_APP, then wsgi.py, then app.py."""
    for name in files:
        (tmp_path / name).touch()
    assert choose_target(configured, environ, tmp_path) == expected


def test_nothing_to_choose_but_a_dotenv_file(tmp_path):
    """The error says that .flaskenv, which may name one, is not read."""
    (tmp_path / ".flaskenv").write_text("FLASK_APP=shop")
    with pytest.raises(ConfigError, match=".flaskenv is there, but only Flask's own commands read it"):
        choose_target(None, {}, tmp_path)


def test_nothing_to_choose(tmp_path):
    """Without any app the error names every way to give one; a directory called app.py does not count."""
    (tmp_path / "app.py").mkdir()
    with pytest.raises(ConfigError, match="^cannot find an app: none was named, FLASK_APP is not set") as raised:
        choose_target(None, {}, tmp_path)
    assert str(tmp_path) in str(raised.value)


# --- what is relied on in flask.cli ------------------------------------------------------------------------------------


def test_flask_cli_prepare_import(project):
    """Targets that are files need it: it returns a module name, and puts the file's directory first on sys.path."""
    directory = project({"ldpkg/__init__": "", "ldpkg/inner": ""})
    assert flask.cli.prepare_import("ldpkg/inner.py") == "ldpkg.inner"
    assert sys.path[0] == str(directory)
    assert flask.cli.prepare_import("ldpkg.inner") == "ldpkg.inner"
    assert flask.cli.prepare_import(str(Path("ldpkg") / "__init__.py")) == "ldpkg"


def test_flask_cli_find_best_app(project):
    """Targets without a name need it: it takes a module, and raises NoAppException if there is no app."""
    sys.path.insert(0, str(project(ldshop="from flask import Flask\nx = Flask('x')", ldempty="")))
    assert flask.cli.find_best_app(importlib.import_module("ldshop")).import_name == "x"
    with pytest.raises(flask.cli.NoAppException):
        flask.cli.find_best_app(importlib.import_module("ldempty"))


def test_flask_cli_find_app_by_string(project):
    """The syntax of targets needs it: it only reads attributes of its argument, which need not be a module."""

    class Module:
        __name__ = "ldshop"

        @staticmethod
        def make(name):
            return Flask(name)

    assert flask.cli.find_app_by_string(Module(), "make('x')").import_name == "x"
    with pytest.raises(flask.cli.NoAppException):
        flask.cli.find_app_by_string(Module(), "absent")


def test_flask_cli_no_app_exception():
    """The operator sees its message in one line."""
    assert str(flask.cli.NoAppException("No app.").message) == "No app."
