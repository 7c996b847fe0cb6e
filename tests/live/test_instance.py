"""The name of a flaskd instance, in all places that show it."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from http.client import HTTPConnection

import pytest
from daemon_kit import Flaskd
from http_client import get, place_of
from patience import PATIENCE
from workers_kit import code


def served_by(url: str, path: str = "/", method: str = "GET") -> tuple[int, list[str]]:
    """The status of an answer, and its X-Served-By."""
    with closing(HTTPConnection(*place_of(url), timeout=PATIENCE)) as client:
        client.request(method, path)
        answer = client.getresponse()
        return answer.status, answer.headers.get_all("X-Served-By", [])


def configure(flaskd: Flaskd, workers: int, server: str) -> None:
    """Write keys of the section server, in addition to its workers."""
    flaskd.write(
        "flaskd.yaml",
        f"server: {{workers: {workers}, max_request_header_size: 8kB{server}}}\nlog: {{format: json, access: json}}\n"
        "health: {path: /healthz}\nadmin: {listen: '127.0.0.1:0'}\n",
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_each_place_says_the_same(flaskd: Flaskd, workers: int) -> None:
    """Status, metrics and logs have the host's name, then the name of a reload; answers have it if configured."""
    configure(flaskd, workers, "")
    own = "\n@app.get('/own')\ndef own():\n    return 'own', 200, {'x-served-by': 'the app'}\n"
    code(flaskd, "one", own)
    flaskd.start(app="shop:app")
    status, url = flaskd.status(), flaskd.url
    assert status["instance"] == socket.gethostname()
    assert served_by(url) == (200, [])
    configure(flaskd, workers, ", instance: web-1, served_by: true")
    assert flaskd.command("reload config").startswith("OK reloaded")
    assert flaskd.status()["instance"] == "web-1"
    assert b'instance="web-1"' in get(f"http://{status['admin'][0]}/", "/metrics")[1]
    assert served_by(url) == (200, ["web-1"])
    assert served_by(url, "/nothing") == (404, ["web-1"])
    assert served_by(url, "/healthz", "HEAD") == (200, ["web-1"])
    assert served_by(url, "/" + "x" * 10_000) == (414, ["web-1"])
    assert served_by(url, "/own") == (200, ["the app"])
    flaskd.settle()
    assert flaskd.stop() == 0
    lines = [json.loads(line) for line in flaskd.log.splitlines()]
    accesses = [line for line in lines if "target" in line]
    assert [line["instance"] for line in accesses] == [socket.gethostname()] + ["web-1"] * 5
    others = [line.get("instance") for line in lines if "target" not in line]
    assert others[-1] == "web-1"
    assert {None, socket.gethostname(), "web-1"} >= set(others)
