"""Apps, wrappers, operators and pipes that misbehave: flaskd still stops in good order."""

import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from daemon_kit import Flaskd, children, handles_sigterm, no_pid_namespace
from http_client import Answer, connect, get

FORKING = """
import multiprocessing, os, time
from gateapp import app
fork = multiprocessing.get_context("fork")

@app.get("/terminated")
def terminated():
    child = fork.Process(target=time.sleep, args=(30,))
    child.start(); child.terminate(); child.join(5)
    return str(child.exitcode)

@app.get("/forked")
def forked():
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    return str(child)
"""


def test_a_terminated_child_ends_and_the_daemon_does_not(flaskd: Flaskd) -> None:
    """SIGTERM to a forked child ends the child, and the daemon does not notice it."""
    flaskd.write("forking.py", FORKING)
    flaskd.start(app="forking")
    assert get(flaskd.url, "/terminated") == (200, b"-15")
    assert flaskd.status()["state"] == "ready"
    assert flaskd.stop() == 0


def test_a_forked_child_keeps_nothing(flaskd: Flaskd) -> None:
    """While a forked child lives, a drain refuses clients, a resume binds, and a stop and the next start work."""
    flaskd.write("forking.py", FORKING)
    flaskd.start(app="forking")
    url = flaskd.url
    child = int(get(url, "/forked")[1])
    try:
        assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
        with pytest.raises(ConnectionRefusedError):
            get(url)
        assert flaskd.command("resume") == "OK ready\n"
        assert get(url) == (200, b"hello")
        before = time.monotonic()
        assert flaskd.stop() == 0
        assert time.monotonic() - before < 2.5
        flaskd.start(app="forking")
        assert flaskd.stop() == 0
    finally:
        os.kill(child, signal.SIGKILL)


def test_echoes_of_a_signal_do_not_change_the_exit_code(flaskd: Flaskd) -> None:
    """Two SIGINTs within milliseconds, as wrappers send them, end an idle flaskd with 0."""
    for pause in (0.001, 0.01, 0.02, 0.03, 0.045):
        flaskd.start()
        flaskd.kill(signal.SIGINT)
        time.sleep(pause)  # the moment of the second signal is what is tested
        if flaskd.process is not None and flaskd.process.poll() is None:
            flaskd.kill(signal.SIGINT)
        assert flaskd.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_the_start(flaskd: Flaskd, number: int) -> None:
    """From the first line of the command on, SIGTERM and Ctrl-C end it with 0, without a traceback or a node."""
    for step in range(10):
        flaskd.drain_messages()
        flaskd.launch()
        flaskd.until(lambda: handles_sigterm(flaskd.pid))  # before that Python itself starts
        time.sleep(step * 0.04)  # the moment of the signal is what is tested
        flaskd.kill(number)
        assert flaskd.wait() == 0, step
        assert flaskd.leftovers() == [], step
    assert "Traceback" not in flaskd.log


