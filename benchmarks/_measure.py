"""The loads of `speed.py`, the clients that make them, and what is measured meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _processes import cpu_of, memory_of
from _servers import FLASK, HERE, HOST, SERVERS, NotReadyError, Running, Served, Server, free_port, running
from _wire import Background, Crowd

BARE = Served(app="bare")
MANY_THREADS = Served(threads=16)

BROWSER = (
    "Connection: keep-alive",
    'sec-ch-ua: "Chromium";v="142", "Not_A Brand";v="99"',
    "sec-ch-ua-mobile: ?0",
    'sec-ch-ua-platform: "Linux"',
    "Upgrade-Insecure-Requests: 1",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36",
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8",
    "Sec-Fetch-Site: same-origin",
    "Sec-Fetch-Mode: navigate",
    "Sec-Fetch-Dest: document",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Accept-Language: en-GB,en;q=0.9,de;q=0.8",
    "Cookie: session=eyJ1c2VyIjo0Mn0.aB3dE5.q1W2e3R4t5Y6u7I8o9P0aSdFgHj; theme=dark",
)
"""The head that a browser sends, without Host: 14 lines together."""

LOGGED = "flaskd+log"
"""The variant of flaskd that writes an access log."""
_ACCEPTED_WITHIN = 45.0
_WARM_UP = 0.3
"""Seconds."""
_IDLE_TIMES = 3
"""A server is left alone for this many times the length of a load."""
_SLEEPERS = 2
_SLEEP = "/slow?seconds=0.05"


@dataclass(frozen=True)
class Load:
    """A number of busy connections that request `target` with a body of `body` bytes.

    `sleepers` are further clients that constantly request 50 ms of sleep and are not measured. A `logged` load is also
    measured with flaskd's access log.
    """

    name: str
    text: str
    connections: int
    target: str = "/"
    body: int = 0
    headers: tuple[str, ...] = ()
    served: Served = FLASK
    sleepers: int = 0
    logged: bool = False


LOADS = [
    Load("1", "1 connection", 1),
    Load("16", "16 connections", 16),
    Load("64", "64 connections", 64),
    Load("256", "256 connections", 256),
    Load("head", "a browser's head, 16 connections", 16, headers=BROWSER, logged=True),
    Load("bare", "a browser's head, no Flask, 16 connections", 16, headers=BROWSER, served=BARE),
    Load("down", "256 KiB down, 16 connections", 16, "/big?kib=256"),
    Load("up", "256 KiB up, 16 connections", 16, "/upload", 256 * 1024),
    Load("post", "1 MiB up, 16 connections", 16, "/upload", 1024 * 1024),
    Load("sleeps", "5 ms of sleep, 32 connections, 16 threads", 32, "/slow?seconds=0.005", served=MANY_THREADS),
    Load("sleepers", "16 connections beside 2 that sleep", 16, sleepers=_SLEEPERS),
]
ONE = "one worker"
"""The variant of flaskd with one worker process."""
COMPUTE = Load("compute", "5 ms of computing, 16 connections", 16, "/compute?ms=5")
"""Only with worker processes. It takes so long that the client uses little of the machine."""
JOB = 0.010
"""Seconds of sleep in each job of the balance."""
BALANCED = Served(workers=4, threads=4)
JOBS_AT_A_TIME = 14
"""Two less than there are threads."""
_FULLEST = next(each for each in LOADS if each.name == "256")
"""The memory is read after it."""


@dataclass
class Sample:
    """The result of one load: `cpu` is CPU seconds of the server, `p99` the seconds for 99 of 100 answers.

    `slept` counts the answers that the sleepers got.
    """

    requests: int
    failed: int
    seconds: float
    cpu: float
    p99: float
    slept: int = 0

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
class Balance:
    """How four workers shared short jobs: the number that each did, and the seconds for 99 of 100 answers."""

    jobs: dict[str, int]
    p99: float

    @property
    def spread(self) -> float:
        """Jobs of the busiest worker ÷ those of the idlest."""
        shares = [*self.jobs.values(), *[0] * (BALANCED.workers - len(self.jobs))]
        return max(shares) / min(shares) if min(shares) else float("inf")


@dataclass
class Supervisor:
    """The first process of an idle server with workers: its MiB (Pss), and the part of a core that it uses."""

    memory: float
    share: float


def one_worker(flaskd: Server) -> Server:
    """Make the variant that has one worker."""
    return dataclasses.replace(flaskd, name=ONE, workers=1)


def logged(flaskd: Server) -> Server:
    """Make the variant that writes an access log, to its log file."""
    return dataclasses.replace(flaskd, name=LOGGED, access="combined")


def before(checkout: Path) -> Server:
    """Make the variant of another commit, which runs from its checkout."""
    return dataclasses.replace(SERVERS["flaskd"], name="before", checkout=checkout)


def _wrk(port: int, load: Load, seconds: float) -> dict[str, Any]:
    argv = ["wrk", "--latency", "-t1", f"-c{load.connections}", f"-d{max(1, round(seconds))}s"]
    for each in load.headers:
        argv += ["-H", each]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        if load.body:
            script.write(f'wrk.method = "POST"\nwrk.body = string.rep("x", {load.body})\n')
            script.flush()
            argv += ["-s", script.name]
        url = f"http://{HOST}:{port}{load.target}"
        out = subprocess.run([*argv, url], capture_output=True, text=True, check=True).stdout
    return told(out, seconds)


def told(out: str, seconds: float) -> dict[str, Any]:
    """Read the output of wrk; raises ValueError if it has another form."""
    counted = re.search(r"(\d+) requests in ", out)
    rate = re.search(r"Requests/sec: +([0-9.]+)", out)
    p99 = re.search(r"^ +99% +([0-9.]+)(us|ms|s|m) *$", out, re.MULTILINE)
    if counted is None or rate is None or p99 is None:
        raise ValueError(f"cannot read what wrk says: {out!r}")
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    broken = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
    failures = (int(failed[1]) if failed else 0) + (sum(map(int, broken.groups())) if broken else 0)
    # wrk ends some milliseconds late; its rate is computed with the real length.
    took = int(counted[1]) / float(rate[1]) if float(rate[1]) else seconds
    latency = float(p99[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}[p99[2]]
    return {"requests": int(counted[1]), "failed": failures, "seconds": took, "p99": latency}


def _own(port: int, load: Load, seconds: float) -> dict[str, Any]:
    orders = {"host": HOST, "port": port, "target": load.target, "body": load.body, "headers": load.headers}
    orders |= {"connections": load.connections, "seconds": seconds}
    argv = [sys.executable, str(HERE / "_wire.py"), json.dumps(orders)]
    counted: dict[str, Any] = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    return counted


CLIENTS = {"wrk": _wrk, "own": _own}


def warm_up(server: Running) -> None:
    """Send some requests that do not count; raises NotReadyError if the server does not answer."""
    _count(server, LOADS[0], "own", _WARM_UP)


def sample(server: Running, load: Load, options: argparse.Namespace) -> Sample:
    """Put a server under a load for some seconds; raises NotReadyError if that fails."""
    with contextlib.ExitStack() as stack:
        slept = []
        if load.sleepers:
            slept = stack.enter_context(Background((HOST, server.port), load.sleepers, _SLEEP)).answers
        used = server.cpu()
        counted = _count(server, load, options.client, options.seconds)
        used = server.cpu() - used
    if load.sleepers and not sum(slept):
        raise NotReadyError(f"{server.name} answered no sleeper under {load.text}")
    return Sample(**counted, cpu=used, slept=sum(slept))


def _count(server: Running, load: Load, client: str, seconds: float) -> dict[str, Any]:
    try:
        counted = CLIENTS[client](server.port, load, seconds)
    except (subprocess.CalledProcessError, ValueError) as error:
        raise NotReadyError(f"{server.name} under {load.text}: {error}") from error
    if not counted["requests"]:
        raise NotReadyError(f"{server.name} answered nothing under {load.text}")
    return counted


def beside(server: Running, count: int, options: argparse.Namespace) -> Beside:
    """Measure one busy connection alone, then beside `count` connections that send nothing."""
    alone = sample(server, LOADS[0], options)
    with Crowd((HOST, server.port), count) as crowd:
        server.wait_connections(count, _ACCEPTED_WITHIN - crowd.age)
        accepted = crowd.age
        crowded = sample(server, LOADS[0], options)
    return Beside(accepted, alone.rate, crowded.rate)


def balance(server: Server, options: argparse.Namespace) -> Balance:
    """Have four workers of four threads do 14 jobs of 10 ms at a time, each on a connection of its own."""
    orders = {"host": HOST, "target": f"/pid?seconds={JOB}", "body": 0, "headers": ["Connection: close"]}
    orders |= {"connections": JOBS_AT_A_TIME, "fresh": True}
    with running(server, free_port(), served=BALANCED) as each:
        orders["port"] = each.port
        for seconds in (_WARM_UP, options.seconds):
            argv = [sys.executable, str(HERE / "_wire.py"), json.dumps(orders | {"seconds": seconds})]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotReadyError(f"{server.name}: the jobs broke off: {done.stderr[-300:]}")
    counted: dict[str, Any] = json.loads(done.stdout)
    if counted["failed"] or not counted["requests"]:
        raise NotReadyError(f"{server.name}: {counted['failed']} jobs failed, {counted['requests']} were done")
    return Balance(counted["bodies"], counted["p99"])


def supervisor(server: Server, options: argparse.Namespace) -> Supervisor:
    """Leave a server with workers alone for some seconds, and measure its first process."""
    with running(server, free_port(), served=Served(workers=options.workers)) as each:
        time.sleep(_WARM_UP)
        pid, began, used = each.process.pid, time.monotonic(), cpu_of(each.process.pid)
        time.sleep(_IDLE_TIMES * options.seconds)
        share = (cpu_of(pid) - used) / (time.monotonic() - began)
        return Supervisor(memory_of(pid), share)


def memory(server: Server, options: argparse.Namespace) -> float:
    """MiB of a server after 256 busy connections; no other server runs meanwhile that could share its pages."""
    with running(server, free_port(), served=Served(workers=options.workers)) as each:
        sample(each, _FULLEST, options)
        return each.memory()
