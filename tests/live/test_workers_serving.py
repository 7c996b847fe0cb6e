"""An app served by workers behaves as without them: listeners, environ, and what child processes inherit."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from daemon_kit import Flaskd, children, inherit
from http_client import Answer, ask, get, refused
from workers_kit import shown

APP = """
import gc, os, threading
import flaskd
from gateapp import app

@app.get("/who")
def who():
    names = ("FLASKD_WORKER", "FLASKD_GENERATION", "FLASKD_CONTROL", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_FDNAMES")
    return {"pid": os.getpid(), "cwd": os.getcwd(), "gc": gc.isenabled(), **{name: os.environ.get(name) for name in names}}

@app.get("/fork")
def fork():
    child = os.fork()
    if child == 0:
        import signal
        try:
            signal.pause()
        finally:
            os._exit(0)
    return str(child)
"""


def who(url: str) -> dict[str, Any]:
    """What a worker tells of itself in an answer."""
    status, body = get(url, "/who")
    assert status == 200
    return dict(json.loads(body))


def both(flaskd: Flaskd) -> list[dict[str, Any]]:
    """What each of two workers tells of itself: the second is asked while the first is busy."""
    url = flaskd.url
    held = flaskd.hold(url)
    found = [who(url)]
    flaskd.gate.open()
    held.result()
    while len({each["pid"] for each in found}) < 2:
        assert len(found) < 1000
        found.append(who(url))
    return sorted({each["pid"]: each for each in found}.values(), key=lambda each: str(each["FLASKD_WORKER"]))


def workers(flaskd: Flaskd) -> dict[int, int]:
    """The pid of the worker in each slot; of the newest one if there are two."""
    return {int(each["slot"]): int(each["pid"]) for each in shown(flaskd)}


def start(flaskd: Flaskd, *args: str, **how: str) -> Flaskd:
    """Start it with two workers, of the app above, each with one thread."""
    flaskd.write("whoapp.py", APP)
    return flaskd.start("-w", "2", "-t", "1", *args, app="whoapp", **how)


def test_all_kinds_of_listeners(flaskd: Flaskd) -> None:
    """Both workers accept on TCP, IPv6 and a Unix socket, know their slot and generation, and work in app.chdir."""
    there = flaskd.directory / "there"
    there.mkdir()
    flaskd.write("flaskd.yaml", f"app: {{chdir: {there}}}\n")
    flaskd.env["PYTHONPATH"] = str(flaskd.directory)
    node = flaskd.directory / "app.sock"
    start(flaskd, "-l", "[::1]:0", "-l", f"unix:{node}")
    tcp = flaskd.url
    listen = flaskd.status()["listen"]
    assert len(listen) == 3
    [ipv6] = [each for each in listen if each.startswith("[::1]:")]
    for url in (tcp, f"http://{ipv6}/", f"unix:{node}"):
        assert who(url)["pid"] in workers(flaskd).values()
    first, second = both(flaskd)
    assert (first["FLASKD_WORKER"], second["FLASKD_WORKER"]) == ("0", "1")
    assert {first["FLASKD_GENERATION"], second["FLASKD_GENERATION"]} == {"1"}
    assert {first["pid"], second["pid"]} == set(workers(flaskd).values())
    assert flaskd.pid not in {first["pid"], second["pid"]}
    for each in (first, second):
        assert (each["cwd"], each["gc"]) == (str(there), True)
        assert each["FLASKD_CONTROL"] == str(flaskd.socket_path)
        assert (each["NOTIFY_SOCKET"], each["LISTEN_FDS"], each["LISTEN_FDNAMES"]) == (None, None, None)
    assert flaskd.stop() == 0
    assert not node.exists()
    assert refused(tcp)


def test_without_workers_it_is_slot_0(flaskd: Flaskd) -> None:
    """Without workers FLASKD_WORKER is 0, so an app that runs its scheduler in slot 0 runs it."""
    flaskd.write("whoapp.py", APP)
    flaskd.start(app="whoapp")
    told = who(flaskd.url)
    assert (told["FLASKD_WORKER"], told["FLASKD_GENERATION"], told["pid"]) == ("0", "0", flaskd.pid)


def test_an_inherited_listener(flaskd: Flaskd) -> None:
    """Workers serve a listener fd:NAME, answer 503 there while drained, and serve again after a resume."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        flaskd.write("whoapp.py", APP)
        flaskd.write("flaskd.yaml", "server: {listen: 'fd:web', workers: 2}\nhealth: {path: /healthz}\n")
        inherit(flaskd, sock, name="web", app="whoapp")
        for _ in range(2):
            told = who(url)
            assert told["pid"] in workers(flaskd).values()
            assert told["LISTEN_FDS"] is None
            assert get(url, "/healthz") == (200, b"ready\n")
            assert "OK drained" in flaskd.command("drain wait")
            flaskd.until(lambda: get(url)[0] == 503)
            assert get(url, "/healthz")[0] == 503
            assert flaskd.command("resume") == "OK ready\n"
        assert get(url) == (200, b"hello")
        assert flaskd.stop() == 0
        waiting = Answer(url, "/")  # they wait in the backlog for the next process that listens
        del flaskd.env["LISTEN_FDNAMES"]
        flaskd.write("flaskd.yaml", "server: {workers: 2}\n")
        inherit(flaskd, sock, app="whoapp")
        assert waiting.result() == (200, b"hello")
        assert flaskd.stop() == 0


def test_the_health_path_tells_of_the_service(flaskd: Flaskd) -> None:
    """The health path says ready while a worker is replaced, in the old worker, too; not while the service drains."""
    flaskd.write("flaskd.yaml", "health: {path: /healthz}\nshutdown: {drain: {keepalive_grace: 20s}}\n")
    start(flaskd)
    url = flaskd.url
    held = flaskd.hold(url)
    [busy] = [each["slot"] for each in shown(flaskd) if each["in_flight"]]
    before = workers(flaskd)[busy]
    assert "OK restarted" in flaskd.command(f"restart {busy}")
    leaving = {each["pid"]: each["state"] for each in shown(flaskd)}
    assert leaving[before] == "leaving"
    assert [get(url, "/healthz") for _ in range(5)] == [(200, b"ready\n")] * 5
    assert flaskd.status()["state"] == "ready"
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    flaskd.until(lambda: before not in workers(flaskd).values())
    with socket.create_connection(("127.0.0.1", int(url.rstrip("/").rpartition(":")[2])), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in client.recv(65536)
        held = flaskd.hold(url)
        assert flaskd.command("drain").startswith("OK draining")

        def unready() -> bool:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            return b" 503 " in client.recv(65536)

        flaskd.until(unready)  # workers are told of the drain a moment after the reply
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.stop() == 0


FAILURES = {
    "no such module": (None, 78, 'there is no module "broken"'),
    "raises": ("raise RuntimeError('disk on fire')\n", 70, "RuntimeError: disk on fire"),
    "no app in it": ("x = 1\n", 78, "cannot load broken"),
    "leaves": ("import os\nos._exit(3)\n", 70, "it left with the exit code 3"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_first_generation_that_does_not_load(flaskd: Flaskd, how: str) -> None:
    """The start fails with the same exit code as without workers, and logs the reason once."""
    text, code, why = FAILURES[how]
    if text is not None:
        flaskd.write("broken.py", text)
    found, log = flaskd.fails("-w", "3", app="broken")
    assert (found, why in log) == (code, True), log
    errors = [line for line in log.splitlines() if re.search(r"Z error ", line)]
    assert len([line for line in errors if "Traceback" not in line]) == 1, log
    assert log.count("Traceback (most recent call last)") == (how == "raises"), log
    assert flaskd.leftovers() == []
    assert any("ERRNO=" in each for each in flaskd.drain_messages())


def test_an_app_in_hand_needs_a_name(flaskd: Flaskd) -> None:
    """Workers cannot import an app object, or a factory of Flask's command line: exit code 78."""
    serve = "import flaskd\nfrom gateapp import app\nraise SystemExit(flaskd.serve(app, {'server': {'workers': 2}}))\n"
    group = (
        "import click\nfrom flask.cli import FlaskGroup\ndef create():\n    from gateapp import app\n    return app\n"
        "@click.group(cls=FlaskGroup, create_app=create)\ndef cli():\n    pass\ncli()\n"
    )
    for text, words in ((serve, []), (group, ["daemon", "-w", "2", "-l", "127.0.0.1:0"])):
        flaskd.write("program.py", text)
        done = subprocess.run(
            [sys.executable, "program.py", *words],
            cwd=flaskd.directory, env=flaskd.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, "app.target" in done.stderr) == (78, True), done.stderr


def test_flask_daemon_serves_with_workers(flaskd: Flaskd) -> None:
    """With `flask --app NAME daemon -w 2` each worker imports the app by that name."""
    with flaskd.log_file.open("ab") as log:
        flaskd.process = subprocess.Popen(
            [sys.executable, "-m", "flask", "--app", "gateapp:app", "daemon", "-w", "2", "-l", "127.0.0.1:0"],
            cwd=flaskd.directory, env=flaskd.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    flaskd.wait_message("READY=1")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.status()["app"] == "gateapp:app"
    assert len(workers(flaskd)) == 2
    assert flaskd.stop() == 0


def test_logs_and_proxies(flaskd: Flaskd) -> None:
    """Access lines of both workers are complete, with the client's address from a proxy; log-level reaches workers."""
    flaskd.write(
        "flaskd.yaml",
        "server: {workers: 2, trusted_proxy: 127.0.0.1, trusted_proxy_headers: x-forwarded-for}\n"
        "log: {access: common, request_id: true}\n",
    )
    flaskd.write("noisy.py", "import logging\nfrom gateapp import app\n@app.get('/debug')\ndef debug():\n"
                 "    logging.getLogger('flaskd.daemon').debug('a word of the app: %s', 'x' * 3000)\n    return 'said'\n")  # fmt: skip
    reader, writer = os.pipe()
    lines: list[str] = []

    def read() -> None:
        with os.fdopen(reader, errors="replace") as pipe:
            lines.extend(pipe)

    thread = threading.Thread(target=read)
    flaskd.start(app="noisy", listen="127.0.0.1:0", stderr=writer)
    os.close(writer)
    thread.start()
    url = flaskd.url
    assert get(url, "/debug") == (200, b"said")
    assert flaskd.command("log-level debug").startswith("OK")

    def ask_many(which: int) -> None:
        for number in range(40):
            assert (
                get(
                    url,
                    f"/{which}/{number}",
                    **{"X-Forwarded-For": f"10.1.1.{which}", "X-Request-ID": f"{which}-{number}"},
                )[0]
                == 404
            )

    askers = [threading.Thread(target=ask_many, args=(which,)) for which in range(4)]
    for each in askers:
        each.start()
    for each in askers:
        each.join()
    assert get(url, "/debug") == (200, b"said")
    assert flaskd.stop() == 0
    thread.join(20)
    access = [line for line in lines if '"GET /' in line and "debug" not in line]
    assert access, lines
    whole = [
        re.fullmatch(r'10\.1\.1\.(\d) - - \[[^]]+\] "GET /(\d)/(\d+) HTTP/1\.1" 404 \d+ request_id=\2-\3\n', each)
        for each in access
    ]
    assert all(whole), access
    assert sorted((each[2], int(each[3])) for each in whole if each and each[1] == each[2]) == sorted(
        (str(which), number) for which in range(4) for number in range(40)
    )
    assert len([line for line in lines if "a word of the app: " in line and line.endswith("x" * 3000 + "\n")]) == 1


def shared_with_the_supervisor(pid: int) -> list[str]:
    """The worker's sockets that a process has open, and the memory shared with the supervisor."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            found.append(str(each.readlink()))
    return [where for where in found if where.startswith("socket:") or "memfd" in where]


def test_a_forked_child_keeps_nothing(flaskd: Flaskd) -> None:
    """A child that the app forks has neither wire nor listeners nor board, at import or in a request."""
    flaskd.write("whoapp.py", APP + "\nwith app.test_request_context():\n    app.forked = fork()\n"
                 "@app.get('/forked')\ndef forked():\n    return app.forked\n")  # fmt: skip
    flaskd.start("-w", "2", "-t", "1", app="whoapp")
    url = flaskd.url
    worker = who(url)["pid"]
    pids = [int(get(url, path)[1]) for path in ("/forked", "/fork")]
    try:
        assert len(shared_with_the_supervisor(int(worker))) >= 3
        for pid in pids:
            flaskd.until(lambda pid=pid: shared_with_the_supervisor(pid) == [])  # its parent may be faster
        pids += [pid for each in workers(flaskd).values() for pid in children(each)]
        url = flaskd.url
        assert flaskd.stop() == 0
        assert refused(url)
    finally:
        for pid in set(pids):
            os.kill(pid, signal.SIGKILL)


ENDPOINT = """
import pathlib
import flaskd
from gateapp import app
endpoint = flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file="token").start()
with open("urls", "a") as file:
    file.write(f"{endpoint.url}\\n")
"""


def test_a_shutdown_endpoint_of_the_app(flaskd: Flaskd) -> None:
    """Each worker's code opens a shutdown endpoint; there is one, in the supervisor, and it stops the service."""
    import flaskd as package

    token = package.ShutdownEndpoint.make_token(flaskd.directory / "token").read_text().strip()
    flaskd.write("opening.py", ENDPOINT)
    flaskd.start("-w", "2", app="opening")
    assert "OK restarted" in flaskd.command("restart 1")
    urls = (flaskd.directory / "urls").read_text().split()
    assert (len(urls), len(set(urls))) == (3, 1)
    assert flaskd.status()["shutdown_endpoint"] == [urls[0]]
    held = flaskd.hold()
    host, _, path = urls[0].removeprefix("http://").partition("/")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    status, body = ask(host, f"/{path}", "POST", b"{}", headers)
    assert (status, json.loads(body)["in_flight"]) == (202, 1)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert flaskd.record()["reason"].startswith("endpoint: ")


def test_a_service_that_nobody_asks_stops(flaskd: Flaskd) -> None:
    """shutdown.idle counts for both workers together: a request to either, and one in hand, keeps the service."""
    flaskd.write("flaskd.yaml", "shutdown: {idle: {after: 2s, ignore: [/poll]}}\n")
    start(flaskd)
    url = flaskd.url
    held = flaskd.hold(url)
    assert "OK restarted" in flaskd.command("restart")
    flaskd.until(lambda: flaskd.status()["idle_for"] == 0.0)
    ended = threading.Event()
    polls = []

    def poll() -> None:
        while not ended.wait(0.05):
            try:
                polls.append(get(url, "/poll"))
            except OSError:
                return

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        assert "STOPPING=1" not in "".join(flaskd.drain_messages())
        assert "idle: no request for 2s" in flaskd.wait_message("STOPPING=1")
        assert flaskd.wait() == 0
    finally:
        ended.set()
        thread.join()
    assert len(polls) > 3
    assert flaskd.record()["reason"] == "idle: no request for 2s"


def test_admin_and_roles(flaskd: Flaskd) -> None:
    """The supervisor has the admin listener and the control socket: probes and status need no worker."""
    flaskd.write("flaskd.yaml", "admin: {listen: '127.0.0.1:0'}\n")
    start(flaskd)
    admin = "http://" + flaskd.status()["admin"][0] + "/"
    assert get(admin, "/readyz")[0] == 200
    assert get(flaskd.url) == (200, b"hello")
    flaskd.settle()
    for pid in workers(flaskd).values():
        os.kill(pid, signal.SIGSTOP)
    try:
        assert get(admin, "/readyz")[0] == 200
        assert b'flaskd_requests_total{outcome="completed"} 1.0' in get(admin, "/metrics")[1]
        assert flaskd.status()["tally"]["outcomes"]["completed"] == 1
    finally:
        for pid in workers(flaskd).values():
            os.kill(pid, signal.SIGCONT)
    assert "OK drained" in flaskd.command("drain wait")
    assert get(admin, "/readyz")[0] == 503
    assert flaskd.stop() == 0


STATE = r"""
import gc, json, locale, os, re, resource, signal, sys, threading, warnings
from flask import Flask
app = Flask(__name__)

@app.get("/")
def state():
    with open("/proc/self/status") as file:
        status = file.read()
    os.umask(umask := os.umask(0))
    files = sorted(
        re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{each}"))
        for each in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{each}")
    )
    return {
        "environment": dict(os.environ), "path": sys.path, "flags": str(sys.flags), "umask": umask, "cwd": os.getcwd(),
        # Signal 32 is the C library's own (nptl(7)), which posix_spawn(3) ignores in the new process.
        "signals": [int(each, 16) & ~(1 << 31) for each in re.findall(r"Sig(?:Blk|Ign|Cgt):\s*(\w+)", status)],
        **{each.name: re.sub("0x.*", "", str(signal.getsignal(each))) for each in signal.Signals},
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:4] == "RLIM" and name != "RLIM_INFINITY"},
        "switch": sys.getswitchinterval(), "gc": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()],
        "locale": locale.setlocale(locale.LC_ALL), "warnings": [str(each) for each in warnings.filters],
        "threads": sorted(re.sub(r"\d+", "N", each.name) for each in threading.enumerate()), "files": files,
        "encodings": [each.encoding for each in (sys.stdin, sys.stdout, sys.stderr)],
        "priority": os.getpriority(os.PRIO_PROCESS, 0), "cpus": sorted(os.sched_getaffinity(0)), "group": os.getpgrp(),
        "recursion": sys.getrecursionlimit(), "main": threading.current_thread() is threading.main_thread(),
    }
"""


def test_the_first_worker_has_what_later_ones_have(flaskd: Flaskd) -> None:
    """The first worker is forked, a later one is a new process: the app finds the same in both."""
    flaskd.write("stateapp.py", STATE)
    flaskd.start("-w", "1", "-t", "1", app="stateapp")
    found = []
    for _ in range(2):
        status, body = get(flaskd.url, "/")
        assert status == 200
        found.append((workers(flaskd)[0], json.loads(body)))
        assert flaskd.client("restart")[0] == 0
    (before, forked), (after, made) = found
    assert before != after
    assert {name: (forked[name], made[name]) for name in forked if forked[name] != made[name]} == {}
