"""How fast the demo app is served, flaskd beside its peers, relative to waitress-serve.

    python benchmarks/speed.py [--servers flaskd,waitress-serve] [--only 16,up,idle] [--runs 5] [--quick] [--json FILE]

In each run all servers are started, and take turns under each load, so that a pair of figures is taken seconds apart.
The tables have a row for each load, the goal that flaskd is held to, and a column for each server:

- requests a second, and in brackets the ratio to waitress-serve: medians over the runs, the ratio that of the pairs;
- CPU time for a request, in microseconds of all of the server's processes, with the ratio likewise;
- 5000 connections that say nothing: how long until all are accepted, then the throughput of one busy connection beside
  them, relative to what it was alone.

The loads are so many busy connections that get a greeting of some bytes, or 16 that get (``down``) or send (``up``)
256 KiB. `wrk` is the client where it is installed, else `_wire.py`. ``-`` is a server that cannot do it, with the
reason below. The exit status is 1 when flaskd misses a goal. Ratios are rounded to two places before they are judged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _servers import (
    HERE,
    HOST,
    SERVERS,
    NotReadyError,
    Running,
    chosen,
    environment,
    free_port,
    median,
    open_many_files,
    running,
    table,
)
from _wire import Crowd

_BODY = 256 * 1024
_BASE = "waitress-serve"
_ACCEPTED_WITHIN = 45.0
_WARM_UP = 0.3
"""Seconds."""


@dataclass(frozen=True)
class Load:
    """So many busy connections, asking for `target`, with a body of so many bytes."""

    name: str
    text: str
    connections: int
    target: str = "/"
    body: int = 0


LOADS = [
    Load("1", "1 connection", 1),
    Load("16", "16 connections", 16),
    Load("64", "64 connections", 64),
    Load("256", "256 connections", 256),
    Load("down", "256 KiB down, 16 connections", 16, f"/big?kib={_BODY // 1024}"),
    Load("up", "256 KiB up, 16 connections", 16, "/upload", _BODY),
]
NAMES = [*[load.name for load in LOADS], "idle"]


@dataclass
class Sample:
    """What one load gave: `cpu` is seconds of the server's."""

    requests: int
    failed: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    @property
    def cpu_each(self) -> float:
        return self.cpu / self.requests if self.requests else float("nan")


@dataclass
class Beside:
    """One busy connection alone and beside silent ones, and the seconds in which those were accepted."""

    accepted: float
    alone: float
    beside: float

    @property
    def ratio(self) -> float:
        return self.beside / self.alone


