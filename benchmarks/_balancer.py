"""HAProxy in front of several servers, in one process: one port for each way to learn that a server is leaving.

==============  ====================================================================================================
agent           the server's own agent (``agent-check``) says drain, and up when it is back
httpchk         HAProxy requests a path of the server
disable-on-404  the same, where 404 means that the server is leaving (``http-check disable-on-404``)
runtime         the program that restarts a server tells HAProxy before and after (runtime API: ``set server``)
kube            HAProxy passes connections on, and checks and retries nothing, as kube-proxy does; the program that
                restarts a server tells HAProxy too late (`_kubelet.py`)
==============  ====================================================================================================

Servers are checked every `INTER` milliseconds; a slow check, on a busy machine, does not make a server count as dead.
Only refused connections are tried again.
"""

from __future__ import annotations

import csv
import shutil
import socket
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

INTER = 100
_PATIENCE = 20.0
_LOOK = 0.01
"""Seconds between two looks at what HAProxy knows."""

WAYS = ("agent", "httpchk", "disable-on-404", "runtime", "kube")
_HEAD = """
global
    stats socket {socket} mode 600 level admin
    log stderr format raw local0
defaults
    mode http
    log global
    option httplog
    option dontlog-normal
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout check 5s
    option redispatch 1
    retries 3
    retry-on conn-failure
"""
_ASKS = "    option httpchk GET {health}\n    http-check send hdr Host localhost\n"
_CHECK = f"check inter {INTER}ms fall 1 rise 1"
_OPTIONS = {
    "agent": "",
    "httpchk": _ASKS,
    "disable-on-404": f"{_ASKS}    http-check disable-on-404\n",
    "runtime": "",
    "kube": "    mode tcp\n    option tcplog\n    no option redispatch\n    retries 0\n",
}
_SERVER = {
    "agent": f"{_CHECK} agent-check agent-addr 127.0.0.1 agent-port {{agent}} agent-inter {INTER}ms",
    "httpchk": _CHECK,
    "disable-on-404": _CHECK,
    "runtime": _CHECK,
    "kube": "",
}


class BalancerError(Exception):
    """HAProxy does not start, refuses a command, or does not notice something in time; the message says what."""


@dataclass(frozen=True)
class Node:
    """A server behind HAProxy: its name, its port, and its agent's port if it has one."""

    name: str
    port: int
    agent: int = 0


class Balancer:
    """HAProxy, while it is open as a context manager; `ports` has the client's port for each way."""

    def __init__(self, directory: Path, nodes: Sequence[Node], ports: dict[str, int], *, health: str) -> None:
        self.ports = ports
        self.log = directory / "haproxy.log"
        self._socket = directory / "haproxy.sock"
        text = _HEAD.format(socket=self._socket)
        for way, port in ports.items():
            text += f"listen {way}\n    bind 127.0.0.1:{port}\n{_OPTIONS[way].format(health=health)}"
            for each in nodes:
                text += f"    server {each.name} 127.0.0.1:{each.port} {_SERVER[way].format(agent=each.agent)}\n"
        self._file = directory / "haproxy.cfg"
        self._file.write_text(text, encoding="ascii")

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(["haproxy", "-db", "-f", str(self._file)], stdout=log, stderr=log)
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self.states()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > until:
                    self.__exit__()
                    raise BalancerError(f"HAProxy did not start:\n{self.log.read_text()}") from None
                time.sleep(_LOOK)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def tell(self, command: str) -> str:
        """Send a command to the runtime API, and return the answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_PATIENCE)
            client.connect(str(self._socket))
            client.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: client.recv(65536), b"")).decode().strip()

    def put(self, way: str, name: str, state: str) -> None:
        """Set a server of a way to ready, drain or maint."""
        if said := self.tell(f"set server {way}/{name} state {state}"):
            raise BalancerError(f"HAProxy does not take {way}/{name} {state}: {said}")

    def states(self, column: str = "status") -> dict[tuple[str, str], str]:
        """HAProxy's state of each server of each way: UP, DOWN, DRAIN, NOLB, MAINT or no check."""
        rows = csv.DictReader(self.tell("show stat").removeprefix("# ").splitlines())
        return {
            (row["pxname"], row["svname"]): row[column].partition(" (")[0]
            for row in rows
            if row["svname"] not in {"FRONTEND", "BACKEND"}
        }

    def wait(self, name: str, states: Collection[str], ways: Collection[str] = ()) -> float:
        """Wait until a server is in one of the states for all `ways`; returns the seconds that it took."""
        began = time.monotonic()
        while True:
            found = self.states()
            if all(found[way, name] in states for way in ways or self.ports):
                return time.monotonic() - began
            if time.monotonic() - began > _PATIENCE:
                raise BalancerError(f"HAProxy does not see {name} as {', '.join(states)}: {found}")
            time.sleep(_LOOK)

    def wait_idle(self, way: str, name: str) -> None:
        """Wait until a server of a way has no running request."""
        until = time.monotonic() + _PATIENCE
        while self.states("scur")[way, name] != "0" and time.monotonic() < until:
            time.sleep(_LOOK)


CHECKED = ("agent", "httpchk", "disable-on-404", "runtime")
"""The ways in which HAProxy itself finds out that a server is gone."""
READY = frozenset({"UP", "no check"})
"""The states in which a server gets requests."""


def wait_refused(port: int) -> None:
    """Wait until no process listens on a port any more."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), _PATIENCE).close()
        except ConnectionRefusedError:
            return
        except OSError:  # the kernel accepted it, and it ended with its listener
            pass
        time.sleep(_LOOK)
    raise BalancerError(f"something still listens on port {port}")


def missing() -> list[str]:
    """The programs that are not installed."""
    return [] if shutil.which("haproxy") else ["haproxy"]


def version() -> str:
    """HAProxy's version."""
    said = subprocess.run(["haproxy", "-v"], capture_output=True, text=True, check=True).stdout
    return " ".join(said.split()[:3])
