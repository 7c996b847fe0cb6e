"""What SIGTERM does to stock waitress; for flaskd see test_drain.py and test_hostile.py (as PID 1)."""

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from daemon_kit import Flaskd, children, no_pid_namespace
from http_client import Answer, get
from patience import PATIENCE

STOCK = "import socket, sys, gateapp, waitress; waitress.serve(gateapp.app, sockets=[socket.socket(fileno=int(sys.argv[1]))])"


@contextmanager
def waitress(flaskd: Flaskd, *prefix: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Waitress with the gate app, on a listener that exists before it, so that early clients wait."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", STOCK, str(listener.fileno())],
            cwd=flaskd.directory, env=flaskd.env, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL,
        )  # fmt: skip
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    try:
        yield process, url
    finally:
        process.kill()
        process.wait()


def test_sigterm_without_a_handler_loses_everything(flaskd: Flaskd) -> None:
    """Stock waitress sets no handler, so SIGTERM ends it in the middle of a request."""
    with waitress(flaskd) as (process, url):
        held = Answer(url, "/hold")
        flaskd.gate.entered()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == -signal.SIGTERM
        assert isinstance(held.result(), (http.client.HTTPException, OSError))


@pytest.mark.skipif(bool(no_pid_namespace()), reason=f"no PID namespace: {no_pid_namespace()}")
def test_sigterm_to_pid_1_is_ignored(flaskd: Flaskd) -> None:
    """Stock waitress as PID 1 ignores SIGTERM, and is killed later."""
    with waitress(flaskd, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child") as (process, url):
        held = Answer(url, "/hold")
        flaskd.gate.entered()
        [first] = children(process.pid)
        os.kill(first, signal.SIGTERM)
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        assert get(url) == (200, b"hello")
        assert process.poll() is None
