"""A child that the app forks keeps nothing of a ServerThread or a ServerProcess, so that it blocks nothing."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from http_client import get, place_of
from patience import PATIENCE

import flaskd
from flaskd.errors import FlaskdError

SHOP = """
import multiprocessing, os, pathlib, signal
from flask import Flask

here = pathlib.Path(__file__).parent
app = Flask(__name__)

def live_on():
    try:
        signal.pause()
    finally:
        os._exit(0)

def with_os():
    child = os.fork()
    if child == 0:
        live_on()
    return child

def with_multiprocessing():
    child = multiprocessing.get_context("fork").Process(target=live_on)
    child.start()
    return child.pid

@app.get("/")
def index():
    return "hello"

@app.get("/os")
def fork():
    return str(with_os())

@app.get("/multiprocessing")
def process():
    return str(with_multiprocessing())
"""

IN_A_THREAD = """
import os, signal, socket, sys, urllib.request
import flaskd, shop

kind, where, how = sys.argv[1:]
server = flaskd.ServerThread(shop.app, server=kind).start()
port = server.port
idle = socket.create_connection(("127.0.0.1", port), timeout=20)
with urllib.request.urlopen(server.url, timeout=20) as answer:  # behind it, so it has been accepted
    assert answer.read() == b"hello"
if where == "request":
    with urllib.request.urlopen(server.url + how, timeout=20) as answer:
        child = int(answer.read())
else:
    child = getattr(shop, f"with_{how}")()
try:
    assert server.stop().clean
    assert idle.recv(1) == b"", "its client still waits"
    socket.create_server(("127.0.0.1", port)).close()
    os.kill(child, 0)
finally:
    os.kill(child, signal.SIGKILL)
print("nothing is kept", flush=True)
"""


IN_A_CHILD = """
import os, sys
import flaskd, shop

@flaskd.on_stop
def clean_up():
    print("cleaned up", flush=True)

with flaskd.ServerThread(shop.app, server=sys.argv[1]) as server:
    child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


@pytest.fixture
def forked():
    """The pids of the forked children, which are killed after the test."""
    pids = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def nothing_left():
    """After each test there is no new thread, for example one that waits for a pipe."""
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert not [each.name for each in threading.enumerate() if each not in before]


def script(place, source, *words):
    """Run a script in a session of its own, with all that it forks; returns its output."""
    with subprocess.Popen(
        # Since Python 3.12 a fork in a process with threads causes a warning.
        [sys.executable, "-Wignore::DeprecationWarning", "-c", source, *words],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            return process.communicate(timeout=2 * PATIENCE)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["os", "multiprocessing"])
@pytest.mark.parametrize("where", ["request", "owner"])
@pytest.mark.parametrize("kind", ["waitress", "werkzeug"])
def test_a_server_in_a_thread_is_forgotten(shop, kind, where, how):
    """While the child lives, the stop is clean, a client sees its connection end, and the port is free."""
    assert script(shop, IN_A_THREAD, kind, where, how).endswith("nothing is kept\n")


@pytest.mark.parametrize("kind", ["waitress", "werkzeug"])
def test_a_child_cleans_nothing_up(shop, kind):
    """A child that leaves the block of a server stops nothing and runs no cleanup step."""
    assert script(shop, IN_A_CHILD, kind) == "cleaned up\n"


@pytest.mark.parametrize("server", ["waitress", "werkzeug"])
@pytest.mark.parametrize("how", ["os", "multiprocessing"])
def test_the_end_of_a_process_is_seen(shop, forked, server, how):
    """While a child of a killed process lives, the process counts as ended, and its port is free."""
    with flaskd.ServerProcess("shop:app", chdir=shop, server=server) as process:
        _, port = place_of(process.url)
        forked.append(int(get(process.url, f"/{how}")[1]))
        process.kill()
        process.join(PATIENCE)
        assert process.stop() is None
    os.kill(forked[0], 0)
    socket.create_server(("127.0.0.1", port)).close()


def test_an_end_before_it_serves_is_seen_though_its_pipe_is_held(tmp_path, forked):
    """The process' end is noticed even if a program that the app started holds its pipe open."""
    (tmp_path / "shop.py").write_text("""
import contextlib, os, pathlib, subprocess
for number in os.listdir("/proc/self/fd"):
    with contextlib.suppress(OSError):
        os.set_inheritable(int(number), True)
child = subprocess.Popen(["sleep", "1000"], close_fds=False)
pathlib.Path(__file__).with_name("pid").write_text(str(child.pid))
os._exit(7)
""")
    process = flaskd.ServerProcess("shop:app", chdir=tmp_path).start()
    before = time.monotonic()
    with pytest.raises(FlaskdError, match="^cannot get ready: the process ended with exit code 7 before it served"):
        process.wait_ready(3 * PATIENCE)
    assert time.monotonic() - before < 2 * PATIENCE
    forked.append(int(Path(tmp_path, "pid").read_text()))
    os.kill(forked.pop(), signal.SIGKILL)  # and now the pipe ends, and the thread that reads it, too
    process.stop()


def test_an_end_before_it_serves_is_seen(tmp_path, forked):
    """If the app forks on import and exits, `wait_ready` raises, although the child lives."""
    (tmp_path / "shop.py").write_text("""
import os, pathlib, signal
child = os.fork()
if child == 0:
    signal.pause()
pathlib.Path(__file__).with_name("pid").write_text(str(child))
os._exit(7)
""")
    process = flaskd.ServerProcess("shop:app", chdir=tmp_path).start()
    with pytest.raises(FlaskdError, match="^cannot get ready: the process ended with exit code 7 before it served"):
        process.wait_ready(PATIENCE)
    forked.append(int(Path(tmp_path, "pid").read_text()))
    process.stop()
    os.kill(forked[0], 0)
