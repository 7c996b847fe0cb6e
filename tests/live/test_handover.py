"""Inherited listeners, an announced drain, and the record of the last stop."""

import json
import os
import signal
import socket
import threading
from contextlib import ExitStack

from daemon_kit import NOBODY, Flaskd, inherit
from http_client import Answer, get, refused
from patience import PATIENCE


def test_a_restart_with_an_inherited_listener_loses_and_refuses_nothing(make_flaskd) -> None:
    """Clients that connect all the time lose no request in ten restarts."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        ended = threading.Event()
        outcomes: list[object] = []

        def ask() -> None:
            while not ended.is_set():
                try:
                    outcomes.append(get(url))
                except OSError as error:
                    outcomes.append(error)

        askers = [threading.Thread(target=ask) for _ in range(4)]
        flaskd = inherit(make_flaskd(), sock)
        for each in askers:
            each.start()
        for _ in range(10):
            assert flaskd.stop() == 0
            inherit(flaskd, sock)
        ended.set()
        for each in askers:
            each.join(PATIENCE)
        assert flaskd.stop() == 0
        assert set(map(str, outcomes)) == {"(200, b'hello')"}, set(map(str, outcomes))


EARLY = """
import pathlib, time
from flaskd.server import WaitressThread
from gateapp import app
start = WaitressThread.start
def late(self, *args, **more):
    started = start(self, *args, **more)
    while not pathlib.Path("answered").exists():
        time.sleep(0.01)
    return started
WaitressThread.start = late
"""


def test_who_waits_for_the_start_is_served_as_configured(flaskd: Flaskd) -> None:
    """The first requests of an inherited backlog already have the health path and the access log."""
    flaskd.write("early.py", EARLY)
    flaskd.write("flaskd.yaml", "health: {path: /healthz}\nlog: {access: common}\n")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        inherit(flaskd, sock, app="early", wait="")
        assert get(url) == (200, b"hello")
        assert get(url, "/healthz") == (503, b"starting\n")
        flaskd.write("answered", "")
        flaskd.wait_message("READY=1")
        flaskd.until(lambda: '"GET / HTTP/1.1" 200' in flaskd.log)
        assert get(url, "/healthz") == (200, b"ready\n")
        assert flaskd.stop() == 0


def test_an_inherited_listener_by_name(flaskd: Flaskd) -> None:
    """`fd:NAME` takes the socket with that name; the app's children do not get the variables."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        flaskd.write("flaskd.yaml", "server: {listen: 'fd:web'}\n")
        inherit(flaskd, sock, name="web")
        assert get(url) == (200, b"hello")
        assert flaskd.status()["url"] == url
        assert flaskd.stop() == 0


def listening(stack: ExitStack, count: int) -> tuple[list[socket.socket], list[str]]:
    """Some listening sockets, and their URLs."""
    socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
    return socks, [f"http://127.0.0.1:{each.getsockname()[1]}/" for each in socks]


def test_without_server_listen_all_passed_sockets_are_the_apps(flaskd: Flaskd) -> None:
    """Whatever the sockets' names, they are the app's, except those of the admin listener and of the store."""
    flaskd.write("flaskd.yaml", "admin: {listen: 'fd:probes'}\n")
    with ExitStack() as stack:
        (first, *others), urls = listening(stack, 5)
        names = "flaskd.socket:http:probes:unknown:listen-127.0.0.1%3A9"
        inherit(flaskd, first, name=names, others=others)
        app, admin = [urls[0], urls[1], urls[3]], urls[2]
        assert [get(url) for url in app] == [(200, b"hello")] * 3
        assert get(admin, "/readyz") == (200, b"ready\n")
        assert flaskd.status()["listen"] == [url.removeprefix("http://").rstrip("/") for url in app]
        assert "flaskd does not listen on" not in flaskd.log
        assert flaskd.stop() == 0


def test_a_passed_socket_that_nobody_takes_is_told(flaskd: Flaskd) -> None:
    """A passed socket without a use is reported, also the admin listener's if that listens elsewhere."""
    flaskd.write("flaskd.yaml", f"admin: {{listen: 'unix:{flaskd.directory}/admin.sock'}}\n")
    with ExitStack() as stack:
        (first, *others), urls = listening(stack, 3)
        inherit(flaskd, first, "-l", "fd:web", name="web:flaskd.socket:admin", others=others)
        assert get(urls[0]) == (200, b"hello")
        places = [url.removeprefix("http://").rstrip("/") for url in urls]
        told = [line for line in flaskd.log.splitlines() if "flaskd does not listen on" in line]
        assert ["fd:web" in line for line in told] == [False, False]
        assert f"flaskd does not listen on {places[1]}, which was passed as fd:flaskd.socket" in told[0]
        assert f"flaskd does not listen on {places[2]}, which was passed as fd:admin" in told[1]
        assert flaskd.stop() == 0


