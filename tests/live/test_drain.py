"""Drain, resume and stop of a real daemon: requests in hand are answered."""

import http.client
import re
import signal
import socket
import time
from collections.abc import Sequence

from daemon_kit import Flaskd
from http_client import Answer, get, place_of, refused
from patience import PATIENCE


def test_the_whole_path(flaskd: Flaskd) -> None:
    """A request in flight is answered during `echo drain`; flaskd is drained, resumes, and stops with exit code 0."""
    flaskd.start()
    url = flaskd.url
    held = flaskd.hold(url)
    with flaskd.fifo_path.open("w") as fifo:
        fifo.write("drain\n")
    flaskd.wait_message("draining: 1 in flight")
    assert flaskd.status()["state"] == "draining"
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    flaskd.wait_message("drained")
    status = flaskd.status()
    assert status["state"] == "drained"
    assert status["pid"] == flaskd.pid
    assert refused(url)
    assert flaskd.command("resume") == "OK ready\n"
    assert get(url) == (200, b"hello")
    flaskd.settle()
    assert flaskd.command("stop").startswith("OK stopping in_flight=0 deadline=")
    assert flaskd.wait() == 0


def test_stop_answers_what_is_running_and_what_is_queued(flaskd: Flaskd) -> None:
    """With one thread, the running request and the queued ones are all answered before the exit."""
    flaskd.start("-t", "1")
    url = flaskd.url
    held = flaskd.hold(url)
    queued = [Answer(url, "/") for _ in range(5)]
    flaskd.until(lambda: flaskd.status()["in_flight"] == 6)
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert [each.result() for each in queued] == [(200, b"hello")] * 5
    assert flaskd.wait() == 0
    assert flaskd.record()["completed"] == 6
    assert flaskd.record()["cut"] == []


