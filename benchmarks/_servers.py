"""The measured servers, each started as its users start it, and the printed tables."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import random
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _processes import accepted, children, group, memory_of
from app import THREADS

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
PATIENCE = 20.0
"""Seconds within which a server must become ready."""
EXIT_PATIENCE = 60.0
"""Seconds within which a server must exit; then it is killed, and the figure is wrong."""
NOBODY = 65534
TOUCHED = "touched"
"""The file in uWSGI's directory that tells it to reload."""

_INHERIT = (
    "import os, sys; fd = int(sys.argv[1]); os.dup2(fd, 3); fd == 3 or os.close(fd);"
    "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
)
"""Becomes the server, with the listener as descriptor 3: sd_listen_fds(3)."""
_WAITRESS_ON_3 = (
    "import socket, waitress; from app import app;"
    f"waitress.serve(app, sockets=[socket.socket(fileno=3)], threads={THREADS}, connection_limit=20000, "
    "asyncore_use_poll=True)"
)


class NotReadyError(Exception):
    """The server did not answer; the message has the end of its log."""


@dataclass(frozen=True)
class Served:
    """What a server serves: a callable of a module, with a number of threads in each of its worker processes.

    With 0 workers flaskd serves in its own process, and each other server with one worker.
    """

    app: str = "app"
    threads: int = THREADS
    workers: int = 0
    module: str = "app"

    @property
    def target(self) -> str:
        """The app as servers are told."""
        return f"{self.module}:{self.app}"

    @property
    def processes(self) -> int:
        """How many processes run the app in a server that can have several."""
        return max(1, self.workers)


FLASK = Served()


@dataclass(frozen=True)
class Server:
    """A server; `bound` gives its arguments for a port of its own, `inherited` those for an inherited listener.

    `access` is the format of flaskd's access log; the others write none. `checkout` is the directory from which flaskd
    is imported, if it is not the installed one. `core` is the CPU on which the server runs, if it may not use all.
    `pooled`: whether it can have several worker processes; `workers` is how many it has, whatever is asked for.
    """

    name: str
    modules: tuple[str, ...]
    bound: Callable[[int, Served], list[str]]
    inherited: Callable[[Served], list[str]] | None = None
    pooled: bool = True
    access: str = "off"
    checkout: Path | None = None
    core: int | None = None
    workers: int | None = None

    @property
    def path(self) -> str:
        """PYTHONPATH for its process."""
        return os.pathsep.join(map(str, (self.checkout, HERE) if self.checkout else (HERE,)))

    @property
    def missing(self) -> list[str]:
        """What of it is not installed."""
        return [each for each in self.modules if importlib.util.find_spec(each) is None]


def _flaskd(served: Served, *more: str) -> list[str]:
    workers = ["-w", str(served.workers)] if served.workers else []
    return ["-m", "flaskd", "serve", served.target, "-c", "flaskd.yaml", "-t", str(served.threads), *workers, *more]


def _waitress(port: int, served: Served) -> list[str]:
    # Without the latter two it accepts 100 connections and fails on descriptors above 1023.
    limits = ["--connection-limit=20000", "--asyncore-use-poll"]
    return ["-m", "waitress", f"--listen={HOST}:{port}", f"--threads={served.threads}", *limits, served.target]


def _gunicorn(served: Served, *more: str) -> list[str]:
    options = ["-k", "gthread", "-w", str(served.processes), "--threads", str(served.threads)]
    options += ["--graceful-timeout", "30"]
    options += ["--no-control-socket", "--worker-connections", "20000"]
    return ["-m", "gunicorn", *options, *more, served.target]


def _uvicorn(served: Served, *more: str) -> list[str]:
    # The environment tells app:asgi what to serve.
    options = ["--no-access-log", "--timeout-graceful-shutdown", "30", "--workers", str(served.processes)]
    return ["-m", "uvicorn", "--factory", "app:asgi", *options, *more]


def _granian(port: int, served: Served) -> list[str]:
    options = ["--interface", "wsgi", "--workers", str(served.processes), "--no-ws"]
    options += ["--blocking-threads", str(served.threads)]
    options += ["--backpressure", "20000"]  # the most connections; its default is 1024
    return ["-m", "granian", *options, "--host", HOST, "--port", str(port), served.target]


