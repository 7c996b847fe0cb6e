"""A start that fails gives one clear line, the right exit code, and no traceback of flaskd's own."""

import os
import resource
import signal
import socket
from pathlib import Path

import pytest
from daemon_kit import Flaskd
from http_client import get

import flaskd as flaskd_package

PACKAGE = str(Path(flaskd_package.__file__).parent)
"""Whose frames no traceback shows; the directory of a clone may have the same name."""
FAULTS = {
    "missing module": ({}, ["nosuch:app"], 78, 'cannot load nosuch:app: there is no module "nosuch"'),
    "missing attribute": ({"empty.py": ""}, ["empty:app"], 78, "cannot load empty:app: failed to find attribute 'app'"),
    "module without app": ({"empty.py": ""}, ["empty"], 78, "cannot load empty: failed to find Flask application"),
    "no app named": ({}, [], 78, "cannot find an app: none was named"),
    "app that raises": ({"bad.py": "def f():\n    raise OSError('disk on fire')\nf()\n"}, ["bad"], 70,
                        "cannot load bad: the app raised OSError: disk on fire"),
    "app that exits": ({"bad.py": "import sys\nsys.exit('not today')\n"}, ["bad"], 70,
                       "cannot load bad: the app raised SystemExit: not today"),
    "missing configuration file": ({}, ["gateapp", "-c", "no.yaml"], 78, "no.yaml"),
    "unknown key": ({"flaskd.yaml": "servr: {}\n"}, ["gateapp"], 78, "flaskd.yaml:1:1 servr: "),
    "bad YAML": ({"flaskd.yaml": "a: [\n"}, ["gateapp"], 78, "flaskd.yaml:1:4: expected a closing"),
    "bad threads": ({}, ["gateapp", "-t", "many"], 64, "command line server.threads: expected an integer"),
    "bad address": ({}, ["gateapp", "-l", "nowhere"], 64, "command line server.listen"),
    "unknown option": ({}, ["gateapp", "--frobnicate"], 64, 'has no option "--frobnicate"'),
    "probe fails": ({"flaskd.yaml": "health: {probe: /boom}\n"}, ["gateapp"], 70,
                    "cannot get ready: the probe of /boom was answered with 500"),
    "chdir missing": ({"flaskd.yaml": "app: {chdir: nowhere}\n"}, ["gateapp"], 78, "cannot change into app.chdir"),
    "cleanup target missing": (
        {"flaskd.yaml": "cleanup: {policies: {p: {use: call, with: {target: 'nosuch:f'}}}}\n"}, ["gateapp"], 78,
        "cleanup.policies.p: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_start(flaskd: Flaskd, name: str) -> None:
    """Each fault has its line and its exit code; nothing is left behind, and the manager is told."""
    files, args, code, line = FAULTS[name]
    for path, text in files.items():
        flaskd.write(path, text)
    found, log = flaskd.fails(*args, app=None, listen=None if "-l" in args else "127.0.0.1:0")
    assert (found, line in log) == (code, True), log
    if name == "app that raises":
        assert log.count("Traceback") == 1
        assert 'bad.py", line 3, in <module>' in log
        assert PACKAGE not in log.partition("Traceback")[2]
        assert "importlib" not in log
    elif name == "probe fails":
        assert "RuntimeError: boom" in log
    elif name != "app that exits":
        assert "Traceback" not in log
    if code != 64:
        assert any("ERRNO=" in message for message in flaskd.drain_messages())
    assert flaskd.leftovers() == []


def test_a_busy_port(flaskd: Flaskd) -> None:
    """A port that another process uses is named, with a next step; the exit code is 73."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        code, log = flaskd.fails(listen=f"127.0.0.1:{port}")
    assert code == 73
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; another process listens there" in log
    assert "Traceback" not in log


def test_a_working_directory_that_is_gone(flaskd: Flaskd) -> None:
    """In a working directory that was removed, the start fails with 78 and one line."""
    gone = flaskd.directory / "gone"
    gone.mkdir()
    flaskd.launch(preexec_fn=lambda: (os.chdir(gone), gone.rmdir()))
    assert flaskd.wait() == 78
    assert flaskd.log == "cannot work here: the working directory is gone (No such file or directory); cd elsewhere\n"


def test_running_twice(flaskd: Flaskd) -> None:
    """A second flaskd in the same runtime directory is refused with the first one's pid, and harms nothing."""
    flaskd.start()
    url = flaskd.url
    code, out, err = flaskd.client("serve", "gateapp", "-l", "127.0.0.1:0")
    assert code == 75
    assert f"flaskd is already running in {flaskd.runtime}, pid {flaskd.pid}" in out + err
    assert get(url) == (200, b"hello")
    assert flaskd.command("version").startswith("OK ")
    assert flaskd.stop() == 0


def test_two_names_live_side_by_side(make_flaskd) -> None:
    """Two daemons with different runtime directories do not affect each other's nodes."""
    one, two = make_flaskd().start(), make_flaskd().start()
    assert one.stop() == 0
    assert two.command("health") == "OK healthy\n"
    assert two.stop() == 0


def test_an_unusable_runtime_directory_costs_the_nodes_only(flaskd: Flaskd) -> None:
    """Without a usable runtime directory flaskd logs that, and serves without nodes."""
    flaskd.runtime.write_text("a file stands here")
    flaskd.start(listen=f"unix:{flaskd.directory}/app.sock")
    assert f"control is not complete: cannot use {flaskd.runtime}: Not a directory; serving all the same" in flaskd.log
    assert get(f"unix:{flaskd.directory}/app.sock") == (200, b"hello")
    assert flaskd.stop() == 0
    assert flaskd.runtime.read_text() == "a file stands here"
    flaskd.runtime.unlink()


def test_an_unusable_runtime_directory_is_fatal_when_control_is_required(flaskd: Flaskd) -> None:
    """Without a usable runtime directory and with `control.required` the exit code is 73."""
    flaskd.runtime.write_text("a file stands here")
    flaskd.write("flaskd.yaml", "control: {required: true}\n")
    code, log = flaskd.fails()
    assert (code, "(control.required is true)" in log) == (73, True)
    flaskd.runtime.unlink()


def test_a_file_at_the_fifo_is_not_touched(flaskd: Flaskd) -> None:
    """A file that `echo drain > control` made while no daemon ran is left alone, and the socket works."""
    flaskd.runtime.mkdir()
    flaskd.fifo_path.write_text("drain\n")
    flaskd.start()
    assert "a file that is not a FIFO stands there" in flaskd.log
    assert flaskd.command("ready") == "OK ready\n"
    assert flaskd.stop() == 0
    assert flaskd.fifo_path.read_text() == "drain\n"
    flaskd.fifo_path.unlink()


def test_stale_nodes_are_taken_over(flaskd: Flaskd) -> None:
    """Nodes that a killed flaskd left are replaced, and the log says so."""
    flaskd.start(listen=f"unix:{flaskd.directory}/app.sock")
    flaskd.kill(signal.SIGKILL)
    flaskd.wait()
    assert flaskd.socket_path.exists()
    flaskd.start(listen=f"unix:{flaskd.directory}/app.sock")
    assert "died without a complete stop" in flaskd.log
    assert flaskd.command("ready") == "OK ready\n"
    assert flaskd.stop() == 0


def test_an_unwritable_state_directory_costs_the_record_only(flaskd: Flaskd) -> None:
    """Without a usable state directory flaskd serves and stops, and logs what is missing."""
    flaskd.state.write_text("a file stands here")
    flaskd.start()
    assert "the last stop will not be recorded" in flaskd.log
    assert flaskd.stop() == 0
    flaskd.state.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_a_runtime_directory_of_somebody_else_is_not_used(flaskd: Flaskd) -> None:
    """A runtime directory that every user may write to is refused, because other users could have made its nodes."""
    flaskd.runtime.mkdir()
    flaskd.runtime.chmod(0o777)
    flaskd.start()
    assert f"cannot use {flaskd.runtime}: all users may write to it; serving" in flaskd.log
    assert flaskd.stop() == 0
    assert list(Path(flaskd.runtime).iterdir()) == []


def test_an_app_that_fails_to_load_forges_no_line_of_the_log(flaskd: Flaskd) -> None:
    """Newlines in an exception's text, or a text that raises, cannot forge a log line."""
    flaskd.write(
        "rude.py", "raise RuntimeError('x\\n2026 forged\\r2026 forged\\u20282026 forged\\x0b2026 forged\\x1b[31m')\n"
    )
    flaskd.write("ruder.py", "class Rude(Exception):\n    def __str__(self):\n        raise LookupError\nraise Rude\n")
    code, log = flaskd.fails(app="rude")
    assert (code, "cannot load rude: the app raised RuntimeError: x" in log) == (70, True)
    assert not [
        line for line in log.split("\n") if "forged" in line and "RuntimeError" not in line and "raise" not in line
    ]
    assert not set("\r\u2028\x0b\x1b") & set(log)
    code, log = flaskd.fails(app="ruder")
    assert (code, "cannot load ruder: the app raised Rude: its text cannot be read" in log) == (70, True)


SHORT_OF_THREADS = """
import os, threading
left = int(os.environ["THREADS_LEFT"])
start = threading.Thread.start

def limited(self):
    global left
    left -= 1
    threading.stack_size(1 << 46 if left < 0 else 0)  # no room for such a stack: pthread_create(3) fails with EAGAIN
    start(self)

threading.Thread.start = limited
"""


def test_no_thread_to_be_had_at_the_start(flaskd: Flaskd) -> None:
    """If a thread of the start cannot be had, there is a clear line and 73, or flaskd works; nothing is left behind."""
    flaskd.write("sitecustomize.py", SHORT_OF_THREADS)
    flaskd.env["PYTHONPATH"] = str(flaskd.directory)
    failed = 0
    for left in range(40):
        flaskd.env["THREADS_LEFT"] = str(left)
        flaskd.log_file.write_text("")
        flaskd.launch("-t", "2")
        try:
            flaskd.wait_message("READY=1")
        except AssertionError:
            assert flaskd.wait() == 73, flaskd.log
            assert "cannot start: no thread can be had; raise TasksMax= of its unit" in flaskd.log
            assert "Traceback" not in flaskd.log
            failed += 1
        else:
            assert get(flaskd.url) == (200, b"hello")
            assert flaskd.stop() == 0
            if "no thread" not in flaskd.log:
                break
        assert flaskd.leftovers() == [], left
    assert failed >= 5


def test_no_descriptor_to_be_had_at_the_start(flaskd: Flaskd) -> None:
    """Without enough descriptors there is a clear line and an exit code, or flaskd works; nothing is left behind."""
    served = failed = 0
    for limit in range(5, 60):
        flaskd.log_file.write_text("")
        flaskd.launch(preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
        try:
            flaskd.wait_message("READY=1")
        except AssertionError:
            assert flaskd.wait() in {70, 73}, flaskd.log  # 70: the app could not open its files
            assert "Too many open files" in flaskd.log or "more open files than this process may have" in flaskd.log
            assert PACKAGE not in flaskd.log.partition("Traceback")[2], flaskd.log
            failed += 1
        else:
            served += 1
            assert flaskd.stop() == 0
            if served == 5:
                break
        assert flaskd.leftovers() == [], limit
    assert failed
    assert served