def test_output_that_is_not_sent_is_waited_for(flaskd: Flaskd) -> None:
    """A client that reads a large response slowly gets all of it, long after the app has finished."""
    flaskd.write("big.py", "def app(environ, start_response):\n"
                 "    start_response('200 OK', [('Content-Length', '8000000')])\n    return [b'x' * 8000000]\n")  # fmt: skip
    flaskd.start(app="big:app")
    with socket.socket() as client:
        client.settimeout(PATIENCE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(place_of(flaskd.url))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        flaskd.until(lambda: "sending" in (flaskd.status()["oldest"] or ""))
        flaskd.kill(signal.SIGTERM)
        flaskd.wait_message("STOPPING=1")
        with http.client.HTTPResponse(client) as response:
            response.begin()
            assert len(response.read()) == 8_000_000
    assert flaskd.wait() == 0


def test_the_deadline_is_kept_and_what_is_cut_is_named(flaskd: Flaskd) -> None:
    """A request that never ends is cut at the deadline; the report has method, path, age, stack, exit code."""
    config = "shutdown: {deadline: 2s, reserve: 500ms, exit_codes: {degraded: 9}}\n"
    flaskd.write("flaskd.yaml", config)
    flaskd.start()
    held = flaskd.hold()
    before = time.monotonic()
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 9
    assert time.monotonic() - before < 3.0
    assert isinstance(held.result(), (http.client.HTTPException, OSError))
    [cut] = flaskd.record()["cut"]
    assert (cut["method"], cut["path"], cut["phase"]) == ("GET", "/hold", "running")
    assert "gate.recv(1)" in cut["stack"]
    assert "cut GET /hold (running for" in flaskd.log


def test_an_app_that_holds_the_interpreter_is_ended_at_the_deadline(flaskd: Flaskd) -> None:
    """Code that never releases the GIL keeps the process at most a second beyond its deadline."""
    flaskd.write("hog.py", "import ctypes, os, socket\n"
                 "def app(environ, start_response):\n"
                 "    with socket.socket(socket.AF_UNIX) as gate:\n"
                 "        gate.connect(os.environ['GATE']); gate.sendall(b'entered'); gate.recv(1)\n"
                 "    ctypes.PyDLL(None).sleep(60)\n")  # fmt: skip
    flaskd.write("flaskd.yaml", "shutdown: {deadline: 1s}\n")
    flaskd.start(app="hog:app")
    flaskd.hold()
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    before = time.monotonic()
    flaskd.gate.open()
    assert flaskd.wait() == 1
    assert time.monotonic() - before < 2.0
    assert "Timeout" in flaskd.log
    for path in flaskd.runtime.glob("*"):
        path.unlink()  # no code could run any more that would have removed them
    (flaskd.state / "running.json").unlink()


def test_drain_wait_tells_the_account(flaskd: Flaskd) -> None:
    """`drain --wait` shows progress, answers at the end, and a later one reports the same account."""
    flaskd.start()
    held = flaskd.hold()
    assert flaskd.command("drain").startswith("OK draining in_flight=1 deadline=15s")
    flaskd.gate.open()
    held.result()
    code, out, _ = flaskd.client("drain", "--wait")
    assert code == 0
    assert out.startswith("drained completed=1 rejected=0 cut=0 took=")
    assert flaskd.command("drain wait").startswith("OK drained completed=1 rejected=0 cut=0 took=")
    assert flaskd.command("drain").startswith("OK drained completed=1")


def test_drain_wait_exits_with_1_when_work_was_lost(flaskd: Flaskd) -> None:
    """The client exits with 1 if the drain cut a request, and the daemon serves after a resume."""
    flaskd.write("flaskd.yaml", "shutdown: {drain: {timeout: 300ms}}\n")
    flaskd.start("-t", "2")
    url = flaskd.url
    flaskd.hold(url)
    code, out, _ = flaskd.client("drain", "--wait")
    assert code == 1
    assert "cut GET /hold" in out
    assert "cut=1" in out
    assert flaskd.command("resume") == "OK ready\n"
    # Both threads are there again, although one of the old ones still runs the cut request.
    first, second = Answer(url, "/hold"), Answer(url, "/hold")
    flaskd.gate.entered()
    flaskd.gate.entered()
    flaskd.gate.open()
    assert (first.result(), second.result()) == ((200, b"held"), (200, b"held"))


def test_resume_undoes_a_drain_that_is_still_under_way(flaskd: Flaskd) -> None:
    """A resume during a drain serves again at once, and the waiting `drain` gets an error."""
    flaskd.start()
    url = flaskd.url
    held = flaskd.hold(url)
    assert flaskd.command("drain").startswith("OK draining")
    assert flaskd.command("resume") == "OK ready\n"
    assert get(url) == (200, b"hello")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.status()["state"] == "ready"


def test_resume_that_cannot_bind_stays_drained(flaskd: Flaskd) -> None:
    """If another process took the port, resume fails with a message, and can be tried again."""
    flaskd.start()
    url = flaskd.url
    _, port = place_of(url)
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    with socket.create_server(("127.0.0.1", port)):
        assert flaskd.command("resume").startswith(
            f"ERR cannot-bind cannot listen on 127.0.0.1:{port}: Address already"
        )
        assert flaskd.status()["state"] == "drained"
    assert flaskd.command("resume") == "OK ready\n"
    assert get(url) == (200, b"hello")


def test_a_stop_after_a_drain_keeps_the_account(flaskd: Flaskd) -> None:
    """The record of a stop includes the requests that an earlier drain has answered."""
    flaskd.start()
    held = flaskd.hold()
    flaskd.command("drain")
    flaskd.gate.open()
    held.result()
    flaskd.command("drain wait")
    code, out, _ = flaskd.client("stop", "--wait")
    assert code == 0
    assert "stopped completed=1" in out
    assert flaskd.wait() == 0
    assert flaskd.record()["completed"] == 1
    assert flaskd.record()["reason"].startswith("control: uid=")


def extensions(messages: Sequence[str]) -> list[int]:
    """The seconds of each request for more time."""
    return [
        int(each) // 1_000_000 for message in messages for each in re.findall(r"EXTEND_TIMEOUT_USEC=(\d+)", message)
    ]


def test_more_time_is_asked_for_where_something_moves(flaskd: Flaskd) -> None:
    """More time is requested for a drain at its begin, not while it hangs; then for each step."""
    policies = "{last: {use: command, phase: final, with: {argv: [sleep, '600']}, timeout: 10s}}"
    flaskd.write(
        "flaskd.yaml",
        f"shutdown: {{deadline: 60s, reserve: 0s, drain: {{timeout: 30s}}}}\ncleanup: {{policies: {policies}}}\n",
    )
    flaskd.start()
    answer = flaskd.hold()
    flaskd.kill(signal.SIGTERM)
    assert "\nEXTEND_TIMEOUT_USEC=5000000" in flaskd.wait_message("STOPPING=1")
    (drain,) = extensions([flaskd.wait_message("EXTEND_TIMEOUT_USEC=")])
    assert 20 < drain <= 31  # as long as it may take, plus a second
    before = len(flaskd.messages)
    for _ in range(3):
        flaskd.wait_message("STATUS=stopping: 1 in flight")
    assert extensions(flaskd.messages[before:]) == []
    flaskd.gate.open()
    assert answer.result() == (200, b"held")
    while extensions([flaskd.wait_message("EXTEND_TIMEOUT_USEC=")]) < [10]:  # the step begins after the drain
        pass
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 0