def _uwsgi(port: int, served: Served) -> list[str]:
    # uWSGI's router speaks HTTP to clients; the hook is its recipe for a SIGTERM that lets requests finish.
    options = ["--master", "--enable-threads", "--threads", str(served.threads), "--need-app", "--disable-logging"]
    options += ["--http-keepalive", "--http-auto-chunked", "--listen", "1024", "--virtualenv", sys.prefix]
    options += ["--hook-master-start", "unix_signal:15 gracefully_kill_them_all"]
    if served.workers:  # like the others, each worker imports the app, so that a reload can replace them one by one
        options += ["--processes", str(served.workers), "--lazy-apps", "--touch-chain-reload", TOUCHED]
    program = str(Path(sys.executable).with_name("uwsgi"))
    become = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    return ["-c", become, program, "--http", f"{HOST}:{port}", *options, "--module", served.target]


SERVERS = {
    each.name: each
    for each in (
        Server("flaskd", ("flaskd",), lambda port, what: _flaskd(what, "-l", f"{HOST}:{port}"), _flaskd),
        Server("waitress-serve", ("waitress",), _waitress, lambda _: ["-c", _WAITRESS_ON_3], pooled=False),
        Server("gunicorn", ("gunicorn",), lambda port, what: _gunicorn(what, "-b", f"{HOST}:{port}"), _gunicorn),
        Server(
            "uvicorn",
            ("uvicorn", "a2wsgi"),
            lambda port, what: _uvicorn(what, "--host", HOST, "--port", str(port)),
            lambda what: _uvicorn(what, "--fd", "3"),
        ),
        Server("granian", ("granian",), _granian),
        Server("uwsgi", ("uwsgidecorators",), _uwsgi),
    )
}


def chosen(names: str) -> list[Server]:
    """The named servers, separated by commas; prints which are left out because they are not installed."""
    wanted = []
    for name in names.split(","):
        if name not in SERVERS:
            raise SystemExit(f"no server {name!r}: choose from {', '.join(SERVERS)}")
        if SERVERS[name].missing:
            print(f"{name} is left out: {', '.join(SERVERS[name].missing)} is not installed")
        else:
            wanted.append(SERVERS[name])
    return wanted


def take_workers(parser: argparse.ArgumentParser, default: int = 0) -> None:
    """Add the option ``--workers`` to a command."""
    parser.add_argument(
        "--workers",
        type=_count,
        default=default,
        metavar="N",
        help="worker processes of each server that can have several; with 0 flaskd serves in its own (%(default)s)",
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)


def open_many_files() -> None:
    """Raise the limit of open files to its maximum, for thousands of connections here and in the servers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def free_port() -> int:
    """A port outside of the range for clients: a client on it could connect to itself while no server listens."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    while True:
        port = random.randrange(10_000, max(10_001, lowest))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


