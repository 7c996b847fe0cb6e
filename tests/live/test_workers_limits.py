"""Workers that reach a limit of `pool`: they are replaced without loss, and a limit that is too low does no harm."""

from __future__ import annotations

from daemon_kit import Flaskd
from http_client import get
from workers_kit import Clients, asked, code, shown, start, workers

GROWS = """
kept = []

@app.get("/grow")
def grow():
    kept.append(b"x" * (200 << 20))
    return str(os.getpid())
"""


def recycled(flaskd: Flaskd, limit: str) -> int:
    """How many workers have reached a limit and were replaced."""
    return int(asked(flaskd, "workers")["recycled"][limit])


def test_max_requests_loses_nothing(flaskd: Flaskd) -> None:
    """Under load workers are replaced; a long request is finished in the worker that stops."""
    start(flaskd, config="pool: {max_requests: 100}\n")
    held = flaskd.hold(flaskd.url)
    with Clients(flaskd.url) as clients:
        flaskd.until(lambda: recycled(flaskd, "max_requests") >= 2)
    assert clients.lost == []
    assert "leaving" in [each["state"] for each in shown(flaskd)]
    flaskd.gate.open()
    assert held.result() == (200, b"held by one")
    assert "requests (pool.max_requests is 100; its own limit" in flaskd.log
    assert "recycled (" in flaskd.client("status")[1]
    assert flaskd.stop() == 0


def test_max_memory_with_a_template(flaskd: Flaskd) -> None:
    """The worker that has grown is replaced by one that is forked from the template; the other one stays."""
    code(flaskd, "one", GROWS)
    flaskd.write("flaskd.yaml", "pool: {preload: true, max_memory: 150MiB}\n")
    flaskd.start("-w", "2", app="shop:app")
    before = dict(workers(flaskd))
    grown = int(get(flaskd.url, "/grow")[1])
    flaskd.until(lambda: recycled(flaskd, "max_memory") == 1)
    after = dict(workers(flaskd))
    assert grown not in after.values()
    assert sum(before[slot] == after[slot] for slot in (0, 1)) == 1
    assert "(pool.max_memory is 150 MiB; its own limit" in flaskd.log
    assert flaskd.stop() == 0


def test_a_limit_below_what_the_app_needs(flaskd: Flaskd) -> None:
    """Log and status name the limit, and workers are replaced more and more rarely; the service serves."""
    start(flaskd, config="pool: {max_memory: 10MiB}\n")
    with Clients(flaskd.url, 1) as clients:
        flaskd.until(lambda: recycled(flaskd, "max_memory") == 2)
    assert clients.lost == []
    said = asked(flaskd, "status")["trouble"]
    assert "reached pool.max_memory (10MiB)" in said
    assert said in flaskd.log
    assert said in flaskd.client("workers")[1]
    assert "The next worker is replaced in 2s at the earliest" in flaskd.log
    assert flaskd.stop() == 0
