"""How long stops take, and what becomes of running requests, for flaskd and its peers.

    python benchmarks/stop.py [--servers flaskd,gunicorn] [--only idle,backlog] [--workers N] [--runs 5] [--quick]
                              [--json FILE]

A row is one kind of stop; the columns are flaskd's goal and the servers. Each stop has a server process of its own, and
the servers take turns. Seconds are the median over the runs, from the signal to the exit of the process unless the row
says otherwise. ``6/8`` are requests answered in full, in the worst run; ``killed`` is a server that had not exited
after some time, and ``-`` one that cannot do it, with the reason below the table.

With ``--workers`` each server that can have several worker processes has that many: the signal goes to the first
process, and the goals are the same.

The names of the rows, for ``--only``, are those of the functions in this file. The exit status is 1 if flaskd misses a
goal. Seconds depend on what else the machine does meanwhile; the numbers of requests do not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from _servers import (
    HOST,
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
from _wire import Connection, Crowd
from app import THREADS

_BEGUN = 0.3
"""Seconds within which a request that was sent begins to be served."""
_BETWEEN = 0.4
"""Seconds between two signals: flaskd takes two within 0.25 s for one (docs/signals.md)."""
_IMPATIENCE = 15.0
"""Seconds within which a server must exit after the last signal; longer than any stop here may take."""
_ACCEPTED_WITHIN = 30.0


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measurement; `grace` is flaskd's default."""

    work: float = 2.0
    grace: float = 1.0
    clients: int = 100
    backlog: int = 50
    mib: int = 10
    crowd: int = 10_000
    workers: int = 0

    @property
    def threads(self) -> int:
        """The threads of all workers."""
        return THREADS * max(1, self.workers)

    def describe(self, text: str) -> str:
        """Fill the sizes into a text."""
        return text.format(**asdict(self), threads=self.threads, queued=2 * self.threads)


QUICK = Sizes(work=0.3, grace=0.2, clients=10, backlog=20, mib=2, crowd=500)
_HANG = "cleanup: {policies: {hang: {use: call, with: {target: 'app:hang'}, timeout: 20s}}}\n"


@dataclass(frozen=True)
class Figure:
    """The result of one stop: seconds, and how many of `of` requests were answered in full."""

    seconds: float
    answered: int = 0
    of: int = 0


def _exit(server: Running, since: float) -> float:
    return server.wait_exit(since, _IMPATIENCE)


def idle(server: Running, sizes: Sizes) -> Figure:  # noqa: ARG001 - all have the same shape
    """Stop a server without connections."""
    return Figure(_exit(server, server.terminate()))


def in_flight(server: Running, sizes: Sizes) -> Figure:
    """One request in flight; the seconds from the moment when its answer was due to the exit."""
    with _asking(server, f"/slow?seconds={sizes.work}") as client:
        due = time.monotonic() + sizes.work
        time.sleep(min(_BEGUN, sizes.work / 2))
        server.terminate()
        answered = int(client.answered())
        return Figure(max(0.0, _exit(server, due)), answered, 1)


