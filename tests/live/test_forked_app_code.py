"""Children that the app forks and that come back from its code: each ends as it would without flaskd, touching nothing.

What an exit is to be: os.fork, sys.exit and sys.excepthook in Python's documentation; a normal return is the end of a
program, with 0.
"""

import signal
import sys
from pathlib import Path

import pytest
from daemon_kit import Flaskd
from http_client import get
from patience import PATIENCE

ENDS = {
    "returns": ("pass", 0),
    "leaves": ("sys.exit()", 0),
    "leaves with a code": ("sys.exit(3)", 3),
    "leaves with words": ("sys.exit('that is all')", 1),
    "fails": ("raise ValueError('lost its way')", 1),
    "is interrupted": ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", -signal.SIGINT),
    "is terminated": ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", -signal.SIGTERM),
}
"""What the child does, and how it ends: an exit code, or minus a signal's number."""

FORKS = {"os": "child = os.fork()", "pty": "child, _ = pty.fork()"}

APP = """
import atexit, os, pty, signal, sys, threading, time
from pathlib import Path
from gateapp import app

here = Path(__file__).parent

def told(child):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with (here / "ends").open("a") as file:
        file.write(f"{code}\\n")

def fork():
    FORK
    if child == 0:
        END
    else:
        told(child)
"""

PLACES = {
    "import": "fork()\n",
    "exit callback": "atexit.register(lambda: here.joinpath('called').open('a').write('x'))\nfork()\n",
    "view": "@app.get('/fork')\ndef view():\n    fork()\n    return 'parent'\n",
    "stream": "@app.get('/fork')\ndef view():\n    def parts():\n        fork()\n        yield 'parent'\n    return parts()\n",
    "close": "from flask import Response\n@app.get('/fork')\ndef view():\n"
    "    answer = Response('parent')\n    answer.call_on_close(fork)\n    return answer\n",
    "thread": "@app.get('/fork')\ndef view():\n    each = threading.Thread(target=fork)\n    each.start()\n"
    "    each.join()\n    return 'parent'\n",
    "signal": "signal.signal(signal.SIGUSR1, lambda *_: fork())\n"
    "@app.get('/fork')\ndef view():\n    os.kill(os.getpid(), signal.SIGUSR1)\n"
    "    while not (here / 'ends').exists(): time.sleep(0.01)\n    return 'parent'\n",
    "stop": "import flaskd\nflaskd.on_stop(fork)\n",
    "call": "",
    "target": "",
}


def app(flaskd: Flaskd, place: str, *, fork: str = "os", end: str = "leaves") -> None:
    """Write an app that forks a child at some place, and its configuration."""
    text = APP.replace("FORK", FORKS[fork]).replace("END", ENDS[end][0])
    flaskd.write("forking.py", text + PLACES[place])
    if place == "call":  # during the stop
        flaskd.write("target.py", "import forking\ndef step(context):\n    forking.fork()\n")
    if place == "target":  # during the import of a step's module
        flaskd.write("target.py", "import forking\nforking.fork()\ndef step(context):\n    pass\n")
    if place in {"call", "target"}:
        flaskd.write("flaskd.yaml", "cleanup: {policies: {p: {use: call, with: {target: 'target:step'}}}}\n")


def lives_on(flaskd: Flaskd, place: str) -> None:
    """Let the app fork; then the daemon serves, has its nodes, and stops by SIGTERM, with all log lines from itself."""
    flaskd.start(app="forking")
    if place in {"view", "stream", "close", "thread", "signal"}:
        assert get(flaskd.url, "/fork") == (200, b"parent")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.socket_path.is_socket()
    assert flaskd.fifo_path.is_fifo()
    assert flaskd.command("health") == "OK healthy\n"
    assert "STOPPING=1" not in "".join(flaskd.drain_messages())
    assert flaskd.stop() == 0
    told = "".join(each + "\n" for each in flaskd.drain_messages())
    assert told.count("READY=1") == 1
    assert told.count("STOPPING=1") == 1
    assert flaskd.log.count("stopped: ") == 1
    assert flaskd.record()["cut"] == []


