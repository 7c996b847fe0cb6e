"""Three flaskds of two workers behind a real HAProxy, told in each way there is, and nginx: what clients see.

With $FLASKD_LONG there are 20 rolling restarts, which take longer than pytest's `faulthandler_timeout`:
`-o faulthandler_timeout=900`. benchmarks/fleet.py has the same with other servers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest
from fleet_kit import NAMES, OUT, Fleet, balancer, failed, kubelet
from systemd_kit import LONG
from workers_kit import Asking

ROLLS = 20 if LONG else 1
RACES = [("6s", 0), ("6s", 5), ("0s", 2)] if LONG else [("1500ms", 1.2), ("0s", 0.5)]
"""How long a pod announces its stop, and how many seconds after its SIGTERM the balancer learns of it."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Three servers that serve; each test leaves them like that."""
    with contextlib.ExitStack() as ends:
        yield Fleet(ends)


def test_rolling_restarts_fail_no_request(fleet: Fleet) -> None:
    """While one after the other is restarted under load, all clients get all answers in all ways."""
    with fleet.load() as accounts:
        for _ in range(ROLLS):
            for name in NAMES:
                fleet.restart(name)
    assert sum(map(failed, accounts.values())) == 0, fleet.explain(accounts)
    assert all(account["requests"] > 20 * ROLLS for account in accounts.values())


def test_a_killed_node_fails_what_it_had_in_hand(fleet: Fleet) -> None:
    """Requests that begin after the kill do not fail, and HAProxy removes the server with the next check."""
    with fleet.load() as accounts:
        dead, took = fleet.kill("two")
        fleet.start("two")
    assert not any(account["fates"]["refused"] for account in accounts.values())
    losses = [each for account in accounts.values() for each in account["losses"]]
    assert len(losses) == sum(map(failed, accounts.values()))
    assert [each for each in losses if each["at"] - each["age"] > dead] == [], fleet.explain(accounts)
    assert took < 10 * balancer.INTER / 1000  # a check may take long on a busy machine


def test_a_drain_and_a_resume_are_seen_each_in_its_way(fleet: Fleet) -> None:
    """A drained server is DRAIN, DOWN or NOLB, HAProxy uses it after a resume, and no request fails."""
    flaskd = fleet.flaskds["one"]
    with fleet.load(*balancer.CHECKED, "nginx") as accounts:
        draining = Asking(flaskd, "drain wait")
        for way, state in OUT.items():
            fleet.haproxy.wait("one", {state}, [way])
        assert "OK drained" in draining.answer()
        assert fleet.haproxy.states()["agent", "one"] in {"DRAIN", "DOWN"}  # nothing listens: the plain check fails
        assert flaskd.command("resume") == "OK ready\n"
        fleet.haproxy.wait("one", balancer.READY)
    assert sum(map(failed, accounts.values())) == 0, fleet.explain(accounts)


def test_a_reload_is_no_news_to_the_balancer(fleet: Fleet) -> None:
    """Bad code is refused, good code comes, HAProxy notices neither, and no request fails."""
    flaskd = fleet.flaskds["one"]
    with fleet.load() as accounts:
        fleet.code(flaskd, "bad", "raise RuntimeError('no database there')\n")
        assert "ERR app-failed" in flaskd.command("reload")
        fleet.code(flaskd, "two")
        assert "OK reloaded" in flaskd.command("reload")
        states = set(fleet.haproxy.states().values())
    assert states <= balancer.READY
    assert sum(map(failed, accounts.values())) == 0, fleet.explain(accounts)


def test_the_agent_takes_back_what_the_runtime_api_said(fleet: Fleet) -> None:
    """HAProxy's own drain stays without an agent, or while that is disabled; else the agent's next answer ends it."""
    haproxy = fleet.haproxy
    haproxy.put("runtime", "three", "drain")
    haproxy.put("agent", "three", "drain")
    haproxy.wait("three", {"UP"}, ["agent"])
    assert haproxy.states()["runtime", "three"] == "DRAIN"
    haproxy.put("runtime", "three", "ready")
    assert haproxy.tell("disable agent agent/three") == ""
    haproxy.put("agent", "three", "drain")
    haproxy.put("agent", "two", "drain")
    haproxy.wait("two", {"UP"}, ["agent"])  # a check later
    assert haproxy.states()["agent", "three"] == "DRAIN"
    assert haproxy.tell("enable agent agent/three") == ""
    haproxy.wait("three", balancer.READY)


def test_the_race_of_kubernetes(fleet: Fleet) -> None:
    """A pod that announces its stop for longer than the balancer takes to learn of it fails no request; others do."""
    lost = {}
    for node, (announce, delay) in zip(fleet.nodes, RACES, strict=False):
        flaskd, name = fleet.flaskds[node.name], node.name
        fleet.configure(flaskd, node, announce)
        assert flaskd.command("reload config").startswith("OK reloaded")
        assert flaskd.process is not None
        with fleet.load("kube") as accounts:
            leave = functools.partial(fleet.haproxy.put, "kube", name, "maint")
            assert not kubelet.end_pod(flaskd.process, leave, delay=delay, grace=30)
        assert flaskd.wait() == 0
        lost[announce, delay] = failed(accounts["kube"])
        fleet.start(name)
    assert all(bool(count) == (announce == "0s") for (announce, _), count in lost.items()), (lost, fleet.explain({}))