def test_a_control_socket_that_was_passed(flaskd: Flaskd) -> None:
    """A passed control socket takes commands next to flaskd's own nodes, and stays after flaskd's end."""
    path = flaskd.directory / "passed.sock"
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.socket(socket.AF_UNIX) as control:
        control.bind(str(path))
        control.listen()
        inherit(flaskd, sock, name="http:control", others=[control])
        for own in (str(flaskd.socket_path), str(path)):
            code, out, _ = flaskd.client("status", "--json", "--socket", own)
            assert (code, len(json.loads(out)["listen"])) == (0, 1)
        assert "flaskd does not listen on" not in flaskd.log
        assert flaskd.client("stop", "--wait", "--socket", str(path))[0] == 0
        assert flaskd.wait() == 0
        assert path.exists()


def test_a_passed_control_socket_may_stand_where_flaskds_own_would(flaskd: Flaskd) -> None:
    """If its path is that of flaskd's own socket, it is used in the place of that."""
    flaskd.runtime.mkdir(exist_ok=True)
    flaskd.write("flaskd.yaml", "control: {required: true}\nserver: {listen: '127.0.0.1:0'}\n")
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(flaskd.socket_path))
        control.listen()
        inherit(flaskd, control, name="control")
        assert flaskd.command("ready") == "OK ready\n"
        assert flaskd.stop() == 0
        flaskd.socket_path.unlink()


def test_commands_are_taken_from_unix_sockets_alone(flaskd: Flaskd) -> None:
    """With a TCP socket for control, the start fails if `control.required`: only Unix sockets tell which user asks."""
    flaskd.write("flaskd.yaml", "control: {required: true}\n")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        inherit(flaskd, sock, name="control", wait="")
        assert flaskd.wait() == 73
    assert "expected a Unix socket, which names its client's user" in flaskd.log


def test_listeners_of_all_kinds_at_once(flaskd: Flaskd) -> None:
    """Inherited, TCP and Unix listeners serve together; a drain closes its own, the inherited one answers 503."""
    path = flaskd.directory / "http.sock"
    with socket.create_server(("127.0.0.1", 0)) as sock:
        inherit(flaskd, sock, "-l", "fd:web", "-l", "127.0.0.1:0", "-l", f"unix:{path}", name="web")
        web, ours, unix = (f"http://{each}/" if ":/" not in each else each for each in flaskd.status()["listen"])
        assert unix == f"unix:{path}"
        for _ in range(2):
            held = [Answer(url, "/hold") for url in (web, ours, unix)]
            for _ in held:
                flaskd.gate.entered()
            flaskd.until(lambda: flaskd.status()["in_flight"] == 3)  # by then all earlier answers are counted
            assert flaskd.command("drain").startswith("OK draining in_flight=3")
            flaskd.gate.open()
            assert [each.result() for each in held] == [(200, b"held")] * 3
            assert "OK drained completed=3 rejected=0 cut=0" in flaskd.command("drain wait")
            assert get(web)[0] == 503
            assert refused(ours)
            assert not path.exists()
            assert flaskd.command("resume") == "OK ready\n"
            assert [get(url) for url in (web, ours, unix)] == [(200, b"hello")] * 3
        assert flaskd.stop() == 0
    assert not path.exists()


def test_a_drained_daemon_with_an_inherited_listener_says_503(flaskd: Flaskd) -> None:
    """A client of a drained flaskd with an inherited listener gets 503; after a resume it is served."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        inherit(flaskd, sock)
        assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
        assert get(url)[0] == 503
        assert flaskd.command("resume") == "OK ready\n"
        assert get(url) == (200, b"hello")
        assert flaskd.stop() == 0


def test_a_socket_that_was_not_passed_is_named(flaskd: Flaskd) -> None:
    """`fd:NAME` without such a socket is a fault of the configuration."""
    code, log = flaskd.fails("-l", "fd:web", listen=None)
    assert (code, "cannot listen on fd:web: no socket of that name was passed (passed: none)" in log) == (78, True)


def test_who_waits_for_the_next_owner_is_counted(flaskd: Flaskd) -> None:
    """Clients that connect during the cleanup wait for the next process that listens; the log has their number."""
    fifo = flaskd.directory / "fifo"
    os.mkfifo(fifo)
    flaskd.write("flaskd.yaml", f"cleanup: {{policies: {{w: {{use: command, with: {{argv: [cat, '{fifo}']}}}}}}}}\n")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        inherit(flaskd, sock)
        flaskd.kill(signal.SIGTERM)
        with fifo.open("w"):  # once it is open at both ends, the drain is over
            waiting = socket.create_connection(sock.getsockname())
        assert flaskd.wait() == 0
        waiting.close()
        where = f"127.0.0.1:{sock.getsockname()[1]}"
    assert f"1 connections wait on {where} for the next process that listens, or are reset" in flaskd.log


def test_the_address_of_a_passed_socket_is_no_stranger_s(flaskd: Flaskd) -> None:
    """If `server.listen` has the port of a passed socket, the error says what to write."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        where = f"127.0.0.1:{sock.getsockname()[1]}"
        inherit(flaskd, sock, "-l", where, name="http", wait="")
        assert flaskd.wait() == 78
    said = f"cannot listen on {where}: the service manager does, and passed it as fd:http; name that in server.listen"
    assert said in flaskd.log


