"""What clients saw, the log, the reply, the record and last-stop agree about a stop."""

import json
import os
import re
import signal
import socket
import threading
import time

import pytest
from daemon_kit import Flaskd, inherit
from http_client import Answer, connect, get
from patience import PATIENCE

from flaskd.units import format_duration


def test_the_account_is_everywhere_the_same(flaskd: Flaskd) -> None:
    """One answered, one running and cut, three queued and refused, one uploading and cut: all places agree."""
    flaskd.write("flaskd.yaml", "shutdown: {drain: {timeout: 1s}}\n")
    flaskd.start("-t", "2")
    url = flaskd.url
    let_go = flaskd.hold(url)
    cut = flaskd.hold(url)
    with connect(url) as uploading:
        uploading.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
        queued = [Answer(url, "/hold") for _ in range(4)]
        flaskd.until(lambda: flaskd.status()["in_flight"] == 6)
        client: dict[str, object] = {}
        flaskd.kill(signal.SIGTERM)
        flaskd.wait_message("STOPPING=1")
        with flaskd.control() as control:
            control.sendall(b'{"id": 1, "cmd": "stop", "wait": true}\n')
            flaskd.gate.open(1)  # the first one ends; its thread takes a queued one, which is cut
            flaskd.gate.entered()
            with control.makefile("rb") as lines:
                client = [answer for line in lines if "ok" in (answer := json.loads(line))][0]  # noqa: RUF015
        assert flaskd.wait() == 0
        assert uploading.recv(100) == b""
    statuses = [each.result()[0] if isinstance(each.result(), tuple) else "cut" for each in [let_go, cut, *queued]]
    assert (statuses.count(200), statuses.count(503), statuses.count("cut")) == (1, 3, 2)
    record = flaskd.record()
    paths = sorted((each["method"], each["path"], each["phase"]) for each in record["cut"])
    assert paths == [("GET", "/hold", "running")] * 2 + [("POST", "/upload", "receiving")]
    assert all(each["reason"] == "the deadline came" for each in record["cut"])
    for account in (client, record):
        assert (account["completed"], account["rejected"], len(account["cut"])) == (1, 3, 3)
    assert client["cut"] == record["cut"]
    assert re.search(r"stopped: completed=1 rejected=3 cut=3 took=", flaskd.log)
    assert len(re.findall(r"cut (GET /hold|POST /upload) \(", flaskd.log)) == 3
    code, out, _ = flaskd.client("last-stop", "--json")
    assert code == 0
    assert {**json.loads(out), "result": None} == {**record, "result": None, "ok": True}
    assert "completed=1 rejected=3 cut=3" in flaskd.client("last-stop")[1]


def test_a_stop_leaves_the_shared_backlog_to_its_next_owner(flaskd: Flaskd) -> None:
    """A drained daemon answers 503 on an inherited listener; a stopping one leaves new clients to its successor."""
    flaskd.write(
        "flaskd.yaml",
        "cleanup: {policies: {slow: {use: command, with: {argv: [sh, -c, 'read x < go']}, timeout: 20s}}}\n",
    )
    go = flaskd.directory / "go"
    os.mkfifo(go)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        inherit(flaskd, sock)
        assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
        assert get(url)[0] == 503
        flaskd.kill(signal.SIGTERM)
        flaskd.wait_message("STOPPING=1")
        with go.open("w") as word, socket.create_connection(sock.getsockname(), timeout=PATIENCE) as late:
            late.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert flaskd.command("health") == "OK healthy\n"  # its loop has run, and has not accepted it
            word.write("x\n")  # the command ran until now: the drain is over, but not the stop
            word.flush()
            assert flaskd.wait() == 0
            flaskd.write("flaskd.yaml", "")
            inherit(flaskd, sock)
            assert b"".join(iter(lambda: late.recv(4096), b"")).endswith(b"hello")
        assert flaskd.stop() == 0


def test_a_waiting_stop_that_lost_nothing_exits_with_0(flaskd: Flaskd) -> None:
    """If all requests were answered, the waiting client exits with 0, and shows the account."""
    flaskd.start()
    held = flaskd.hold()
    outcome: list[tuple[int, str, str]] = []
    stopper = threading.Thread(target=lambda: outcome.append(flaskd.client("stop", "--wait", "--json")))
    stopper.start()
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    stopper.join(PATIENCE)
    code, out, _ = outcome[0]
    answer = json.loads(out.splitlines()[-1])
    assert (code, answer["completed"], answer["cut"]) == (0, 1, [])
    assert flaskd.wait() == 0


LATE = {
    "an announce": (0, "  announce: 300ms\n", ""),
    "a drain that was under way": (0, "", "drain"),
    "a second wish": (0, "  announce: 60s\n  deadline: 90s\n", "now"),
    "workers": (1, "  announce: 300ms\n", ""),
}


@pytest.mark.parametrize("case", LATE)
def test_a_stop_took_as_long_in_log_answer_and_record(flaskd: Flaskd, case: str) -> None:
    """One length everywhere, the announce included; that of a drain that was under way before is its own."""
    workers, shutdown, more = LATE[case]
    config = f"server: {{workers: {workers}}}\nlog: {{format: json}}\nshutdown:\n  exit_wait: 1s\n{shutdown}"
    flaskd.write("flaskd.yaml", config)
    flaskd.start()
    held = flaskd.hold() if more != "now" else None  # that is cut or not, as it comes
    if more == "drain":
        assert flaskd.command("drain").startswith("OK draining")
    with flaskd.control() as stopping, stopping.makefile("r") as told:
        stopping.sendall(b'{"cmd":"stop","wait":true}\n')
        assert "left" in json.loads(told.readline())
        began = time.monotonic()
        if more == "now":
            assert flaskd.command("stop now").startswith("OK stopping")
        flaskd.gate.open()
        answer = json.loads(told.read().splitlines()[-1])
        lasted = time.monotonic() - began
    assert held is None or held.result() == (200, b"held")
    assert flaskd.wait() == 0
    entries = [json.loads(line) for line in flaskd.log.splitlines()]
    [stopped] = [each for each in entries if each["message"].startswith("stopped: ")]
    assert answer["took"] == stopped["took"] == flaskd.record()["took"]
    assert f" took={format_duration(answer['took'])};" in stopped["message"]
    assert lasted - 0.5 < answer["took"] < lasted + 0.5
    if shutdown.startswith("  announce: 300ms"):
        [drained] = [each for each in entries if each["message"].startswith("drained: ")]
        assert 0.3 <= drained["took"] <= answer["took"]
