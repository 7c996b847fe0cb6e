"""How fast the app is served by flaskd, by its peers, and by an earlier flaskd.

    python benchmarks/speed.py [--servers flaskd,waitress-serve] [--before DIR] [--only 16,up,idle] [--runs 5]
                               [--workers N] [--pin] [--quick] [--json FILE]

In each run all servers are started, and take turns under each load, so that two figures to be compared are measured
within seconds. The tables have a row for each load and a column for each server:

- requests a second, and in brackets the ratio to waitress-serve: medians over the runs, the ratio that of the pairs;
- CPU time for a request, in microseconds of all of the server's processes, with the ratio likewise;
- the time within which 99 of 100 requests were answered, likewise;
- connections that send nothing: how long until all are accepted, then the throughput of one busy connection beside
  them, divided by what it was alone;
- the memory that each server, started alone, has after 256 busy connections (Pss of all of its processes).

The last table has flaskd's goals, each with its figure.

Loads that are a number are that many busy connections that get a greeting of some bytes (`head`: with a browser's head
of 14 lines; `bare`: from an app without Flask). 16 connections get (`down`) or send (`up`) 256 KiB, or send 1 MiB
(`post`), 32 request 5 ms of sleep (`sleeps`), and 16 run beside two others that request 50 ms of sleep (`sleepers`).
``flaskd+log`` is flaskd with its access log, which the others do not write; ``before`` is the flaskd in `DIR`, a
checkout of another commit, with the same Python. ``-`` is what was not measured, or what a server cannot do, with the
reason below.

With ``--workers`` each server that can have several worker processes has that many, and the goals are others. There is
a further column, ``one worker``, for flaskd with a single worker, and there are three more rows: `compute`, whose app
computes for 5 ms; `balance`, jobs of 10 ms, 14 at a time, each on a connection of its own, for 4 workers of 4 threads,
and how many each worker did; and `supervisor`, memory and CPU of the first process of each server while it is idle.
Everything is still compared with waitress-serve, which has one process.

`wrk` is the client if it is installed, else `_wire.py`. With ``--pin`` the servers have one core and the client the
others; CPU times are best compared like that, because Python's threads cost more if they run on several cores. The exit
status is 1 if flaskd misses a goal. Ratios are rounded to two places before they are compared with goals.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _goals import CPU, P99, RATE, Measure, Results, judge
from _measure import (
    CLIENTS,
    COMPUTE,
    JOB,
    LOADS,
    LOGGED,
    ONE,
    Beside,
    Load,
    balance,
    before,
    beside,
    logged,
    memory,
    one_worker,
    sample,
    supervisor,
    warm_up,
)
from _servers import (
    FLASK,
    SERVERS,
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

NAMES = [*[load.name for load in LOADS], "idle", "memory"]
WITH_WORKERS = [COMPUTE.name, "balance", "supervisor"]


def columns(options: argparse.Namespace) -> list[Server]:
    """What is measured: the named servers, and with flaskd its variants."""
    found = []
    for server in chosen(options.servers):
        found.append(server)
        if server.name == "flaskd":
            found += [before(options.before)] if options.before else []
            found += [one_worker(server)] if options.workers else []
            found += [logged(server)] if any(each.logged and each.name in options.only for each in LOADS) else []
    if options.pin:
        core, *others = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, others)
        found = [dataclasses.replace(server, core=core) for server in found]
    return found


def origin(server: Server) -> str:
    """Where that flaskd is: its directory, and in a checkout the commit."""
    code = "import flaskd, pathlib; print(pathlib.Path(flaskd.__file__).parent.parent)"
    argv, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": server.path, "PYTHONDONTWRITEBYTECODE": "1"}
    where = subprocess.run(argv, env=env, cwd="/", capture_output=True, text=True, check=True).stdout.strip()
    if not Path(where, ".git").exists() or not shutil.which("git"):
        return where
    argv = ["git", "-C", where, "describe", "--always", "--dirty"]
    commit = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
    return f"{where}, {commit or 'no commit'}"


def _run(number: int, servers: list[Server], options: argparse.Namespace, results: Results) -> None:
    for served in dict.fromkeys(load.served for load in LOADS):
        loads = [load for load in _loads(options) if load.served == served]
        crowds = options.crowd if served == FLASK and "idle" in options.only else []
        if not loads and not crowds:
            continue
        at_work = dataclasses.replace(served, workers=options.workers)
        with _started(servers, at_work, results) as started:
            plain = [each for each in started if each.name != LOGGED]
            for load in loads:
                for each in started if load.logged else plain:
                    with _noting(results, f"{each.name}, {load.name}"):
                        results.samples.setdefault((load.name, each.name), {})[number] = sample(each, load, options)
            for count in crowds:
                for each in plain:
                    what = f"{each.name}, {count} idle"
                    if what not in results.errors:  # it takes long to fail again
                        with _noting(results, what):
                            results.beside.setdefault((count, each.name), {})[number] = beside(each, count, options)
    for server in servers if "memory" in options.only else ():
        if server.name == LOGGED:
            continue
        with _noting(results, f"{server.name}, memory"):
            results.memory.setdefault(server.name, {})[number] = memory(server, options)
    _run_workers(number, servers, options, results)


def _run_workers(number: int, servers: list[Server], options: argparse.Namespace, results: Results) -> None:
    for server in [each for each in servers if each.pooled and each.name not in {LOGGED, ONE}]:
        if "balance" in options.only:
            with _noting(results, f"{server.name}, balance"):
                results.balance.setdefault(server.name, {})[number] = balance(server, options)
        if "supervisor" in options.only:
            with _noting(results, f"{server.name}, supervisor"):
                results.supervisor.setdefault(server.name, {})[number] = supervisor(server, options)


def _loads(options: argparse.Namespace) -> list[Load]:
    return [load for load in (*LOADS, COMPUTE) if load.name in options.only]


@contextlib.contextmanager
def _started(servers: list[Server], served: Served, results: Results) -> Iterator[list[Running]]:
    """Start all servers; those that do not answer are noted and left out."""
    with contextlib.ExitStack() as stack:
        started = []
        for server in servers:
            with _noting(results, server.name):
                each = stack.enter_context(running(server, free_port(), served=served))
                warm_up(each)
                started.append(each)
        yield started


@contextlib.contextmanager
def _noting(results: Results, what: str) -> Iterator[None]:
    try:
        yield
    except (NotReadyError, OSError) as error:
        results.errors[what] = str(error)


def report(results: Results, names: list[str], goals: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The tables as text."""
    loads = _loads(options)
    plain = [name for name in names if name != LOGGED]
    parts = []

    def cell(load: str, name: str, measure: Measure) -> str:
        figure, ratio = results.figure(load, name, measure.of), results.ratio(load, name, measure.of)
        return _number(figure * measure.scale, measure.digits) + (f" ({ratio:.2f})" if ratio == ratio else "")  # noqa: PLR0124

    def line(text: str, count: int, what: Callable[[Beside], float], digits: int = 2) -> list[str]:
        return [text, *[_number(results.crowded(count, name, what), digits) for name in plain]]

    for measure in (RATE, CPU, P99) if loads else ():
        rows = [[load.text, *[cell(load.name, name, measure) for name in names]] for load in loads]
        title = f"## {measure.title} (beside waitress-serve), median of {options.runs}"
        parts.append(table(title, ["load", *names], rows))
    for count in options.crowd if "idle" in options.only else ():
        rows = [
            line("all accepted, s", count, lambda each: each.accepted),
            line("one busy connection alone, requests/s", count, lambda each: each.alone, 0),
            line("beside them", count, lambda each: each.beside, 0),
            line("ratio", count, lambda each: each.ratio),
        ]
        parts.append(table(f"## {count} idle connections", ["", *plain], rows))
    if "memory" in options.only:
        row = [_number(median(list(results.memory.get(name, {}).values())), 1) for name in plain]
        parts.append(table("## Memory after 256 connections in MiB", ["", *plain], [["Pss", *row]]))
    if "balance" in options.only:
        rows = [
            ["busiest ÷ idlest", *[_number(results.of_balance(name, lambda e: e.spread), 2) for name in plain]],
            ["p99 ÷ 10 ms", *[_number(results.of_balance(name, lambda e: e.p99) / JOB, 2) for name in plain]],
        ]
        parts.append(table("## Jobs of 10 ms, 14 at a time, for 4 workers of 4 threads", ["", *plain], rows))
    if "supervisor" in options.only:
        rows = [
            ["MiB (Pss)", *[_number(results.of_supervisor(name, lambda e: e.memory), 1) for name in plain]],
            ["CPU, % of a core", *[_number(results.of_supervisor(name, lambda e: e.share * 100), 2) for name in plain]],
        ]
        parts.append(table(f"## The first process of {options.workers + 1}, idle", ["", *plain], rows))
    if goals:
        rows = [
            [each["goal"], _bound(each), _number(each["figure"], 2), "" if each["met"] else "missed"] for each in goals
        ]
        parts.append(table("## Goals", ["figure of flaskd's", "goal", "is", ""], rows))
    return "\n".join(parts)


