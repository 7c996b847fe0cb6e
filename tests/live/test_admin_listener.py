"""The admin listener of a real daemon."""

import json
import os
import signal
import socket
import sys
import time

from daemon_kit import Flaskd
from http_client import Answer, get


def configure(flaskd: Flaskd, more: str = "") -> None:
    flaskd.write("flaskd.yaml", f"admin: {{listen: 'unix:{flaskd.directory}/admin.sock'}}\n{more}")


def admin(flaskd: Flaskd, path: str) -> tuple[int, bytes]:
    return get(f"unix:{flaskd.directory}/admin.sock", path)


def test_readiness_through_the_life_of_a_daemon(flaskd: Flaskd) -> None:
    """/readyz is 200 while ready, `health.unready_status` while draining and drained, and 200 after a resume."""
    configure(flaskd, "health: {unready_status: 429}\n")
    flaskd.start()
    assert admin(flaskd, "/readyz") == (200, b"ready\n")
    held = flaskd.hold()
    assert flaskd.client("drain")[0] == 0
    assert admin(flaskd, "/readyz") == (429, b"draining\n")
    assert json.loads(admin(flaskd, "/status.json")[1])["state"] == "draining"
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    flaskd.wait_message("drained")
    assert admin(flaskd, "/readyz") == (429, b"drained\n")
    assert admin(flaskd, "/livez") == (200, b"alive\n")
    assert flaskd.client("resume")[0] == 0
    assert admin(flaskd, "/readyz") == (200, b"ready\n")
    assert b"flaskd_drains_total 1.0" in admin(flaskd, "/metrics")[1]
    assert flaskd.stop() == 0
    assert not (flaskd.directory / "admin.sock").exists()


def test_it_answers_while_the_app_is_imported(flaskd: Flaskd) -> None:
    """During a slow start flaskd is alive and not ready; a stop in it leaves no node behind."""
    configure(flaskd)
    flaskd.write("slowapp.py", "import os, socket\nwith socket.socket(socket.AF_UNIX) as gate:\n"
                 "    gate.connect(os.environ['GATE']); gate.sendall(b'entered'); gate.recv(1)\n")  # fmt: skip
    flaskd.launch(app="slowapp")
    flaskd.gate.entered()
    assert admin(flaskd, "/livez") == (200, b"alive\n")
    assert flaskd.command("health") == "OK healthy\n"
    assert admin(flaskd, "/readyz") == (503, b"starting\n")
    assert admin(flaskd, "/metrics")[0] == 200
    assert flaskd.stop() == 0
    assert not (flaskd.directory / "admin.sock").exists()


def test_it_answers_when_every_thread_is_stuck(flaskd: Flaskd) -> None:
    """With all threads busy and more requests waiting, probes, metrics and status are answered."""
    configure(flaskd)
    flaskd.start("-t", "2")
    held = [flaskd.hold() for _ in range(2)]
    waiting = Answer(flaskd.url, "/")
    flaskd.until(lambda: json.loads(admin(flaskd, "/status.json")[1])["queued"] == 1)
    for path in ("/livez", "/readyz", "/metrics"):
        assert admin(flaskd, path)[0] == 200
    metrics = admin(flaskd, "/metrics")[1]
    assert b"flaskd_requests_in_flight 3.0" in metrics
    assert b"flaskd_requests_queued 1.0" in metrics
    flaskd.gate.open()
    assert [each.result()[0] for each in (*held, waiting)] == [200] * 3
    flaskd.settle()
    metrics = admin(flaskd, "/metrics")[1]
    assert b'flaskd_responses_total{status="2xx"} 3.0' in metrics
    assert b"flaskd_queue_wait_seconds_count 3.0" in metrics
    assert flaskd.stop() == 0


def test_it_tells_of_the_stop_until_the_end(flaskd: Flaskd) -> None:
    """While a cleanup step runs, /readyz fails and the metrics show the finished steps."""
    configure(
        flaskd,
        "cleanup: {policies: {first: {use: command, phase: quiesce, with: {argv: ['true']}},"
        " second: {use: command, phase: close, with: {argv: [cat, hold]}}}}\n",
    )
    os.mkfifo(flaskd.directory / "hold")
    flaskd.start()
    flaskd.kill(signal.SIGTERM)
    with (flaskd.directory / "hold").open("w"):  # returns when the second step reads
        assert admin(flaskd, "/readyz") == (503, b"stopping\n")
        steps = admin(flaskd, "/metrics")[1].decode()
        assert 'flaskd_cleanup_seconds{fate="ok",policy="first",stop="current"}' in steps
    assert flaskd.wait() == 0
    flaskd.start()
    steps = admin(flaskd, "/metrics")[1].decode()
    assert 'flaskd_cleanup_seconds{fate="ok",policy="second",stop="last"}' in steps
    assert 'flaskd_last_stop_requests{outcome="completed"} 0.0' in steps
    assert flaskd.stop() == 0


def test_a_socket_that_was_passed_as_admin(flaskd: Flaskd) -> None:
    """LISTEN_FDNAMES=admin makes an admin listener without configuration; the app has its own address."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        passing = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='admin'); "
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        flaskd.start(prefix=[sys.executable, "-c", passing, str(passed.fileno())], pass_fds=[passed.fileno()])
        url = f"http://127.0.0.1:{passed.getsockname()[1]}/"
        assert get(url, "/readyz") == (200, b"ready\n")
        assert get(flaskd.url) == (200, b"hello")
        assert flaskd.stop() == 0


def test_an_address_that_cannot_be_had(flaskd: Flaskd) -> None:
    """If the admin address is in use, or was not passed, the start fails with a message."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flaskd.write("flaskd.yaml", f"admin: {{listen: '127.0.0.1:{taken.getsockname()[1]}'}}\n")
        code, log = flaskd.fails()
        assert code == 73
        assert "cannot listen on 127.0.0.1" in log
    flaskd.write("flaskd.yaml", "admin: {listen: 'fd:admin'}\n")
    code, log = flaskd.fails()
    assert code == 78
    assert "cannot listen on fd:admin: no socket of that name was passed (passed: none)" in log


def test_silent_clients_are_shown_the_door(flaskd: Flaskd) -> None:
    """Many half-open clients delay a probe only until their time is up."""
    configure(flaskd)
    flaskd.start()
    silent = [socket.socket(socket.AF_UNIX) for _ in range(100)]
    for each in silent:
        each.connect(str(flaskd.directory / "admin.sock"))
        each.sendall(b"GET /rea")
    began = time.monotonic()
    assert admin(flaskd, "/readyz") == (200, b"ready\n")
    assert time.monotonic() - began < 5
    assert get(flaskd.url) == (200, b"hello")
    for each in silent:
        each.close()
    assert flaskd.stop() == 0
