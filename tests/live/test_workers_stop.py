"""Stops of a service with workers: the order, the deadline, one account; and single workers that stop."""

import json
import os
import signal
import time
from collections.abc import Iterator

import pytest
from daemon_kit import Flaskd, Terminal, children, no_pid_namespace
from http_client import Answer, connect, get
from workers_kit import all_gone, hold_in_both, shown, worker_pids

APP = """
import atexit, os, threading
from gateapp import app

def note(what):
    file = os.open("order", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{what} {os.environ['FLASKD_WORKER']}\\n".encode())
    os.close(file)

def step(context):
    note(context.policy)

@app.get("/pid")
def pid():
    return str(os.getpid())

@app.get("/thread")
def thread():
    threading.Thread(target=threading.Event().wait, args=(60,), name="mailer").start()
    return "begun"

@app.get("/callback/<float:seconds>")
def callback(seconds):
    def last():
        threading.Event().wait(seconds)
        note("callback")
    atexit.register(last)
    return "registered"
"""


CLEANING = """
import flaskd
from stopapp import app, note

@flaskd.on_stop
def bye():
    note("on_stop")
"""

LEAVING = """
import signal
from stopapp import app

def leave(*_):
    raise SystemExit(3)

signal.signal(signal.SIGUSR2, leave)
"""


def start(flaskd: Flaskd, configuration: str = "", *, app: str = "stopapp") -> str:
    """Start it with two workers; returns its URL."""
    flaskd.write("stopapp.py", APP)
    flaskd.write("leaving.py", LEAVING)
    flaskd.write("cleaning.py", CLEANING)
    flaskd.write("flaskd.yaml", configuration)
    flaskd.start("-w", "2", "-t", "16", app=app)
    return flaskd.url


def unfinished(flaskd: Flaskd) -> list[str]:
    """What was not finished, from the record."""
    return [each["name"] for each in flaskd.record().get("unfinished", [])]


POLICIES = """
shutdown: {deadline: 60s}
cleanup:
  policies:
    tell: {use: command, phase: announce, with: {argv: [sh, -c, 'echo tell >> order']}}
    early: {use: call, phase: announce, with: {target: "stopapp:step"}}
    middle: {use: call, phase: quiesce, with: {target: "stopapp:step"}}
    deregister: {use: command, phase: quiesce, with: {argv: [sh, -c, 'echo deregister >> order']}}
    late: {use: call, phase: final, with: {target: "stopapp:step"}}
    last: {use: command, phase: final, with: {argv: [sh, -c, 'echo last >> order']}}
    each: {use: command, phase: final, scope: worker, with: {argv: [sh, -c, 'echo each $FLASKD_WORKER >> order']}}
    never: {use: command, phase: final, with: {argv: [sh, -c, 'echo never >> order']}, when: {reason: idle}}
"""


def test_the_order_of_steps(flaskd: Flaskd) -> None:
    """A worker's steps run in each worker; the service's run once, before all workers or after the last one."""
    url = start(flaskd, POLICIES, app="cleaning")
    assert flaskd.command("restart 1").splitlines()[-1].startswith("OK restarted")
    flaskd.until(lambda: len(shown(flaskd)) == 2)
    replaced = (flaskd.directory / "order").read_text().split("\n")
    assert "never" not in replaced
    assert "tell" not in replaced
    assert "on_stop 1" in replaced  # as at the end of each worker
    (flaskd.directory / "order").unlink()
    pids = worker_pids(flaskd)
    held = flaskd.hold(url)
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.wait_message("stopping: 1 in flight")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    order = (flaskd.directory / "order").read_text().split("\n")[:-1]
    assert order[0] == "tell"
    assert order[-2:] == ["deregister", "last"]
    for slot in (0, 1):
        mine = [each.removesuffix(f" {slot}") for each in order if each.endswith(f" {slot}")]
        assert mine.index("early") < mine.index("middle") < mine.index("late")
        assert sorted(mine) == ["each", "early", "late", "middle", "on_stop"]
    assert len(order) == 3 + 2 * 5
    record = flaskd.record()
    fates = {name: entry["fate"] for name, entry in record["policies"].items()}
    assert {name: fates[name] for name in ("tell", "deregister", "last", "never")} == {
        "tell": "ok", "deregister": "ok", "last": "ok", "never": "skipped",
    }  # fmt: skip
    assert {fates[f"{name} (worker {slot})"] for name in ("early", "middle", "late", "each") for slot in (0, 1)} == {
        "ok"
    }
    assert [(each["slot"], each["code"]) for each in record["workers"]] == [(0, 0), (1, 0)]
    assert {each["pid"] for each in record["workers"]} == pids
    assert record["completed"] == 1
    assert "early (worker 0)" in flaskd.client("last-stop", "--json")[1]


