"""Real flaskd processes: started, waited for by their own readiness, and looked after when they have ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import systemd_kit

PATIENCE = 20.0
"""Seconds after which a test gives up waiting; no test waits that long when all is well."""

# Where the tests run in the background of a shell, or under nohup, SIGINT, SIGQUIT and SIGHUP are ignored, and flaskd would respect
# that. What it is to do with them is tested as in a terminal of its own.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

GATE_APP = """
import os, socket, time
from flask import Flask, Response, request

app = Flask(__name__)

@app.get("/")
def index():
    return "hello"

@app.get("/hold")
def hold():
    # Tells the test that it is running, and runs until the test says a word.
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)
    return "held"

@app.get("/environ")
def environ():
    return {key: str(request.environ[key]) for key in sorted(request.environ)}

@app.get("/boom")
def boom():
    raise RuntimeError("boom")
"""


class Gate:
    """Where requests to ``/hold`` announce themselves and wait to be let go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._listener.settimeout(PATIENCE)
        self._held: list[socket.socket] = []

    def entered(self) -> None:
        """Wait until one more request is running."""
        held, _ = self._listener.accept()
        held.settimeout(PATIENCE)
        assert held.recv(7) == b"entered"
        self._held.append(held)

    def open(self) -> None:
        """Let all of them go on."""
        for held in self._held:
            with contextlib.suppress(OSError):
                held.sendall(b"x")
            held.close()
        self._held.clear()

    def close(self) -> None:
        self.open()
        self._listener.close()


class Answer(threading.Thread):
    """A request made in a thread; its outcome is (status, body) or the exception."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__(daemon=True)
        self._url, self._path = url, path
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = get(self._url, self._path)
        except (OSError, http.client.HTTPException) as error:
            self.outcome = error

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), f"no answer to {self._path}"
        return self.outcome


def get(url: str, path: str = "/", **headers: str) -> tuple[int, bytes]:
    """GET a path; `url` is http://host:port/ or unix:/path."""
    host = url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection("localhost" if url.startswith("unix:") else host, timeout=PATIENCE)
    if url.startswith("unix:"):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(url.removeprefix("unix:"))
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


NOBODY = ("--name", "nobody-runs-this")
"""For a client that is to find no daemon, where one of the usual name may run on this machine."""


def refused(url: str) -> bool:
    """Whether nobody listens at the URL."""
    host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


