"""Real flaskd processes: started, waited for by their own readiness, and asked what they did when they have ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_notify import Receiver
from http_client import Answer
from patience import PATIENCE, until

GATE_APP = """
import os, socket, threading, time
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

class Last:
    def __init__(self, seconds):
        self.seconds = seconds

    def __del__(self, wait=threading.Event().wait, write=os.write):
        write(1, b"finalizing\\n")
        wait(self.seconds)

@app.get("/finalizer/<float:seconds>")
def finalizer(seconds):
    # The process has something to do when it finalizes the interpreter.
    app.last = Last(seconds)
    return "accepted"
"""


class Gate:
    """The requests to ``/hold``: each signals that it runs, and waits until the test releases it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._listener.settimeout(PATIENCE)
        self._held: list[socket.socket] = []

    def is_called(self, seconds: float = 0.0) -> bool:
        """Whether one more request runs within `timeout` seconds."""
        return bool(select.select([self._listener], [], [], seconds)[0])

    def entered(self) -> None:
        """Wait until one more request is running."""
        held, _ = self._listener.accept()
        held.settimeout(PATIENCE)
        assert held.recv(7) == b"entered"
        self._held.append(held)

    def open(self, most: int | None = None) -> None:
        """Release all requests, or at most `most`, the first ones first."""
        for held in self._held[:most]:
            with contextlib.suppress(OSError):
                held.sendall(b"x")
            held.close()
        del self._held[:most]

    def close(self) -> None:
        self.open()
        self._listener.close()


NOBODY = ("--name", "nobody-runs-this")
"""An environment in which a client finds no daemon, even if this machine runs one with the usual name."""


class Flaskd:
    """One flaskd process with a runtime and state directory of its own, and a fake service manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime = directory / "run"
        self.state = directory / "state"
        self.gate = Gate(directory / "gate")
        self.messages: list[str] = []
        self._manager = Receiver(directory / "notify")
        self.process: subprocess.Popen[bytes] | None = None
        self.log_file = directory / "log"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("FLASK", "XDG_"))},
            "RUNTIME_DIRECTORY": str(self.runtime),
            "STATE_DIRECTORY": str(self.state),
            "NOTIFY_SOCKET": self._manager.address,
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
        """Start it without waiting; `prefix` is a command that runs it."""
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
        """Start it, although the start must fail; returns the exit code and its output."""
        self.launch(*args, app=app, listen=listen)
        return self.wait(), self.log

    def wait_message(self, wanted: str) -> str:
        """Wait for a notification that contains a text, and keep those before it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([self._manager], [], [], 0.2)[0]:
                self.messages.append(self._manager.message().decode())
                if wanted in self.messages[-1]:
                    return self.messages[-1]
            elif self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"flaskd exited with {self.process.returncode} before {wanted}:\n{self.log}")
        raise AssertionError(f"no {wanted} within {PATIENCE}s:\n{self.log}")

    def drain_messages(self) -> list[str]:
        """All notifications so far."""
        self.messages += [each.decode() for each in self._manager.messages()]
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

    def control(self) -> socket.socket:
        """A connection to the control socket."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.socket_path))  # without a timeout it waits for room in the backlog
        client.settimeout(PATIENCE)
        return client

    def command(self, line: str) -> str:
        """Send a text command and return the whole answer."""
        with self.control() as client:
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
        """Wait until all requests are counted: a client may have its answer slightly before the daemon counts it."""
        self.until(lambda: "in_flight: 0" in self.command("status").splitlines())

    def hold(self, url: str | None = None) -> Answer:
        """Make a request that runs until the gate opens; returns when it runs."""
        answer = Answer(url or self.url, "/hold")
        self.gate.entered()
        return answer

    def stop_holding(self, url: str | None = None) -> None:
        """Send SIGTERM while a request runs: it is answered, and the exit code is 0."""
        held = self.hold(url)
        self.kill(signal.SIGTERM)
        self.wait_message("STOPPING=1")
        self.gate.open()
        assert held.result() == (200, b"held")
        assert self.wait() == 0

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that must be polled; if it fails, the log is shown."""
        until(condition, lambda: f"\n{self.log}")

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
        """Files in its directories that it should have removed."""
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
        self._manager.close()


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
        with contextlib.suppress(OSError):  # a test may have closed it
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
    """The pids of a process' children, whichever thread started them."""
    found = []
    for each in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found += map(int, each.read_text().split())
    return sorted(found)


def handles_sigterm(pid: int) -> bool:
    """Whether a process handles SIGTERM (SigCgt, proc_pid_status(5)); a fresh Python does not."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16) >> (signal.SIGTERM - 1) & 1)


_SHIM = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])"


def inherit(
    flaskd: Flaskd,
    sock: socket.socket,
    *args: str,
    name: str = "",
    others: Sequence[socket.socket] = (),
    wait: str = "READY=1",
    app: str = "gateapp",
) -> Flaskd:
    """Start flaskd with listening sockets passed as systemd does (sd_listen_fds(3)); `name` has their names, with colons."""
    flaskd.env.update(LISTEN_FDS=str(1 + len(others)), LISTEN_FDNAMES=name)

    def pass_on() -> None:
        above = [fcntl.fcntl(each.fileno(), fcntl.F_DUPFD, 100) for each in (sock, *others)]
        for target, each in enumerate(above, 3):
            os.dup2(each, target)
            os.close(each)

    flaskd.launch(
        *args, app=app, listen=None, prefix=[sys.executable, "-c", _SHIM], preexec_fn=pass_on, close_fds=False
    )
    if wait:
        flaskd.wait_message(wait)
    return flaskd


def no_pid_namespace() -> list[str]:
    """What is missing for a PID namespace; empty if nothing is."""
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True, check=False
    )
    return [done.stderr.strip() or "unshare failed"] if done.returncode else []


def requires(name: str, missing: Sequence[str]) -> None:
    """Skip the test with the reason if something is missing, or fail if $FLASKD_REQUIRE names it."""
    if missing:
        reason = f"{name} is not available: {', '.join(missing)}"
        if name in os.environ.get("FLASKD_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