def test_signals_again_and_again(flaskd: Flaskd) -> None:
    """The second SIGTERM cuts the requests of all workers; the third ends at once, and no worker is left."""
    slow = "cleanup: {policies: {slow: {use: command, scope: worker, with: {argv: [sleep, '60']}, timeout: 60s}}}\n"
    url = start(flaskd, "shutdown: {deadline: 90s, drain: {timeout: 80s}}\n")
    pids = worker_pids(flaskd)
    held = hold_in_both(flaskd, url)
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    time.sleep(0.3)  # signals closer together than 250 ms count as one
    before = time.monotonic()
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 0
    assert time.monotonic() - before < 10
    all_gone(flaskd, pids)
    cut = flaskd.record()["cut"]
    assert [each["path"] for each in cut] == ["/hold"] * len(held)
    assert {each["worker"] for each in cut} == {0, 1}
    assert unfinished(flaskd) == []
    assert all(isinstance(each.result(), Exception) for each in held)
    flaskd.gate.open()

    start(flaskd, "shutdown: {deadline: 90s}\n" + slow)
    pids = worker_pids(flaskd)
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.until(lambda: all(children(pid) for pid in pids))
    sleepers = {child for pid in pids for child in children(pid)}
    for _ in range(2):
        time.sleep(0.3)
        flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 128 + signal.SIGTERM
    all_gone(flaskd, pids)
    for pid in sleepers:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    assert list(flaskd.runtime.glob("*")) == []
    (flaskd.state / "running.json").unlink()


@pytest.fixture
def terminal(flaskd: Flaskd) -> Iterator[Terminal]:
    """A running flaskd with two workers on a terminal."""
    each = Terminal(flaskd, "-w", "2", "-t", "16")
    flaskd.wait_message("READY=1")
    yield each
    each.close()


def test_ctrl_c_in_a_terminal(terminal: Terminal) -> None:
    """Ctrl-C reaches all processes, and the supervisor alone acts: requests are answered, exit code 0."""
    held = hold_in_both(terminal.flaskd, terminal.flaskd.url)
    pids = worker_pids(terminal.flaskd)
    terminal.type(b"\x03")
    terminal.read_until(b"stopping (signal: SIGINT): %d in flight" % len(held))
    terminal.flaskd.gate.open()
    assert [each.result() for each in held] == [(200, b"held")] * len(held)
    assert terminal.flaskd.wait() == 0
    assert terminal.flaskd.record()["cut"] == []
    all_gone(terminal.flaskd, pids)


def test_three_ctrl_c_in_a_terminal(terminal: Terminal) -> None:
    """The second Ctrl-C cuts the stop short, the third ends all processes at once."""
    terminal.flaskd.hold()
    pids = worker_pids(terminal.flaskd)
    terminal.type(b"\x03")
    terminal.read_until(b"stopping")
    time.sleep(0.3)  # signals closer together than 250 ms count as one
    terminal.type(b"\x03")
    terminal.read_until(b"asked again")
    time.sleep(0.3)
    terminal.type(b"\x03")
    assert terminal.flaskd.wait() in {0, 130}  # the second one may have been enough
    all_gone(terminal.flaskd, pids)
    (terminal.flaskd.state / "running.json").unlink(missing_ok=True)