def kept_alive(server: Running, sizes: Sizes, pause: float = 1.3) -> Figure:
    """Keep-alive connections that have been idle for longer than the grace."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_asking(server, "/")) for _ in range(sizes.clients)]
        answered = sum(each.answered() for each in clients)
        time.sleep(pause * sizes.grace)
        return Figure(_exit(server, server.terminate()), answered, len(clients))


def just_answered(server: Running, sizes: Sizes) -> Figure:
    """Keep-alive connections that have just had an answer."""
    return kept_alive(server, sizes, pause=0)


def refusal(server: Running, sizes: Sizes) -> Figure:
    """The time from the signal to the first refused client, while a running request keeps the server alive."""
    with _asking(server, f"/slow?seconds={sizes.work}") as client:
        time.sleep(min(_BEGUN, sizes.work / 2))
        since = server.terminate()
        refused = float("inf")
        while refused == float("inf") and time.monotonic() < since + _IMPATIENCE:
            try:
                socket.create_connection((HOST, server.port), timeout=_IMPATIENCE).close()
            except ConnectionRefusedError:
                refused = time.monotonic() - since
            except OSError:  # it was reset, so a process still listens
                pass
            time.sleep(0.001)
        answered = int(client.answered())
        _exit(server, since)
        return Figure(refused, answered, 1)


def backlog(server: Running, sizes: Sizes) -> Figure:
    """Requests on connections that the kernel has made and the server, held up meanwhile, has not accepted."""
    pids = server.pids
    with contextlib.ExitStack() as stack:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        clients = [stack.enter_context(_asking(server, "/")) for _ in range(sizes.backlog)]
        since = server.terminate()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        answered = sum(each.answered() for each in clients)
        return Figure(_exit(server, since), answered, len(clients))


def queued(server: Running, sizes: Sizes) -> Figure:
    """Twice as many requests in flight as there are threads; the seconds from the moment when the last was due.

    If workers do not share them evenly, the last answer comes later.
    """
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(_asking(server, f"/slow?seconds={sizes.work}")) for _ in range(2 * sizes.threads)
        ]
        due = time.monotonic() + 2 * sizes.work
        time.sleep(min(_BEGUN, sizes.work / 2))
        server.terminate()
        answered = sum(each.answered() for each in clients)
        return Figure(max(0.0, _exit(server, due)), answered, len(clients))


def slow_readers(server: Running, sizes: Sizes) -> Figure:
    """Three clients that read a long answer slowly; the seconds from the last byte of the last one."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(_asking(server, f"/big?mib={sizes.mib}", receive_buffer=65536)) for _ in range(3)
        ]
        for each in clients:  # wait until each answer has begun
            each.socket.recv(1, socket.MSG_PEEK)
        server.terminate()
        answered = _read_together(clients)
        return Figure(_exit(server, time.monotonic()), answered, len(clients))


def _read_together(clients: list[Connection]) -> int:
    with ThreadPoolExecutor(len(clients)) as pool:
        return sum(pool.map(lambda each: each.answered(pace=0.01), clients))


def second_signal(server: Running, sizes: Sizes) -> Figure:  # noqa: ARG001
    """A second SIGTERM, while a request takes half a minute and, in flaskd, a cleanup step hangs."""
    with _asking(server, "/slow?seconds=30"):
        time.sleep(_BEGUN)
        server.terminate()
        time.sleep(_BETWEEN)
        return Figure(_exit(server, server.terminate()))


def third_signal(server: Running, sizes: Sizes) -> Figure:  # noqa: ARG001
    """A third SIGTERM, in the same situation."""
    with _asking(server, "/slow?seconds=30"):
        time.sleep(_BEGUN)
        for _ in range(2):
            server.terminate()
            time.sleep(_BETWEEN)
        return Figure(_exit(server, server.terminate()))


def crowd(server: Running, sizes: Sizes) -> Figure:
    """Thousands of connections that never sent anything, and close when the server does."""
    with Crowd((HOST, server.port), sizes.crowd) as clients:
        server.wait_connections(sizes.crowd, _ACCEPTED_WITHIN)
        time.sleep(1.3 * sizes.grace)
        clients.follow()
        return Figure(_exit(server, server.terminate()))


def _asking(server: Running, target: str, **options: int) -> Connection:
    return Connection((HOST, server.port), **options).ask(target)


@dataclass(frozen=True)
class Kind:
    """A kind of stop, and flaskd's goal: at most so many seconds, and every request answered."""

    take: Callable[[Running, Sizes], Figure]
    text: str
    most: Callable[[Sizes], float] | None
    config: str = ""

    @property
    def name(self) -> str:
        return self.take.__name__

    def goal(self, sizes: Sizes) -> str:
        return "all answered" if self.most is None else f"≤ {self.most(sizes):g} s"

    def missed(self, sizes: Sizes, figures: list[Figure]) -> bool:
        late = self.most is not None and not median([each.seconds for each in figures]) <= self.most(sizes)
        return late or any(each.answered < each.of for each in figures)


