"""How much slow and silent clients slow down honest ones, for flaskd and its peers.

    python benchmarks/attacks.py [--servers flaskd,gunicorn] [--only heads,bodies] [--workers N] [--runs 3] [--quick]
                                 [--json FILE]

Four honest clients send one request after the other, on one connection each. Meanwhile attackers, in a process of their
own, hold other connections: `_attackers.py` says how many, and what they send. A connection that the server ends they
make again. The honest clients are measured when the attack is under way and the server has finished its first work on
it. A figure is their requests a second, divided by what they had alone right before and right after, with the same
server process; the median of the runs. Each run and attack has a server process of its own, and the servers take turns.
In brackets are the attackers' connections that the server has ended.

The exit status is 1 if flaskd misses a goal: the honest clients keep at least nine tenths of their speed alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _attackers import ATTACKS, Attack, Attackers
from _servers import (
    HERE,
    HOST,
    NotReadyError,
    Running,
    Served,
    Server,
    chosen,
    environment,
    free_port,
    median,
    open_many_files,
    running,
    table,
    take_workers,
)

LEAST = 0.9
"""The part of their speed alone that honest clients keep."""
_HONEST = 4
_BEGUN = 1.0
"""Seconds after which an attack is under way."""
_QUIET = 0.2
"""The part of a core that a server uses at most when it has finished its first work on the attack."""
_QUIET_WITHIN = 15.0
"""Seconds within which it must have finished that."""
_LEAVING = 10.0
"""Seconds within which a server must have closed the connections of attackers that have left."""


@dataclass(frozen=True)
class Sample:
    """Requests a second of the honest clients before, during and after an attack; and the ended connections."""

    before: float
    during: float
    after: float
    ended: int

    @property
    def share(self) -> float:
        """The part of their speed alone; for a server that does not recover, of their speed before."""
        alone = (self.before + self.after) / 2 if self.after else self.before
        return self.during / alone


def measure(server: Server, attack: Attack, options: argparse.Namespace) -> Sample:
    """Start a server, attack it, and measure honest clients; raises NotReadyError if they get nothing alone."""
    with running(server, free_port(), served=Served(workers=options.workers)) as each:
        _rate(each, options.seconds / 4)
        before = _rate(each, options.seconds)
        if not before:
            raise NotReadyError(f"{server.name} answered nothing")
        try:
            with Attackers((HOST, each.port), attack) as attackers:
                _wait_quiet(each, options.begun)
                during = _rate(each, options.seconds)
        except ConnectionError as error:
            raise NotReadyError(f"{server.name}: {error}") from error
        until = time.monotonic() + _LEAVING
        while each.connections() and time.monotonic() < until:
            time.sleep(0.05)
        return Sample(before, during, _rate(each, options.seconds), attackers.ended)


def _wait_quiet(server: Running, begun: float) -> None:
    """Wait until an attack is under way, and the server has finished its first work on it."""
    until, used = time.monotonic() + _QUIET_WITHIN, float("inf")
    while used > _QUIET * begun and time.monotonic() < until:
        before = server.cpu()
        time.sleep(begun)
        used = server.cpu() - before


def _rate(server: Running, seconds: float) -> float:
    orders = {"host": HOST, "port": server.port, "target": "/", "body": 0, "connections": _HONEST, "seconds": seconds}
    argv = [sys.executable, str(HERE / "_wire.py"), json.dumps(orders)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotReadyError(f"{server.name} cannot be asked: {done.stderr.strip().splitlines()[-1:]}")
    counted = json.loads(done.stdout)
    return float(counted["requests"] / counted["seconds"])


class Results:
    """The samples by attack and server, and the measurements that failed."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], list[Sample]] = {}
        self.errors: dict[str, str] = {}

    def share(self, attack: str, server: str) -> float:
        """The median of the runs."""
        return round(median([each.share for each in self.samples.get((attack, server), [])]), 2)

    def goals(self, attacks: list[Attack]) -> list[dict[str, Any]]:
        """The goals; a goal that could not be measured is missed."""
        shares = {each.text: self.share(each.name, "flaskd") for each in attacks}
        return [
            {"goal": f"{text}: share of the speed alone", "least": LEAST, "figure": share, "met": share >= LEAST}
            for text, share in shares.items()
        ]

    def cell(self, attack: str, server: str) -> str:
        """The text of a cell of the table."""
        those = self.samples.get((attack, server))
        if not those:
            return "-"
        return f"{self.share(attack, server):.2f} ({max(each.ended for each in those)})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.name for each in ATTACKS]
    parser.add_argument("--servers", default="flaskd,waitress-serve,gunicorn", help="separated by commas (%(default)s)")
    parser.add_argument("--only", default=",".join(names), help="attacks, separated by commas (%(default)s)")
    take_workers(parser)
    parser.add_argument("--runs", type=int, default=3, help="times that everything is measured (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short run: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(names):
        parser.error(f"no attack {min(unknown)!r}: choose from {', '.join(names)}")
    options.begun = _BEGUN
    if options.quick:
        options.runs, options.seconds, options.begun = 1, 0.3, 0.2
    return options


def main() -> int:
    """Measure, print, and return 1 if flaskd missed a goal."""
    options = _options()
    open_many_files()
    servers = chosen(options.servers)
    attacks = [each for each in ATTACKS if each.name in options.only.split(",")]
    print(f"{environment()}\n", flush=True)
    results = Results()
    for run in range(options.runs):
        for attack in attacks:
            for server in servers[run % len(servers) :] + servers[: run % len(servers)]:
                try:
                    sample = measure(server, attack, options)
                    results.samples.setdefault((attack.name, server.name), []).append(sample)
                except NotReadyError as error:
                    results.errors[f"{attack.name}, {server.name}"] = str(error)
    names = [each.name for each in servers]
    rows = [[attack.text, *[results.cell(attack.name, name) for name in names]] for attack in attacks]
    title = f"## Requests of {_HONEST} honest clients, as a share of those without the attack, median of {options.runs}"
    print(table(title, ["attack", *names], rows))
    for where, reason in results.errors.items():
        print(f"{where}: {reason}")
    goals = results.goals(attacks) if "flaskd" in names else []
    missed = [each for each in goals if not each["met"]]
    for each in missed:
        print(f"flaskd misses: {each['goal']}: {each['figure']:.2f}")
    if not missed:
        print("flaskd meets every goal")
    if options.json:
        samples = [
            {
                "attack": attack,
                "server": server,
                "share": results.share(attack, server),
                "runs": list(map(asdict, those)),
            }
            for (attack, server), those in results.samples.items()
        ]
        written = {"environment": environment(), "attacks": samples, "goals": goals, "errors": results.errors}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