def test_an_announced_drain(flaskd: Flaskd) -> None:
    """While a drain is announced, readiness says no, in the verb and at health.path, and requests are served."""
    flaskd.write("flaskd.yaml", "health: {path: /healthz, unready_status: 404}\nshutdown: {announce: 60s}\n")
    flaskd.start()
    url = flaskd.url
    assert get(url, "/healthz") == (200, b"ready\n")
    flaskd.settle()
    assert flaskd.command("drain").startswith("OK draining in_flight=0 deadline=1m")
    assert get(url, "/healthz") == (404, b"draining\n")
    assert flaskd.command("ready") == "ERR not-ready flaskd is draining\n"
    assert get(url) == (200, b"hello")
    assert flaskd.command("resume") == "OK ready\n"
    assert get(url, "/healthz") == (200, b"ready\n")
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    assert get(url) == (200, b"hello")
    assert flaskd.command("stop now").startswith("OK stopping")
    assert flaskd.wait() == 0


def test_the_last_stop_is_shown(flaskd: Flaskd) -> None:
    """`flaskd last-stop` shows the record, from the file or from a running daemon."""
    code, _, err = flaskd.client("last-stop", *NOBODY)
    assert (code, "there is no record in" in err) == (69, True)
    flaskd.write("flaskd.yaml", "shutdown: {drain: {timeout: 100ms}}\n")
    flaskd.start()
    assert flaskd.command("last-stop") == "ERR no-record no stop has been recorded yet\n"
    flaskd.hold()
    assert flaskd.stop() == 0
    code, out, _ = flaskd.client("last-stop", *NOBODY)
    assert code == 0
    assert out.startswith("reason: signal: SIGTERM\n")
    assert "requests: completed=0 rejected=0 cut=1\n" in out
    assert "cut: GET /hold (running for " in out
    flaskd.start()
    assert flaskd.command("last-stop").startswith("reason: signal: SIGTERM\n")
    assert flaskd.stop() == 0


def test_queued_requests_are_refused_in_words_at_the_deadline(flaskd: Flaskd) -> None:
    """With one thread that hangs, queued requests get a 503 at the deadline, and the account says so."""
    flaskd.write("flaskd.yaml", "shutdown: {drain: {timeout: 200ms}}\n")
    flaskd.start("-t", "1")
    url = flaskd.url
    flaskd.hold(url)
    queued = [Answer(url, "/") for _ in range(3)]
    flaskd.until(lambda: flaskd.status()["in_flight"] == 4)
    code, out, _ = flaskd.client("stop", "--wait")
    assert code == 1
    assert "rejected=3 cut=1" in out
    assert {each.result()[0] for each in queued} == {503}
    assert flaskd.wait() == 0


SHELL = ["sh", "-c", 'export LISTEN_FDS=1 LISTEN_PID=$$; "$@"; exit $?', "sh"]


def test_sockets_that_a_shell_was_given_are_not_replaced_by_the_default_address(flaskd: Flaskd) -> None:
    """If LISTEN_PID names the shell around flaskd, the start fails with advice, and nothing is bound."""
    flaskd.launch(listen=None, prefix=SHELL)
    assert flaskd.process is not None
    assert flaskd.wait() == 78
    assert f"cannot listen: 1 socket was passed to pid {flaskd.process.pid} (sh), and this is pid " in flaskd.log
    assert "with exec in it; if they are not meant for it, set server.listen" in flaskd.log
    assert "will serve on" not in flaskd.log


def test_sockets_that_a_shell_was_given_do_not_stop_who_listens_elsewhere(flaskd: Flaskd) -> None:
    """With own addresses flaskd serves, warns about the sockets, and the app does not get the variables."""
    flaskd.start(prefix=SHELL)
    assert "1 socket was passed to pid " in flaskd.log
    assert get(flaskd.url) == (200, b"hello")
    flaskd.command("stop")
    assert flaskd.wait() == 0