def ends(flaskd: Flaskd) -> list[int]:
    """How the children ended, in the order of their forks."""
    return [int(line) for line in (flaskd.directory / "ends").read_text().split()]


@pytest.mark.parametrize("place", PLACES)
def test_a_child_ends_where_the_app_forks_it(flaskd: Flaskd, place: str) -> None:
    """Wherever it was forked, sys.exit() ends the child with 0, and the daemon goes on undisturbed."""
    app(flaskd, place)
    lives_on(flaskd, place)
    assert ends(flaskd) == [0]
    assert "Traceback" not in flaskd.log


@pytest.mark.parametrize("place", ["import", "view", "signal", "call"])
def test_a_child_that_returns_ends(flaskd: Flaskd, place: str) -> None:
    """A child that returns from the app's code is ended with 0 and a message, and is no second daemon."""
    app(flaskd, place, end="returns")
    lives_on(flaskd, place)
    assert ends(flaskd) == [0]
    assert flaskd.log.count("returned from the app's code, and is ended") == 1


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("place", ["import", "view"])
def test_a_child_ends_as_it_would_without_flaskd(flaskd: Flaskd, place: str, end: str) -> None:
    """The exit code or signal is that of a plain child: SIGINT is a KeyboardInterrupt, SIGTERM ends it."""
    app(flaskd, place, end=end)
    lives_on(flaskd, place)
    answered = place == "view" and end == "fails"  # Flask catches it, and makes a 500 that the child does not send
    assert ends(flaskd) == [0 if answered else ENDS[end][1]]
    assert ("lost its way" in flaskd.log) is (end == "fails")
    assert ("that is all" in flaskd.log) is (end == "leaves with words")


@pytest.mark.parametrize("place", ["import", "view", "stop"])
def test_a_child_of_a_terminal_of_its_own_ends(flaskd: Flaskd, place: str) -> None:
    """A child of pty.fork() ends in the same way."""
    app(flaskd, place, fork="pty")
    lives_on(flaskd, place)
    assert ends(flaskd) == [0]


def test_exit_callbacks_of_the_app_run_in_the_child(flaskd: Flaskd) -> None:
    """An exit callback runs once in a child that ends by sys.exit(), and once in the daemon."""
    app(flaskd, "exit callback")
    lives_on(flaskd, "exit callback")
    assert (flaskd.directory / "called").read_text() == "xx"


@pytest.mark.parametrize("server", ["waitress", "werkzeug"])
@pytest.mark.parametrize("place", ["view", "stream", "import"])
def test_a_child_of_a_server_in_a_process_ends(tmp_path: Path, place: str, server: str) -> None:
    """In a ServerProcess, with either server, a child ends in the same way, and its owner does not notice it."""
    import flaskd

    text = APP.replace("from gateapp import app", "from flask import Flask\napp = Flask(__name__)")
    text = text.replace("FORK", FORKS["os"]).replace("END", ENDS["returns"][0])
    (tmp_path / "forking.py").write_text(text + PLACES[place])
    with flaskd.ServerProcess("forking:app", chdir=tmp_path, server=server) as process:
        if place != "import":
            assert get(process.url, "/fork") == (200, b"parent")
        report = process.stop()
    assert report is not None
    assert report.clean
    assert (tmp_path / "ends").read_text() == "0\n"


def test_a_child_of_a_server_in_a_thread_ends(tmp_path: Path) -> None:
    """If a view of a ServerThread forks, the program's code after the server runs once, not twice."""
    import subprocess

    (tmp_path / "program.py").write_text("""
import os, sys, urllib.request
import flask, flaskd
app = flask.Flask(__name__)
@app.get("/")
def fork():
    child = os.fork()
    return f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}" if child else "child"
with flaskd.ServerThread(app) as server:
    print(urllib.request.urlopen(server.url, timeout=20).read().decode(), flush=True)
print("over")
""")
    done = subprocess.run(
        [sys.executable, "-Wignore::DeprecationWarning", "program.py"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert done.stdout == "0\nover\n"
