"""Processes whose threads and sockets gevent or eventlet would replace are refused before that."""

import importlib
import os
import sys
from textwrap import dedent

import pytest
from flask import Flask

import flaskd
from flaskd.errors import EX_CONFIG
from flaskd.serving.loading import load_app
from flaskd.serving.patching import PatchingError, check_unpatched, patching_refused

GEVENT = """
    done = []
    def patch_all(**more): done.extend(["socket", "thread"])
    def patch_socket(): done.append("socket")
    def patch_module(target, source): return "a tool of others"
    def is_module_patched(name): return name in done
"""
EVENTLET = """
    done = []
    def monkey_patch(**more): done.append("thread")
    def is_monkey_patched(name): return name in done
"""


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Stand-ins for both libraries, with the functions that flaskd uses; they are removed afterwards."""
    names = [name for name in sys.modules if name.partition(".")[0] in {"gevent", "eventlet"}]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    for path, source in {
        "gevent/__init__.py": "",
        "gevent/monkey.py": GEVENT,
        "eventlet/patcher.py": EVENTLET,
        "eventlet/__init__.py": "from eventlet.patcher import monkey_patch",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASK_RUN_FROM_CLI", "false")
    yield tmp_path
    for name in [each for each in sys.modules if each.partition(".")[0] in {"gevent", "eventlet", "ldpatching"}]:
        del sys.modules[name]


CALLS = {
    "gevent.monkey.patch_all()": "from gevent import monkey\nmonkey.patch_all(thread=False)",
    "gevent.monkey.patch_socket()": "import gevent.monkey\ngevent.monkey.patch_socket()",
    "eventlet.patcher.monkey_patch()": "import eventlet\neventlet.monkey_patch()",
}


@pytest.mark.parametrize("where", ["on import", "in the factory"])
@pytest.mark.parametrize("call", CALLS)
def test_an_app_that_patches_is_refused_at_the_call(call, where, libraries):
    """The error names the call, its place and the next step, and nothing has been replaced."""
    lines = CALLS[call].splitlines()
    body = lines if where == "on import" else ["def create_app():", *(f"    {line}" for line in lines)]
    (libraries / "ldpatching.py").write_text("\n".join(body))
    with patching_refused(), pytest.raises(PatchingError) as raised:
        load_app("ldpatching")
    assert raised.value.exit_code == EX_CONFIG
    library = call.partition(".")[0]
    assert str(raised.value) == (
        f"cannot serve: {call} was called ({libraries}/ldpatching.py:{len(body)}), and flaskd serves with threads; leave "
        f"the patching out, or serve the app with a server that is made for it, such as "
        f'"gunicorn --worker-class {library}"'
    )
    check_unpatched()


def test_what_was_imported_before_refuses_too_and_is_put_back(libraries):
    """Functions that were imported before refuse, too, while flaskd serves; tools for other modules are allowed."""
    monkey = importlib.import_module("gevent.monkey")
    with patching_refused():
        with pytest.raises(PatchingError):
            monkey.patch_all()
        assert monkey.patch_module(None, None) == "a tool of others"
        assert importlib.import_module("eventlet.patcher").monkey_patch.__name__ == "refuse"
        child = os.fork()
        if child == 0:  # not the daemon, so it is allowed
            monkey.patch_all()
            os._exit(len(monkey.done))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert monkey.done == []
    monkey.patch_socket()
    sys.modules["eventlet.patcher"].monkey_patch()
    assert monkey.done == ["socket"]
    assert not [each for each in sys.meta_path if type(each).__module__ == "flaskd.serving.patching"]


@pytest.mark.parametrize(
    ("module", "call", "replaced"),
    [("gevent.monkey", "patch_all", "socket, thread"), ("eventlet.patcher", "monkey_patch", "thread")],
)
def test_a_process_that_is_patched_already_serves_nothing(module, call, replaced, libraries):
    """In a patched process, `flaskd.serve` and `ServerThread` raise an error, and do not hang."""
    check_unpatched()
    getattr(importlib.import_module(module), call)()
    said = f"cannot serve: {module.partition('.')[0]} has replaced Python's own {replaced} (monkey patching)"
    for start in (lambda: flaskd.serve(Flask("x")), flaskd.ServerThread(Flask("x")).start):
        with pytest.raises(PatchingError) as raised:
            start()
        assert str(raised.value).startswith(said)


def test_an_asgi_app_in_hand_is_refused():
    """A ServerThread refuses an ASGI app."""

    async def app(scope, receive, send):
        raise NotImplementedError

    with pytest.raises(flaskd.FlaskdError, match="cannot serve function: it is an ASGI app"):
        flaskd.ServerThread(app).start()
