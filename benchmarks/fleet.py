"""Rolling restarts of three servers behind HAProxy, under load: what clients notice, with flaskd and its peers.

    python benchmarks/fleet.py [--servers flaskd,gunicorn] [--rolls 20] [--peer-rolls 3] [--clients 4] [--json FILE]

Three servers of two worker processes each serve the same app behind one HAProxy, which has one port for each way to
learn that a server leaves (`_balancer.py`). On each port there are clients that keep their connection, that make one
for each request, that request something that takes 50 ms, and that post; each pauses for some 20 ms between two
requests. Then the servers are restarted one after the other: SIGTERM, exit, start; the next one follows when HAProxy
uses the restarted one again in all ways. A roll is all three restarts. flaskd announces a stop for 1 s before it
refuses connections. Its peers have no announce, no agent, and no path that reports a stop: HAProxy checks them with
``/``. The columns of the first table:

- requests: of the clients of that way; failed: those that were not answered in full with 200;
- how: refused (no connection), rejected (503 of HAProxy: no server left), reset (the connection ended before an
  answer), cut (within one), raced (the close crossed the request on the wire), wrong (another status, such as 502);
- silence: the longest time in which no client of that way had an answer, in seconds.

The second table is the race in Kubernetes (`_kubelet.py`): HAProxy passes connections on and checks nothing, and a
server is removed 0 to 5 s after its SIGTERM, after a different time at each restart. flaskd is measured with
``announce: 6s`` and with ``announce: 0s``. Clients that still come to a peer that has exited or closed its listener are
refused; to prevent that, it would need a ``preStop`` that sleeps.

The third table is flaskd alone: a server is killed (SIGKILL to all of its processes). ``in hand`` are the failed
requests that had begun when it was dead; ``later`` are those that began after that; ``out`` is the longest time, in
milliseconds, from its death until HAProxy had removed it, with a check every 100 ms.

The exit status is 1 if flaskd failed a request in a rolling restart, in the race with its announce, or one that began
after a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import _balancer
from _balancer import READY, Balancer, BalancerError, Node
from _kubelet import end_pod
from _load import Load
from _servers import NotReadyError, Running, Served, Server, chosen, environment, free_port, table

SERVED = Served(workers=2)
FLASKD_WAYS = ("agent", "httpchk", "disable-on-404", "runtime")
PEER_WAYS = ("httpchk", "runtime")
_NAMES = ("one", "two", "three")
_GRACE = 30.0
"""Seconds within which a server must exit."""
_BETWEEN = 0.3
"""Seconds of load between two restarts."""
_OUT = frozenset({"DOWN", "NOLB", "DRAIN", "MAINT"})


class Fleet:
    """Three servers behind HAProxy, while it is open as a context manager."""

    def __init__(self, server: Server, ways: Sequence[str], announce: float) -> None:
        self.server = server
        self.is_flaskd = server.name == "flaskd"
        self._announce = announce
        self.nodes = [Node(name, free_port(), free_port()) for name in _NAMES]
        self.running: dict[str, Running] = {}
        self.ends = contextlib.ExitStack()
        self._directory = Path(self.ends.enter_context(tempfile.TemporaryDirectory(prefix="bench-fleet-")))
        health = "/healthz" if self.is_flaskd else "/"
        self.balancer = Balancer(self._directory, self.nodes, {way: free_port() for way in ways}, health=health)

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                self.start(node)
            self.ends.enter_context(self.balancer)
            for node in self.nodes:
                self.balancer.wait(node.name, READY)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.close()
        for each in self.running.values():
            each.close()

    def start(self, node: Node) -> None:
        """Start a server, and wait until it is ready."""
        config = (
            f"server: {{instance: {node.name}}}\nadmin: {{agent: '127.0.0.1:{node.agent}'}}\n"
            "health: {path: /healthz, unready_status: 404}\n"
            f"shutdown: {{announce: {self._announce:g}s, deadline: 25s}}\n"
        )
        each = self.running[node.name] = Running(self.server, node.port, served=SERVED, config=config)
        each.wait_ready()

    def restart(self, node: Node) -> None:
        """Stop one and start it; returns when HAProxy uses it again; the way `runtime` is told before and after."""
        told = "runtime" in self.balancer.ports
        if told:
            self.balancer.put("runtime", node.name, "drain")
            self.balancer.wait_idle("runtime", node.name)
        old = self.running[node.name]
        old.wait_exit(old.terminate(), _GRACE)
        old.close()
        self.start(node)
        if told:
            self.balancer.put("runtime", node.name, "ready")
        self.balancer.wait(node.name, READY)

    def race(self, node: Node, delay: float) -> None:
        """Restart one as Kubernetes does: it is removed from the balancer `delay` seconds after its SIGTERM."""
        old = self.running[node.name]
        end_pod(old.process, lambda: self.balancer.put("kube", node.name, "maint"), delay=delay, grace=_GRACE)
        old.close()
        self.start(node)
        self.balancer.put("kube", node.name, "ready")

    def kill(self, node: Node) -> tuple[float, float]:
        """Kill one and start it again; gives the moment at which it was dead, and how long HAProxy took to notice."""
        old = self.running[node.name]
        os.killpg(old.process.pid, signal.SIGKILL)
        old.process.wait()
        _balancer.wait_refused(node.port)
        dead = time.time()
        took = self.balancer.wait(node.name, _OUT)
        old.close()
        self.start(node)
        self.balancer.wait(node.name, READY)
        return dead, took


@contextlib.contextmanager
def loads(fleet: Fleet, clients: int) -> Iterator[dict[str, Load]]:
    """Clients of each way."""
    with contextlib.ExitStack() as stack:
        found = {}
        for way, port in fleet.balancer.ports.items():
            found[way] = stack.enter_context(contextlib.closing(Load(port, "paced", clients)))
            found[way].wait_begun()
        yield found


def failed(account: dict[str, Any]) -> int:
    """How many requests were not answered in full with 200."""
    return sum(count for fate, count in account["fates"].items() if fate != "answered")


def how(account: dict[str, Any]) -> str:
    """What became of those."""
    said = [f"{count} {fate}" for fate, count in account["fates"].items() if count and fate != "answered"]
    return ", ".join(said) or "-"


def roll(server: Server, rolls: int, clients: int) -> dict[str, Any]:
    """Rolling restarts; the account of each way."""
    ways = FLASKD_WAYS if server.name == "flaskd" else PEER_WAYS
    with Fleet(server, ways, 1.0) as fleet, loads(fleet, clients) as found:
        for _ in range(rolls):
            for node in fleet.nodes:
                time.sleep(_BETWEEN)
                fleet.restart(node)
        time.sleep(_BETWEEN)
        return {way: each.finish() for way, each in found.items()}


def race(server: Server, announce: float, restarts: int, clients: int) -> dict[str, Any]:
    """Restarts as Kubernetes does them; the account."""
    with Fleet(server, ["kube"], announce) as fleet, loads(fleet, clients) as found:
        for number in range(restarts):
            time.sleep(_BETWEEN)
            fleet.race(fleet.nodes[number % 3], delay=5.0 * number / max(1, restarts - 1))
        time.sleep(_BETWEEN)
        return found["kube"].finish()


def kill(server: Server, kills: int, clients: int) -> dict[str, Any]:
    """Kills: how many requests failed that had begun before and after, and how long HAProxy took."""
    with Fleet(server, FLASKD_WAYS, 1.0) as fleet, loads(fleet, clients) as found:
        deaths = []
        for number in range(kills):
            time.sleep(_BETWEEN)
            deaths.append(fleet.kill(fleet.nodes[number % 3]))
        time.sleep(_BETWEEN)
        accounts = [each.finish() for each in found.values()]
    losses = [each for account in accounts for each in account["losses"]]
    begun = [loss["at"] - loss["age"] for loss in losses]
    in_hand = sum(any(-_GRACE < moment - dead <= 0 for dead, _ in deaths) for moment in begun)
    # A refused connection is no loss with a moment, and always began after the kill.
    later = sum(map(failed, accounts)) - in_hand
    return {
        "kills": kills,
        "requests": sum(account["requests"] for account in accounts),
        "in hand": in_hand,
        "later": later,
        "out": [round(took * 1000) for _, took in deaths],
        "details": dict(sum((Counter(account["details"]) for account in accounts), Counter())),
    }


def _run(options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {"rolls": {}, "race": {}, "kill": {}}
    for server in options.servers:
        flaskd = server.name == "flaskd"
        try:
            if "roll" in options.only:
                rolls = options.rolls if flaskd else options.peer_rolls
                figures["rolls"][server.name] = {"rolls": rolls, "ways": roll(server, rolls, options.clients)}
            if "race" in options.only:
                for announce in (6.0, 0.0) if flaskd else (0.0,):
                    name = f"flaskd, announce: {announce:g}s" if flaskd else server.name
                    figures["race"][name] = race(server, announce, options.races, options.clients)
            if "kill" in options.only and flaskd:
                figures["kill"][server.name] = kill(server, options.kills, options.clients)
        except (NotReadyError, BalancerError) as error:
            print(f"{server.name} is left out: {error}")
    return figures


def faults_of(figures: dict[str, Any]) -> list[str]:
    """The promises that flaskd has not kept."""
    ways = figures["rolls"].get("flaskd", {}).get("ways", {})
    found = [f"{way}: {failed(account)} failed" for way, account in ways.items() if failed(account)]
    raced = figures["race"].get("flaskd, announce: 6s")
    found += [f"the race, announced: {failed(raced)} failed"] if raced and failed(raced) else []
    killed = figures["kill"].get("flaskd")
    return found + ([f"{killed['later']} failed that began after a kill"] if killed and killed["later"] > 0 else [])


def _print(figures: dict[str, Any], options: argparse.Namespace) -> None:
    if figures["rolls"]:
        rows = [
            [f"{name}, {way}", each["rolls"], account["requests"], failed(account), how(account), account["silence"]]
            for name, each in figures["rolls"].items()
            for way, account in each["ways"].items()
        ]
        _show("rolling restarts", ["rolls", "requests", "failed", "how", "silence"], rows)
    if figures["race"]:
        rows = [
            [name, options.races, account["requests"], failed(account), how(account)]
            for name, account in figures["race"].items()
        ]
        _show("the race of Kubernetes", ["restarts", "requests", "failed", "how"], rows)
    rows = [
        [name, each["kills"], each["requests"], each["in hand"], each["later"], max(each["out"])]
        for name, each in figures["kill"].items()
    ]
    if rows:
        _show("kills", ["kills", "requests", "in hand", "later", "out"], rows)


def _show(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(table(title, ["", *headers], [list(map(str, row)) for row in rows]), "\n", flush=True)


def main() -> int:
    """Measure, print, and return 1 if flaskd broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default="flaskd,gunicorn,granian,uvicorn,waitress-serve")
    parser.add_argument("--only", default="roll,race,kill", help="the tables: %(default)s")
    parser.add_argument("--rolls", type=int, default=20, help="rolling restarts of flaskd (%(default)s)")
    parser.add_argument("--peer-rolls", type=int, default=3, help="rolling restarts of each other server (%(default)s)")
    parser.add_argument("--races", type=int, default=9, help="restarts in Kubernetes' race (%(default)s)")
    parser.add_argument("--kills", type=int, default=9, help="kills (%(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="clients of each way (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the accounts there, too")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - {"roll", "race", "kill"}:
        parser.error(f"no table {min(unknown)!r}: choose from roll, race, kill")
    if lacks := _balancer.missing():
        raise SystemExit(f"{', '.join(lacks)} is not installed")
    options.servers = chosen(options.servers)
    print(f"{environment()}, {_balancer.version()}\n", flush=True)
    figures = _run(options)
    _print(figures, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="ascii")
    faults = faults_of(figures)
    for each in faults:
        print(f"flaskd: {each}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
