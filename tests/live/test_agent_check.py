"""HAProxy's agent-check, answered by a real daemon without workers, and by a supervisor."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from daemon_kit import Flaskd, inherit
from fleet_kit import agent_says
from http_client import ask, outcome
from systemd_kit import free_port
from workers_kit import WAITS, code, worker_pids

BOTH = pytest.mark.parametrize("workers", [0, 2])


def configure(flaskd: Flaskd, workers: int, more: str = "") -> str:
    """Write an app and a configuration with an agent; gives the agent's address."""
    address = f"127.0.0.1:{free_port()}"
    code(flaskd, "one")
    flaskd.write("flaskd.yaml", f"server: {{workers: {workers}}}\nadmin: {{agent: '{address}'}}\n{more}")
    return address


@BOTH
def test_it_answers_through_the_whole_life(flaskd: Flaskd, workers: int) -> None:
    """The agent says down during the import, ready, drain while draining, drained and stopping, and ready after resume."""
    address = configure(flaskd, workers)
    code(flaskd, "one", WAITS)
    flaskd.launch(app="shop:app")
    for _ in range(workers or 1):
        flaskd.gate.entered()
    assert agent_says(address) == "down#starting"
    flaskd.gate.open()
    flaskd.wait_message("READY=1")
    assert agent_says(address) == "up ready"
    status = flaskd.status()
    assert status["agent"] == [address]
    assert f"agent: {address}" in flaskd.log
    assert f"agent        {address}" in flaskd.client("status")[1]
    held = flaskd.hold(status["url"])
    assert flaskd.command("drain").startswith("OK draining")
    assert agent_says(address) == "drain"
    flaskd.gate.open()
    assert held.result() == (200, b"held by one")
    flaskd.until(lambda: flaskd.status()["state"] == "drained")
    assert agent_says(address) == "drain"
    assert flaskd.command("resume") == "OK ready\n"
    assert agent_says(address) == "up ready"
    held = flaskd.hold(status["url"])
    assert flaskd.command("stop").startswith("OK stopping")
    assert agent_says(address) == "drain"
    flaskd.gate.open()
    assert held.result() == (200, b"held by one")
    assert flaskd.wait() == 0
    assert agent_says(address) == ""


@BOTH
def test_readiness_says_no_first_and_the_gate_closes_last(flaskd: Flaskd, workers: int) -> None:
    """In a stop the agent, /readyz and health.path fail at once, and clients are served until the announce's end."""
    admin = f"127.0.0.1:{free_port()}"
    more = f"  listen: '{admin}'\nhealth: {{path: /healthz}}\nshutdown: {{announce: 700ms}}\n"
    address = configure(flaskd, workers)
    flaskd.write("flaskd.yaml", f"server: {{workers: {workers}}}\nadmin:\n  agent: '{address}'\n{more}")
    flaskd.start(app="shop:app")
    url = flaskd.url
    assert agent_says(address) == "up ready"
    began = time.monotonic()
    assert flaskd.command("stop").startswith("OK stopping")
    assert agent_says(address) == "drain"
    assert ask(admin, "/readyz") == (503, b"stopping\n")
    flaskd.until(lambda: ask(url, "/healthz")[0] == 503)  # workers learn of it a moment later
    served = 0
    while not isinstance(answer := outcome(url), ConnectionRefusedError):
        assert answer == (200, b"one"), "a request was lost while it was announced"
        served, ended = served + 1, time.monotonic()
    assert served
    assert ended - began > 0.6
    assert flaskd.wait() == 0


def test_it_says_why_no_worker_serves(flaskd: Flaskd) -> None:
    """When all workers have died the agent says down with the reason, and up again when one is ready."""
    address = configure(flaskd, 2)
    flaskd.start(app="shop:app")
    code(flaskd, "one", WAITS)
    for pid in worker_pids(flaskd):
        os.kill(pid, signal.SIGKILL)
    flaskd.until(lambda: agent_says(address) == "down#no worker is ready")
    flaskd.gate.entered()
    flaskd.gate.open()
    flaskd.until(lambda: agent_says(address) == "up ready")
    flaskd.gate.entered()
    flaskd.gate.open()
    assert flaskd.stop() == 0


def test_it_answers_while_the_app_computes(flaskd: Flaskd) -> None:
    """With all threads computing it answers within a second, half of HAProxy's time for a check."""
    address = configure(flaskd, 0)
    spin = "\n@app.get('/spin')\ndef spin():\n    import time\n    until = time.monotonic() + 2\n"
    code(flaskd, "one", f"{spin}    while time.monotonic() < until:\n        pass\n    return 'spun'\n")
    flaskd.start(app="shop:app")
    host, port = flaskd.url.removeprefix("http://").rstrip("/").split(":")
    busy = [socket.create_connection((host, int(port))) for _ in range(4)]
    for each in busy:
        each.sendall(b"GET /spin HTTP/1.1\r\nHost: localhost\r\n\r\n")
    flaskd.until(lambda: "in_flight: 4" in flaskd.command("status").splitlines())
    took = []
    for _ in range(10):
        began = time.monotonic()
        assert agent_says(address) == "up ready"
        took.append(time.monotonic() - began)
    assert max(took) < 1
    for each in busy:
        each.close()
    assert flaskd.stop() == 0


def test_a_socket_that_was_passed_as_agent(flaskd: Flaskd) -> None:
    """LISTEN_FDNAMES=agent makes an agent without configuration; the app is not served there."""
    with socket.create_server(("127.0.0.1", 0)) as app, socket.create_server(("127.0.0.1", 0)) as passed:
        inherit(flaskd, app, others=[passed], name="http:agent")
        where = f"127.0.0.1:{passed.getsockname()[1]}"
        assert agent_says(where) == "up ready"
        assert flaskd.status()["agent"] == [where]
        assert flaskd.status()["listen"] == [f"127.0.0.1:{app.getsockname()[1]}"]
    assert flaskd.stop() == 0
