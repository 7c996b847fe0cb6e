"""Drains of a service with workers: requests in all workers are finished, or reported with their worker."""

import http.client
import signal
import socket
import time

from daemon_kit import Flaskd
from http_client import Answer, connect, get, place_of, refused
from patience import PATIENCE
from workers_kit import hold_in_both, shown

APP = """
import os, socket, threading, time
import flaskd
from flask import Response, request
from gateapp import app

@app.get("/pid")
def pid():
    return str(os.getpid())

@app.get("/stream")
def stream():
    def ticks():
        while True:
            yield "tick\\n"
            time.sleep(0.05)
    return Response(ticks(), mimetype="text/event-stream")

@flaskd.background("export")
def export():
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)

@app.get("/export")
def begin():
    threading.Thread(target=export, name="exporter").start()
    return "begun"
"""


def start(flaskd: Flaskd, configuration: str = "", threads: str = "16") -> str:
    """Start it with two workers; returns its URL."""
    flaskd.write("drainapp.py", APP)
    flaskd.write("flaskd.yaml", configuration)
    flaskd.start("-w", "2", "-t", threads, app="drainapp")
    return flaskd.url


def read_answer(client: socket.socket, method: str = "GET") -> tuple[int, bytes, bool]:
    """The next answer on a connection: status, body, and whether the server closes the connection."""
    with http.client.HTTPResponse(client, method=method) as response:
        response.begin()
        return response.status, response.read(), response.will_close