class Flaskd:
    """One flaskd process with a runtime and state directory of its own, and a fake service manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime = directory / "run"
        self.state = directory / "state"
        self.gate = Gate(directory / "gate")
        self.messages: list[str] = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / "notify"))
        self._notify.settimeout(PATIENCE)
        self.process: subprocess.Popen[bytes] | None = None
        self.log_file = directory / "log"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("FLASK", "XDG_"))},
            "RUNTIME_DIRECTORY": str(self.runtime),
            "STATE_DIRECTORY": str(self.state),
            "NOTIFY_SOCKET": str(directory / "notify"),
            "GATE": str(self.gate.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "default",
        }
        self.write("gateapp.py", GATE_APP)

    # --- starting ---

    def write(self, name: str, text: str) -> Path:
        """Write a file into the directory that flaskd works in."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def launch(
        self,
        *args: str,
        app: str | None = "gateapp",
        listen: str | None = "127.0.0.1:0",
        prefix: Sequence[str] = (),
        **popen: Any,
    ) -> None:
        """Start it, and wait for nothing; `prefix` is a command that runs it."""
        argv = [*prefix, sys.executable, "-m", "flaskd", "serve", *([app] if app else []), *args]
        argv += ["-l", listen] if listen else []
        self.log_file.touch()
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=self.directory, env=self.env, stdin=subprocess.DEVNULL,
                **{"stdout": log, "stderr": log, **popen},
            )  # fmt: skip

    def start(self, *args: str, app: str | None = "gateapp", listen: str | None = "127.0.0.1:0", **how: Any) -> Flaskd:
        """Start it and wait until it says READY."""
        self.launch(*args, app=app, listen=listen, **how)
        self.wait_message("READY=1")
        return self

    def fails(self, *args: str, app: str | None = "gateapp", listen: str | None = "127.0.0.1:0") -> tuple[int, str]:
        """Start what cannot start; returns the exit code and all that was said."""
        self.launch(*args, app=app, listen=listen)
        return self.wait(), self.log

    def wait_message(self, wanted: str) -> str:
        """Wait for a notification with that text in it, keeping those before it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            readable, _, _ = select.select([self._notify], [], [], 0.2)
            if readable:
                self.messages.append(self._notify.recv(8192).decode())
                if wanted in self.messages[-1]:
                    return self.messages[-1]
            elif self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"flaskd exited with {self.process.returncode} before {wanted}:\n{self.log}")
        raise AssertionError(f"no {wanted} within {PATIENCE}s:\n{self.log}")

    def drain_messages(self) -> list[str]:
        """All notifications so far."""
        while select.select([self._notify], [], [], 0)[0]:
            self.messages.append(self._notify.recv(8192).decode())
        return self.messages

    # --- talking ---

    @property
    def log(self) -> str:
        """All that it wrote to standard output and error."""
        return self.log_file.read_text(errors="replace")

    @property
    def socket_path(self) -> Path:
        return self.runtime / "control.sock"

    @property
    def fifo_path(self) -> Path:
        return self.runtime / "control"

    def command(self, line: str) -> str:
        """Send a text command and return the whole answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.socket_path))  # waits for room in the backlog, which it would not with a timeout
            client.settimeout(PATIENCE)
            client.sendall(line.encode() + b"\n")
            return b"".join(iter(lambda: client.recv(65536), b"")).decode()

    def status(self) -> dict[str, Any]:
        """The status, as programs see it."""
        code, out, err = self.client("status", "--json")
        assert code == 0, err
        return dict(json.loads(out))

    def client(self, *args: str) -> tuple[int, str, str]:
        """Run a client verb."""
        done = subprocess.run(
            [sys.executable, "-m", "flaskd", *args],
            cwd=self.directory, env=self.env, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    @property
    def url(self) -> str:
        return str(self.status()["url"])

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def settle(self) -> None:
        """Wait until all is counted: a client may have its answer a moment before the daemon has it in its account."""
        self.until(lambda: "in_flight: 0" in self.command("status").splitlines())

    def hold(self, url: str | None = None) -> Answer:
        """Make a request that runs until the gate opens; it is running when this returns."""
        answer = Answer(url or self.url, "/hold")
        self.gate.entered()
        return answer

    def stop_holding(self, url: str | None = None) -> None:
        """SIGTERM with a request in hand: it is answered, and the exit code is 0."""
        held = self.hold(url)
        self.kill(signal.SIGTERM)
        self.wait_message("STOPPING=1")
        self.gate.open()
        assert held.result() == (200, b"held")
        assert self.wait() == 0

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that only shows by looking; bounded."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"it never became so:\n{self.log}"
            time.sleep(0.01)

    # --- ending ---

    def kill(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end, and return the exit code."""
        assert self.process is not None
        return self.process.wait(timeout)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.kill(signal.SIGTERM)
        return self.wait()

    def leftovers(self) -> list[str]:
        """What it left in its directories that should not be there."""
        found = [str(path) for path in self.runtime.glob("*")] + [str(path) for path in self.runtime.glob(".*")]
        return found + [str(path) for path in self.state.glob("*") if path.name != "last-stop.json"]

    def record(self) -> dict[str, Any]:
        """The record of the last stop."""
        return dict(json.loads((self.state / "last-stop.json").read_text()))

    def close(self) -> None:
        self.gate.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._notify.close()


class Terminal:
    """flaskd on a pseudo-terminal of its own, as a shell would start it."""

    def __init__(self, flaskd: Flaskd, *args: str, app: str = "gateapp", prefix: Sequence[str] = ()) -> None:
        self.flaskd = flaskd
        self.master, slave = pty.openpty()
        self.process = flaskd.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "flaskd", "serve", app, "-l", "127.0.0.1:0", *args],
            cwd=flaskd.directory, env=flaskd.env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a test may have hung it up
            os.close(self.master)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read_until(self, text: bytes) -> bytes:
        seen = b""
        end = time.monotonic() + PATIENCE
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([self.master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    seen += os.read(self.master, 65536)
        return seen


def children(pid: int) -> list[int]:
    """The pids of a process' children."""
    with contextlib.suppress(FileNotFoundError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def handles_sigterm(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM (SigCgt, proc_pid_status(5)), which Python has none for."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.fixture
def make_flaskd() -> Iterator[Callable[[], Flaskd]]:
    """Makes flaskd processes, each with a short-pathed directory of its own (a Unix socket's path has 107 bytes)."""
    made: list[Flaskd] = []

    def make() -> Flaskd:
        made.append(Flaskd(Path(tempfile.mkdtemp(prefix="flaskd-test-"))))
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(OSError):
            print(f"--- log of {each.directory}:\n{each.log}")
        each.close()
        shutil.rmtree(each.directory)


@pytest.fixture
def flaskd(make_flaskd: Callable[[], Flaskd]) -> Iterator[Flaskd]:
    """One flaskd; a test that ended it in good order must find nothing left of it."""
    each = make_flaskd()
    yield each
    ended = each.process is not None and each.process.poll() is not None
    if ended and each.process is not None and each.process.returncode >= 0:
        assert each.leftovers() == []


def requires(name: str, missing: Sequence[str]) -> None:
    """Skip with the reason when something is missing, unless $FLASKD_REQUIRE says that it must be there."""
    if missing:
        reason = f"{name} is not available: {', '.join(missing)}"
        if name in os.environ.get("FLASKD_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)


_managers: dict[str, systemd_kit.Systemd] = {}
"""Service managers that are booted, by the root file system they come from."""
_managers_end = contextlib.ExitStack()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the service managers when the next test needs none: others look for children that were left behind."""
    if nextitem is None or "systemd" not in nextitem.path.name:
        _managers.clear()
        _managers_end.close()


def booted(kind: str) -> systemd_kit.Systemd:
    """A real service manager with flaskd's units installed; the same one for all tests that follow each other."""
    requires("systemd", systemd_kit.why_not())
    if kind not in _managers:
        with _or_skipped(kind), contextlib.ExitStack() as ends:
            manager = ends.enter_context(systemd_kit.Systemd(_root(kind)))
            manager.prepare()
            _managers_end.enter_context(ends.pop_all())
        _managers[kind] = manager  # one that could not be prepared is of no use to the next test
    return _managers[kind]


def _root(kind: str) -> Path | None:
    return None if kind == "machine" else systemd_kit.debian_13()


@contextlib.contextmanager
def _or_skipped(kind: str) -> Iterator[None]:
    """What is missing for a service manager is a reason to skip the test, unless it has to be there."""
    try:
        yield
    except systemd_kit.UnavailableError as error:
        requires("systemd" if kind == "machine" else "systemd-257", [str(error)])
        raise


@pytest.fixture(params=["machine", "debian-13"])
def each_systemd(request: pytest.FixtureRequest) -> systemd_kit.Systemd:
    """This machine's service manager, and that of Debian 13."""
    return booted(request.param)


@pytest.fixture(params=["machine", "debian-13"])
def bare_systemd(request: pytest.FixtureRequest) -> Iterator[systemd_kit.Systemd]:
    """Like each_systemd, but with nothing of flaskd, with a network of its own, and for one test alone."""
    requires("systemd", systemd_kit.why_not())
    with contextlib.ExitStack() as ends:
        with _or_skipped(request.param):
            manager = ends.enter_context(systemd_kit.Systemd(_root(request.param), bare=True))
        tried = manager.run("/usr/bin/python3", "-c", "import ensurepip", check=False)
        requires("systemd", ["/usr/bin/python3 with ensurepip (Debian: python3-venv)"] if tried.returncode else [])
        yield manager


@pytest.fixture(params=["machine", "debian-13"] if systemd_kit.LONG else ["machine"])
def systemd(request: pytest.FixtureRequest) -> systemd_kit.Systemd:
    """This machine's service manager; with $FLASKD_LONG that of Debian 13, too."""
    return booted(request.param)
