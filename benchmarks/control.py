"""How fast flaskd answers questions about itself: on the control socket, the admin listener, and by its commands.

    python benchmarks/control.py [--only busy,verb,leak,stuck] [--workers N] [--runs 5] [--quick] [--json FILE]

Each run has a daemon of its own. A row is one figure: its goal if there is one, the median of the runs, and the worst:

- ``busy``: `status` over the control socket from time to time, on a new connection each time, while 64 connections
  keep the app busy;
- ``verb``: how long `flaskd ready` takes from its start to its exit, in turns with ``python -c "import click"``;
- ``leak``: what 10,000 times `status` leave behind in the daemon: memory, descriptors, threads;
- ``stuck``: `/readyz`, `/livez` and `status` while every thread of the app is stuck, and more requests wait.

With ``--workers`` that many processes serve the app, and the supervisor is asked and measured.

The exit status is 1 if a goal is missed. All but the leaks depend on what else the machine does meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from _servers import (
    HERE,
    HOST,
    SERVERS,
    Running,
    Served,
    environment,
    free_port,
    median,
    percentile,
    running,
    table,
    take_workers,
)
from app import THREADS

_PATIENCE = 30.0
"""How many seconds one answer may take before the measurement is broken off."""
_LOAD_BEGUN = 0.5
"""Seconds after which the load is at its full height."""
_APART = 0.04
"""The longest pause between two questions at full load, in seconds; without pauses they would disturb each other."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of questions, of command starts, and of calls that may leak."""

    asked: int = 300
    verbs: int = 15
    calls: int = 10_000


QUICK = Sizes(asked=20, verbs=2, calls=300)


@dataclass
class Figure:
    """One row, with a value for each run; `most` is the goal, in the same unit."""

    text: str
    unit: str
    most: float | None = None
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def missed(self) -> bool:
        return self.most is not None and self.median > self.most


FIGURES = {
    "busy_median": Figure("`status` at full load, median", "ms", 5.0),
    "busy_p99": Figure("`status` at full load, 99 %", "ms"),
    "verb": Figure("`flaskd ready`", "ms"),
    "click": Figure("`python -c 'import click'`", "ms"),
    "verb_ratio": Figure("the former beside the latter", "times", 1.5),
    "leak_memory": Figure("memory after the calls", "KiB more", 2000.0),
    "leak_files": Figure("descriptors after the calls", "more", 0.0),
    "leak_threads": Figure("threads after the calls", "more", 0.0),
    "readyz_p99": Figure("`/readyz`, every thread stuck, 99 %", "ms", 50.0),
    "livez_p99": Figure("`/livez`, every thread stuck, 99 %", "ms"),
    "stuck_median": Figure("`status`, every thread stuck, median", "ms"),
}


def timed(ask: Callable[[], None], times: int) -> list[float]:
    """Ask `times` times; the milliseconds of each."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        ask()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def status(server: Running) -> None:
    """Ask for the status on a new connection, as `nc -U` does."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.control))
        client.settimeout(_PATIENCE)
        client.sendall(b"status\n")
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    if not answer.endswith(b"\nOK ready\n"):
        raise SystemExit(f"cannot measure: status answered {answer[-200:]!r}")


