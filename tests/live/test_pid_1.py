"""As a container's only process: SIGTERM at every moment, second and third signals, and orphans."""

import os
import signal
import time

import pytest
from daemon_kit import Flaskd, Terminal, children, handles_sigterm, no_pid_namespace
from http_client import get

pytestmark = pytest.mark.skipif(bool(no_pid_namespace()), reason=f"no PID namespace: {no_pid_namespace()}")

AS_PID_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def first_process(flaskd: Flaskd) -> int:
    """PID 1 of the namespace, by its number outside."""
    flaskd.until(lambda: bool(children(flaskd.pid)) or flaskd.process is None)
    return children(flaskd.pid)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_the_start(flaskd: Flaskd, number: int) -> None:
    """From the first line on SIGTERM ends it with 0; before that the kernel drops signals without a handler."""
    for step in range(10):
        flaskd.drain_messages()
        flaskd.launch(prefix=AS_PID_1)
        first = first_process(flaskd)
        flaskd.until(lambda first=first: handles_sigterm(first))
        time.sleep(step * 0.04)  # the moment of the signal is what is tested
        os.kill(first, number)
        assert flaskd.wait() == 0, step
        assert flaskd.leftovers() == [], step
    assert "Traceback" not in flaskd.log


def test_a_signal_while_draining(flaskd: Flaskd) -> None:
    """SIGTERM after `drain` continues the drain: requests in hand are answered, exit code 0."""
    flaskd.start(prefix=AS_PID_1)
    held = flaskd.hold()
    assert flaskd.command("drain").startswith("OK draining in_flight=1")
    os.kill(first_process(flaskd), signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert flaskd.record()["completed"] == 1


def test_the_second_and_the_third_signal(flaskd: Flaskd) -> None:
    """The second signal cuts the drain short; the third ends at once, with 128 plus its number, also of PID 1."""
    flaskd.write(
        "flaskd.yaml", "cleanup: {policies: {slow: {use: command, with: {argv: [sleep, '30']}, timeout: 40s}}}\n"
    )
    flaskd.start(prefix=AS_PID_1)
    first = first_process(flaskd)
    flaskd.hold()
    os.kill(first, signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    time.sleep(0.3)  # closer together they would count as one
    os.kill(first, signal.SIGTERM)
    flaskd.until(lambda: "cut GET /hold" in flaskd.log)
    time.sleep(0.3)
    os.kill(first, signal.SIGTERM)
    assert flaskd.wait() == 128 + signal.SIGTERM
    (flaskd.state / "running.json").unlink()  # the next start must know that this run did not end well


def test_children_of_commands_are_reaped(flaskd: Flaskd) -> None:
    """PID 1 reaps what a cleanup command leaves behind, while the stop goes on."""
    flaskd.write("flaskd.yaml", "cleanup: {policies: {\n"
                 "  orphans: {use: command, with: {argv: [sh, -c, '(exit 0) & (exit 0) & :']}, phase: quiesce},\n"
                 "  wait: {use: command, with: {argv: [sh, -c, 'echo x > told; read x < go']}, phase: final, timeout: 20s}}}\n")  # fmt: skip
    for name in ("told", "go"):
        os.mkfifo(flaskd.directory / name)
    flaskd.start(prefix=AS_PID_1)
    first = first_process(flaskd)
    [daemon] = children(first)
    assert get(flaskd.url) == (200, b"hello")
    os.kill(first, signal.SIGTERM)
    assert (flaskd.directory / "told").read_text() == "x\n"
    flaskd.until(lambda: children(first) == [daemon])
    (flaskd.directory / "go").write_text("x\n")
    assert flaskd.wait() == 0
    assert flaskd.record()["policies"]["orphans"]["fate"] == "ok"


def test_every_signal_of_the_app_is_passed_on(flaskd: Flaskd) -> None:
    """All signals are passed on, because PID 1 cannot know which ones the app handles."""
    flaskd.write("handling.py", "import signal\nfrom pathlib import Path\nfrom gateapp import app\n"
                 "here = Path(__file__).parent\nfor each in (signal.SIGALRM, signal.SIGRTMAX, signal.SIGTTIN):\n"
                 "    signal.signal(each, lambda number, _: here.joinpath(f'got-{number}').touch())\n")  # fmt: skip
    flaskd.start(app="handling", prefix=AS_PID_1)
    first = first_process(flaskd)
    for number in (signal.SIGALRM, signal.SIGRTMAX, signal.SIGTTIN):
        os.kill(first, number)
        flaskd.until((flaskd.directory / f"got-{number:d}").exists)
    os.kill(first, signal.SIGTERM)
    assert flaskd.wait() == 0


def test_a_ctrl_c_comes_once_however_slow_pid_1_is(flaskd: Flaskd) -> None:
    """A Ctrl-C comes once: the terminal sends it to the daemon's process group alone, even if PID 1 is stopped."""
    terminal = Terminal(flaskd, prefix=AS_PID_1)
    try:
        flaskd.wait_message("READY=1")
        first = first_process(flaskd)
        held = flaskd.hold()
        os.kill(first, signal.SIGSTOP)
        terminal.type(b"\x03")
        terminal.read_until(b"stopping (signal: SIGINT): 1 in flight")
        time.sleep(0.3)  # closer together they would count as one
        os.kill(first, signal.SIGCONT)
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        assert flaskd.wait() == 0
        assert flaskd.record()["cut"] == []
    finally:
        terminal.close()
