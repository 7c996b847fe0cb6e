"""What a server answers while all of its threads hang, for flaskd and its peers.

    python benchmarks/hang.py [--servers flaskd,gunicorn] [--runs 3] [--limit 4]

Each server has one process with 4 threads, and its own limit on the time of a request, if it has one:
`server.request_timeout` of flaskd, ``--timeout`` of gunicorn, ``--harakiri`` of uWSGI. Each figure is the median of the
runs; each run has a server of its own, and the servers take turns. The columns:

- health: all 4 threads hang, and no limit is set. The time until the cheapest request is answered: `health.path` of
  flaskd, and a page of the app for the others, which have no such path. ``never``: no answer within 10 s.
- next: all 4 threads hang, the limit is set. The time until the next request, a page of the app, is answered.
- hung: what the client of a request that hangs gets: a status; ``closed``; ``nothing`` within 10 s.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from _servers import (
    HOST,
    SERVERS,
    NotReadyError,
    Running,
    Server,
    chosen,
    environment,
    free_port,
    median,
    running,
    table,
)
from _wire import request
from app import THREADS

_PATIENCE = 10.0
"""Seconds after which a missing answer counts as none."""
_HANGS = "/slow?seconds=60"
_BEGUN = 0.5
"""Seconds within which requests that were sent begin to run."""
_LIMITS = {"gunicorn": "--timeout={}", "uwsgi": "--harakiri={}"}


@dataclass
class Figures:
    """The figures of one server in seconds, and how often clients of hanging requests got each result."""

    health: list[float] = field(default_factory=list)
    next: list[float] = field(default_factory=list)
    hung: Counter[str] = field(default_factory=Counter)
    error: str = ""


def limited(server: Server, seconds: int) -> Server:
    """The server with its own limit; flaskd's is in its configuration, and some servers have none."""
    option = _LIMITS.get(server.name)
    if option is None:
        return server
    return dataclasses.replace(server, bound=lambda port, what: [*server.bound(port, what), option.format(seconds)])


def config(server: Server, limit: int = 0) -> str:
    """The configuration of flaskd."""
    more = f"server: {{request_timeout: {limit}s}}\n" if limit and server.name == "flaskd" else ""
    return f"health: {{path: /healthz}}\n{more}"


@contextlib.contextmanager
def hanging(server: Running, count: int) -> Iterator[list[socket.socket]]:
    """Send requests that hang, and wait until they run."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((HOST, server.port))) for _ in range(count)]
        for client in clients:
            client.sendall(request(_HANGS))
        time.sleep(_BEGUN)
        yield clients


def timed(server: Running, target: str) -> float:
    """Send a request; returns the seconds until the answer is complete, infinite if none comes."""
    began = time.monotonic()
    try:
        status, _ = server.ask(target, _PATIENCE)
    except (OSError, ValueError):
        return float("inf")
    return time.monotonic() - began if status == 200 else float("inf")


def fate(client: socket.socket, until: float) -> str:
    """What a client has received, or receives until a moment."""
    client.settimeout(max(0.01, until - time.monotonic()))
    try:
        got = client.recv(4096)
    except TimeoutError:
        return "nothing"
    except OSError:
        return "closed"
    return got.split()[1].decode() if got else "closed"


def all_hang(server: Server, figures: Figures, limit: int) -> None:
    """Measure what is answered while all threads hang: without the limit, and with it."""
    with running(server, free_port(), config=config(server)) as each, hanging(each, THREADS):
        figures.health.append(timed(each, "/healthz" if server.name == "flaskd" else "/"))
    with (
        running(limited(server, limit), free_port(), config=config(server, limit)) as each,
        hanging(each, THREADS) as clients,
    ):
        figures.next.append(timed(each, "/"))
        until = time.monotonic() + _PATIENCE
        figures.hung.update(fate(client, until) for client in clients)


def seconds(values: list[float]) -> str:
    """The median as text."""
    found = median(values)
    return "never" if found == float("inf") else f"{found:.3f} s" if found < 1 else f"{found:.1f} s"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="separated by commas (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each server (%(default)s)")
    parser.add_argument("--limit", type=int, default=4, help="seconds that a request may take (%(default)s)")
    options = parser.parse_args()
    servers = chosen(options.servers)
    print(f"{environment()}\n", flush=True)
    found = {server.name: Figures() for server in servers}
    for _, server in itertools.product(range(options.runs), servers):
        figures = found[server.name]
        if not figures.error:
            try:
                all_hang(server, figures, options.limit)
            except NotReadyError as error:
                figures.error = str(error)
    rows = []
    for name, each in found.items():
        hung = ", ".join(f"{fate} ({count})" for fate, count in each.hung.most_common())
        rows.append([name, seconds(each.health), seconds(each.next), hung])
    title = f"## Requests that hang, {THREADS} threads, limit {options.limit} s, median of {options.runs}"
    print(table(title, ["server", "health", "next", "hung"], rows))
    for name, each in found.items():
        if each.error:
            print(f"{name}: {each.error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
