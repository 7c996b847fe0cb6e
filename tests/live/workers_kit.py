"""Workers in live tests: an app with two versions, questions to flaskd, and clients."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Self

from daemon_kit import Flaskd
from http_client import Answer, outcome

APP = """
import os, socket
from flask import Flask

app = Flask(__name__)
CODE = "{code}"

@app.get("/")
def index():
    return CODE

@app.get("/who")
def who():
    return f"{{CODE}} {{os.environ['FLASKD_WORKER']}} {{os.environ['FLASKD_GENERATION']}}"

@app.get("/hold")
def hold():
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)
    return "held by " + CODE
"""


WAITS = (
    "with socket.socket(socket.AF_UNIX) as gate:\n    gate.connect(os.environ['GATE'])\n"
    "    gate.sendall(b'entered')\n    gate.recv(1)\n"
)
"""Code whose import waits for the gate."""


def code(flaskd: Flaskd, name: str, more: str = "") -> None:
    """Write code that answers with that name; `more` comes after it."""
    flaskd.write("shop.py", APP.format(code=name) + more)


def start(flaskd: Flaskd, *args: str, config: str = "") -> Flaskd:
    """Start two workers that serve the code "one"."""
    code(flaskd, "one")
    if config:
        flaskd.write("flaskd.yaml", config)
    return flaskd.start("-w", "2", *args, app="shop:app")


def asked(flaskd: Flaskd, verb: str) -> dict[str, Any]:
    """The answer of a client verb, as JSON for programs."""
    with flaskd.control() as client:
        client.sendall(json.dumps({"id": 1, "cmd": verb}).encode() + b"\n")
        with client.makefile("rb") as answers:
            return dict(json.loads(answers.readline()))


def shown(flaskd: Flaskd) -> list[dict[str, Any]]:
    """The description of each worker, as JSON for programs."""
    return list(asked(flaskd, "workers")["list"])


def workers(flaskd: Flaskd) -> list[tuple[int, int]]:
    """Slot and pid of each serving worker."""
    return [(each["slot"], each["pid"]) for each in shown(flaskd) if each["state"] == "ready"]


def generations(flaskd: Flaskd) -> list[int]:
    """The generation of each slot's worker."""
    return [each["generation"] for each in shown(flaskd) if each["state"] == "ready"]


class Clients:
    """Clients that send requests without a pause, and note the outcome of each."""

    def __init__(self, url: str, count: int = 4) -> None:
        self._url, self._ended = url, threading.Event()
        self.answers: list[object] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            self.answers.append(outcome(self._url))

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for each in self._threads:
            each.join()

    @property
    def lost(self) -> list[object]:
        """The outcomes that were no answer of the app."""
        return [each for each in self.answers if not isinstance(each, tuple) or each[0] != 200]

    @property
    def said(self) -> set[bytes]:
        """All bodies."""
        return {each[1] for each in self.answers if isinstance(each, tuple)}


class Asking(threading.Thread):
    """A command that runs while the test goes on."""

    def __init__(self, flaskd: Flaskd, line: str = "reload") -> None:
        super().__init__(daemon=True)
        self._flaskd, self._line = flaskd, line
        self._control = flaskd.control()
        self._control.sendall(line.encode() + b"\n")
        self._said = b""
        self.start()

    def run(self) -> None:
        with self._control:
            self._said = b"".join(iter(lambda: self._control.recv(65536), b""))

    def answer(self) -> str:
        """All output, without the progress."""
        self.join(60)
        assert not self.is_alive(), self._flaskd.log
        return "".join(each for each in self._said.decode().splitlines(keepends=True) if not each.startswith(".. "))


def worker_pids(flaskd: Flaskd) -> set[int]:
    """The pids of all workers."""
    return {int(each["pid"]) for each in shown(flaskd)}


def hold_in_both(flaskd: Flaskd, url: str, least: int = 3) -> list[Answer]:
    """Make requests that run until the gate opens, until both workers have some; each worker has 16 threads.

    On a busy machine one worker may take more requests than it has places for, before the other one is awake.
    """
    held: list[Answer] = []
    while len(held) < least or not all(each["in_flight"] for each in shown(flaskd)):
        held.append(Answer(url, "/hold"))
        flaskd.until(lambda: sum(each["in_flight"] for each in shown(flaskd)) == len(held))
    for each in shown(flaskd):
        for _ in range(min(each["in_flight"], 16)):
            flaskd.gate.entered()
    return held


def all_gone(flaskd: Flaskd, pids: set[int]) -> None:
    """Wait until all of these processes have ended, reaped or not."""

    def gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    flaskd.until(lambda: all(map(gone, pids)))
