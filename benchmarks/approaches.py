"""Costs and results of the three ways to stop a Flask app from a program, compared with their textbook versions.

    python benchmarks/approaches.py [--runs 7] [--json FILE]

Each way runs in a process of its own, all of them in turn. The medians are printed:

=============  ====================================================================================================
start          from the call that starts it to the first answer
memory         what the start adds: to the process for a thread, else the whole new process (VmRSS)
stop, idle     from the call that stops it until it has ended
stop, busy     the same with a running request that takes one second
answered       whether that request was answered
cleanup        whether the app's cleanup had run by then
=============  ====================================================================================================

The textbook versions are the usual ones: a thread around ``make_server`` and its ``shutdown()``; a
``multiprocessing.Process`` around ``app.run`` and its ``terminate()``; a route that sends SIGINT to its own process,
because Werkzeug 2.1 has removed ``werkzeug.server.shutdown``. Their cleanup is an ``atexit`` callback. The exit status
is 1 if flaskd lost the request or the cleanup.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import http.client
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Flask

import flaskd

HOST = "127.0.0.1"
PATIENCE = 30.0
_READING = 0.2
"""Seconds that a client in this process has to read an answer that was sent."""
DIRECTORY = Path(os.environ.get("APPROACHES_DIRECTORY", tempfile.gettempdir()))
"""Where the app writes that its request runs, and that its cleanup has run."""


def create_app() -> Flask:
    """Make the app, the same for all ways."""
    app = Flask("approaches")

    @app.get("/")
    def index() -> str:
        return "hello\n"

    @app.get("/second")
    def second() -> str:
        with (DIRECTORY / "entered").open("wb") as fifo:
            fifo.write(b"x")
        time.sleep(1)
        return "a second\n"

    @app.post("/shutdown")
    def shutdown() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "shutting down\n"

    return app


def clean_up() -> None:
    """Leave a mark."""
    (DIRECTORY / "cleaned").touch()


# --- the ways: each starts a server, and returns its URL, its pid if it has one of its own, and how to stop it --------

Started = tuple[str, int | None, Callable[[], None]]


def server_thread(kind: Any) -> Started:
    """A thread: flaskd's way."""
    app = create_app()
    flaskd.on_stop(app=app)(clean_up)
    server = flaskd.ServerThread(app, server=kind).start()
    return server.url, None, lambda: void(server.stop())