def test_all_that_is_in_hand_is_finished(flaskd: Flaskd) -> None:
    """`drain --wait` finishes running, half-sent and pipelined requests, streams and background work of all workers."""
    url = start(flaskd, "shutdown: {drain: {stream_grace: 200ms, keepalive_grace: 5s}}\n", threads="32")
    held = hold_in_both(flaskd, url)
    assert get(url, "/export") == (200, b"begun")
    flaskd.gate.entered()
    flaskd.until(lambda: len(flaskd.status()["background"]) == 1)
    with connect(url) as half, connect(url) as lines, connect(url) as streaming, connect(url) as idle:
        half.sendall(b"POST /pid HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
        idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(idle) == (200, b"hello", False)
        streaming.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"tick" in streaming.recv(65536)
        lines.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(lines) == (200, b"hello", False)
        flaskd.until(lambda: f"in_flight: {len(held) + 1}" in flaskd.command("status"))
        assert flaskd.command("drain").startswith(f"OK draining in_flight={len(held) + 1} deadline=")
        flaskd.until(lambda: {each["state"] for each in shown(flaskd)} <= {"draining", "drained"})
        half.sendall(b"cde")
        assert read_answer(half)[0] == 405
        answer: tuple[int, bytes, bool] = (200, b"hello", False)
        while answer == (200, b"hello", False):  # the client sends this before it hears of the drain
            idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = read_answer(idle)
        assert answer == (200, b"hello", True)
        lines.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        answers = [read_answer(lines)]
        assert answers[0][:2] == (200, b"hello")
        while streaming.recv(65536):  # it ends between two chunks
            pass
        flaskd.until(lambda: refused(url))
        assert flaskd.status()["state"] == "draining"
        flaskd.gate.open()
        assert [each.result() for each in held] == [(200, b"held")] * len(held)
        code, out, _ = flaskd.client("drain", "--wait")
        assert (code, "cut=0" in out, "rejected=0" in out) == (0, True, True), out
    assert flaskd.status()["state"] == "drained"
    assert [each["state"] for each in shown(flaskd)] == ["drained", "drained"]
    assert flaskd.command("resume") == "OK ready\n"
    assert get(url) == (200, b"hello")
    assert flaskd.stop() == 0


def test_what_is_cut_is_named_with_its_worker(flaskd: Flaskd) -> None:
    """At the deadline requests that never began get 503, running ones are cut and named with their worker."""
    url = start(flaskd, "shutdown: {drain: {timeout: 1s}}\n", threads="1")
    running = [flaskd.hold(url) for _ in range(2)]
    queued = [Answer(url, "/pid") for _ in range(3)]
    flaskd.until(lambda: flaskd.status()["in_flight"] == 5)
    code, out, _ = flaskd.client("drain", "--wait")
    assert code == 1
    assert "cut=2" in out
    assert "rejected=3" in out
    for slot in (0, 1):
        assert f"in worker {slot})" in out
    assert [each.result()[0] for each in queued] == [503] * 3
    assert all(isinstance(each.result(), Exception) for each in running)
    flaskd.gate.open()
    assert flaskd.command("resume") == "OK ready\n"
    assert {get(url, "/pid")[0] for _ in range(8)} == {200}
    assert flaskd.stop() == 0


def test_resume_at_any_moment(flaskd: Flaskd) -> None:
    """A resume after, during or in the announce of a drain serves on the same port, and requests in hand go on."""
    url = start(flaskd, "shutdown: {announce: 0s}\nhealth: {path: /healthz}\n")
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    assert refused(url)
    assert flaskd.command("resume") == "OK ready\n"
    for _ in range(3):
        held = flaskd.hold(url)
        assert flaskd.command("drain").startswith("OK draining in_flight=1")
        assert flaskd.command("resume") == "OK ready\n"
        assert get(url) == (200, b"hello")
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        flaskd.settle()
    flaskd.write("flaskd.yaml", "shutdown: {announce: 15s, deadline: 60s}\nhealth: {path: /healthz}\n")
    assert flaskd.command("reload config").splitlines()[-1].startswith("OK reloaded")
    assert flaskd.command("drain").startswith("OK draining")
    flaskd.until(lambda: get(url, "/healthz") == (503, b"draining\n"))
    with connect(url) as client:  # announced: new clients are served, and their connections closed
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(client) == (200, b"hello", True)
    before = time.monotonic()
    assert flaskd.command("resume") == "OK ready\n"
    assert time.monotonic() - before < 10
    flaskd.until(lambda: get(url, "/healthz") == (200, b"ready\n"))
    held = flaskd.hold(url)
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert "OK restarted" in flaskd.command("restart")  # new workers get the present listeners
    assert get(url) == (200, b"hello")
    assert flaskd.client("stop", "--now")[0] == 0
    assert flaskd.wait() == 0


def test_resume_that_cannot_bind_stays_drained(flaskd: Flaskd) -> None:
    """If another process took the port, resume fails with a message, and can be tried again."""
    url = start(flaskd)
    _, port = place_of(url)
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    with socket.create_server(("127.0.0.1", port)):
        assert flaskd.command("resume").startswith(
            f"ERR cannot-bind cannot listen on 127.0.0.1:{port}: Address already"
        )
        assert flaskd.status()["state"] == "drained"
    assert flaskd.command("resume") == "OK ready\n"
    assert get(url) == (200, b"hello")
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    assert flaskd.stop() == 0


def test_a_drain_with_a_worker_that_leaves(flaskd: Flaskd) -> None:
    """A replaced worker that still has a request belongs to the drain, and does not block a resume."""
    url = start(flaskd, threads="1")
    held = flaskd.hold(url)
    [busy] = [each for each in shown(flaskd) if each["in_flight"]]
    assert "OK restarted" in flaskd.command(f"restart {busy['slot']}")
    assert flaskd.command("drain").startswith("OK draining in_flight=1")
    flaskd.until(lambda: refused(url))
    assert flaskd.command("resume") == "OK ready\n"
    assert get(url) == (200, b"hello")
    flaskd.until(lambda: flaskd.status()["in_flight"] == 1)  # its client may have the answer a moment earlier
    assert flaskd.command("drain").startswith("OK draining in_flight=1")
    assert flaskd.status()["state"] == "draining"
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    code, out, _ = flaskd.client("drain", "--wait")
    assert (code, "completed=1" in out) == (0, True), out
    assert flaskd.stop() == 0
    assert flaskd.record()["completed"] == 1


def test_work_in_the_background(flaskd: Flaskd) -> None:
    """A stop waits for background work; what is cut is named in log and record, and shows in the exit code."""
    url = start(flaskd, "shutdown: {drain: {timeout: 500ms}, exit_codes: {degraded: 9}}\n")
    assert get(url, "/export") == (200, b"begun")
    flaskd.gate.entered()
    code, out, _ = flaskd.client("drain", "--wait")
    assert (code, "background: export (for " in out) == (1, True), out
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait(PATIENCE) == 9
    [left] = flaskd.record()["background"]
    assert (left["name"], left["thread"]) == ("export", "exporter")
    assert "in the background there is still: export" in flaskd.log
