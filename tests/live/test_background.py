"""Background work: a drain waits for it, status shows it, and the account names it if it is left behind."""

import signal

from daemon_kit import Flaskd
from http_client import get

EXPORTING = """
import os, socket, threading
import flaskd
from gateapp import app

@flaskd.background("export")
def export():
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)
    print("exported", flush=True)

@app.get("/export")
def begin():
    threading.Thread(target=export, name="exporter").start()
    return "begun"
"""


def exporting(flaskd: Flaskd, configuration: str = "") -> Flaskd:
    """Start flaskd, and background work that ends when the gate opens."""
    flaskd.write("exporting.py", EXPORTING)
    flaskd.write("flaskd.yaml", configuration)
    flaskd.start(app="exporting")
    export(flaskd)
    return flaskd


def export(flaskd: Flaskd) -> None:
    assert get(flaskd.url, "/export") == (200, b"begun")
    flaskd.gate.entered()


def test_a_stop_waits_for_work_in_the_background(flaskd: Flaskd) -> None:
    """Without a request in flight the stop goes on when the work has ended, and is clean."""
    exporting(flaskd, "shutdown: {exit_codes: {degraded: 9}}\n")
    (shown,) = flaskd.status()["background"]
    assert (shown["name"], shown["thread"]) == ("export", "exporter")
    assert "background: name=export age=" in flaskd.command("status")
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("background: export")
    assert flaskd.status()["state"] == "stopping"
    flaskd.gate.open()
    assert flaskd.wait() == 0
    assert "exported" in flaskd.log
    assert flaskd.record()["background"] == []


def test_a_drain_is_over_when_the_work_is(flaskd: Flaskd) -> None:
    """`drain wait` answers after the work has ended; then `status` does not show it any more."""
    exporting(flaskd)
    flaskd.until(lambda: flaskd.status()["in_flight"] == 0)  # its client may have the answer slightly earlier
    assert flaskd.command("drain").startswith("OK draining in_flight=0")
    assert flaskd.status()["state"] == "draining"
    flaskd.gate.open()
    assert flaskd.client("drain", "--wait")[0] == 0
    assert flaskd.status()["background"] == []
    assert flaskd.stop() == 0


def test_what_the_deadline_leaves_behind_is_told(flaskd: Flaskd) -> None:
    """Reply, log and record name the work, and the exit codes of flaskd and its client are not 0."""
    exporting(flaskd, "shutdown: {drain: {timeout: 100ms}, exit_codes: {degraded: 9}}\n")
    code, out, _ = flaskd.client("stop", "--wait")
    assert code == 1
    assert "background: export (for " in out
    assert flaskd.wait() == 9
    (left,) = flaskd.record()["background"]
    assert (left["name"], left["thread"]) == ("export", "exporter")
    assert "gate.recv(1)" in left["stack"]
    assert "in the background there is still: export" in flaskd.log
    assert "background: export (for " in flaskd.client("last-stop")[1]


def test_work_that_begins_while_drained_is_waited_for(flaskd: Flaskd) -> None:
    """A stop waits for work that began while flaskd was drained."""
    flaskd.write("late.py", EXPORTING + "\nimport signal\nsignal.signal(signal.SIGUSR1, lambda *_: begin())\n")
    flaskd.start(app="late")
    assert get(flaskd.url)[0] == 200
    assert flaskd.command("drain wait").startswith(("..", "OK drained completed=0"))
    flaskd.kill(signal.SIGUSR1)
    flaskd.gate.entered()
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("background: export")
    flaskd.gate.open()
    assert flaskd.wait() == 0
    assert "exported" in flaskd.log
