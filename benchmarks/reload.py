"""Good and bad new code under load: what becomes of the requests and of the server, for flaskd and its peers.

    python benchmarks/reload.py [--servers flaskd,gunicorn] [--kinds good,syntax] [--workers 2] [--cycles 1]
                                [--json FILE]

Each server serves an app with two workers under mixed clients: those of `_load.py`, without pipelining and Expect,
which not all servers answer. Then new code replaces the old one, and the server is told to reload: flaskd by `flaskd
reload`, gunicorn, granian and uvicorn by SIGHUP, uWSGI by its chain reload. Each table is for one kind of code: good;
slow to import; broken (a syntax error, an exception); an app that answers 500, which flaskd detects with
`health.probe`; one that exits while it is imported, and one that hangs. For each reload a new server is started, and
the servers take turns. The columns:

- lost: requests that were sent and not answered in full; raced: the server's close crossed them on the wire;
- wrong: answered with another status; rejected: answered 503; refused: connections, tried again after some 20 ms;
- silence: the longest time in which no client had an answer, in seconds, the worst of the cycles;
- survived: the first process of the server still runs some seconds afterwards; else its exit code;
- answers: the code that new connections find at the end, ``new``, ``old``, both, or nothing;
- told: the exit code of the command that asked for the reload. A signal has none.

The server is watched until its command has returned, or until no old worker is left and new ones answer, at most for
``--seconds``. The exit status is 1 if flaskd lost, refused or garbled a request, did not survive, has the wrong code at
the end, or returned the wrong exit code (right is 0 for good code, 70 for bad).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from _load import Load
from _reload import EXIT_OF_BAD_CODE, GOOD, KINDS, MODULE, RELOADS, Code, config, put, serving, taken_over, versions
from _servers import NotReadyError, Running, Server, chosen, environment, free_port, running, table, take_workers
from app import THREADS

OLD, NEW = "old", "new"
_BEFORE = 0.8
"""Seconds of load before the reload."""
_AFTER = 1.0
"""Seconds of load after its outcome is known."""
_PATIENCE = 8.0
"""Seconds of silence after which a client gives up."""
_START_TIMEOUT = 8.0
"""Seconds that flaskd gives a new worker."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one reload; `exited` is the exit code of a server that did not survive."""

    server: str
    kind: str
    requests: int = 0
    fates: dict[str, int] = field(default_factory=dict)
    silence: float = 0.0
    exited: int | None = None
    answers: str = ""
    told: int | None = None
    said: str = ""
    seconds: float = 0.0
    details: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def lost(self) -> int:
        return self.fates["reset"] + self.fates["cut"]

    def faults(self, code: Code) -> list[str]:
        """The promises that flaskd has not kept."""
        if self.error:
            return [self.error]
        wanted = 0 if code.good else EXIT_OF_BAD_CODE
        told = "nothing" if self.told is None else f"exit code {self.told}"
        checks = [
            (self.lost, f"{self.lost} requests lost"),
            (self.fates["wrong"], f"{self.fates['wrong']} answered wrong"),
            (self.fates["refused"], f"{self.fates['refused']} refused"),
            (self.exited is not None, f"exited with {self.exited}"),
            (self.answers != (NEW if code.good else OLD), f"answers: {self.answers}"),
            (self.told != wanted, f"told {told}, not {wanted}"),
            (code.says not in self.said, f"did not say {code.says!r}"),
        ]
        return [text for broken, text in checks if broken]


def measure(server: Server, code: Code, options: argparse.Namespace) -> Outcome:
    """Start a server, reload new code under load, and record what becomes of both."""
    port, served = free_port(), serving(options.workers, THREADS)
    try:
        with (
            running(
                server, port, served=served, config=config(_START_TIMEOUT), modules={f"{MODULE}.py": GOOD.version(OLD)}
            ) as each,
            contextlib.closing(Load(port, "plain", options.clients, _PATIENCE)) as clients,
        ):
            clients.wait_begun()
            time.sleep(_BEFORE)
            old = each.workers
            put(each, code, NEW)
            began = time.monotonic()
            told = RELOADS[server.name](each, options.seconds)
            if told is None:
                _watch(each, old, began + options.seconds)
            took = time.monotonic() - began
            time.sleep(_AFTER)
            account = clients.finish()
            return Outcome(
                server.name,
                code.name,
                account["requests"],
                account["fates"],
                account["silence"],
                each.process.poll(),
                _answers(each),
                told.returncode if told else None,
                told.stdout + told.stderr if told else "",
                round(took, 2),
                account["details"],
            )
    except NotReadyError as error:
        return Outcome(server.name, code.name, error=str(error))


