"""Hanging requests and growing queues in real flaskds: what is refused, what goes on, and what is reported."""

from __future__ import annotations

import signal

from daemon_kit import Flaskd
from http_client import Answer, get
from patience import until
from workers_kit import shown, start

CONFIG = "server: {threads: 1, request_timeout: 500ms, request_timeouts: {/held/*: null}}\nhealth: {path: /healthz}\n"


def hang(flaskd: Flaskd, url: str) -> tuple[int, bytes]:
    """Make a request that is given up; returns its answer."""
    answer = Answer(url, "/hold")
    flaskd.gate.entered()
    return answer.result()


def test_a_request_that_hangs(flaskd: Flaskd) -> None:
    """Its client gets 504, the next one is served, status and top show it, and the stop does not wait."""
    flaskd.write("flaskd.yaml", CONFIG)
    url = flaskd.start().url
    assert hang(flaskd, url)[0] == 504
    assert get(url) == (200, b"hello")
    flaskd.until(lambda: flaskd.status()["limited"] == {"request_timeout": 1})
    code, out, _ = flaskd.client("status")
    assert (code, "1 for request_timeout" in out) == (0, True)
    code, out, _ = flaskd.client("top", "--count", "1")
    assert (code, "1 for request_timeout" in out) == (0, True)
    code, out, _ = flaskd.client("threads")
    assert "GET /hold" in out
    assert "it is over, its thread goes on" in out
    assert "gate.recv(1)" in flaskd.log
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait(5) == 0
    assert flaskd.record()["cut"] == []


def test_too_many_that_hang(flaskd: Flaskd) -> None:
    """While threads are missing, readiness says no and why; when they are back, it says ready."""
    flaskd.write("flaskd.yaml", CONFIG)
    url = flaskd.start().url
    assert [hang(flaskd, url)[0] for _ in range(2)] == [504, 504]
    flaskd.until(lambda: get(url, "/healthz")[0] == 503)
    code, _, err = flaskd.client("ready")
    assert code != 0
    assert "1 of its threads is lost in requests that hang" in err
    assert "1 of its threads is lost" in flaskd.command("status")
    flaskd.gate.open()
    flaskd.until(lambda: get(url, "/healthz")[0] == 200)
    assert get(url) == (200, b"hello")
    assert flaskd.stop() == 0


def test_a_worker_that_has_lost_a_thread_is_replaced(flaskd: Flaskd) -> None:
    """The new worker is ready first, other requests of the old one are finished, and the log has the reason."""
    config = "server: {threads: 2, request_timeouts: {/hold: 500ms}}\n"
    url = start(flaskd, config=config).url
    before = {each["slot"]: each["pid"] for each in shown(flaskd)}
    assert hang(flaskd, url)[0] == 504

    def replaced() -> bool:
        now = [(each["slot"], each["pid"]) for each in shown(flaskd)]
        return len(now) == 2 and len(set(now) - set(before.items())) == 1

    until(replaced, lambda: flaskd.log, patience=60)
    assert "1 of its threads hangs in requests that were given up" in flaskd.log
    assert {get(url)[0] for _ in range(20)} == {200}
    assert flaskd.stop() == 0
    assert flaskd.record()["cut"] == []