class Running:
    """A server process in a directory of its own; it inherits `listener`, or binds `port`.

    `config` is flaskd's configuration apart from the access log. `modules` are Python files, by name, that the app may
    import.
    """

    def __init__(
        self,
        server: Server,
        port: int,
        listener: socket.socket | None = None,
        *,
        unprivileged: bool = False,
        config: str = "",
        served: Served = FLASK,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        if listener is not None and server.inherited is None:
            raise NotReadyError(f"{server.name} is not measured on an inherited listener")
        if server.workers is not None:
            served = dataclasses.replace(served, workers=server.workers)
        self.port = port
        self.name = server.name
        self._path = server.path
        self.served = served
        self._processes = served.processes if server.pooled else 1
        self.directory = Path(tempfile.mkdtemp(prefix="bench-"))
        (self.directory / "flaskd.yaml").write_text(f'log: {{access: "{server.access}"}}\n{config}', encoding="ascii")
        (self.directory / "run").mkdir()
        self._imported = self.directory / "imported"
        for name, text in (modules or {}).items():
            (self.directory / name).write_text(text, encoding="utf-8")
        env = {key: value for key, value in os.environ.items() if not key.startswith(("LISTEN_", "FLASK"))}
        env |= {
            "PYTHONPATH": os.pathsep.join((server.path, str(self.directory))),
            "BENCHMARKS_MODULE": served.module,
            "BENCHMARKS_APP": served.app,
            "BENCHMARKS_THREADS": str(served.threads),
            "BENCHMARKS_IMPORTED": str(self._imported),
            "BENCHMARKS_NOTES": str(self.notes),
            "PYTHONDONTWRITEBYTECODE": "1",
            "RUNTIME_DIRECTORY": str(self.directory / "run"),
            "STATE_DIRECTORY": str(self.directory),
            "HOME": str(self.directory),
        }
        argv = [sys.executable, *server.bound(port, served)]
        options: dict[str, Any] = {}
        if listener is not None and server.inherited is not None:
            argv = [sys.executable, "-c", _INHERIT, str(listener.fileno()), sys.executable, *server.inherited(served)]
            options["pass_fds"] = [listener.fileno()]
        if unprivileged and os.geteuid() == 0:
            for each in (self.directory, *self.directory.iterdir()):
                os.chown(each, NOBODY, NOBODY)
            options |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        try:
            with self.log.open("wb") as log:
                self.began = time.monotonic()
                self.process = subprocess.Popen(
                    argv,
                    cwd=self.directory,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    process_group=0,  # with it close() finds processes that outlive the first one
                    **options,
                )
            if server.core is not None:  # its threads and children inherit it
                os.sched_setaffinity(self.process.pid, {server.core})
        except PermissionError as error:
            shutil.rmtree(self.directory)
            raise NotReadyError(
                f"cannot run {sys.executable} as nobody: {error.strerror}; use a Python that everybody may run"
            ) from error

    @property
    def log(self) -> Path:
        """Its output, and flaskd's access log."""
        return self.directory / "log"

    @property
    def notes(self) -> Path:
        """The file that `app:noted` writes."""
        return self.directory / "notes"

    @property
    def control(self) -> Path:
        """The path of flaskd's control socket."""
        return self.directory / "run" / "control.sock"

    def wait_ready(self, look: float = 0.01) -> None:
        """Wait until it answers 200, asking every `look` seconds, and until each of its workers has the app.

        Raises NotReadyError with its log.
        """
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            with (
                contextlib.suppress(OSError, ValueError, IndexError),
                socket.create_connection((HOST, self.port), timeout=until - time.monotonic()) as sock,
            ):
                sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if sock.recv(64).split()[1] == b"200":
                    break
            time.sleep(look)
        if not self.wait_workers(self._processes, until):
            log = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            self.close()
            raise NotReadyError(f"{self.name} did not become ready: {' | '.join(log) or 'it logged nothing'}")

    def wait_workers(self, count: int, until: float) -> bool:
        """Wait until `count` of its processes have imported the app; False if that takes longer than `until`."""
        while time.monotonic() < until and self.process.poll() is None:
            if count == 1 or len(self.workers) >= count:
                return True
            time.sleep(0.01)
        return False

    @property
    def workers(self) -> list[int]:
        """Its processes that have imported the app, without the first process if there are several."""
        alive = self.pids[1:] if self._processes > 1 else self.pids
        return [pid for pid in dict.fromkeys(self._importers()) if pid in alive]

    @property
    def imports(self) -> int:
        """How many times one of its processes has imported the app."""
        return len(self._importers())

    def _importers(self) -> list[int]:
        return [int(pid) for pid in self._imported.read_text().split()] if self._imported.exists() else []

    def ask(self, target: str, patience: float) -> tuple[int, bytes]:
        """Send a request on a new connection; returns status and body, raises OSError or ValueError if none comes."""
        with socket.create_connection((HOST, self.port), timeout=patience) as client:
            client.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            head, end, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")
        if not end:
            raise ValueError(f"it ended within the head of its answer: {head!r}")
        return int(head.split()[1]), body

    def flaskd(self, *arguments: str, patience: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a flaskd command that talks to it."""
        argv = [sys.executable, "-m", "flaskd", *arguments, "--socket", str(self.control)]
        env = os.environ | {"PYTHONPATH": self._path, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(argv, env=env, cwd="/", capture_output=True, text=True, timeout=patience, check=False)

    def terminate(self) -> float:
        """Send SIGTERM and return the moment; raises NotReadyError if it has exited already."""
        if self.process.poll() is not None:
            raise NotReadyError(f"{self.name} has exited before")
        moment = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return moment

    def wait_exit(self, since: float, patience: float = EXIT_PATIENCE) -> float:
        """Wait until it has exited and return the seconds since a moment; infinite if it had to be killed."""
        exited = os.pidfd_open(self.process.pid)  # Popen.wait() with a timeout is up to 50 ms late
        try:
            watch = select.poll()
            watch.register(exited, select.POLLIN)
            moment = time.monotonic() if watch.poll(patience * 1000) else float("inf")
        finally:
            os.close(exited)
        if moment == float("inf"):
            self.close()
        self.process.wait()
        return moment - since

    @property
    def pids(self) -> list[int]:
        """Its process and all descendants."""
        found = [self.process.pid]
        for pid in found:
            found += children(pid)
        return found

    def cpu(self) -> float:
        """CPU seconds that it and its children have used: proc(5)."""
        used = 0
        for pid in self.pids:
            words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            used += int(words[11]) + int(words[12])
        return used / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MiB of memory that it and its children have, shared pages counted in parts: proc_pid_smaps_rollup(5)."""
        return sum(memory_of(pid) for pid in self.pids)

    def connections(self) -> int:
        """How many open connections it has accepted: in proc_net(5), those in a backlog have inode 0."""
        where = f"{self.port:04X} "
        lines = Path("/proc/self/net/tcp").read_text(encoding="ascii").splitlines()[1:]
        # The fields: number, local address, remote address, state (01 is ESTABLISHED), five more, inode.
        return sum(line.partition(":")[2].partition(":")[2].startswith(where) and accepted(line) for line in lines)

    def wait_connections(self, count: int, patience: float) -> None:
        """Wait until it has accepted `count` connections that are still open; raises NotReadyError."""
        until = time.monotonic() + patience
        while (now := self.connections()) < count:
            if time.monotonic() > until:
                raise NotReadyError(f"{self.name} has {now} of {count} connections after {patience:.0f} s")
            time.sleep(0.02)

    def close(self) -> None:
        """Kill its remaining processes, and remove its directory."""
        if self.process.poll() is None:
            for child in self.pids[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            self.process.kill()
        for left in group(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        self.process.wait()
        if os.environ.get("BENCHMARKS_KEEP_LOGS"):
            print(f"{self.name} log: {self.log}")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def running(server: Server, port: int, listener: socket.socket | None = None, **options: Any) -> Iterator[Running]:
    """Start a server, wait until it is ready, and close it at the end; the options are those of Running."""
    each = Running(server, port, listener, **options)
    try:
        each.wait_ready()
        yield each
    finally:
        each.close()


def median(values: Sequence[float]) -> float:
    """The median; not a number if there are no values."""
    return statistics.median(values) if values else float("nan")


def percentile(values: Sequence[float], hundredth: int) -> float:
    """The value that this many hundredths of all values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * hundredth // 100) - 1)]


def environment() -> str:
    """The versions and the machine on which the figures were taken, in one line."""
    versions = []
    for module in ("flaskd", "waitress", "gunicorn", "uvicorn", "a2wsgi", "granian", "uwsgi", "flask", "httptools"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{module} {importlib.metadata.version(module)}")
    system = os.uname()
    cores = len(os.sched_getaffinity(0))
    return f"{', '.join(versions)}; Python {sys.version.split()[0]}, {system.sysname} {system.release}, {cores} cores"


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    lines = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]

    def lay(line: Sequence[str]) -> str:
        first, *others = [
            each.ljust(width) if column == 0 else each.rjust(width)
            for column, (each, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join([first, *others]) + " |"

    rule = (
        "|" + "|".join("-" * (width + 1) + ("-" if column == 0 else ":") for column, width in enumerate(widths)) + "|"
    )
    return "\n".join([title, "", lay(lines[0]), rule, *[lay(line) for line in lines[1:]], ""])
