"""Where there is no epoll, no gate and half of POSIX is missing: the package imports, and its servers work.

A system is put on in a process of its own, before anything of flaskd is imported: what Python does not have there is
hidden, from the processes that it starts, too.
"""

import os
import subprocess
import sys

import pytest

# What Python has not got there: docs.python.org/3/library/intro.html#availability, and each module's own notes.
# What is imported first is not on trial, and finds its compiled parts by the system's true name.
SITECUSTOMIZE = """
import os, select, selectors, signal, socket, subprocess, sys, tempfile, threading, zoneinfo
import click, flask, pydantic.main, sdnotify, werkzeug.serving, yaml

def socketpair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]

def bind(self, where):  # Windows has no TIME_WAIT that keeps a listener from its port
    self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    super(socket.socket, self).bind(where)

EPOLL = [name for name in dir(select) if name.lower().startswith("epoll")]
POLL = [name for name in dir(select) if name.lower().startswith("poll")]
SYSTEMS = {
    "darwin": ((), {select: EPOLL, socket: ["SO_PEERCRED", "SOCK_CLOEXEC", "SOCK_NONBLOCK"]}),
    "win32": (("fcntl", "grp", "pwd", "resource", "syslog", "termios"), {
        select: [*EPOLL, *POLL],
        socket: ["AF_UNIX", "SO_PEERCRED", "SO_REUSEPORT", "SOCK_CLOEXEC", "SOCK_NONBLOCK"],
        signal: ["SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT", "SIG_BLOCK",
                 "SIG_SETMASK", "SIG_UNBLOCK", "pthread_sigmask", "pthread_kill", "sigwait"],
        os: ["chown", "fork", "geteuid", "getgid", "getegid", "getuid", "getpgid", "killpg", "mkfifo", "setsid",
             "register_at_fork", "O_NOCTTY", "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "P_ALL"],
    }),
}
modules, names = SYSTEMS[os.environ["ELSEWHERE"]]
for module in modules:
    sys.modules[module] = None
for place, gone in names.items():
    for name in gone:
        if hasattr(place, name):
            delattr(place, name)
selectors.DefaultSelector = selectors.PollSelector
if os.environ["ELSEWHERE"] == "win32":
    selectors.DefaultSelector = selectors.SelectSelector
    socket.socketpair, socket.socket.bind = socketpair, bind
sys.platform = os.environ["ELSEWHERE"]
"""

GET = """
import contextlib, http.client, urllib.parse

def get(url, path="/"):
    place = urllib.parse.urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(place.hostname, place.port, timeout=10)) as connection:
        connection.request("GET", path)
        return connection.getresponse().read()
"""

THREAD = (
    GET
    + """
import logging, threading, time
import flaskd

logging.getLogger("waitress.queue").setLevel("ERROR")  # on a busy machine a request may wait a moment for its thread
inside, go_on, draining = threading.Event(), threading.Event(), []

def app(environ, start_response):
    draining.append(environ["flaskd.draining"])
    if environ["PATH_INFO"] == "/wait":
        inside.set()
        go_on.wait(10)
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]

def ask(path="/"):
    return get(server.url, path)

answers, reports = [], []
with flaskd.ServerThread(app, threads=2) as server:
    answers.append(ask())
    while server.in_flight:  # an answer may be here a moment before it is in the account
        time.sleep(0.001)
    asker = threading.Thread(target=lambda: answers.append(ask("/wait")))
    drainer = threading.Thread(target=lambda: reports.append(server.drain(10)))
    asker.start()
    assert inside.wait(10)
    drainer.start()
    assert draining[0].wait(10)
    go_on.set()
    drainer.join(10)
    asker.join(10)
    try:
        ask()
    except OSError as error:
        answers.append(type(error).__name__)
    server.resume()
    answers.append(ask())
    with flaskd.ServerThread(app, server="werkzeug") as other:
        answers.append(get(other.url))
hello = b"hello"
assert answers == [hello, hello, "ConnectionRefusedError", hello, hello], answers
assert (reports[0].completed, reports[0].cut) == (1, ()), reports
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
print("well")
"""
)

PROCESS = (
    GET
    + """
import flaskd

with flaskd.ServerProcess("shop:app") as server:
    print(get(server.url).decode())
"""
)

DAEMON = """
import flaskd

try:
    flaskd.serve(lambda environ, start_response: [], {"server": {"listen": "127.0.0.1:0"}})
except flaskd.FlaskdError as error:
    print(error.exit_code, error)
"""

SYSTEMS = pytest.mark.parametrize("system", ["darwin", "win32"])


@pytest.fixture
def python(tmp_path):
    """Runs Python with these arguments on a simulated other system."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def run(system, *arguments):
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("FLASK", "RUNTIME_DIR"))}
        return subprocess.run(
            [sys.executable, "-W", "error", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60,
            env={**environ, "PYTHONPATH": str(site), "ELSEWHERE": system}, check=False,
        )  # fmt: skip

    return run


@SYSTEMS
def test_a_server_thread_serves_drains_resumes_and_stops(system, python):
    """It uses waitress' own loop, without the gate: running requests are answered, new clients refused, and it resumes."""
    done = python(system, "-c", THREAD)
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_a_server_process_serves_and_stops(python, tmp_path):
    """It needs only pipes and no signals; how Windows inherits the pipes cannot be tested here."""
    tmp_path.joinpath("shop.py").write_text(
        "from flask import Flask\napp = Flask('shop')\napp.route('/')(lambda: 'hello')\n"
    )
    done = python("darwin", "-c", PROCESS)
    assert (done.stdout, done.stderr) == ("hello\n", "")


@SYSTEMS
def test_serve_says_that_it_cannot(system, python):
    """The daemon needs Linux: from Python an error is raised, the command exits with 69."""
    word = f"cannot serve: the daemon needs Linux, and this is {system}; "
    done = python(system, "-c", DAEMON)
    assert (done.stdout[: 3 + len(word)], done.stderr) == (f"69 {word}", "")
    done = python(system, "-m", "flaskd", "serve", "nothing:app")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (69, "", 1)
    assert done.stderr.startswith(f"flaskd: {word}")


@SYSTEMS
@pytest.mark.parametrize("arguments", [["status", "--name", "nobody-runs-this"], ["status", "--socket", "site"]])
def test_a_client_says_that_nobody_is_there(system, arguments, python):
    """Client verbs say that there is no daemon, as on other systems."""
    done = python(system, "-m", "flaskd", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (69, "", 1)
    assert done.stderr.startswith("flaskd: cannot ")


@SYSTEMS
def test_what_needs_no_daemon_works(system, python):
    """A configuration can be checked on any system."""
    done = python(system, "-m", "flaskd", "check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "no configuration file: the defaults are in force\n", "")
