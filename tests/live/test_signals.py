"""Signals at every moment: during the import, while serving, repeated, and from a real terminal."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from daemon_kit import Flaskd, Terminal, children
from http_client import connect

ENTER = "import os, socket\ngate = socket.socket(socket.AF_UNIX)\ngate.connect(os.environ['GATE'])\ngate.sendall(b'entered')\n"

SLEEPERS = {
    "python": ENTER + "import time\ntime.sleep(5)\n",
    "python that swallows everything": ENTER + (
        "import time\nend = time.monotonic() + 5\nwhile time.monotonic() < end:\n"
        "    try:\n        time.sleep(1)\n    except BaseException:\n        pass\n"
    ),
    "c that starts again": ENTER + (
        "import ctypes, time\nlibc = ctypes.CDLL(None)\nend = time.monotonic() + 5\n"
        "left = 5\nwhile left:\n    left = libc.sleep(left)\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("sleeper", SLEEPERS)
def test_a_signal_ends_an_import_at_once(flaskd: Flaskd, sleeper: str, number: int) -> None:
    """SIGTERM during an import that sleeps 5 s ends flaskd within a second, with 0, without a node."""
    flaskd.write("sleeper.py", SLEEPERS[sleeper])
    flaskd.launch(app="sleeper", listen=f"unix:{flaskd.directory}/app.sock")
    flaskd.gate.entered()
    before = time.monotonic()
    flaskd.kill(number)
    assert flaskd.wait() == 0
    assert time.monotonic() - before < 1.0
    assert "stopped while starting" in flaskd.log
    assert "Traceback" not in flaskd.log
    assert not (flaskd.directory / "app.sock").exists()


def test_stop_ends_an_import_and_answers(flaskd: Flaskd) -> None:
    """The control nodes exist before the app is imported; a stop there ends the start, and is answered."""
    flaskd.write("sleeper.py", SLEEPERS["python"])
    flaskd.launch(app="sleeper")
    flaskd.gate.entered()
    assert flaskd.status()["state"] == "starting"
    assert flaskd.command("resume") == "ERR not-now cannot resume: flaskd is starting\n"
    flaskd.until(lambda: "cannot resume: flaskd is starting" in flaskd.log)
    assert flaskd.command("stop wait").splitlines()[-1] == "OK stopped"
    assert flaskd.wait() == 0


def test_the_second_signal_cuts_the_drain_short(flaskd: Flaskd) -> None:
    """After the second SIGTERM the request is cut, and all cleanup has one second in total."""
    flaskd.write("slow_cleanup.py", "import time\ndef step(context):\n    time.sleep(30)\n")
    flaskd.write("flaskd.yaml", "shutdown: {deadline: 60s, drain: {timeout: 50s}}\n"
                 "cleanup: {policies: {slow: {use: call, with: {target: 'slow_cleanup:step'}, timeout: 20s}}}\n")  # fmt: skip
    flaskd.start()
    flaskd.hold()
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    before = time.monotonic()
    time.sleep(0.3)  # signals closer together than 250 ms count as one
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 0
    assert time.monotonic() - before < 2.0
    record = flaskd.record()
    assert [each["path"] for each in record["cut"]] == ["/hold"]
    assert record["policies"]["slow"]["fate"] == "timed_out"


def test_the_third_signal_ends_it_at_once(flaskd: Flaskd) -> None:
    """The third SIGINT ends flaskd at once with 128 plus its number, and no node is left."""
    flaskd.write("stubborn.py", "import time\ndef step(context):\n    time.sleep(30)\n")
    flaskd.write("flaskd.yaml", "cleanup: {policies: {slow: {use: call, phase: announce, with: {target: 'stubborn:step'},"
                 " timeout: 20s}}}\n")  # fmt: skip
    flaskd.start()
    flaskd.hold()
    flaskd.kill(signal.SIGINT)
    flaskd.wait_message("STOPPING=1")
    for _ in range(2):
        time.sleep(0.3)  # signals closer together than 250 ms count as one
        flaskd.kill(signal.SIGINT)
    assert flaskd.wait() == 128 + signal.SIGINT
    assert list(flaskd.runtime.glob("*")) == []
    (flaskd.state / "running.json").unlink()


def test_signals_close_together_are_one(flaskd: Flaskd) -> None:
    """A Ctrl-C that a wrapper forwards a second time does not cut the stop short."""
    flaskd.start()
    held = flaskd.hold()
    flaskd.kill(signal.SIGINT)
    flaskd.kill(signal.SIGTERM)
    flaskd.kill(signal.SIGINT)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert flaskd.record()["cut"] == []


def test_handlers_of_the_app_are_taken_back(flaskd: Flaskd) -> None:
    """If the app sets a SIGTERM handler on import, flaskd takes it back with a warning, and stops at SIGTERM."""
    flaskd.write("greedy.py", "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nfrom gateapp import app\n")
    flaskd.start(app="greedy")
    assert "the app installed its own handler for SIGTERM; flaskd takes it back" in flaskd.log
    assert flaskd.stop() == 0


@pytest.fixture
def terminal(flaskd: Flaskd) -> Iterator[Terminal]:
    """A running flaskd on a terminal."""
    each = Terminal(flaskd)
    flaskd.wait_message("READY=1")
    yield each
    each.close()


def test_ctrl_c_in_a_terminal(terminal: Terminal) -> None:
    """One Ctrl-C stops flaskd: requests are answered, exit code 0."""
    held = terminal.flaskd.hold()
    terminal.type(b"\x03")
    terminal.read_until(b"stopping (signal: SIGINT): 1 in flight")
    terminal.flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert terminal.flaskd.wait() == 0


def test_three_ctrl_c_in_a_terminal(terminal: Terminal) -> None:
    """Three Ctrl-C end it, whatever hangs."""
    terminal.flaskd.hold()
    terminal.type(b"\x03")
    terminal.read_until(b"stopping")
    time.sleep(0.3)  # signals closer together than 250 ms count as one
    terminal.type(b"\x03")
    terminal.read_until(b"asked again")
    time.sleep(0.3)
    terminal.type(b"\x03")
    assert terminal.flaskd.wait() in {0, 130}  # the second one may have been enough
    (terminal.flaskd.state / "running.json").unlink(missing_ok=True)


def test_a_terminal_that_hangs_up_is_a_stop(terminal: Terminal) -> None:
    """When the terminal hangs up, SIGHUP stops flaskd."""
    held = terminal.flaskd.hold()
    os.close(terminal.master)
    terminal.flaskd.wait_message("STOPPING=1")
    terminal.flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert terminal.flaskd.wait() == 0


def test_sighup_without_a_terminal_is_a_reload(flaskd: Flaskd) -> None:
    """SIGHUP reloads: systemd gets RELOADING with its moment, then READY."""
    flaskd.start()
    flaskd.kill(signal.SIGHUP)
    reloading = flaskd.wait_message("RELOADING=1")
    assert "MONOTONIC_USEC=" in reloading
    flaskd.wait_message("READY=1")
    assert flaskd.status()["last_reload"]["ok"] is True


def test_sighup_while_drained_is_answered(flaskd: Flaskd) -> None:
    """If a reload is refused, systemd gets its begin, its end and the reason."""
    flaskd.start()
    assert "OK drained" in flaskd.command("drain wait")
    flaskd.kill(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in flaskd.wait_message("RELOADING=1")
    assert "STATUS=drained: cannot reload: flaskd is drained" in flaskd.wait_message("READY=1")
    assert flaskd.status()["state"] == "drained"
    assert flaskd.stop() == 0


def test_sighup_during_a_reload_is_answered(flaskd: Flaskd) -> None:
    """A second SIGHUP during a reload gets a RELOADING with a moment of its own."""
    go = flaskd.directory / "go"
    os.mkfifo(go)
    flaskd.write("flaskd.yaml", "version: 1\n")
    flaskd.start()
    flaskd.write("slow.py", f"open({str(go)!r}).close()\ndef bye(context): pass\n")
    flaskd.write("flaskd.yaml", "cleanup: {policies: {bye: {use: call, with: {target: 'slow:bye'}}}}\n")
    flaskd.kill(signal.SIGHUP)
    first = flaskd.wait_message("RELOADING=1")
    flaskd.kill(signal.SIGHUP)
    assert "RELOADING=1" in first
    flaskd.until(lambda: "state: reloading" in flaskd.command("status"))
    go.write_text("")
    second = flaskd.wait_message("=")
    assert "RELOADING=1" in second, second
    assert first != second
    assert flaskd.stop() == 0


def test_nothing_keeps_the_exit(flaskd: Flaskd) -> None:
    """A stray thread, a busy executor and an idle connection delay the exit by no more than their limits."""
    flaskd.write("stray.py", "import threading, time, concurrent.futures\nfrom gateapp import app\n"
                 "threading.Thread(target=time.sleep, args=(60,), name='stray').start()\n"
                 "pool = concurrent.futures.ThreadPoolExecutor(1)\npool.submit(time.sleep, 60)\n")  # fmt: skip
    # the executor's time for its job, and the exit's
    flaskd.write("flaskd.yaml", "cleanup: {defaults: {timeout: 200ms}}\nshutdown: {exit_wait: 200ms}\n")
    flaskd.start(app="stray")
    with connect(flaskd.url):
        before = time.monotonic()
        assert flaskd.stop() == 0
        assert time.monotonic() - before < 2.0
    assert "cut at the exit: thread/stray" in flaskd.log


def test_twenty_lives_leave_nothing(flaskd: Flaskd) -> None:
    """Twenty starts and stops leave no node, child or temporary file."""
    temporary = flaskd.directory / "tmp"
    temporary.mkdir()
    flaskd.env["TMPDIR"] = str(temporary)
    for _ in range(20):
        flaskd.start(listen=f"unix:{flaskd.directory}/app.sock")
        assert children(flaskd.pid) == []
        assert flaskd.stop() == 0
        assert flaskd.leftovers() == []
        assert not (flaskd.directory / "app.sock").exists()
    assert list(temporary.iterdir()) == []