KINDS = [
    Kind(idle, "idle", lambda _: 0.3),
    Kind(in_flight, "a request of {work:g} s in flight, exit after its end", lambda _: 0.5),
    Kind(kept_alive, "{clients} keep-alive, idle longer than the grace", lambda _: 0.5),
    Kind(just_answered, "{clients} keep-alive, just answered", lambda sizes: sizes.grace + 0.5),
    Kind(refusal, "first refusal after the signal", lambda _: 0.05),
    Kind(backlog, "{backlog} in the backlog", None),
    Kind(queued, "{queued} x {work:g} s over {threads} threads, exit after the end", None),
    Kind(slow_readers, "3 slow readers of {mib} MiB, exit after the last byte", None),
    Kind(second_signal, "2nd signal to exit", lambda _: 1.3, _HANG),
    Kind(third_signal, "3rd signal to exit", lambda _: 0.1, _HANG),
    Kind(crowd, "{crowd} connections that never spoke", lambda _: 2.0),
]


def measure(server: Server, kind: Kind, sizes: Sizes) -> Figure:
    """Start a server and stop it once; raises NotReadyError if that fails."""
    config = f"shutdown: {{drain: {{keepalive_grace: {sizes.grace}s}}}}\n" + kind.config
    try:
        with running(server, free_port(), config=config, served=Served(workers=sizes.workers)) as each:
            return kind.take(each, sizes)
    except (OSError, ValueError) as error:  # before the stop it closed, or its answer was unreadable
        raise NotReadyError(f"{server.name} broke off: {error}") from error


def _cell(figures: list[Figure]) -> str:
    if not figures:
        return "-"
    seconds = median([each.seconds for each in figures])
    text = "killed" if seconds == float("inf") else f"{seconds:.2f} s"
    worst = min(figures, key=lambda each: each.answered)
    return f"{text}, {worst.answered}/{worst.of}" if worst.of else text


def main() -> int:
    """Measure, print, and return 1 if flaskd missed a goal."""
    names = [kind.name for kind in KINDS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="separated by commas (%(default)s)")
    parser.add_argument("--only", default=",".join(names), help="separated by commas (%(default)s)")
    take_workers(parser)
    parser.add_argument("--runs", type=int, default=5, help="stops of each kind for each server (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and one run: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(names):
        parser.error(f"no row {min(unknown)!r}: choose from {', '.join(names)}")
    kinds = [kind for kind in KINDS if kind.name in options.only.split(",")]
    sizes, runs = (QUICK, 1) if options.quick else (Sizes(), options.runs)
    sizes = replace(sizes, workers=options.workers)
    open_many_files()
    servers = chosen(options.servers)
    print(f"{environment()}\n", flush=True)

    figures: dict[tuple[str, str], list[Figure]] = {
        (kind.name, server.name): [] for kind in kinds for server in servers
    }
    unable: dict[tuple[str, str], str] = {}
    for _, kind, server in itertools.product(range(runs), kinds, servers):
        key = kind.name, server.name
        if key not in unable:
            try:
                figures[key].append(measure(server, kind, sizes))
            except NotReadyError as error:
                unable[key] = str(error)

    rows = [
        [sizes.describe(kind.text), kind.goal(sizes), *[_cell(figures[kind.name, server.name]) for server in servers]]
        for kind in kinds
    ]
    of_workers = f", {sizes.workers} workers" if sizes.workers else ""
    headers = ["stop", "goal", *[server.name for server in servers]]
    print(table(f"## From SIGTERM to exit, median of {runs}{of_workers}", headers, rows))
    for (name, _), reason in unable.items():
        print(f"{name}: {reason}")
    missed = [
        kind.name
        for kind in kinds
        if ("flaskd" in [server.name for server in servers])
        and ((kind.name, "flaskd") in unable or kind.missed(sizes, figures[kind.name, "flaskd"]))
    ]
    print(f"flaskd misses: {', '.join(missed)}" if missed else "flaskd meets every goal")
    if options.json:
        stops = [
            {
                "kind": name,
                "server": server,
                "median": median([each.seconds for each in those]),
                "figures": [asdict(each) for each in those],
                "error": unable.get((name, server)),
            }
            for (name, server), those in figures.items()
        ]
        text = {"environment": environment(), "sizes": asdict(sizes), "stops": stops, "missed": missed}
        options.json.write_text(json.dumps(text, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
