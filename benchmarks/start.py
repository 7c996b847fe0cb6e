"""How long a server takes from its exec to its first answer, and how much memory it has then.

    python benchmarks/start.py [--servers flaskd,waitress-serve] [--workers N] [--runs 10] [--quick] [--json FILE]

Each run starts every server once, and ``python -c "import flask"``, in turns. The time of the latter depends only on
the machine, so the ratio of the medians can be compared between machines. The memory is the proportional set size of
all of the server's processes (Pss in proc_pid_smaps_rollup(5)), right after the first answer. With ``--workers`` flaskd
with that many worker processes is measured, too, as ``flaskd -w``, until all of them have the app. The exit status is 1
if flaskd misses a goal.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _servers import (
    SERVERS,
    NotReadyError,
    Running,
    Served,
    Server,
    chosen,
    environment,
    free_port,
    median,
    table,
    take_workers,
)

MOST_RATIO = 1.7
"""flaskd's first answer may take this many times `import flask`."""
MOST_MEMORY = 29.0
"""MiB that flaskd may have then."""
MOST_RATIO_WORKERS = 1.3
"""With one worker flaskd may take this many times its time without workers."""
WITH_WORKERS = "flaskd -w"
"""The variant of flaskd with worker processes."""
_LOOK = 0.001
"""Seconds between two tries of the client."""


@dataclass
class Starts:
    """The starts of one server: seconds to the first answer, MiB of memory."""

    server: str
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    error: str = ""


def compiled() -> None:
    """Compile flaskd as pip does when it installs, because files edited in a clone may not be compiled."""
    spec = importlib.util.find_spec("flaskd")
    for place in spec.submodule_search_locations or () if spec else ():
        compileall.compile_dir(place, quiet=2)


def import_flask() -> float:
    """Seconds that a new interpreter takes to import Flask."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import flask"], check=True, cwd="/")
    return time.monotonic() - began


def start(server: Server, into: Starts, workers: int = 0) -> None:
    """Start a server, wait for its first answer, and measure its memory."""
    with contextlib.closing(Running(server, free_port(), served=Served(workers=workers))) as each:
        each.wait_ready(look=_LOOK)
        into.seconds.append(time.monotonic() - each.began)
        into.memory.append(each.memory())


def main() -> int:
    """Measure, print, and return 1 if flaskd missed a goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--servers", default="flaskd,waitress-serve", help="of " + ", ".join(SERVERS) + " (%(default)s)"
    )
    take_workers(parser)
    parser.add_argument("--runs", type=int, default=10, help="starts of each (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    options = parser.parse_args()
    servers = [(server.name, server, 0) for server in chosen(options.servers)]
    if options.workers:
        servers += [(WITH_WORKERS, server, options.workers) for _, server, _ in servers if server.name == "flaskd"]
    print(f"{environment()}\n")
    compiled()
    found = {name: Starts(name) for name, _, _ in servers}
    imports: list[float] = []
    import_flask()  # not measured: it reads the files into the page cache
    for _ in range(2 if options.quick else options.runs):
        imports.append(import_flask())
        for name, server, workers in servers:
            try:
                start(server, found[name], workers)
            except NotReadyError as error:
                found[name].error = str(error)
    rows = [_row(each, median(imports)) for each in found.values()]
    headers = ["server", "exec to first answer", "÷ import flask", "memory then"]
    print(table(f"import flask: {median(imports) * 1000:.0f} ms", headers, rows))
    goals = _goals(found["flaskd"], median(imports)) if "flaskd" in found else []
    goals += [_first_with_worker(found["flaskd"], found[WITH_WORKERS])] if options.workers == 1 and goals else []
    for goal in goals:
        if not goal["met"]:
            print(f"flaskd misses {goal['goal']}: {goal['figure']:.2f}")
    if options.json:
        starts = [asdict(each) for each in found.values()]
        written = {"environment": environment(), "import_flask": imports, "starts": starts, "goals": goals}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if all(goal["met"] for goal in goals) else 1


def _row(starts: Starts, flask: float) -> list[str]:
    if starts.error:
        return [starts.server, starts.error, "-", "-"]
    took = median(starts.seconds)
    return [starts.server, f"{took * 1000:.0f} ms", f"{took / flask:.2f}", f"{median(starts.memory):.1f} MiB"]


def _goals(starts: Starts, flask: float) -> list[dict[str, Any]]:
    ratio, memory = median(starts.seconds) / flask, median(starts.memory)
    return [
        {"goal": f"at most {MOST_RATIO} times import flask", "figure": ratio, "met": ratio <= MOST_RATIO},
        {"goal": f"at most {MOST_MEMORY} MiB", "figure": memory, "met": memory <= MOST_MEMORY},
    ]


def _first_with_worker(without: Starts, with_one: Starts) -> dict[str, Any]:
    ratio = median(with_one.seconds) / median(without.seconds)
    goal = f"with one worker at most {MOST_RATIO_WORKERS} times the time without"
    return {"goal": goal, "figure": ratio, "met": ratio <= MOST_RATIO_WORKERS}


if __name__ == "__main__":
    sys.exit(main())
