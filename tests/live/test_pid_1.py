"""As a container's only process: SIGTERM at every moment, a second and a third one, and nobody's child left over."""

import os
import signal
import time

import pytest
from conftest import Flaskd, children, get, handles_sigterm
from test_hostile import _no_pid_namespace

pytestmark = pytest.mark.skipif(bool(_no_pid_namespace()), reason=f"no PID namespace: {_no_pid_namespace()}")

AS_PID_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def first_process(flaskd: Flaskd) -> int:
    """PID 1 of the namespace, by its number outside."""
    flaskd.until(lambda: bool(children(flaskd.pid)) or flaskd.process is None)
    return children(flaskd.pid)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_the_start(flaskd: Flaskd, number: int) -> None:
    """From the first line of the command on, it ends with 0; before that the kernel drops what PID 1 does not handle."""
    for step in range(10):
        flaskd.drain_messages()
        flaskd.launch(prefix=AS_PID_1)
        first = first_process(flaskd)
        flaskd.until(lambda first=first: handles_sigterm(first))
        time.sleep(step * 0.04)  # not a wait for anything: the moment of the signal is what is tried
        os.kill(first, number)
        assert flaskd.wait() == 0, step
        assert flaskd.leftovers() == [], step
    assert "Traceback" not in flaskd.log


def test_a_signal_while_draining(flaskd: Flaskd) -> None:
    """SIGTERM after `drain` is a stop that joins it: what is in hand is answered, and the exit code is 0."""
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
    """The second cuts the drain short; the third leaves at once, with 128 and its number, which PID 1 passes on."""
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
    (flaskd.state / "running.json").unlink()  # the next start is to know that this one did not end well


def test_children_of_commands_are_reaped(flaskd: Flaskd) -> None:
    """What a cleanup command leaves behind is PID 1's to bury, while the stop goes on."""
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
