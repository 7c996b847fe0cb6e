"""A daemon that stops by itself when it is not used, with real processes."""

import http.client
import threading
import time

from daemon_kit import Flaskd
from http_client import get
from patience import PATIENCE

CONFIG = "shutdown: {{idle: {{after: {after}, ignore: [/, '/poll*']}}}}\nhealth: {{path: /healthz}}\n"

STREAMING = """
from flask import Response, request
from gateapp import app

@app.get("/poll/stream")
def stream():
    draining = request.environ["flaskd.draining"]

    def ticks():
        while not draining.wait(0.05):
            yield "data: tick\\n\\n"
    return Response(ticks(), mimetype="text/event-stream")
"""


def test_it_stops_when_nobody_asks(flaskd: Flaskd) -> None:
    """Without requests it stops like other stops: announced, cleaned up, recorded with its reason, exit code 0."""
    policy = "cleanup: {policies: {bye: {use: command, with: {argv: ['true']}, when: {reason: idle}}}}\n"
    flaskd.write("flaskd.yaml", CONFIG.format(after="300ms") + policy)
    flaskd.start()
    assert "idle: no request for 300ms" in flaskd.wait_message("STOPPING=1")
    assert flaskd.wait() == 0
    assert flaskd.record()["reason"] == "idle: no request for 300ms"
    assert flaskd.record()["policies"]["bye"]["fate"] == "ok"


def test_an_open_tab_does_not_keep_it(flaskd: Flaskd) -> None:
    """A tab that polls ignored paths and the health path, and holds an ignored stream open, does not prevent the stop."""
    flaskd.write("flaskd.yaml", CONFIG.format(after="1s"))
    flaskd.write("streaming.py", STREAMING)
    flaskd.start(app="streaming")
    url, ended = flaskd.url, threading.Event()
    polls = []

    def poll() -> None:
        while not ended.wait(0.02):
            try:
                polls.extend(get(url, path)[0] for path in ("/", "/poll/x", "/healthz"))
            except (OSError, http.client.HTTPException):  # flaskd has stopped
                return

    tab = threading.Thread(target=poll)
    stream = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=PATIENCE)
    stream.request("GET", "/poll/stream")
    assert stream.getresponse().read(4) == b"data"
    tab.start()
    try:
        flaskd.wait_message("STOPPING=1")
        assert flaskd.wait() == 0
    finally:
        ended.set()
        tab.join()
        stream.close()
    assert len(polls) > 3
    assert flaskd.record()["reason"].startswith("idle: ")
    assert flaskd.record()["cut"] == []


def test_a_request_keeps_it(flaskd: Flaskd) -> None:
    """While a request runs flaskd does not stop; the time begins after its answer."""
    flaskd.write("flaskd.yaml", CONFIG.format(after="1h"))
    flaskd.start()
    held = flaskd.hold()
    flaskd.write("flaskd.yaml", CONFIG.format(after="200ms"))
    assert flaskd.command("reload").startswith("OK reloaded")
    for _ in range(3):  # commands on the control socket do not count
        status = flaskd.status()
        assert (status["state"], status["idle_for"]) == ("ready", 0.0)
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert flaskd.record()["reason"] == "idle: no request for 200ms"


def test_a_drained_one_waits_for_its_operator(flaskd: Flaskd) -> None:
    """A drained flaskd does not stop by itself; after a resume the time begins again."""
    flaskd.write("flaskd.yaml", CONFIG.format(after="1s"))
    flaskd.start()
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    drained = time.monotonic()
    flaskd.until(lambda: time.monotonic() - drained > 1.5)
    status = flaskd.status()
    assert (status["state"], status["idle_stop_at"]) == ("drained", None)
    resumed = time.monotonic()
    assert flaskd.command("resume").startswith("OK ready")
    assert flaskd.wait() == 0
    assert time.monotonic() - resumed >= 1.0
    assert flaskd.record()["reason"].startswith("idle: ")


def test_status_says_when(flaskd: Flaskd) -> None:
    """The status has the seconds without requests, and the moment of the stop; a reload switches it off and on."""
    flaskd.write("flaskd.yaml", CONFIG.format(after="1h"))
    flaskd.start()
    status = flaskd.status()
    assert 0.0 < status["idle_for"] < PATIENCE
    assert time.strptime(status["idle_stop_at"][:19], "%Y-%m-%dT%H:%M:%S") > time.gmtime(time.time() + 3000)
    flaskd.write("flaskd.yaml", "version: 1\n")
    assert flaskd.command("reload").startswith("OK reloaded")
    status = flaskd.status()
    assert (status["idle_for"], status["idle_stop_at"]) == (None, None)
    assert flaskd.stop() == 0
