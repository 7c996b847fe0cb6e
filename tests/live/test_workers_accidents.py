"""Workers that are killed, crash or hang, and a supervisor that is killed: losses are reported, the rest goes on."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_kit import Flaskd, inherit
from http_client import Answer, get, outcome, place_of
from patience import until
from workers_kit import Asking, asked, shown

LONG = bool(os.environ.get("FLASKD_LONG"))
PATIENCE = 60.0
"""Seconds in which a new worker must be ready on a busy machine."""

APP = """
import ctypes, os, re, signal, threading, time
from flask import request
from gateapp import app

@app.get("/pid")
def pid():
    return str(os.getpid())

@app.get("/leave")
def leave():
    os._exit(3)

@app.get("/crash")
def crash():
    ctypes.string_at(0)

@app.get("/abort")
def abort():
    os.abort()

notes = os.open("notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

@app.get("/note/<int:number>")
def note(number):
    os.write(notes, b"%d\\n" % number)
    return "noted"

@app.get("/gil")
def gil():
    ctypes.PyDLL(None).sleep(int(request.args["seconds"]))
    return "slept"
"""

LATE = "import os, time\nwhile os.path.exists('wait'):\n    time.sleep(0.02)\nfrom deadly import app\n"
"""An app whose import lasts as long as there is a file called wait."""


@pytest.fixture
def served(flaskd: Flaskd) -> Flaskd:
    """A flaskd whose app can kill its worker in several ways; `start` starts it."""
    flaskd.write("deadly.py", APP)
    return flaskd


def start(flaskd: Flaskd, *, workers: int = 2, **how: Any) -> Flaskd:
    """Start it with so many workers."""
    return flaskd.start("-w", str(workers), app="deadly", **how)


def deaths(flaskd: Flaskd) -> list[dict[str, Any]]:
    """The deaths of workers."""
    return list(asked(flaskd, "workers")["deaths"])


def pids_of(flaskd: Flaskd, *states: str) -> list[int]:
    """The pids of the workers in these states."""
    return [each["pid"] for each in shown(flaskd) if each["state"] in states]


def pids(flaskd: Flaskd) -> set[int]:
    """The pids of the ready workers."""
    return set(pids_of(flaskd, "ready"))


def whole(flaskd: Flaskd, count: int, *, without: int = 0) -> set[int]:
    """Wait until so many workers are ready, none of them `without`; returns their pids."""
    found: set[int] = set()

    def look() -> bool:
        nonlocal found
        found = pids(flaskd)
        return len(found) == count and without not in found

    until(look, lambda: f"\n{flaskd.log}", patience=PATIENCE)
    return found


def who_holds(flaskd: Flaskd) -> int:
    """The pid of the worker that has a request in hand."""
    [found] = [each["pid"] for each in shown(flaskd) if each["in_flight"]]
    return int(found)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; init may reap an orphan late."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_supervisor(flaskd: Flaskd) -> None:
    """Kill the supervisor alone."""
    flaskd.kill(signal.SIGKILL)
    flaskd.wait()


@contextlib.contextmanager
def clients(url: str, count: int, path: str = "/?{}") -> Iterator[dict[str, Any]]:
    """Clients that send requests in a loop, one for each connection; returns the outcomes of each path at the end."""
    found: dict[str, Any] = {}
    over = threading.Event()
    numbers = itertools.count()

    def ask() -> None:
        while not over.is_set():
            mine = path.format(next(numbers))
            found[mine] = outcome(url, mine)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for each in threads:
        each.start()
    try:
        yield found
    finally:
        over.set()
        for each in threads:
            each.join()


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("/leave", "it left with the exit code 3"),
        ("/crash", "it was killed by SIGSEGV"),
        ("/abort", "it was killed by SIGABRT"),
    ],
)
def test_a_request_that_ends_its_worker_is_named(served: Flaskd, path: str, how: str) -> None:
    """The request that kills its worker is named, and all others that it had read; the slot is filled again."""
    served.write("flaskd.yaml", "log: {request_id: true}\n")
    start(served)
    before, url = whole(served, 2), served.url
    # One slot alone: otherwise it is not known which of the workers has the first request.
    held = served.hold()
    victim = who_holds(served)
    with clients(url, 2) as others:
        while victim in pids(served) and not is_gone(victim):
            if get(url, "/pid")[1] == str(victim).encode():
                with contextlib.suppress(Exception):
                    get(url, "/nothing")
            answer = outcome(url, path)
            assert isinstance(answer, Exception)
        served.until(lambda: f"(pid {victim}," in served.log and how in served.log)
        now = whole(served, 2, without=victim)
    assert all(each == (200, b"hello") for each in others.values() if not isinstance(each, Exception))
    assert not any(isinstance(each, ConnectionRefusedError) for each in others.values())
    died = {each["pid"]: each for each in deaths(served)}
    assert how in died[victim]["how"]
    assert {each["path"] for each in died[victim]["cut"]} >= {"/hold", path}
    assert all(f"request_id={each['request_id']}): its worker is gone" in served.log for each in died[victim]["cut"])
    assert died[victim]["connections"] >= 2
    assert isinstance(held.result(), Exception)
    assert served.status()["tally"]["outcomes"]["cut"] == sum(len(each["cut"]) for each in died.values())
    assert len(now - before) >= 1
    for each in ("/hold", path):
        assert any("cut" in line and each in line for line in served.log.splitlines())
    assert f"died {died[victim]['time']}" in served.client("workers")[1]
    assert served.stop() == 0


def test_down_to_no_worker(served: Flaskd) -> None:
    """Without workers flaskd is not ready and says so; clients wait in the backlog for the next worker."""
    served.write("late.py", LATE)
    served.write("flaskd.yaml", "admin: {listen: ['127.0.0.1:0']}\n")
    served.start("-w", "1", app="late")
    url, status = served.url, served.status()
    [admin] = status["admin"]
    [pid] = whole(served, 1)
    assert served.client("ready")[0] == 0
    assert get(admin, "/readyz") == (200, b"ready\n")
    served.write("wait", "")
    os.kill(pid, signal.SIGKILL)
    served.until(lambda: "no worker is ready" in served.log)
    waiting = Answer(url, "/")
    code, _, err = served.client("ready")
    assert code != 0
    assert "no worker is ready" in err
    assert get(admin, "/readyz") == (503, b"no worker is ready\n")
    assert b"flaskd_worker_deaths_total 1.0" in get(admin, "/metrics")[1]
    (served.directory / "wait").unlink()
    assert waiting.result() == (200, b"hello")
    served.until(lambda: served.client("ready")[0] == 0)
    assert get(admin, "/readyz") == (200, b"ready\n")
    assert served.stop() == 0


def test_a_worker_that_dies_in_a_drain(served: Flaskd) -> None:
    """The drain ends, its account has the cut requests; the slot is filled while drained, and serves after resume."""
    start(served)
    whole(served, 2)
    held = served.hold()
    victim = who_holds(served)
    drain: list[tuple[int, str, str]] = []
    waiting = threading.Thread(target=lambda: drain.append(served.client("drain", "--wait")))
    waiting.start()
    served.until(lambda: served.status()["state"] == "draining")
    os.kill(victim, signal.SIGKILL)
    waiting.join()
    assert "/hold" in drain[0][1] + drain[0][2]
    assert isinstance(held.result(), Exception)
    served.until(lambda: sorted(each["state"] for each in shown(served)) == ["drained", "loaded"])
    [drained] = [each["pid"] for each in shown(served) if each["state"] == "drained"]
    os.kill(drained, signal.SIGKILL)
    until(lambda: [each["state"] for each in shown(served)] == ["loaded"] * 2, lambda: served.log, patience=PATIENCE)
    assert served.client("resume")[0] == 0
    whole(served, 2)
    assert get(served.url) == (200, b"hello")
    assert served.stop() == 0


def test_a_worker_that_dies_in_the_stop(served: Flaskd) -> None:
    """The stop ends at once, and its record has the cut requests, and how the worker died."""
    start(served)
    whole(served, 2)
    held = served.hold()
    victim = who_holds(served)
    served.kill(signal.SIGTERM)
    served.wait_message("STOPPING=1")
    served.until(lambda: len([each for each in shown(served) if each["pid"] != victim]) == 0)
    os.kill(victim, signal.SIGKILL)
    assert served.wait() == 0  # shutdown.exit_codes.degraded can change that
    record = served.record()
    assert len(record["unfinished"]) == 1
    assert [each["path"] for each in record["cut"]] == ["/hold"]
    assert "it was killed by SIGKILL" in next(each["died"] for each in record["workers"] if each["pid"] == victim)
    assert isinstance(held.result(), Exception)


def test_an_old_worker_that_dies_while_another_comes(served: Flaskd) -> None:
    """The reload goes on, and is done when the new worker is ready."""
    served.write("late.py", LATE)
    served.start("-w", "1", app="late")
    [old] = whole(served, 1)
    served.write("wait", "")
    reloading = Asking(served)
    served.until(lambda: len(shown(served)) == 2)
    os.kill(old, signal.SIGKILL)
    served.until(lambda: len(shown(served)) == 1)
    (served.directory / "wait").unlink()
    assert "OK reloaded" in reloading.answer()
    [new] = shown(served)
    assert new["generation"] == 2
    assert served.stop() == 0


def test_a_new_worker_that_dies_ends_the_reload(served: Flaskd) -> None:
    """The old worker goes on, and the reply to the reload says why it failed."""
    served.write("late.py", LATE)
    served.start("-w", "1", app="late")
    [old] = whole(served, 1)
    served.write("wait", "")
    reloading = Asking(served)
    served.until(lambda: len(shown(served)) == 2)
    os.kill(next(each["pid"] for each in shown(served) if each["pid"] != old), signal.SIGKILL)
    answer = reloading.answer()
    assert answer.startswith("ERR app-failed"), answer
    assert "it was killed by SIGKILL before it was ready" in answer
    assert pids(served) == {old}
    assert get(served.url, "/pid") == (200, str(old).encode())
    assert served.stop() == 0


def test_a_supervisor_that_is_killed(served: Flaskd) -> None:
    """The workers finish their requests and end; the next start on that port works, and finds nothing left."""
    start(served)
    whole(served, 2)
    url, held, all_pids = served.url, served.hold(), pids(served)
    kill_supervisor(served)
    served.until(lambda: served.log.count("the supervisor is gone") == 2)
    served.gate.open()
    assert held.result() == (200, b"held")
    until(lambda: all(map(is_gone, all_pids)), lambda: served.log, patience=PATIENCE)
    host, port = place_of(url)
    start(served, listen=f"{host}:{port}")
    assert get(url) == (200, b"hello")
    assert served.status()["previous"].startswith("died")
    assert served.stop() == 0


def test_the_next_start_while_workers_of_the_one_before_still_finish(served: Flaskd) -> None:
    """The old workers have closed their copies of the listener: the port is free, and both serve their clients."""
    start(served)
    whole(served, 2)
    url, held, all_pids = served.url, served.hold(), pids(served)
    kill_supervisor(served)
    served.until(lambda: served.log.count("the supervisor is gone") == 2)
    host, port = place_of(url)
    until(lambda: outcome(url).__class__ is ConnectionRefusedError, lambda: served.log)
    start(served, listen=f"{host}:{port}")
    assert get(url) == (200, b"hello")
    served.gate.open()
    assert held.result() == (200, b"held")
    until(lambda: all(map(is_gone, all_pids)), lambda: served.log, patience=PATIENCE)
    assert served.stop() == 0


def test_a_supervisor_that_is_killed_while_workers_are_started(served: Flaskd) -> None:
    """Workers that import the app or have no listeners yet end at once, and leave nothing."""
    served.write("late.py", LATE)
    served.start("-w", "1", app="late")
    whole(served, 1)
    assert served.client("drain", "--wait")[0] == 0
    os.kill(pids_of(served, "drained")[0], signal.SIGKILL)
    served.until(lambda: len(pids_of(served, "loaded")) == 1)
    served.write("wait", "")
    scaling = Asking(served, "scale 2")
    served.until(lambda: len(pids_of(served, "loading")) == 1)
    left = pids_of(served, "loaded", "loading")
    kill_supervisor(served)
    until(lambda: all(map(is_gone, left)), lambda: served.log, patience=PATIENCE)
    assert scaling.answer() == ""


def test_a_supervisor_that_is_killed_with_a_unix_socket(served: Flaskd) -> None:
    """The next start takes over the socket's node."""
    node = served.directory / "http.sock"
    start(served, listen=f"unix:{node}")
    left = whole(served, 2)
    kill_supervisor(served)
    until(lambda: all(map(is_gone, left)), lambda: served.log, patience=PATIENCE)
    start(served, listen=f"unix:{node}")
    assert get(f"unix:{node}") == (200, b"hello")
    assert served.stop() == 0
    assert not node.exists()


def test_no_descriptor_for_a_new_worker(served: Flaskd) -> None:
    """A slot that cannot be filled is reported, and filled when descriptors are free; other workers serve."""
    start(served)
    victim = min(whole(served, 2))
    limits = resource.prlimit(served.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(victim, signal.SIGKILL)
    served.until(lambda: "cannot start worker" in served.log)
    resource.prlimit(served.pid, resource.RLIMIT_NOFILE, limits)
    assert get(served.url) == (200, b"hello")
    whole(served, 2, without=victim)
    assert served.stop() == 0


def test_a_supervisor_that_is_killed_with_an_inherited_socket(served: Flaskd) -> None:
    """Clients that come meanwhile wait in the backlog for the next start; none is refused or lost."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        inherit(served, sock, "-w", "2", app="deadly")
        all_pids = whole(served, 2)
        kill_supervisor(served)
        until(lambda: all(map(is_gone, all_pids)), lambda: served.log, patience=PATIENCE)
        waiting = [Answer(url, "/") for _ in range(5)]
        inherit(served, sock, "-w", "2", app="deadly")
        assert [each.result() for each in waiting] == [(200, b"hello")] * 5
        assert served.stop() == 0


def test_a_worker_whose_loop_does_not_turn(served: Flaskd) -> None:
    """The worker is noticed, writes its stacks, and is replaced; it ends when its loop turns again."""
    start(served, workers=1)
    [old] = whole(served, 1)
    stuck = Answer(served.url, "/gil?seconds=15")
    until(lambda: "its loop has not turned" in served.log, lambda: served.log, patience=PATIENCE)
    assert whole(served, 1, without=old)
    assert get(served.url) == (200, b"hello")
    served.until(lambda: "in gil" in served.log)
    stuck.result()
    until(lambda: is_gone(old), lambda: served.log, patience=PATIENCE)
    assert served.stop() == 0


def test_a_worker_that_was_stopped_alone(served: Flaskd) -> None:
    """The stopped worker is replaced, and killed at its stop's deadline; others serve meanwhile."""
    served.write("flaskd.yaml", "shutdown: {deadline: 3s}\n")
    start(served)
    old = min(whole(served, 2))
    os.kill(old, signal.SIGSTOP)
    until(lambda: "its loop has not turned" in served.log, lambda: served.log, patience=PATIENCE)
    whole(served, 2, without=old)
    until(lambda: is_gone(old), lambda: served.log, patience=PATIENCE)
    assert "did not write its stacks" in served.log
    assert served.stop() == 0


def test_threads_that_all_hang(served: Flaskd) -> None:
    """Beyond pool.stuck_after the worker is replaced, once the new one is ready; its stacks are in the log."""
    served.write("flaskd.yaml", "{pool: {stuck_after: 2s}, server: {threads: 2}, shutdown: {deadline: 3s}}\n")
    start(served, workers=1)
    [old] = whole(served, 1)
    held = [served.hold(), served.hold()]
    until(lambda: "pool.stuck_after is 2s" in served.log, lambda: served.log, patience=PATIENCE)
    whole(served, 1, without=old)
    assert get(served.url) == (200, b"hello")
    served.until(lambda: "in hold" in served.log)
    until(lambda: is_gone(old), lambda: served.log, patience=PATIENCE)
    assert all(isinstance(each.result(), Exception) for each in held)
    assert "cannot carry out" not in served.log
    assert len([line for line in served.log.splitlines() if "cut GET /hold" in line]) == 2
    assert served.stop() == 0


def test_a_service_that_was_stopped_as_a_whole(served: Flaskd) -> None:
    """If the whole service was stopped for longer than a worker may be silent, no worker is replaced."""
    start(served)
    all_pids = whole(served, 2)
    held = served.hold()
    everybody = [served.pid, *all_pids]
    for each in everybody:
        os.kill(each, signal.SIGSTOP)
    time.sleep(13)  # the time is what is tested
    for each in everybody:
        os.kill(each, signal.SIGCONT)
    for _ in range(5):
        assert get(served.url) == (200, b"hello")
    served.gate.open()
    assert held.result() == (200, b"held")
    silent = time.monotonic() + 3  # long enough for some looks
    served.until(lambda: time.monotonic() > silent)
    assert "hangs" not in served.log
    assert pids(served) == all_pids
    assert served.stop() == 0


@pytest.mark.parametrize("seed", range(25 if LONG else 1))
def test_kills_of_random_workers_under_load(served: Flaskd, seed: int) -> None:
    """Only connections of a killed worker end, each of its read requests is named, and no client is refused."""
    start(served)
    url = served.url
    named: set[str] = set()
    chance, times = random.Random(seed), 4  # the pause of a failed slot doubles each time
    with clients(url, 8, "/note/{}") as answers:
        for _ in range(times):
            victim = chance.choice(sorted(whole(served, 2)))
            os.kill(victim, signal.SIGKILL)
            whole(served, 2, without=victim)
            died = deaths(served)[-1]
            assert died["pid"] == victim
            named |= {each["path"] for each in died["cut"]}
            assert died["connections"] >= len(died["cut"])
    hurt = {path: each for path, each in answers.items() if isinstance(each, Exception)}
    assert all(each == (200, b"noted") for path, each in answers.items() if path not in hurt)
    assert [each for each in hurt.values() if isinstance(each, ConnectionRefusedError)] == []
    begun = {f"/note/{line}" for line in (served.directory / "notes").read_text().split()}
    assert hurt.keys() & begun <= named
    assert len(hurt) <= 8 * times
    served.settle()
    assert served.status()["tally"]["outcomes"]["cut"] == len(named)
    assert served.stop() == 0