def _watch(server: Running, old: list[int], until: float) -> None:
    """Wait until a server whose reload has no command has only new workers, or has exited; at most until a moment."""
    while time.monotonic() < until and server.process.poll() is None:
        if taken_over(server, old, NEW):
            return
        time.sleep(0.1)


def _answers(server: Running) -> str:
    found = sorted(f"{version} {status}" if status != 200 else version for status, version in versions(server))
    return " and ".join(found) or "nothing"


def _row(server: str, those: list[Outcome]) -> list[str]:
    done = [each for each in those if not each.error]
    if not done:
        return [server, *["-"] * 9]
    sums = [
        sum(each.requests for each in done),
        sum(each.lost for each in done),
        *[sum(each.fates[fate] for each in done) for fate in ("raced", "wrong", "rejected", "refused")],
    ]
    exits = sorted({each.exited for each in done if each.exited is not None})
    alive = sum(each.exited is None for each in done)
    return [
        server,
        *map(str, sums),
        f"{max(each.silence for each in done):.2f}",
        f"{alive} of {len(done)}" + (f", exit {', '.join(map(str, exits))}" if exits else ""),
        " / ".join(sorted({each.answers for each in done})),
        ", ".join(sorted({"-" if each.told is None else str(each.told) for each in done})),
    ]


def report(kind: Code, outcomes: dict[str, list[Outcome]], workers: int) -> str:
    """The table of one kind of code."""
    headers = ["server", "requests", "lost", "raced", "wrong", "rejected", "refused", "silence", "survived"]
    rows = [_row(name, those) for name, those in outcomes.items()]
    laid = table(f"## New code: {kind.text} ({workers} workers)", [*headers, "answers", "told"], rows)
    errors = {each.error: each.server for each in itertools.chain(*outcomes.values()) if each.error}
    return laid + "".join(f"{server}: {error}\n" for error, server in errors.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [kind.name for kind in KINDS]
    parser.add_argument("--servers", default=",".join(RELOADS), help="separated by commas (%(default)s)")
    parser.add_argument("--kinds", default=",".join(names), help="of new code, separated by commas (%(default)s)")
    parser.add_argument("--cycles", type=int, default=1, help="reloads of each kind for each server (%(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="closed loops (%(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="that a server is watched, at most (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome")
    take_workers(parser, default=2)
    options = parser.parse_args()
    if unknown := set(options.kinds.split(",")) - set(names):
        parser.error(f"no kind {min(unknown)!r}: choose from {', '.join(names)}")
    if unknown := set(options.servers.split(",")) - set(RELOADS):
        parser.error(f"no server {min(unknown)!r} that reloads: choose from {', '.join(RELOADS)}")
    if not options.workers:
        parser.error("--workers 0 cannot reload code: give at least 1")
    return options


def main() -> int:
    """Measure, print, and return 1 if flaskd broke a promise."""
    options = _options()
    kinds = [kind for kind in KINDS if kind.name in options.kinds.split(",")]
    servers = chosen(options.servers)
    print(f"{environment()}\n", flush=True)
    every: list[Outcome] = []
    faults: list[str] = []
    for kind in kinds:
        outcomes: dict[str, list[Outcome]] = {server.name: [] for server in servers}
        for _ in range(options.cycles):
            for server in random.sample(servers, len(servers)):
                outcomes[server.name].append(measure(server, kind, options))
        print(report(kind, outcomes, options.workers), flush=True)
        every += itertools.chain(*outcomes.values())
        found = [fault for each in outcomes.get("flaskd", []) for fault in each.faults(kind)]
        faults += [f"{kind.name}: {fault}" for fault in dict.fromkeys(found)]
    for fault in faults:
        print(f"flaskd breaks a promise: {fault}")
    if options.json:
        written = {"environment": environment(), "workers": options.workers, "faults": faults}
        written["outcomes"] = [asdict(each) for each in every]
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
