"""Which object of a module a real flaskd serves, and what it refuses to start with."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys

import pytest
from daemon_kit import Flaskd
from http_client import get

SHOP = """
import flaskd
from flask import Flask

calls = []

def create_app():
    calls.append(1)
    app = Flask("shop")
    app.add_url_rule("/", view_func=lambda: f"secret {len(calls)}")

    @flaskd.on_stop
    def say():
        from flask import current_app
        print(f"stopped in {current_app.name}", flush=True)

    return app
"""
WSGI = """
from shop import create_app

class BasicAuth:
    def __init__(self, protected):
        self.protected = protected
    def __call__(self, environ, start_response):
        if environ.get("HTTP_AUTHORIZATION") == "let me in":
            return self.protected(environ, start_response)
        start_response("401 Unauthorized", [("Content-Length", "0")])
        return [b""]

application = BasicAuth(create_app())
"""
COMMANDS = {
    "module": (["-m", "flaskd", "serve", "wsgi"], {}),
    "file": (["-m", "flaskd", "serve", "wsgi.py"], {}),
    "name": (["-m", "flaskd", "serve", "wsgi:application"], {}),
    "FLASK_APP": (["-m", "flaskd", "serve"], {"FLASK_APP": "wsgi"}),
    "nothing": (["-m", "flaskd", "serve"], {}),
    "flask --app": (["-m", "flask", "--app", "wsgi", "daemon"], {}),
    "flask": (["-m", "flask", "daemon"], {}),
}


@pytest.mark.parametrize("how", COMMANDS)
def test_an_app_keeps_its_authentication(flaskd: Flaskd, how: str) -> None:
    """However the app is named, its wrapper is served, its factory is called once, and `on_stop` runs."""
    words, environ = COMMANDS[how]
    flaskd.write("shop.py", SHOP)
    flaskd.write("wsgi.py", WSGI)
    flaskd.env |= environ
    with flaskd.log_file.open("ab") as log:
        flaskd.process = subprocess.Popen(
            [sys.executable, *words, "-l", "127.0.0.1:0"],
            cwd=flaskd.directory, env=flaskd.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    flaskd.wait_message("READY=1")
    url = flaskd.url
    assert get(url) == (401, b"")
    assert get(url, Authorization="let me in") == (200, b"secret 1")
    assert flaskd.stop() == 0
    why = "it was named" if how == "name" else "the name that WSGI servers look for"
    assert f'serving wsgi:application, a WSGI app (BasicAuth) around the Flask app "shop": {why}\n' in flaskd.log
    assert "stopped in shop" in flaskd.log


def test_the_log_says_what_is_not_served(flaskd: Flaskd) -> None:
    """Of an app and its wrapper, the one with the usual name is served, with a warning that names the other."""
    flaskd.write("shop.py", SHOP)
    flaskd.write("wsgi.py", WSGI.replace("application =", "app = create_app()\nsecured =").replace("BasicAuth(create_app())", "BasicAuth(app)"))  # fmt: skip
    flaskd.start(app="wsgi")
    assert get(flaskd.url) == (200, b"secret 1")
    assert 'serving wsgi:app, the Flask app "shop": the module has "app", and no "application"\n' in flaskd.log
    assert 'warning wsgi:app is served without what is wrapped around it; if that was meant, name "wsgi:secured"\n' in flaskd.log  # fmt: skip
    assert flaskd.stop() == 0


def test_an_app_that_is_made_for_the_first_request(flaskd: Flaskd) -> None:
    """A Flask app that its wrapper makes at the first request is found for the stop."""
    flaskd.write("shop.py", SHOP.replace("@flaskd.on_stop\n", "@flaskd.on_stop(app=app)\n"))
    flaskd.write(
        "wsgi.py",
        """
from shop import create_app
class Late:
    made = None
    def __call__(self, environ, start_response):
        if self.made is None:
            self.made = create_app()
        return self.made(environ, start_response)
