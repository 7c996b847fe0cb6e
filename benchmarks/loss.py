"""What becomes of each request while a server is stopped, restarted or drained under load.

    python benchmarks/loss.py [--servers flaskd,gunicorn] [--scenario stop] [--workers N] [--cycles 20]

Scenarios: ``stop`` starts and stops the server on a port of its own under mixed clients; ``connect`` does the same
under clients that make a connection for each request; ``restart`` stops and starts it on a listener that this process
holds and the server inherits (LISTEN_FDS), so that no client need be refused; ``drain`` drains and resumes flaskd.

With ``--workers`` there are six more, in each of which one server serves all the time: ``reload`` brings new code,
``replace`` gives the slots new workers one after the other (`flaskd restart SLOT`), ``scale`` adds two workers and
removes them, ``bad`` brings code that does not load, answers 500, exits or hangs. In ``leak`` each request leaks 1 MB,
so that workers are replaced for their memory (`pool.max_memory`), which none may exceed by more than 30 %. ``kill``
sends SIGKILL to a worker: only its own connections may fail, and flaskd must name the requests that it had begun and
not ended (`flaskd workers --json`); the app writes both to a file. A kill waits until there is more than one worker
again. A cycle of ``leak`` is 6 s.

``_load.py`` explains the columns. The exit status is 1 if flaskd lost a request (``kill``: of another worker), or if
it refused one while its workers change, or broke another promise that is named below the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

from _load import FATES, LOST, Load
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
    running,
    table,
    take_workers,
)
from _workers import LEAK_LIMIT, LEAKS, PEERS_TOO, busy, tell

SCENARIOS = {
    "stop": "Stop under load: SIGTERM, exit, start again on the same port",
    "connect": "Stop while 24 clients connect anew for each request",
    "restart": "Restart on a listener that the parent process holds",
    "drain": "Drain and resume under load, by flaskd's control socket",
}
WITH_WORKERS = {
    "reload": "New code for all workers",
    "replace": "A new worker for one slot after the other",
    "scale": "Two workers more, and back again",
    "bad": "New code that is refused",
    "kill": "SIGKILL for a worker",
    "leak": f"{LEAKS} requests a second and worker, each of which leaks 1 MB, and pool.max_memory: {LEAK_LIMIT}MiB",
}
_MOST_FAULTS = 20
"""How many broken promises are printed."""
TOOK = {
    "drain": "drain",
    "reload": "new code everywhere",
    "replace": "new worker",
    "scale": "change",
    "bad": "refusal",
    "kill": "wait",
    "leak": "life of a worker",
}
"""What the seconds in the last column are, if they are not those from a stop to the exit."""


def _served(options: argparse.Namespace) -> Served:
    return Served(workers=options.workers)


def _stops(server: Server, port: int, options: argparse.Namespace, load: str) -> tuple[dict[str, Any], list[float]]:
    took: list[float] = []
    with contextlib.closing(Load(port, load, options.clients)) as clients:
        for _ in range(options.cycles):
            with running(server, port, unprivileged=options.unprivileged, served=_served(options)) as each:
                busy()
                took.append(each.wait_exit(each.terminate()))
        return clients.finish(), took


def _restarts(server: Server, port: int, options: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    took: list[float] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((HOST, port), backlog=1024))
        clients: Load | None = None
        for cycle in range(options.cycles + 1):
            with running(server, port, listener, unprivileged=options.unprivileged, served=_served(options)) as each:
                clients = clients or stack.enter_context(contextlib.closing(Load(port, "mixed", options.clients)))
                busy()
                if cycle < options.cycles:
                    took.append(each.wait_exit(each.terminate()))
                else:  # the last server answers the remaining requests
                    return clients.finish(), took
    raise AssertionError


def _drains(server: Server, port: int, options: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    took: list[float] = []
    with (
        running(server, port, unprivileged=options.unprivileged, served=_served(options)) as each,
        contextlib.closing(Load(port, "mixed", options.clients)) as clients,
    ):
        for _ in range(options.cycles):
            busy()
            began = time.monotonic()
            _command(each, "drain wait")
            took.append(time.monotonic() - began)
            _command(each, "resume")
        busy()
        return clients.finish(), took


def _command(server: Running, line: str) -> None:
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(60)
        control.connect(str(server.control))
        control.sendall(line.encode() + b"\n")
        answer = b"".join(iter(lambda: control.recv(4096), b"")).decode()
    if not answer.splitlines()[-1:] or not answer.splitlines()[-1].startswith("OK"):
        raise NotReadyError(f"flaskd answered {answer!r} to {line!r}")


def measure(server: Server, scenario: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one scenario with one server; the account has ``error`` if the server cannot do it."""
    port = free_port()
    try:
        if scenario == "restart":
            account, took = _restarts(server, port, options)
        elif scenario == "drain":
            account, took = _drains(server, port, options)
        elif scenario in WITH_WORKERS:
            account, took = tell(server, port, scenario, options)
        else:
            account, took = _stops(server, port, options, "connect" if scenario == "connect" else "mixed")
    except NotReadyError as error:
        return {"server": server.name, "scenario": scenario, "error": str(error)}
    lost = sum(account["fates"][fate] for fate in LOST)
    return {
        "server": server.name,
        "scenario": scenario,
        "cycles": options.cycles,
        "took": took,
        "lost": lost,
        **account,
    }