def test_a_signal_ends_the_import_in_workers(flaskd: Flaskd) -> None:
    """SIGTERM while workers import the app ends all processes soon, with 0, and nothing is left."""
    flaskd.write("sleeper.py", "import os, socket, time\ngate = socket.socket(socket.AF_UNIX)\n"
                 "gate.connect(os.environ['GATE'])\ngate.sendall(b'entered')\ntime.sleep(60)\n")  # fmt: skip
    flaskd.launch("-w", "2", app="sleeper")
    for _ in range(2):
        flaskd.gate.entered()
    pids = set(children(flaskd.pid))
    assert len(pids) == 2
    before = time.monotonic()
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 0
    assert time.monotonic() - before < 10
    all_gone(flaskd, pids)
    assert "Traceback" not in flaskd.log
    assert "is gone" not in flaskd.log


@pytest.mark.parametrize("how", ["SIGTERM", "SystemExit"])
def test_a_worker_that_leaves_alone(flaskd: Flaskd, how: str) -> None:
    """SIGTERM to a worker, or SystemExit in its main thread, ends it after its requests; other workers serve."""
    url = start(flaskd, "health: {path: /healthz}\n", app="leaving")
    held = hold_in_both(flaskd, url)
    before = worker_pids(flaskd)
    first = min(before)
    os.kill(first, signal.SIGTERM if how == "SIGTERM" else signal.SIGUSR2)
    flaskd.until(lambda: len({each["pid"] for each in shown(flaskd) if each["state"] == "ready"} - before) == 1)
    assert first in worker_pids(flaskd)
    for _ in range(10):
        assert get(url, "/healthz") == (200, b"ready\n")
        assert get(url, "/pid")[0] == 200
    with connect(url) as client:  # the gate of the listener is open
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in client.recv(65536)
    flaskd.gate.open()
    assert [each.result() for each in held] == [(200, b"held")] * len(held)
    flaskd.until(lambda: first not in worker_pids(flaskd))
    assert len(worker_pids(flaskd)) == 2
    assert flaskd.status()["state"] == "ready"
    deaths = json.loads(flaskd.client("workers", "--json")[1])["deaths"]
    if how == "SystemExit":
        [death] = deaths
        assert (death["pid"], "SystemExit(3)" in death["how"], death["cut"]) == (first, True, [])
    else:
        assert deaths == []
    assert flaskd.stop() == 0


