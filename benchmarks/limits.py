"""The effect of flaskd's limits: with requests that hang, and under three times the load that it can answer.

    python benchmarks/limits.py [--only hang,overload] [--workers N] [--runs 3] [--seconds 6]

``hang``: of 6 threads (with workers: in each worker) 2 hang for good, under the load of clients that each request a
page, and ``server.request_timeout`` is 2 s. The answers to these clients are timed before and after the threads hang;
with workers also how long it takes until all threads are there again: as many requests of 0.3 s as there are threads,
made at once, are then all answered within twice that time, and no worker has a lost thread.

``overload``: requests of 50 ms each come three times as fast as the threads can answer them, with and without
``server.queue_timeout: 1s``. The table has the answers a second, compared with clients that send the next request after
each answer, and how long the answered requests waited.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _servers import SERVERS, Running, Served, environment, free_port, median, percentile, running, table, take_workers
from _wire import request

THREADS = 6
HUNG = 2
"""How many of them hang, in each worker."""
LIMIT = 2.0
"""Seconds that the app may take for a request."""
JOB = 0.05
"""Seconds that each request of an overload takes."""
TIMES = 3
"""An overload is this many times what the threads can answer."""
QUEUE_TIMEOUT = 1.0
PROBE = 0.3
"""Seconds that each request takes that checks whether all threads are there."""
CLIENTS = 4

MOST_P99 = 3.0
MOST_SECONDS_TO_WHOLE = 5.0
MOST_WAIT = 1.2
LEAST_GOODPUT = 0.9
_PATIENCE = 30.0


@dataclass
class Answers:
    """The answers to some requests: how often each status came (0: no answer), and the seconds of those with 200."""

    statuses: Counter[int] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)

    @property
    def p99(self) -> float:
        """The seconds within which 99 of 100 were answered."""
        return percentile(self.took, 99) if self.took else math.inf


async def ask(port: int, target: str, answers: Answers) -> None:
    """Make one request on a new connection."""
    began, status = time.monotonic(), 0
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(target, headers=["Connection: close"]))
            answer = await reader.read()
            writer.close()
            status = int(answer.split(None, 2)[1])
    except (OSError, IndexError, TimeoutError):
        pass
    answers.statuses[status] += 1
    if status == 200:
        answers.took.append(time.monotonic() - began)


async def load(port: int, target: str, until: float, answers: Answers) -> None:
    """Send one request after the other until a moment."""
    while time.monotonic() < until:
        await ask(port, target, answers)


async def together(port: int, target: str, seconds: float, clients: int) -> Answers:
    """Let `clients` clients send requests for some seconds."""
    answers = Answers()
    until = time.monotonic() + seconds
    await asyncio.gather(*[load(port, target, until, answers) for _ in range(clients)])
    return answers


# --- requests that hang -----------------------------------------------------------------------------------------------


@dataclass
class Hang:
    """The findings: p99 before and beside the hanging ones, failed requests, and seconds until all threads are back."""

    before: float
    beside: float
    hung: dict[int, int]
    failed: int
    whole: float


async def hang(server: Running, seconds: float, workers: int) -> Hang:
    """Measure requests that hang."""
    port, at_once = server.port, max(1, workers)
    before = await together(port, "/", seconds, CLIENTS)
    hung, beside = Answers(), Answers()
    began = time.monotonic()
    hanging = asyncio.gather(*[ask(port, "/slow?seconds=60", hung) for _ in range(HUNG * at_once)])
    loads = asyncio.gather(*[load(port, "/", began + seconds + LIMIT, beside) for _ in range(CLIENTS)])
    await hanging
    whole = math.inf
    while whole == math.inf and time.monotonic() - began < _PATIENCE:
        probes, asked = Answers(), time.monotonic()
        await asyncio.gather(*[ask(port, f"/slow?seconds={PROBE}", probes) for _ in range(THREADS * at_once)])
        if max(probes.took, default=math.inf) < 2 * PROBE:
            whole = asked - began
    await loads
    bad = sum(count for status, count in (before.statuses + beside.statuses).items() if status != 200)
    return Hang(before.p99, beside.p99, dict(hung.statuses), bad, whole)


# --- more than it can bear --------------------------------------------------------------------------------------------


@dataclass
class Overload:
    """The findings: answers a second with as many clients as threads, and in the overload; and the other statuses."""

    capacity: float
    goodput: float
    longest: float
    """The seconds that 99 of 100 answered requests waited at most."""
    statuses: dict[int, int]


async def overload(server: Running, seconds: float, workers: int) -> Overload:
    """Measure an overload."""
    port, threads = server.port, THREADS * max(1, workers)
    target = f"/slow?seconds={JOB}"
    alone = await together(port, target, seconds, threads)
    answers, tasks = Answers(), list[asyncio.Task[None]]()
    began, pause = time.monotonic(), JOB / threads / TIMES
    for number in itertools.count():
        due = began + number * pause
        if due >= began + seconds:
            break
        if (early := due - time.monotonic()) > 0:
            await asyncio.sleep(early)
        tasks.append(asyncio.create_task(ask(port, target, answers)))
    # Only answers while requests come; those to requests that wait at the end would improve the figure.
    good = len(answers.took)
    took = time.monotonic() - began
    await asyncio.gather(*tasks)
    return Overload(len(alone.took) / seconds, good / took, answers.p99 - JOB, dict(sorted(answers.statuses.items())))


# --- the table --------------------------------------------------------------------------------------------------------


def measured(what: str, config: str, options: argparse.Namespace) -> Any:
    """Start flaskd with that configuration, and make one of the two measurements."""
    served = Served(workers=options.workers, threads=THREADS)
    with running(SERVERS["flaskd"], free_port(), config=config, served=served) as server:
        return asyncio.run({"hang": hang, "overload": overload}[what](server, options.seconds, options.workers))


def main() -> int:
    """Measure, print a table and the missed goals; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="hang,overload", help="what to measure (%(default)s)")
    take_workers(parser)
    parser.add_argument("--runs", type=int, default=3, help="of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each part of a run (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - {"hang", "overload"}:
        parser.error(f"no measurement {min(unknown)!r}: choose from hang, overload")
    print(f"{environment()}\n", flush=True)
    found: dict[str, list[dict[str, Any]]] = {"hang": [], "overload": [], "unlimited": []}
    goals: list[tuple[str, float, bool]] = []
    for _ in range(options.runs):
        if "hang" in wanted:
            found["hang"].append(vars(measured("hang", f"server: {{request_timeout: {LIMIT:g}s}}\n", options)))
        if "overload" in wanted:
            config = f"server: {{queue_timeout: {QUEUE_TIMEOUT:g}s}}\n"
            found["overload"].append(vars(measured("overload", config, options)))
            found["unlimited"].append(vars(measured("overload", "", options)))
    if found["hang"]:
        rows = [
            [f"{each['before'] * 1e3:.1f}", f"{each['beside'] * 1e3:.1f}", str(each["failed"]), str(each["hung"]),
             f"{each['whole']:.1f}"]
            for each in found["hang"]
        ]  # fmt: skip
        title = f"## {HUNG} of {THREADS} threads hang, {options.workers} workers, request_timeout {LIMIT:g} s"
        print(table(title, ["p99 before, ms", "beside, ms", "not answered", "hung", "whole again, s"], rows))
        ratio = median([each["beside"] / each["before"] for each in found["hang"]])
        failed = sum(each["failed"] for each in found["hang"])
        goals += [("p99 beside ÷ before", ratio, ratio <= MOST_P99), ("others not answered", failed, not failed)]
        whole = median([each["whole"] for each in found["hang"]])
        goals.append(("whole again after, s", whole, whole <= MOST_SECONDS_TO_WHOLE))
    if found["overload"]:
        rows = [
            [name, f"{each['capacity']:.0f}", f"{each['goodput']:.0f}", f"{each['longest']:.2f}", str(each["statuses"])]
            for name, key in (("1 s", "overload"), ("none", "unlimited"))
            for each in found[key]
        ]
        title = f"## {TIMES} times the load that can be borne, {options.workers} workers"
        print(table(title, ["queue_timeout", "answers/s alone", "answers/s", "waited, p99, s", "statuses"], rows))
        good = median([each["goodput"] / each["capacity"] for each in found["overload"]])
        longest = median([each["longest"] for each in found["overload"]])
        goals += [
            ("goodput ÷ capacity", good, good >= LEAST_GOODPUT),
            ("waited, p99, s", longest, longest <= MOST_WAIT),
        ]
    for goal, figure, met in goals:
        print(f"{goal}: {figure:.2f}{'' if met else ', missed'}")
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), **found}, indent=1) + "\n")
    return 0 if all(met for _, _, met in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