def failed(account: dict[str, Any]) -> bool:
    """Whether a promise was broken; after a kill the loss of that worker's own requests breaks none."""
    lost = account.get("lost", 0) if account["scenario"] != "kill" else account.get("fates", {}).get("wrong", 0)
    return bool("error" in account or lost or account.get("faults"))


def _row(account: dict[str, Any]) -> list[str]:
    if "error" in account:
        return [account["server"], *["-"] * (len(FATES) + 4)]
    fates = [str(account["fates"][fate]) for fate in FATES]
    per_cycle = f"{account['lost'] / account['cycles']:.1f}"
    cycles, requests = str(account["cycles"]), str(account["requests"])
    return [account["server"], cycles, requests, *fates, per_cycle, f"{median(account['took']):.2f} s"]


def _report(scenario: str, accounts: list[dict[str, Any]]) -> str:
    headers = ["server", "cycles", "requests", *FATES, "lost a cycle", TOOK.get(scenario, "stop to exit")]
    title = (SCENARIOS | WITH_WORKERS)[scenario]
    lines = [table(f"## {title}", headers, [_row(account) for account in accounts])]
    for account in accounts:
        name = account["server"]
        if "error" in account:
            lines.append(f"{name}: {account['error']}")
            continue
        if missing := account["requests"] - sum(account["fates"].values()):
            lines.append(f"{name}: the fate of {missing} requests is not known: a fault of this program")
        lines += [f"{name}: {count} x {what}" for what, count in account["details"].items()]
        if "named" in account:
            lines.append(f"{name} names {account['named']} requests of the killed workers")
        if peaks := account.get("peaks"):
            most, times = max(peaks), max(peaks) / LEAK_LIMIT
            lines.append(f"{name}: {len(peaks)} workers, the largest had {most:.0f} MiB (PSS): {times:.2f} x the limit")
        faults = account.get("faults", [])
        lines += [f"{name}: {fault}" for fault in faults[:_MOST_FAULTS]]
        lines += [f"{name}: {len(faults) - _MOST_FAULTS} more like these"] if len(faults) > _MOST_FAULTS else []
    return "\n".join(lines)


def _can(server: Server, scenario: str) -> bool:
    if server.name == "flaskd":
        return True
    return scenario in PEERS_TOO and server.pooled if scenario in WITH_WORKERS else scenario != "drain"


def main() -> int:
    """Measure, print, and return 1 if flaskd lost anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="separated by commas (%(default)s)")
    parser.add_argument("--scenario", choices=[*SCENARIOS, *WITH_WORKERS, "all"], default="all")
    take_workers(parser)
    parser.add_argument("--cycles", type=int, default=10, help="stops or other steps for each server (%(default)s)")
    parser.add_argument("--clients", type=int, default=24, help="closed loops (%(default)s)")
    parser.add_argument("--unprivileged", action="store_true", help="run the servers as nobody, when started as root")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all accounts, each loss with its moment")
    options = parser.parse_args()
    if options.scenario in WITH_WORKERS and not options.workers:
        parser.error(f"--scenario {options.scenario} takes worker processes: give --workers N, too")
    able = SCENARIOS | (WITH_WORKERS if options.workers else {})
    servers = chosen(options.servers)
    print(f"{environment()}\n")
    accounts = []
    for scenario in able if options.scenario == "all" else [options.scenario]:
        those = [measure(server, scenario, options) for server in servers if _can(server, scenario)]
        accounts += those
        print(_report(scenario, those), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "accounts": accounts}, indent=1) + "\n")
    return 1 if any(failed(each) for each in accounts if each["server"] == "flaskd") else 0


if __name__ == "__main__":
    sys.exit(main())