def probe(port: int, path: str) -> None:
    """Ask the admin listener as a probe does: on a new connection each time."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=_PATIENCE)) as connection:
        connection.request("GET", path)
        if (answer := connection.getresponse()).status != http.client.OK:
            raise SystemExit(f"cannot measure: {path} answered {answer.status} {answer.read()!r}")
        answer.read()


@contextlib.contextmanager
def busy(server: Running) -> Iterator[None]:
    """The app at full load: 64 connections that send requests without a pause."""
    orders = {"host": HOST, "port": server.port, "target": "/", "body": 0, "connections": 64, "seconds": 120}
    load = subprocess.Popen([sys.executable, str(HERE / "_wire.py"), json.dumps(orders)], stdout=subprocess.DEVNULL)
    try:
        time.sleep(_LOAD_BEGUN)
        yield
        if load.poll() is not None:
            raise SystemExit("cannot measure: the load was over before the measurement")
    finally:
        load.kill()
        load.wait()


@contextlib.contextmanager
def stuck(server: Running) -> Iterator[None]:
    """Every thread of the app in a request that does not end, and the same number of requests in the queue."""
    wanted = 2 * THREADS * server.served.processes
    with contextlib.ExitStack() as stack:
        for _ in range(wanted):
            client = stack.enter_context(socket.create_connection((HOST, server.port), timeout=_PATIENCE))
            client.sendall(b"GET /slow?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until = time.monotonic() + _PATIENCE
        while in_flight(server) < wanted:
            if time.monotonic() > until:
                raise SystemExit("cannot measure: the app's threads did not get stuck")
            time.sleep(0.01)
        yield


def in_flight(server: Running) -> int:
    """How many requests the daemon reports as in flight."""
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as lines:
        client.connect(str(server.control))
        client.settimeout(_PATIENCE)
        client.sendall(b'{"cmd": "status"}\n')
        return int(json.loads(lines.readline())["in_flight"])


def measure_busy(server: Running, _admin: int, sizes: Sizes) -> dict[str, float]:
    """`status` at full load, asked at random moments."""
    taken = []
    with busy(server):
        for _ in range(sizes.asked):
            time.sleep(random.uniform(0, _APART))
            taken += timed(lambda: status(server), 1)
    return {"busy_median": median(taken), "busy_p99": percentile(taken, 99)}


def measure_stuck(server: Running, admin: int, sizes: Sizes) -> dict[str, float]:
    """What is answered while no thread of the app is free."""
    with stuck(server):
        return {
            "readyz_p99": percentile(timed(lambda: probe(admin, "/readyz"), sizes.asked), 99),
            "livez_p99": percentile(timed(lambda: probe(admin, "/livez"), sizes.asked), 99),
            "stuck_median": median(timed(lambda: status(server), sizes.asked)),
        }


def measure_verb(server: Running, _admin: int, sizes: Sizes) -> dict[str, float]:
    """A command from its start to its exit, in turns with importing only click."""
    verb = [sys.executable, "-m", "flaskd", "ready", "--socket", str(server.control)]
    bare = [sys.executable, "-c", "import click"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(server.directory / "bytecode")  # an installed flaskd is compiled as well
    verbs, bares = [], []
    for _ in range(sizes.verbs + 1):
        verbs += timed(lambda: run(verb, env), 1)
        bares += timed(lambda: run(bare, env), 1)
    verbs, bares = verbs[1:], bares[1:]  # the first runs compile what they import
    ratios = [ours / theirs for ours, theirs in zip(verbs, bares, strict=True)]
    return {"verb": median(verbs), "click": median(bares), "verb_ratio": median(ratios)}


def run(argv: list[str], env: dict[str, str]) -> None:
    """Run a command to its end; without a timeout, because with one Python notices the end up to 50 ms late."""
    subprocess.run(argv, env=env, stdout=subprocess.DEVNULL, check=True)


def measure_leak(server: Running, _admin: int, sizes: Sizes) -> dict[str, float]:
    """What many calls leave behind; the first tenth is not counted, because it fills caches and arenas."""
    timed(lambda: status(server), sizes.calls // 10)
    before = held(server)
    timed(lambda: status(server), sizes.calls)
    time.sleep(0.1)  # the daemon may still close the last connection
    names = ("leak_memory", "leak_files", "leak_threads")
    return {name: float(now - then) for name, now, then in zip(names, held(server), before, strict=True)}


def held(server: Running) -> tuple[int, int, int]:
    """Resident KiB, descriptors, threads: proc(5)."""
    process = Path(f"/proc/{server.process.pid}")
    lines = (process / "status").read_text(encoding="ascii", errors="replace").splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return resident, len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


PARTS = {"busy": measure_busy, "verb": measure_verb, "leak": measure_leak, "stuck": measure_stuck}
"""In this order, because the stuck threads stay stuck."""


def report(figures: dict[str, Figure], runs: int) -> str:
    """The table as text."""
    rows = [
        [
            each.text,
            f"≤ {each.most:g} {each.unit}" if each.most is not None else "",
            f"{each.median:.2f} {each.unit}",
            f"{max(each.values):.2f}",
        ]
        for each in figures.values()
    ]
    return table(f"## Asking flaskd, median of {runs}", ["", "goal", "median", "worst"], rows)


def main() -> int:
    """Measure, print, and return 1 if flaskd missed a goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (%(default)s)")
    take_workers(parser)
    parser.add_argument("--runs", type=int, default=5, help="daemons that are asked (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short run: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no part {min(unknown)!r}: choose from {', '.join(PARTS)}")
    sizes, runs = (QUICK, 1) if options.quick else (Sizes(), options.runs)
    print(f"{environment()}\n", flush=True)
    for _ in range(runs):
        admin = free_port()
        config = f"admin: {{listen: '{HOST}:{admin}'}}\n"
        with running(SERVERS["flaskd"], free_port(), config=config, served=Served(workers=options.workers)) as server:
            for name, measure in PARTS.items():
                for figure, value in measure(server, admin, sizes).items() if name in wanted else ():
                    FIGURES[figure].values.append(value)
    figures = {name: each for name, each in FIGURES.items() if each.values}
    print(report(figures, runs))
    missed = [each for each in figures.values() if each.missed]
    for each in missed:
        print(f"flaskd misses: {each.text}: {each.median:.2f} {each.unit}")
    if not missed:
        print("flaskd meets every goal")
    if options.json:
        goals = [
            {"goal": each.text, "most": each.most, "figure": each.median, "met": not each.missed}
            for each in figures.values()
            if each.most is not None
        ]
        written = {"environment": environment(), "goals": goals}
        written["figures"] = {name: asdict(each) for name, each in figures.items()}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