def test_a_signal_to_the_whole_process_group(flaskd: Flaskd) -> None:
    """SIGTERM to supervisor and workers at once is one stop: no worker is started."""
    url = start(flaskd)
    held = hold_in_both(flaskd, url)
    for pid in (*worker_pids(flaskd), flaskd.pid):
        os.kill(pid, signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert [each.result() for each in held] == [(200, b"held")] * len(held)
    assert flaskd.wait() == 0
    record = flaskd.record()
    assert (record["completed"], record["cut"]) == (len(held), [])
    assert [each["slot"] for each in record["workers"]] == [0, 1]


def test_what_the_app_leaves_to_the_end_of_its_process(flaskd: Flaskd) -> None:
    """Exit callbacks and finalizers run in workers; what exceeds exit_wait is cut, and named with its worker."""
    config = "shutdown: {deadline: 40s, exit_wait: 8s, exit_codes: {degraded: 9}}\n"
    url = start(flaskd, config)
    assert get(url, "/callback/0.1") == (200, b"registered")
    assert get(url, "/finalizer/0.0") == (200, b"accepted")
    assert flaskd.stop() == 0
    assert "callback" in (flaskd.directory / "order").read_text()
    assert "finalizing" in flaskd.log
    assert unfinished(flaskd) == []

    url = start(flaskd, config.replace("8s", "500ms"))
    assert get(url, "/thread") == (200, b"begun")
    code, out, _ = flaskd.client("stop", "--wait")
    assert (code, "thread/mailer" in out) == (1, True), out
    assert flaskd.wait() == 9
    [told] = unfinished(flaskd)
    assert told in {"worker 0: thread/mailer", "worker 1: thread/mailer"}

    url = start(flaskd, config.replace("8s", "1s"))
    assert get(url, "/finalizer/600.0") == (200, b"accepted")
    assert flaskd.stop() == 9
    [told] = unfinished(flaskd)
    assert told in {"worker 0: finalizers", "worker 1: finalizers"}


def test_the_stop_tells_what_it_waits_for(flaskd: Flaskd) -> None:
    """While a worker waits for an exit callback, STATUS names that; a second request to stop cuts it."""
    url = start(flaskd, "shutdown: {deadline: 90s, exit_wait: 80s, exit_codes: {degraded: 9}}\n")
    assert get(url, "/callback/80.0") == (200, b"registered")
    flaskd.kill(signal.SIGTERM)
    assert "the exit waits for atexit/stopapp.callback" in flaskd.wait_message("the exit waits for atexit/")
    before = time.monotonic()
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 9
    assert time.monotonic() - before < 10
    assert len(unfinished(flaskd)) >= 1


def test_the_deadline_holds(flaskd: Flaskd) -> None:
    """An app that never releases the GIL is killed with its worker at the deadline, and its request is named."""
    flaskd.write("hog.py", "import ctypes, os, socket\nfrom gateapp import app\n@app.get('/hog')\ndef hog():\n"
                 "    with socket.socket(socket.AF_UNIX) as gate:\n"
                 "        gate.connect(os.environ['GATE']); gate.sendall(b'entered'); gate.recv(1)\n"
                 "    ctypes.PyDLL(None).sleep(60)\n    return ''\n")  # fmt: skip
    flaskd.write("flaskd.yaml", "shutdown: {deadline: 4s, exit_codes: {degraded: 9}}\n")
    flaskd.start("-w", "2", app="hog")
    answer = Answer(flaskd.url, "/hog")
    flaskd.gate.entered()
    pids = worker_pids(flaskd)
    flaskd.gate.open()
    before = time.monotonic()
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 9
    assert time.monotonic() - before < 5
    assert isinstance(answer.result(), Exception)
    all_gone(flaskd, pids)
    [cut] = flaskd.record()["cut"]
    assert (cut["path"], cut["worker"] in {0, 1}) == ("/hog", True)
    assert {each.get("killed", "") != "" for each in flaskd.record()["workers"]} == {True, False}


@pytest.mark.skipif(bool(no_pid_namespace()), reason=f"no PID namespace: {no_pid_namespace()}")
def test_as_pid_1(flaskd: Flaskd) -> None:
    """As a container's first process, flaskd answers requests in workers at SIGTERM, and reaps orphans."""
    flaskd.write("flaskd.yaml", "cleanup: {policies: {\n"
                 "  orphans: {use: command, with: {argv: [sh, -c, '(exit 0) & (exit 0) & :']}, phase: quiesce}}}\n")  # fmt: skip
    flaskd.start("-w", "2", "-t", "16", prefix=["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"])
    [first] = children(flaskd.pid)
    [supervisor] = children(first)
    assert len(children(supervisor)) == 2
    os.kill(children(supervisor)[0], signal.SIGKILL)
    flaskd.until(lambda: "is gone: it was killed by SIGKILL" in flaskd.log)
    flaskd.until(lambda: flaskd.status()["workers"]["ready"] == 2)
    held = hold_in_both(flaskd, flaskd.url)
    os.kill(first, signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert [each.result() for each in held] == [(200, b"held")] * len(held)
    assert flaskd.wait() == 0
    assert flaskd.record()["policies"]["orphans"]["fate"] == "ok"


def test_a_stop_while_workers_are_replaced(flaskd: Flaskd) -> None:
    """A stop during a `restart` ends it with an error, new workers end, and old ones finish their requests."""
    url = start(flaskd)
    held = hold_in_both(flaskd, url)
    with flaskd.control() as client:
        client.sendall(b"restart\n")
        flaskd.until(lambda: len(children(flaskd.pid)) > 2)
        flaskd.kill(signal.SIGTERM)
        assert client.makefile().read().splitlines()[-1].startswith("ERR not-now")
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert [each.result() for each in held] == [(200, b"held")] * len(held)
    assert flaskd.wait() == 0
    assert flaskd.record()["cut"] == []
    assert "Traceback" not in flaskd.log