application = Late()
""",
    )
    flaskd.start(app="wsgi")
    url = flaskd.url
    assert get(url) == get(url) == (200, b"secret 1")
    assert flaskd.stop() == 0
    assert "stopped in shop" in flaskd.log


def refused(flaskd: Flaskd, source: str) -> str:
    """Serve an app that must be refused: one line, exit code 78, nothing left; returns the log."""
    flaskd.write("app.py", source)
    code, log = flaskd.fails(app=None)
    assert code == 78, log
    assert "Traceback" not in log
    assert not any("READY=1" in message for message in flaskd.drain_messages())
    return log


def test_an_asgi_app_is_refused(flaskd: Flaskd) -> None:
    """The error says that it is an ASGI app, and what can serve it."""
    source = "class FastAPI:\n    async def __call__(self, scope, receive, send): pass\napp = FastAPI()\n"
    assert (
        "cannot load app.py: app:app: it is an ASGI app, and flaskd serves WSGI apps; serve it with an ASGI server "
        "(uvicorn, hypercorn), or name a WSGI app around it, such as a2wsgi.ASGIMiddleware(app)\n"
    ) in refused(flaskd, source)


PATCHERS = {
    "gevent": "from gevent import monkey\nmonkey.patch_all()\n",
    "eventlet": "import eventlet\neventlet.monkey_patch()\n",
}


@pytest.mark.parametrize("library", PATCHERS)
@pytest.mark.parametrize("where", ["on import", "in the factory"])
def test_a_process_that_would_be_patched_is_refused(flaskd: Flaskd, library: str, where: str) -> None:
    """An app that patches with gevent or eventlet is refused before they have replaced anything."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    flaskd.env["PYTHONWARNINGS"] = "ignore"
    lines = PATCHERS[library]
    if where == "in the factory":
        lines = "def create_app():\n" + "".join(f"    {line}\n" for line in lines.splitlines())
    log = refused(flaskd, lines + "from flask import Flask\napp = Flask('x')\n" * (where == "on import"))
    assert "(monkey patching)" not in log
    assert f"app.py:{2 if where == 'on import' else 3}), and flaskd serves with threads; leave the patching out" in log
    assert f'such as "gunicorn --worker-class {library}"' in log


def test_what_patches_later_is_refused_later(flaskd: Flaskd) -> None:
    """A view that patches the serving process fails, and the process goes on answering."""
    if importlib.util.find_spec("gevent") is None:
        pytest.skip("gevent is not installed")
    flaskd.write(
        "app.py",
        "from flask import Flask\napp = Flask('x')\n@app.get('/')\ndef index():\n    return 'fine'\n"
        "@app.get('/patch')\ndef patch():\n    from gevent import monkey\n    monkey.patch_all()\n    return 'patched'\n",
    )
    flaskd.start(app=None)
    url = flaskd.url
    assert get(url, "/patch")[0] == 500
    assert get(url) == (200, b"fine")
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 0
    assert "gevent.monkey.patch_all() was called" in flaskd.log


def test_a_process_that_is_patched_before_flaskd_is_refused(flaskd: Flaskd) -> None:
    """A process that was patched at the interpreter's start is refused before anything is made."""
    if importlib.util.find_spec("gevent") is None:
        pytest.skip("gevent is not installed")
    flaskd.write("early/sitecustomize.py", "from gevent import monkey\nmonkey.patch_all()\n")
    flaskd.env["PYTHONPATH"] = str(flaskd.directory / "early")
    code, log = flaskd.fails()
    assert code == 78
    assert log.startswith("cannot serve: gevent has replaced Python's own ")
    assert log.count("\n") == 1


def test_a_dotenv_file_is_read_by_flasks_own_command_alone(flaskd: Flaskd) -> None:
    """`.flaskenv` names the app of `flask daemon`, as for `flask run`; `flaskd serve` says that it does not read it."""
    if importlib.util.find_spec("dotenv") is None:
        pytest.skip("python-dotenv is not installed")
    flaskd.write(".flaskenv", "FLASK_APP=gateapp\n")
    code, log = flaskd.fails(app=None)
    assert code == 78
    assert "FLASK_APP is not set (.flaskenv is there, but only Flask's own commands read it)" in log
    with flaskd.log_file.open("ab") as out:
        flaskd.process = subprocess.Popen(
            [sys.executable, "-m", "flask", "daemon", "-l", "127.0.0.1:0"],
            cwd=flaskd.directory, env=flaskd.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    flaskd.wait_message("READY=1")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0