@dataclass
class Results:
    """Everything that was measured, by load and server, one entry a run; and what could not be."""

    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    beside: dict[str, list[Beside]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def figure(self, load: str, server: str, what: Callable[[Sample], float]) -> float:
        return median([what(each) for each in self.samples.get((load, server), [])])

    def ratio(self, load: str, server: str, what: Callable[[Sample], float]) -> float:
        """The median of the ratios to waitress-serve in the same run."""
        pairs = zip(self.samples.get((load, server), []), self.samples.get((load, _BASE), []), strict=False)
        return round(median([what(ours) / what(theirs) for ours, theirs in pairs if what(theirs)]), 2)


def _wrk(port: int, load: Load, seconds: float) -> dict[str, Any]:
    argv = ["wrk", "-t1", f"-c{load.connections}", f"-d{max(1, round(seconds))}s"]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        if load.body:
            script.write(f'wrk.method = "POST"\nwrk.body = string.rep("x", {load.body})\n')
            script.flush()
            argv += ["-s", script.name]
        url = f"http://{HOST}:{port}{load.target}"
        out = subprocess.run([*argv, url], capture_output=True, text=True, check=True).stdout
    counted = re.search(r"(\d+) requests in ", out)
    rate = re.search(r"Requests/sec: +([0-9.]+)", out)
    if counted is None or rate is None:
        raise ValueError(f"cannot read what wrk says: {out!r}")
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    broken = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
    failures = (int(failed[1]) if failed else 0) + (sum(map(int, broken.groups())) if broken else 0)
    # It is some milliseconds late at its end, and says in its rate by how much.
    took = int(counted[1]) / float(rate[1]) if float(rate[1]) else seconds
    return {"requests": int(counted[1]), "failed": failures, "seconds": took}


def _own(port: int, load: Load, seconds: float) -> dict[str, Any]:
    orders = {"host": HOST, "port": port, "target": load.target, "body": load.body}
    orders |= {"connections": load.connections, "seconds": seconds}
    argv = [sys.executable, str(HERE / "_wire.py"), json.dumps(orders)]
    counted: dict[str, Any] = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    return counted


CLIENTS = {"wrk": _wrk, "own": _own}


def sample(server: Running, load: Load, options: argparse.Namespace, seconds: float | None = None) -> Sample:
    """Put a server under a load for some seconds; raises NotReadyError when that cannot be done."""
    before = server.cpu()
    try:
        counted = CLIENTS[options.client](server.port, load, seconds or options.seconds)
    except (subprocess.CalledProcessError, ValueError) as error:
        raise NotReadyError(f"{server.name} under {load.text}: {error}") from error
    if not counted["requests"]:
        raise NotReadyError(f"{server.name} answered nothing under {load.text}")
    return Sample(**counted, cpu=server.cpu() - before)


def beside(server: Running, options: argparse.Namespace) -> Beside:
    """Measure one busy connection alone, then beside many that say nothing."""
    alone = sample(server, LOADS[0], options)
    with Crowd((HOST, server.port), options.crowd) as crowd:
        server.wait_connections(options.crowd, _ACCEPTED_WITHIN - crowd.age)
        accepted = crowd.age
        crowded = sample(server, LOADS[0], options)
    return Beside(accepted, alone.rate, crowded.rate)


def _run(servers: list[Any], options: argparse.Namespace, results: Results) -> None:
    wanted = options.only.split(",")
    with contextlib.ExitStack() as stack:
        started = []
        for server in servers:
            try:
                started.append(stack.enter_context(running(server, free_port())))
                sample(started[-1], LOADS[0], options, _WARM_UP)
            except NotReadyError as error:
                results.errors[server.name] = str(error)
        for load in LOADS:
            for each in started if load.name in wanted else ():
                with _noting(results, each, load.name):
                    results.samples.setdefault((load.name, each.name), []).append(sample(each, load, options))
        for each in started if "idle" in wanted else ():
            if f"{each.name}, idle" not in results.errors:  # it takes long to find that out anew
                with _noting(results, each, "idle"):
                    results.beside.setdefault(each.name, []).append(beside(each, options))


@contextlib.contextmanager
def _noting(results: Results, server: Running, what: str) -> Iterator[None]:
    try:
        yield
    except (NotReadyError, OSError) as error:
        results.errors[f"{server.name}, {what}"] = str(error)


def judge(results: Results, wanted: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """List flaskd's goals, each with its figure; what has no peer to be compared with is not judged."""
    goals: list[dict[str, Any]] = []

    def at(goal: str, figure: float, *, least: float | None = None, most: float | None = None) -> None:
        met = figure >= least if least is not None else most is not None and figure <= most
        goals.append({"goal": goal, "least": least, "most": most, "figure": figure, "met": met})

    for load in LOADS:
        if (load.name, _BASE) in results.samples and load.name in wanted:
            at(f"{load.text}: requests a second", results.ratio(load.name, "flaskd", lambda s: s.rate), least=1.0)
            if not load.target[1:]:
                at(f"{load.text}: CPU", results.ratio(load.name, "flaskd", lambda s: s.cpu_each), most=1.0)
    if "idle" in wanted:
        those = results.beside.get("flaskd", [])
        at(f"{options.crowd} idle: accepted, s", round(median([each.accepted for each in those]), 2), most=2.0)
        at(f"{options.crowd} idle: one busy beside", round(median([each.ratio for each in those]), 2), least=0.9)
    return goals


def report(results: Results, names: list[str], options: argparse.Namespace) -> str:
    """Lay out the tables."""
    wanted, parts = options.only.split(","), []

    def rows(what: Callable[[Sample], float], scale: float, goals: Callable[[Load], str]) -> list[list[str]]:
        return [
            [
                load.text,
                goals(load),
                *[
                    _cell(results.figure(load.name, name, what) * scale, results.ratio(load.name, name, what))
                    for name in names
                ],
            ]
            for load in LOADS
            if load.name in wanted
        ]

    if set(wanted) - {"idle"}:
        title = f"## Requests a second (beside {_BASE}), median of {options.runs}"
        parts.append(table(title, ["load", "goal", *names], rows(lambda s: s.rate, 1, lambda _: "≥ 1.00")))
        title = f"## CPU for a request in µs (beside {_BASE})"
        cpu = rows(lambda s: s.cpu_each, 1e6, lambda load: "" if load.target[1:] else "≤ 1.00")
        parts.append(table(title, ["load", "goal", *names], cpu))
    if "idle" in wanted:
        those = [results.beside.get(name, []) for name in names]
        lines = [
            ["all accepted", "≤ 2 s", *[_plain([e.accepted for e in each], " s") for each in those]],
            [
                "one busy connection alone, requests/s",
                "",
                *[_plain([e.alone for e in each], digits=0) for each in those],
            ],
            ["beside them", "", *[_plain([e.beside for e in each], digits=0) for each in those]],
            ["ratio", "≥ 0.90", *[_plain([e.ratio for e in each]) for each in those]],
        ]
        parts.append(table(f"## {options.crowd} idle connections", ["", "goal", *names], lines))
    return "\n".join(parts)


def _cell(figure: float, ratio: float) -> str:
    if figure != figure:  # noqa: PLR0124 - not a number
        return "-"
    return f"{figure:.0f}" if ratio != ratio else f"{figure:.0f} ({ratio:.2f})"  # noqa: PLR0124


def _plain(figures: list[float], unit: str = "", digits: int = 2) -> str:
    return f"{median(figures):.{digits}f}{unit}" if figures else "-"


def main() -> int:
    """Measure, print, and tell whether flaskd missed a goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="separated by commas (%(default)s)")
    parser.add_argument("--only", default=",".join(NAMES), help="loads, separated by commas (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="times that everything is measured (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each load (%(default)s)")
    parser.add_argument("--crowd", type=int, default=5000, help="idle connections (%(default)s)")
    parser.add_argument("--client", choices=CLIENTS, default="wrk" if shutil.which("wrk") else "own")
    parser.add_argument("--quick", action="store_true", help="one short run, fewer idle: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(NAMES):
        parser.error(f"no load {min(unknown)!r}: choose from {', '.join(NAMES)}")
    if options.quick:
        options.runs, options.seconds, options.crowd = 1, 0.3, 300
    open_many_files()
    servers = chosen(options.servers)
    names = [server.name for server in servers]
    print(f"{environment()}; client: {options.client}\n", flush=True)

    results = Results()
    for run in range(options.runs):
        _run(servers[run % len(servers) :] + servers[: run % len(servers)], options, results)
    print(report(results, names, options))
    for (load, name), samples in results.samples.items():
        if failed := sum(each.failed for each in samples):
            print(f"{name}, {load}: {failed} requests failed")
    for where, reason in results.errors.items():
        print(f"{where}: {reason}")
    goals = judge(results, wanted, options) if "flaskd" in names else []
    missed = [each for each in goals if not each["met"]]
    for each in missed:
        print(f"flaskd misses: {each['goal']}: {each['figure']:.2f}")
    if not missed:
        print("flaskd meets every goal")
    if options.json:
        options.json.write_text(json.dumps(_as_json(results, goals, options), indent=1) + "\n")
    return 1 if missed else 0


def _as_json(results: Results, goals: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    loads = [
        {
            "load": load,
            "server": name,
            "rate": median([each.rate for each in samples]),
            "ratio": results.ratio(load, name, lambda s: s.rate),
            "samples": [vars(each) for each in samples],
        }
        for (load, name), samples in results.samples.items()
    ]
    idle = [
        {"server": name, "ratio": median([each.ratio for each in those]), "runs": [vars(each) for each in those]}
        for name, those in results.beside.items()
    ]
    return {
        "environment": environment(),
        "client": options.client,
        "loads": loads,
        "idle": idle,
        "goals": goals,
        "errors": results.errors,
    }


if __name__ == "__main__":
    sys.exit(main())