def textbook_thread() -> Started:
    """A thread around make_server: the textbook's way."""
    from werkzeug.serving import make_server  # noqa: PLC0415 - it is part of the start

    server = make_server(HOST, 0, create_app(), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    atexit.register(clean_up)

    def stop() -> None:
        server.shutdown()
        thread.join()

    return f"http://{HOST}:{server.server_port}/", None, stop


def server_process() -> Started:
    """A process: flaskd's way."""
    process = flaskd.ServerProcess("approaches:with_cleanup()").start().wait_ready()
    return process.url, process.pid, lambda: void(process.stop())


def with_cleanup() -> Flask:
    """Make the app with its cleanup, in a process of its own."""
    app = create_app()
    flaskd.on_stop(app=app)(clean_up)
    return app


def run_textbook(port: int) -> None:
    """Serve as the textbook does."""
    atexit.register(clean_up)
    create_app().run(HOST, port, threaded=True)


def textbook_process() -> Started:
    """A multiprocessing.Process around app.run: the textbook's way."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=run_textbook, args=(port,))
    process.start()
    answer(f"http://{HOST}:{port}/", wait_for_it=True)

    def stop() -> None:
        process.terminate()
        process.join()

    return f"http://{HOST}:{port}/", process.pid, stop


def endpoint() -> Started:
    """The protected endpoint under flaskd serve."""
    port, door, token = free_port(), free_port(), DIRECTORY / "token"
    with contextlib.suppress(FileNotFoundError):
        token.unlink()
    token.touch(0o600)
    token.write_text(os.urandom(32).hex(), encoding="ascii")
    config = DIRECTORY / "flaskd.yaml"
    config.write_text(
        'log: {level: warning, access: "off"}\n'
        f'shutdown: {{endpoint: {{listen: "{HOST}:{door}", token_file: {token}}}}}\n',
        encoding="utf-8",
    )
    return _served(
        [
            sys.executable,
            "-m",
            "flaskd",
            "serve",
            "approaches:with_cleanup()",
            "-l",
            f"{HOST}:{port}",
            "-c",
            str(config),
        ],
        port,
        lambda: request(
            f"http://{HOST}:{door}/shutdown",
            {"Authorization": f"Bearer {token.read_text(encoding='ascii')}", "Content-Type": "application/json"},
        ),
    )


def textbook_endpoint() -> Started:
    """A route that interrupts its own process: the textbook's way."""
    port = free_port()
    command = [sys.executable, "-c", f"import approaches; approaches.run_textbook({port})"]

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # sometimes this answer is lost, too
            request(f"http://{HOST}:{port}/shutdown", {})

    return _served(command, port, ask)


def _served(command: list[str], port: int, ask: Callable[[], object]) -> Started:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answer(f"http://{HOST}:{port}/", wait_for_it=True)

    def stop() -> None:
        ask()
        process.wait(PATIENCE)

    return f"http://{HOST}:{port}/", process.pid, stop


WAYS: dict[str, Callable[[], Started]] = {
    "ServerThread": lambda: server_thread("waitress"),
    'ServerThread, server="werkzeug"': lambda: server_thread("werkzeug"),
    "textbook thread": textbook_thread,
    "ServerProcess": server_process,
    "textbook process": textbook_process,
    "shutdown endpoint": endpoint,
    "textbook route": textbook_endpoint,
}


# --- measuring --------------------------------------------------------------------------------------------------------


def void(_: object) -> None:
    """Drop a result."""


def free_port() -> int:
    """A free port."""
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def request(url: str, headers: dict[str, str]) -> None:
    """POST to a shutdown route."""
    with urllib.request.urlopen(
        urllib.request.Request(url, b"{}" if headers else b"", headers, method="POST"), timeout=PATIENCE
    ) as response:
        response.read()


def answer(url: str, *, wait_for_it: bool = False) -> bytes | None:
    """GET; None without an answer. `wait_for_it` retries until the server listens, because these have no readiness."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                return bytes(response.read())
        except OSError:
            if not wait_for_it or time.monotonic() > until:
                return None
            time.sleep(0.002)


def resident(pid: int | str) -> float:
    """MiB of memory that a process has (VmRSS, proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(name: str) -> dict[str, Any]:
    """Start it and stop it idle; start it again and stop it busy."""
    figures: dict[str, Any] = {}
    before, began = resident("self"), time.monotonic()
    url, pid, stop = WAYS[name]()
    assert answer(url) == b"hello\n"
    figures["start"] = time.monotonic() - began
    figures["memory"] = resident(pid) if pid else resident("self") - before
    figures["idle"] = _timed(stop)
    url, pid, stop = WAYS[name]()
    (DIRECTORY / "cleaned").unlink(missing_ok=True)
    answers: list[bytes | None] = []
    client = threading.Thread(target=lambda: answers.append(answer(url + "second")))
    client.start()
    with (DIRECTORY / "entered").open("rb") as fifo:
        fifo.read(1)
    figures["busy"] = _timed(stop)
    figures["answered"] = False
    # If a thread's stop has returned before the answer was sent, the process ends, and the request is lost.
    if not pid:
        client.join(_READING)
    if pid or answers:
        client.join()
        figures["answered"] = answers == [b"a second\n"]
    figures["cleaned"] = (DIRECTORY / "cleaned").exists()
    return figures


def _timed(function: Callable[[], None]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


def one(name: str) -> dict[str, Any]:
    """Measure one way in a process and a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="approaches-") as directory:
        os.mkfifo(Path(directory) / "entered")
        env = os.environ | {
            "APPROACHES_DIRECTORY": directory, "RUNTIME_DIRECTORY": directory, "STATE_DIRECTORY": directory,
            "PYTHONPATH": str(Path(__file__).resolve().parent),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__, "--one", name],
            env=env, cwd=directory, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures


def main() -> int:
    """Measure, print, and return 1 if flaskd lost anything."""
    from _servers import environment, median, table  # noqa: PLC0415 - the measured process does not need it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="of each way, interleaved (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()
    print(f"{environment()}\n")
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(options.runs):
        for name in WAYS:
            figures[name].append(one(name))
    rows = [
        [
            name,
            *[f"{median([each[key] for each in runs]):.2f} s" for key in ("start",)],
            f"{median([each['memory'] for each in runs]):.1f} MiB",
            *[f"{median([each[key] for each in runs]):.2f} s" for key in ("idle", "busy")],
            *[f"{sum(each[key] for each in runs)} of {len(runs)}" for key in ("answered", "cleaned")],
        ]
        for name, runs in figures.items()
    ]
    headers = ["", "start", "memory", "stop, idle", "stop, busy", "answered", "cleanup"]
    print(table("## Three ways to stop a Flask app from a program", headers, rows))
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "figures": figures}, indent=1) + "\n")
    ours = [each for name, runs in figures.items() if not name.startswith("textbook") for each in runs]
    return 0 if all(each["answered"] and each["cleaned"] for each in ours) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])), flush=True)
        os._exit(0)
    sys.exit(main())
