"""What becomes of requests while a server is stopped, restarted or drained under load, request by request.

    python benchmarks/loss.py [--servers flaskd,gunicorn] [--scenario stop] [--cycles 20]

Scenarios: ``stop`` starts and stops the server on a port of its own under mixed clients; ``connect`` does the same
under clients that make a connection for each request; ``restart`` stops and starts it on a listener that this process
holds and the server inherits (LISTEN_FDS), so that nothing need be refused; ``drain`` drains and resumes flaskd.
``_load.py`` says what each column means. The exit status is 1 when flaskd lost a request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _load import FATES, LOST
from _servers import (
    HERE,
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

SCENARIOS = {
    "stop": "Stop under load: SIGTERM, exit, start again on the same port",
    "connect": "Stop while 24 clients connect anew for each request",
    "restart": "Restart on a listener that the parent process holds",
    "drain": "Drain and resume under load, by flaskd's control socket",
}
_LOADED = 0.4
"""Seconds of load between two stops, on average."""


class Load:
    """The clients of `_load.py`, in a process of their own."""

    def __init__(self, port: int, kind: str, clients: int) -> None:
        orders = json.dumps({"host": HOST, "port": port, "load": kind, "clients": clients})
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "_load.py"), orders], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def finish(self) -> dict[str, Any]:
        """Let each client finish what it has begun, and return their account."""
        out, _ = self._process.communicate(timeout=120)
        account: dict[str, Any] = json.loads(out)
        return account

    def close(self) -> None:
        """End it if it still lives."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def _busy() -> None:
    time.sleep(_LOADED * random.uniform(0.7, 1.3))


def _stops(server: Server, port: int, options: argparse.Namespace, load: str) -> tuple[dict[str, Any], list[float]]:
    took: list[float] = []
    with contextlib.closing(Load(port, load, options.clients)) as clients:
        for _ in range(options.cycles):
            with running(server, port, unprivileged=options.unprivileged) as each:
                _busy()
                took.append(each.wait_exit(each.terminate()))
        return clients.finish(), took


def _restarts(server: Server, port: int, options: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    took: list[float] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((HOST, port), backlog=1024))
        clients: Load | None = None
        for cycle in range(options.cycles + 1):
            with running(server, port, listener, unprivileged=options.unprivileged) as each:
                clients = clients or stack.enter_context(contextlib.closing(Load(port, "mixed", options.clients)))
                _busy()
                if cycle < options.cycles:
                    took.append(each.wait_exit(each.terminate()))
                else:  # the last one answers all that is left
                    return clients.finish(), took
    raise AssertionError


def _drains(server: Server, port: int, options: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    took: list[float] = []
    with (
        running(server, port, unprivileged=options.unprivileged) as each,
        contextlib.closing(Load(port, "mixed", options.clients)) as clients,
    ):
        for _ in range(options.cycles):
            _busy()
            began = time.monotonic()
            _command(each, "drain wait")
            took.append(time.monotonic() - began)
            _command(each, "resume")
        _busy()
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
    """Run one scenario with one server; the account has ``error`` when the server cannot do it."""
    port = free_port()
    try:
        if scenario == "restart":
            account, took = _restarts(server, port, options)
        elif scenario == "drain":
            account, took = _drains(server, port, options)
        else:
            account, took = _stops(server, port, options, "connect" if scenario == "connect" else "mixed")
    except NotReadyError as error:
        return {"server": server.name, "scenario": scenario, "error": str(error)}
    lost = sum(account["fates"][fate] for fate in LOST)
    return {"server": server.name, "scenario": scenario, "cycles": len(took), "took": took, "lost": lost, **account}


def _row(account: dict[str, Any]) -> list[str]:
    if "error" in account:
        return [account["server"], *["-"] * (len(FATES) + 4)]
    fates = [str(account["fates"][fate]) for fate in FATES]
    per_cycle = f"{account['lost'] / account['cycles']:.1f}"
    cycles, requests = str(account["cycles"]), str(account["requests"])
    return [account["server"], cycles, requests, *fates, per_cycle, f"{median(account['took']):.2f} s"]


def _report(scenario: str, accounts: list[dict[str, Any]]) -> str:
    headers = [
        "server",
        "cycles",
        "requests",
        *FATES,
        "lost a cycle",
        "drain" if scenario == "drain" else "stop to exit",
    ]
    lines = [table(f"## {SCENARIOS[scenario]}", headers, [_row(account) for account in accounts])]
    for account in accounts:
        name = account["server"]
        if "error" in account:
            lines.append(f"{name}: {account['error']}")
            continue
        if missing := account["requests"] - sum(account["fates"].values()):
            lines.append(f"{name}: the fate of {missing} requests is not known: a fault of this program")
        lines += [f"{name}: {count} x {what}" for what, count in account["details"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and tell whether flaskd lost anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="separated by commas (%(default)s)")
    parser.add_argument("--scenario", choices=[*SCENARIOS, "all"], default="all")
    parser.add_argument("--cycles", type=int, default=10, help="stops or drains for each server (%(default)s)")
    parser.add_argument("--clients", type=int, default=24, help="closed loops (%(default)s)")
    parser.add_argument("--unprivileged", action="store_true", help="run the servers as nobody, when started as root")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all accounts, each loss with its moment")
    options = parser.parse_args()
    servers = chosen(options.servers)
    print(f"{environment()}\n")
    accounts = []
    for scenario in SCENARIOS if options.scenario == "all" else [options.scenario]:
        able = [each for each in servers if scenario != "drain" or each.name == "flaskd"]
        those = [measure(server, scenario, options) for server in able]
        accounts += those
        print(_report(scenario, those), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "accounts": accounts}, indent=1) + "\n")
    failed = [each for each in accounts if each["server"] == "flaskd" and ("error" in each or each["lost"])]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
