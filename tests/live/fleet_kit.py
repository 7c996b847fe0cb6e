"""Several flaskds behind a balancer, and their clients; balancer and clients are those of the benchmarks."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from daemon_kit import Flaskd, requires
from http_client import refused
from patience import PATIENCE
from systemd_kit import PROJECT, free_port

BENCHMARKS = PROJECT / "benchmarks"
sys.path.append(str(BENCHMARKS))
balancer, kubelet, load = map(importlib.import_module, ("_balancer", "_kubelet", "_load"))
sys.path.remove(str(BENCHMARKS))

WAYS = ("agent", "httpchk", "disable-on-404", "runtime", "kube")
NAMES = ("one", "two", "three")
CLIENTS = 4
"""The clients of each way: one keeps its connection, one does not, one requests 50 ms of sleep, one posts."""
_PAUSE = 0.2
"""The longest pause of a client between two requests, in seconds."""
OUT = {"agent": "DRAIN", "httpchk": "DOWN", "disable-on-404": "NOLB"}
"""HAProxy's state of a server that says that it drains."""
_NGINX = """user root;
pid {0}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c; uwsgi_temp_path {0}/d; scgi_temp_path {0}/e;
    upstream flaskd {{
{1}    }}
    server {{
        listen 127.0.0.1:{2};
        location / {{
            proxy_pass http://flaskd;
            proxy_next_upstream error;
        }}
    }}
}}
"""


def agent_says(address: str) -> str:
    """The line that an agent sends to a new connection; empty if nothing listens there."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), PATIENCE) as client:
        return b"".join(iter(lambda: client.recv(100), b"")).decode().rstrip("\n")
    return ""


@contextlib.contextmanager
def nginx(directory: Path, ports: Sequence[int]) -> Iterator[int]:
    """The nginx of docs/proxy.md in front of servers on these ports; gives its own port."""
    port, servers = free_port(), "".join(f"        server 127.0.0.1:{each} max_fails=0;\n" for each in ports)
    file, log = directory / "nginx.conf", directory / "nginx.log"
    file.write_text(_NGINX.format(directory, servers, port))
    with log.open("wb") as out:
        process = subprocess.Popen(["nginx", "-g", "daemon off;", "-c", str(file)], stdout=out, stderr=out)
    try:
        while refused(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE)


class Fleet:
    """Three flaskds of two workers each behind HAProxy, which has a port for each way, and nginx."""

    def __init__(self, ends: contextlib.ExitStack) -> None:
        requires("haproxy", balancer.missing())
        requires("nginx", [] if shutil.which("nginx") else ["nginx"])
        self.nodes = [balancer.Node(name, free_port(), free_port()) for name in NAMES]
        self.flaskds = {each.name: self._made(each, ends) for each in self.nodes}
        for each in self.flaskds.values():
            each.launch(app="served:app", listen=None, start_new_session=True)
        for each in self.flaskds.values():
            each.wait_message("READY=1")
        directory = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="flaskd-fleet-")))
        self.haproxy = ends.enter_context(
            balancer.Balancer(directory, self.nodes, {way: free_port() for way in WAYS}, health="/healthz")
        )
        self.ports = dict(self.haproxy.ports)
        self.ports["nginx"] = ends.enter_context(nginx(directory, [each.port for each in self.nodes]))
        for name in NAMES:
            self.haproxy.wait(name, balancer.READY)

    def _made(self, node: Any, ends: contextlib.ExitStack) -> Flaskd:
        flaskd = Flaskd(Path(tempfile.mkdtemp(prefix="flaskd-test-")))
        ends.callback(shutil.rmtree, flaskd.directory)
        ends.callback(flaskd.close)
        flaskd.env["PYTHONPATH"] = str(BENCHMARKS)
        self.code(flaskd, "one")
        self.configure(flaskd, node, "600ms")
        return flaskd

    def configure(self, flaskd: Flaskd, node: Any, announce: str) -> None:
        """Write its configuration; `announce` is longer than HAProxy takes to notice the drain."""
        flaskd.write(
            "flaskd.yaml",
            f"server: {{listen: '127.0.0.1:{node.port}', workers: 2, instance: {node.name}, served_by: true}}\n"
            f"admin: {{agent: '127.0.0.1:{node.agent}'}}\nhealth: {{path: /healthz, unready_status: 404}}\n"
            f"log: {{access: 'off'}}\nshutdown: {{announce: {announce}}}\n",
        )

    def code(self, flaskd: Flaskd, version: str, more: str = "") -> None:
        """Write the app's code with a version."""
        flaskd.write("served.py", f"import app as base\nbase.VERSION = {version!r}\napp = base.app\n{more}")

    def start(self, name: str) -> None:
        """Start one again, and wait until HAProxy uses it."""
        flaskd = self.flaskds[name]
        flaskd.messages.clear()
        flaskd.start(app="served:app", listen=None, start_new_session=True)
        for way in ("runtime", "kube"):
            self.haproxy.put(way, name, "ready")
        self.haproxy.wait(name, balancer.READY)

    def restart(self, name: str) -> None:
        """Stop one and start it; a way in which HAProxy checks nothing is told before."""
        for way in ("runtime", "kube"):
            self.haproxy.put(way, name, "drain")
        self.haproxy.wait_idle("runtime", name)
        assert self.flaskds[name].stop() == 0
        self.start(name)

    def kill(self, name: str) -> tuple[float, float]:
        """Kill all of its processes; gives the moment at which they were dead, and how long HAProxy took to notice."""
        self.haproxy.put("kube", name, "maint")  # HAProxy checks nothing there
        flaskd = self.flaskds[name]
        os.killpg(flaskd.pid, signal.SIGKILL)
        flaskd.wait()
        balancer.wait_refused(next(each.port for each in self.nodes if each.name == name))
        return time.time(), self.haproxy.wait(name, {"DOWN"}, balancer.CHECKED)

    @contextlib.contextmanager
    def load(self, *ways: str) -> Iterator[dict[str, Any]]:
        """Clients of these ways, or of all, while it is open; it has their accounts by way afterwards."""
        accounts: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            found = {
                way: stack.enter_context(contextlib.closing(load.Load(port, "paced", CLIENTS, pause=_PAUSE)))
                for way, port in self.ports.items()
                if way in (ways or self.ports)
            }
            for each in found.values():
                each.wait_begun()
            yield accounts
            accounts.update({way: each.finish() for way, each in found.items()})

    def explain(self, accounts: dict[str, Any]) -> str:
        """All facts about a failure."""
        logs = "\n".join(f"--- {name}\n{each.log}" for name, each in self.flaskds.items())
        return f"{json.dumps(accounts, indent=1)}\n{self.haproxy.log.read_text()}\n{logs}"


def failed(account: dict[str, Any]) -> int:
    """How many requests were not answered in full with 200."""
    return sum(count for fate, count in account["fates"].items() if fate != "answered")