def test_standard_error_that_nobody_reads(flaskd: Flaskd) -> None:
    """With a full pipe log lines are lost; requests are answered, and SIGTERM stops flaskd."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 65536)
    except BlockingIOError:
        os.set_blocking(writing, True)
    flaskd.start(stderr=writing, stdout=writing)
    os.close(writing)
    url = flaskd.url
    for _ in range(50):
        assert get(url) == (200, b"hello")
    before = time.monotonic()
    assert flaskd.stop() == 0
    assert time.monotonic() - before < 4
    os.close(reading)


def test_standard_error_that_is_closed(flaskd: Flaskd) -> None:
    """With standard error closed, flaskd serves and stops, also with three signals, and with a stray thread."""
    flaskd.write("stray.py", "import threading, time\nfrom gateapp import app\n"
                 "threading.Thread(target=time.sleep, args=(60,)).start()\n")  # fmt: skip
    flaskd.write("flaskd.yaml", "shutdown: {exit_wait: 500ms}\n")
    reading, writing = os.pipe()
    flaskd.start(app="stray", stderr=writing, stdout=writing)
    os.close(writing)
    os.close(reading)
    assert get(flaskd.url) == (200, b"hello")
    before = time.monotonic()
    assert flaskd.stop() == 0
    assert time.monotonic() - before < 3


def test_a_reload_that_hangs_does_not_keep_a_stop_waiting(flaskd: Flaskd) -> None:
    """A module that sleeps during a reload does not delay a stop, and the reload gets an error."""
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start()
    flaskd.write("sleeper.py", "import os, socket, time\ngate = socket.socket(socket.AF_UNIX)\n"
                 "gate.connect(os.environ['GATE'])\ngate.sendall(b'entered')\ntime.sleep(30)\ndef step(context): pass\n")  # fmt: skip
    flaskd.write("flaskd.yaml", "cleanup: {policies: {p: {use: call, with: {target: 'sleeper:step'}}}}\n")
    with flaskd.control() as client:
        client.sendall(b"reload\n")
        flaskd.gate.entered()
        assert flaskd.status()["state"] == "reloading"
        assert flaskd.command("ready") == "OK ready\n"
        before = time.monotonic()
        assert flaskd.stop() == 0
        assert time.monotonic() - before < 2
        assert client.recv(1000) == b"ERR not-now the reload was broken off by a stop\n"


def test_reloads_in_a_storm_are_merged(flaskd: Flaskd) -> None:
    """Hundreds of SIGHUPs lead to a few reloads, the last of which reads the newest file; a stop comes at once."""
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start()
    for _ in range(300):
        flaskd.kill(signal.SIGHUP)
    flaskd.write("flaskd.yaml", "server: {threads: 3}\n")
    assert flaskd.command("reload").startswith("OK reloaded")
    assert flaskd.status()["threads"] == 3
    before = time.monotonic()
    assert flaskd.stop() == 0
    assert time.monotonic() - before < 2


def test_ids_that_are_no_text_lose_nothing(flaskd: Flaskd) -> None:
    """A JSON client with a lone surrogate as id gets its answers, and its stop is complete."""
    flaskd.start()
    with flaskd.control() as client:
        client.sendall(rb'{"id":"\ud800","cmd":"stop","wait":true}' + b"\n")
        answers = [json.loads(line) for line in client.makefile("rb")]
    assert (answers[-1]["id"], answers[-1]["result"]) == ("\ud800", "stopped")
    assert flaskd.wait() == 0
    assert flaskd.record()["reason"].startswith("control:")


def test_logging_set_up_by_the_app_does_not_silence_flaskd(flaskd: Flaskd) -> None:
    """logging.config disables all loggers that it does not name; flaskd enables its own again."""
    flaskd.write(
        "logged.py", "import logging.config\nlogging.config.dictConfig({'version': 1})\nfrom gateapp import app\n"
    )
    flaskd.start(app="logged")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0
    assert "ready: logged" in flaskd.log
    assert '"GET / HTTP/1.1" 200' in flaskd.log


def test_a_policy_module_does_not_take_the_signals(flaskd: Flaskd) -> None:
    """Signal handlers that a `call` target sets on import are replaced again, at the start and at a reload."""
    flaskd.write("greedy.py", "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef step(context): pass\n")
    flaskd.write("flaskd.yaml", "cleanup: {policies: {p: {use: call, with: {target: 'greedy:step'}}}}\n")
    flaskd.start()
    assert "flaskd takes it back" in flaskd.log
    assert flaskd.stop() == 0


def test_nohup_is_respected(flaskd: Flaskd) -> None:
    """A flaskd that was started with SIGHUP ignored goes on ignoring it."""
    flaskd.start(prefix=["nohup"])
    flaskd.kill(signal.SIGHUP)
    assert flaskd.command("health") == "OK healthy\n"
    assert flaskd.status()["last_reload"] is None
    assert flaskd.stop() == 0


def test_a_pipelined_request_in_the_kernel_is_answered(flaskd: Flaskd) -> None:
    """A pipelined request that was unread when the stop came is answered."""
    flaskd.start()
    with connect(flaskd.url) as client:
        client.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        flaskd.gate.entered()
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        flaskd.kill(signal.SIGTERM)
        flaskd.wait_message("STOPPING=1")
        flaskd.gate.open()
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.endswith(b"hello")
    assert flaskd.wait() == 0
    assert flaskd.record()["completed"] == 2


def answer_of(client: socket.socket) -> bytes:
    """Read one response with a Content-Length."""
    with client.makefile("rb") as stream:
        head = b"".join(iter(stream.readline, b"\r\n"))
        return head + stream.read(int(head.partition(b"Content-Length: ")[2].split()[0]))


def test_running_out_of_files_costs_no_core(flaskd: Flaskd) -> None:
    """Without a free descriptor accepting pauses, with one log line; it goes on when descriptors are free."""
    flaskd.write("eater.py", "import os\nfrom gateapp import app\nheld = []\n@app.get('/eat')\ndef eat():\n"
                 "    try:\n        while True: held.append(os.open('/dev/null', os.O_RDONLY))\n"
                 "    except OSError: return 'full'\n@app.get('/spit')\ndef spit():\n"
                 "    while held: os.close(held.pop())\n    return 'empty'\n")  # fmt: skip
    flaskd.start(app="eater", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)))
    url = flaskd.url
    with connect(url) as kept:
        kept.sendall(b"GET /eat HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"full" in answer_of(kept)
        waiting = Answer(url, "/")
        flaskd.until(lambda: "cannot accept connections" in flaskd.log)
        kept.sendall(b"GET /spit HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"empty" in answer_of(kept)
        assert waiting.result() == (200, b"hello")
    assert len(flaskd.log.splitlines()) < 40
    assert flaskd.stop() == 0


def test_silent_clients_make_room_for_the_operator(flaskd: Flaskd) -> None:
    """With more idle control clients than are allowed, a command is still answered."""
    flaskd.start()
    silent = [flaskd.control() for _ in range(100)]
    assert flaskd.command("health") == "OK healthy\n"
    for each in silent:
        each.close()
    assert flaskd.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_somebody_without_a_home(flaskd: Flaskd) -> None:
    """A user without a home, runtime and state directory can run flaskd, with nodes in /tmp."""
    for name in ("HOME", "RUNTIME_DIRECTORY", "STATE_DIRECTORY"):
        flaskd.env.pop(name, None)
    temporary = flaskd.directory / "tmp"
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o777)
    flaskd.env["TMPDIR"] = str(temporary)
    flaskd.directory.chmod(0o755)
    flaskd.gate.path.chmod(0o777)
    (flaskd.directory / "notify").chmod(0o777)
    closed = [
        each
        for file in (Path(sys.executable).resolve(), Path(__file__))
        for each in file.parents
        if not each.stat().st_mode & 0o005
    ]
    if closed or not os.access("/usr/bin/setpriv", os.X_OK):
        pytest.skip(f"other users may not read {closed[0]}" if closed else "there is no setpriv")
    flaskd.start(prefix=["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"])
    assert (temporary / "flaskd-54321").stat().st_mode & 0o777 == 0o700
    assert flaskd.stop() == 0
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(bool(no_pid_namespace()), reason=f"no PID namespace: {no_pid_namespace()}")
def test_as_pid_1(flaskd: Flaskd) -> None:
    """As PID 1, flaskd answers requests at SIGTERM, exits with 0, and reaps orphans."""
    flaskd.write("orphans.py", "import subprocess\nfrom gateapp import app\n@app.get('/orphan')\ndef orphan():\n"
                 "    subprocess.run(['sh', '-c', 'sleep 0.01 &'])\n    return subprocess.run(['sh', '-c', 'exit 7']).returncode.__str__()\n")  # fmt: skip
    flaskd.start(app="orphans", prefix=["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"])
    [first] = children(flaskd.pid)
    [daemon] = children(first)
    url = flaskd.url
    for _ in range(5):
        assert get(url, "/orphan") == (200, b"7")
    flaskd.until(lambda: children(first) == [daemon])
    held = flaskd.hold(url)
    os.kill(first, signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0


@pytest.mark.skipif(bool(no_pid_namespace()), reason=f"no PID namespace: {no_pid_namespace()}")
def test_as_pid_1_while_starting(flaskd: Flaskd) -> None:
    """SIGTERM during an import ends flaskd as PID 1 within a second."""
    flaskd.write("sleeper.py", "import os, socket, time\ngate = socket.socket(socket.AF_UNIX)\n"
                 "gate.connect(os.environ['GATE'])\ngate.sendall(b'entered')\ntime.sleep(30)\n")  # fmt: skip
    flaskd.launch(app="sleeper", prefix=["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"])
    flaskd.gate.entered()
    [first] = children(flaskd.pid)
    before = time.monotonic()
    os.kill(first, signal.SIGTERM)
    assert flaskd.wait() == 0
    assert time.monotonic() - before < 1.5