def _bound(goal: dict[str, Any]) -> str:
    return f"≥ {goal['least']:.2f}" if goal["least"] is not None else f"≤ {goal['most']:.2f}"


def _number(figure: float, digits: int) -> str:
    return f"{figure:.{digits}f}" if figure == figure else "-"  # noqa: PLR0124 - what was not measured is not a number


def _options() -> argparse.Namespace:
    """Read the arguments; `only` and `crowd` become lists, and ``--quick`` sets other options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="separated by commas (%(default)s)")
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout of an earlier flaskd, measured too")
    parser.add_argument("--only", help=f"loads, separated by commas ({','.join(NAMES + WITH_WORKERS)})")
    take_workers(parser)
    parser.add_argument("--runs", type=int, default=5, help="times that everything is measured (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each load (%(default)s)")
    parser.add_argument("--crowd", default="5000,10000", help="idle connections, separated by commas (%(default)s)")
    parser.add_argument("--client", choices=CLIENTS, default="wrk" if shutil.which("wrk") else "own")
    parser.add_argument("--pin", action="store_true", help="one core for the servers, the others for the client")
    parser.add_argument("--quick", action="store_true", help="one short run, fewer idle: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure")
    options = parser.parse_args()
    names = NAMES + (WITH_WORKERS if options.workers else [])
    options.only = options.only.split(",") if options.only else names
    if unknown := set(options.only) - set(NAMES + WITH_WORKERS):
        parser.error(f"no load {min(unknown)!r}: choose from {', '.join(NAMES + WITH_WORKERS)}")
    if without := set(options.only) - set(names):
        parser.error(f"--only {min(without)} takes worker processes: give --workers N, too")
    if options.before and "flaskd" not in options.servers.split(","):
        parser.error("--before is measured beside flaskd: name that in --servers, too")
    if options.before and not Path(options.before, "flaskd", "__init__.py").is_file():
        parser.error(f"no flaskd in {str(options.before)!r}: give the directory of a checkout")
    if options.pin and len(os.sched_getaffinity(0)) < 2:
        parser.error("--pin takes two cores: leave it out")
    if options.quick:
        options.runs, options.seconds, options.crowd = 1, 0.3, "300"
    options.crowd = [int(count) for count in options.crowd.split(",")]
    options.before = options.before and options.before.resolve()
    return options


def main() -> int:
    """Measure, print, and return 1 if flaskd missed a goal."""
    options = _options()
    open_many_files()
    told = f"{environment()}; client: {options.client}{', pinned' if options.pin else ''}"
    servers = columns(options)
    names = [server.name for server in servers]
    origins = {
        server.name: origin(server)
        for server in servers
        if "flaskd" in server.modules and server.name not in {LOGGED, ONE}
    }
    print(told, *[f"{name}: {where}" for name, where in origins.items()], "", sep="\n", flush=True)

    results = Results()
    for run in range(options.runs):
        _run(run, servers[run % len(servers) :] + servers[: run % len(servers)], options, results)
    goals = judge(results, options.only, options.crowd, options.workers) if "flaskd" in names else []
    print(report(results, names, goals, options))
    for (load, name), samples in results.samples.items():
        if failed := sum(each.failed for each in samples.values()):
            print(f"{name}, {load}: {failed} requests failed")
    for where, reason in results.errors.items():
        print(f"{where}: {reason}")
    missed = [each for each in goals if not each["met"]]
    for each in missed:
        print(f"flaskd misses: {each['goal']}: {each['figure']:.2f}")
    if not missed:
        print("flaskd meets every goal")
    if options.json:
        written = {"environment": told, "origins": origins, "client": options.client}
        written |= _as_json(results) | {"goals": goals, "errors": results.errors}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if missed else 0


def _as_json(results: Results) -> dict[str, Any]:
    loads = [
        {
            "load": load,
            "server": name,
            "rate": results.figure(load, name, RATE.of),
            "ratio": results.ratio(load, name, RATE.of),
            "samples": [vars(each) for each in samples.values()],
        }
        for (load, name), samples in results.samples.items()
    ]
    idle = [
        {
            "server": name,
            "crowd": count,
            "ratio": results.crowded(count, name, lambda each: each.ratio),
            "runs": [vars(each) for each in runs.values()],
        }
        for (count, name), runs in results.beside.items()
    ]
    weighed = [{"server": name, "runs": list(runs.values())} for name, runs in results.memory.items()]
    shared = [
        {"server": name, "runs": [vars(each) | {"spread": each.spread} for each in runs.values()]}
        for name, runs in results.balance.items()
    ]
    first = [
        {"server": name, "runs": [vars(each) for each in runs.values()]} for name, runs in results.supervisor.items()
    ]
    return {"loads": loads, "idle": idle, "memory": weighed, "balance": shared, "supervisor": first}


if __name__ == "__main__":
    sys.exit(main())
