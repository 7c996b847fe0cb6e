"""An app that uses up all threads or descriptors: flaskd can still be asked, drained, cleaned up and stopped."""

from __future__ import annotations

import resource
import signal

import pytest
from daemon_kit import GATE_APP, Flaskd
from http_client import get

EATER = """
held = []

@app.get("/eat")
def eat():
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return "full"
"""
ADMIN = "admin: {{listen: ['unix:{}/admin.sock']}}\n"
STEPS = "cleanup: {policies: {mark: {use: command, with: {argv: [touch, mark]}}}}\n"


@pytest.mark.parametrize("limit", [128, 1024])
@pytest.mark.parametrize("way", ["stop", "drain wait"])
def test_an_app_that_has_leaked_all_descriptors(flaskd: Flaskd, limit: int, way: str) -> None:
    """Commands, health and metrics are answered; drain and stop are quick, steps run, the record is written."""
    flaskd.write("eater.py", GATE_APP + EATER)
    flaskd.write("flaskd.yaml", ADMIN.format(flaskd.directory) + STEPS)
    flaskd.start(app="eater", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    admin = f"unix:{flaskd.directory}/admin.sock"
    held = flaskd.hold()
    assert get(flaskd.url, "/eat") == (200, b"full")
    for _ in range(30):
        assert flaskd.command("health") == "OK healthy\n"
        assert get(admin, "/livez")[0] == get(admin, "/readyz")[0] == get(admin, "/metrics")[0] == 200
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    if way == "drain wait":
        told = flaskd.command(way).splitlines()[-1]
        assert told.startswith("OK drained")
        assert flaskd.command("resume") == "OK ready\n"
        flaskd.kill(signal.SIGTERM)
    else:
        assert flaskd.command(way).startswith("OK stopping")
    assert flaskd.wait() == 0
    record = flaskd.record()
    assert record["took"] < 5
    assert (record["cut"], record["policies"]["mark"]["fate"]) == ([], "ok")
    assert (flaskd.directory / "mark").exists()


SHORT = """
import concurrent.futures, threading

@app.get("/short")
def short():
    threading.stack_size(1 << 46)  # no thread can be had: pthread_create(3) finds no room for such a stack
    return "short"

class Pool:
    closed = False
    def close(self):
        print("the pool is closed", flush=True)

pool = Pool()
"""


def test_an_app_that_has_used_up_all_threads(flaskd: Flaskd) -> None:
    """Without threads the steps run in the thread that was started early, in their order."""
    flaskd.write(
        "short.py", GATE_APP + SHORT + "import flaskd\n@flaskd.on_stop\ndef bye():\n    print('bye', flush=True)\n"
    )
    flaskd.write(
        "flaskd.yaml",
        "cleanup:\n  policies:\n"
        "    mark: {use: command, with: {argv: [touch, mark]}, phase: quiesce}\n"
        "    slow: {use: command, with: {argv: [sleep, 5]}, phase: quiesce, timeout: 300ms}\n"
        "    pool: {use: redis.close, with: {target: 'short:pool'}}\n"
        "    flush: {use: logging.flush}\n",
    )
    flaskd.start(app="short")
    held = flaskd.hold()
    assert get(flaskd.url, "/short") == (200, b"short")
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    record = flaskd.record()
    fates = {name: entry["fate"] for name, entry in record["policies"].items()}
    assert fates == {"mark": "ok", "slow": "timed_out", "pool": "ok", "flush": "ok", "bye": "ok"}
    assert (flaskd.directory / "mark").exists()
    assert "bye" in flaskd.log
    assert "the pool is closed" in flaskd.log
    assert record["took"] < 5


def test_the_pulse_goes_on_without_descriptors(flaskd: Flaskd) -> None:
    """Without descriptors the watchdog's check, which needs a connection, still works."""
    flaskd.env["WATCHDOG_USEC"] = "400000"
    flaskd.write("eater.py", GATE_APP + EATER)
    flaskd.start(app="eater", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)))
    assert get(flaskd.url, "/eat") == (200, b"full")
    flaskd.drain_messages()
    for _ in range(5):
        assert flaskd.wait_message("WATCHDOG=1")
    assert flaskd.stop() == 0
