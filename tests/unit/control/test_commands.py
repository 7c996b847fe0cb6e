"""What a line, a JSON object or an HTTP request means, and which client may give which command."""

import contextlib
import errno
import json
import os
import queue
import selectors
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaskd.admin.health import AdminApp
from flaskd.boot import Boot
from flaskd.config import Config, load_mapping
from flaskd.control import connection, plane
from flaskd.control.access import Access
from flaskd.control.commands import from_fields, from_http, from_words
from flaskd.control.connection import MAX_OUTPUT, Connection
from flaskd.control.peer import FIFO_PEER, Peer
from flaskd.control.replies import LogReply
from flaskd.control.verbs import RUN
from flaskd.errors import ForbiddenError, UnknownCommandError, UsageError
from flaskd.reload import Reload
from flaskd.serving import launch
from flaskd.serving.inprocess import InProcess
from flaskd.verbs import FLAGS, VERBS, Role

PEER = Peer(uid=4242, pid=1, groups=frozenset({77}))


def a_daemon(app=None):
    """A daemon that is not started."""
    return Boot(lambda: None, plane=lambda _: None, name="flaskd", environ={}, app=app).daemon


def test_every_verb_of_the_table_does_something():
    """The table of verbs and the functions behind it have the same verbs, and each flag is explained."""
    assert list(RUN) == list(VERBS)
    assert {flag for verb in VERBS.values() for flag in verb.flags} == set(FLAGS)


@pytest.mark.parametrize(("silent", "why"), [(4.9, ""), (6.25, "the serving thread has not turned for 6.2s")])
def test_one_word_on_whether_it_lives(silent, why, monkeypatch):
    """`health` and `/livez` fail if the serving thread has not run its loop for five seconds."""
    daemon, config = a_daemon(app=lambda environ, start_response: []), Config()
    assert daemon.wedged == ""  # starting
    monkeypatch.setattr(launch, "make_server", lambda *_, **__: SimpleNamespace(silent_for=silent))
    daemon.serving.load(config, None)
    daemon.serving.make_server(config, [])
    assert daemon.wedged == why
    answers = []
    reply = SimpleNamespace(ok=answers.append, error=lambda code, message: answers.append(f"{code} {message}"))
    RUN["health"](daemon, from_words(["health"], PEER), reply)
    app = AdminApp(daemon, None, ())
    body = app({"PATH_INFO": "/livez", "REQUEST_METHOD": "GET"}, lambda status, _: answers.append(status))
    assert [*answers, *body] == (
        [f"unhealthy {why}", "503 Service Unavailable", f"{why}\n".encode()]
        if why
        else ["healthy", "200 OK", b"alive\n"]
    )


@pytest.mark.parametrize(("verb", "what"), [("plan", {"text": "one\ntwo"}), ("check", SimpleNamespace(path=None))])
def test_a_slow_answer_keeps_nobody_waiting(verb, what, monkeypatch):
    """A verb that asks the app or a file returns at once, and its answer follows later."""
    gate, answers = threading.Event(), queue.SimpleQueue()
    asked = {"plan": (InProcess, "plan"), "check": (Reload, "read")}[verb]
    monkeypatch.setattr(*asked, lambda *_: what if gate.wait(20) else None)
    daemon = a_daemon()
    daemon.configuration = SimpleNamespace()
    reply = SimpleNamespace(ok=lambda word, *_, **__: answers.put(word), error=lambda *error: answers.put(error))
    RUN[verb](daemon, from_words([verb], PEER), reply)
    assert answers.empty()
    gate.set()
    assert answers.get(timeout=20) == {"plan": "plan", "check": "valid"}[verb]


@pytest.mark.parametrize(
    ("line", "text", "changes", "role"),
    [
        ("status", "status", False, Role.VIEWER),
        ("stop now wait", "stop now wait", True, Role.ADMIN),
        ("stop wait now wait", "stop now wait", True, Role.ADMIN),
        ("drain", "drain", True, Role.OPERATOR),
        ("log-level", "log-level", False, Role.VIEWER),
        ("log-level debug", "log-level debug", True, Role.OPERATOR),
        ("restart", "restart", True, Role.OPERATOR),
        ("restart 1 wait", "restart wait 1", True, Role.OPERATOR),
        ("scale", "scale", True, Role.OPERATOR),
        ("help stop", "help stop", False, Role.VIEWER),
        ("requests stacks", "requests stacks", False, Role.VIEWER),
    ],
)
def test_words(line, text, changes, role):
    """A verb may have flags in any order and an argument; `log-level` without an argument changes nothing."""
    command = from_words(line.split(), PEER)
    assert (str(command), command.changes, command.role) == (text, changes, role)


def test_nothing_that_could_forge_a_line_of_the_log():
    """Control characters are refused in every dialect."""
    for speak in (
        lambda: from_words(["log-level", "x\x1b[2J"], PEER),
        lambda: from_fields("log-level", {"level": "x\ncontrol: stop from uid=0"}, PEER),
        lambda: from_fields("sta\x1btus", {}, PEER),
        lambda: from_fields("status", {"a\nb": True}, PEER),
        lambda: from_http("POST", "/log-level?level=%0aFAKE", b"", PEER),
    ):
        with pytest.raises(UsageError, match="^expected a command of printable characters$"):
            speak()


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("", UsageError, 'expected a command; try "help"'),
        ("drian", UnknownCommandError, '"drian"; did you mean "drain"? try "help"'),
        ("DRAIN", UnknownCommandError, '"DRAIN"; did you mean "drain"? try "help"'),
        ("drain fast", UsageError, 'drain does not know "fast"; it knows wait'),
        ("log-level a b", UsageError, "log-level takes one level, got 2"),
        ("health wait", UsageError, 'health does not know "wait"; it takes none'),
    ],
)
def test_words_that_mean_nothing(line, error, message):
    """The error says what is wrong and what is known; no command is carried out."""
    with pytest.raises(error) as caught:
        from_words(line.split(), PEER)
    assert str(caught.value) == message


def test_fields():
    """In JSON flags are booleans and the argument is text or a whole number; a false flag is like a missing one."""
    assert str(from_fields("stop", {"wait": True, "now": False}, PEER)) == "stop wait"
    assert str(from_fields("log-level", {"level": "debug"}, PEER)) == "log-level debug"
    assert str(from_fields("restart", {"slot": 0}, PEER)) == "restart 0"
    for verb, fields in [
        ("drain", {"wait": 1}), ("drain", {"wait": "yes"}), ("drain", {"": True}), ("log-level", {"level": 7.5}),
        ("restart", {"slot": True}), ("restart", {"slot": None}),
        ("log-level", {"level": ""}), (7, {}), (None, {}), ("status", {"level": "x"}),
    ]:  # fmt: skip
        with pytest.raises(UsageError):
            from_fields(verb, fields, PEER)


@pytest.mark.parametrize(
    ("method", "target", "body", "text"),
    [
        ("GET", "/status", b"", "status"),
        ("GET", "/status/", b"", "status"),
        ("GET", "/", b"", "help"),
        ("HEAD", "/health", b"", "health"),
        ("POST", "/drain?wait", b"", "drain wait"),
        ("POST", "/drain?wait=true", b"", "drain wait"),
        ("POST", "/drain?wait=0", b"", "drain"),
        ("POST", "/drain", b'{"wait": true}', "drain wait"),
        ("POST", "/log-level?level=debug", b"", "log-level debug"),
        ("GET", "/log-level", b"", "log-level"),
        ("GET", "/help?verb=stop", b"", "help stop"),
        ("GET", "http://flaskd/status", b"", "status"),
        ("POST", "HTTP://flaskd/drain?wait", b"", "drain wait"),
        ("GET", "http://flaskd", b"", "help"),
        ("GET", "/last%2Dstop", b"", "last-stop"),
    ],
)
def test_http(method, target, body, text):
    """The path is the verb; flags and argument are in the query or in a JSON body."""
    assert str(from_http(method, target, body, PEER)) == text


@pytest.mark.parametrize(
    ("method", "target", "body", "code"),
    [
        ("GET", "/drain", b"", "method"),
        ("GET", "/stop?now", b"", "method"),
        ("GET", "/log-level?level=debug", b"", "method"),
        ("GET", "/restart", b"", "method"),
        ("PUT", "/status", b"", "method"),
        ("POST", "/drain?wait=perhaps", b"", "usage"),
        ("POST", "/drain", b"[1]", "usage"),
        ("POST", "/drain", b"{", "usage"),
        ("POST", "/drain", b"[" * 3000, "usage"),
        ("GET", "/drian", b"", "unknown-command"),
        ("GET", "//[", b"", "unknown-command"),
        ("GET", "/status%0a", b"", "usage"),
    ],
)
def test_http_that_is_refused(method, target, body, code):
    """What changes something needs POST; all else is as in the other dialects."""
    with pytest.raises(UsageError) as caught:
        from_http(method, target, body, PEER)
    assert caught.value.code == code


# --- access -----------------------------------------------------------------------------------------------------------


def access(**control):
    return Access(load_mapping({"control": control}, actions={}).values.control)


@pytest.mark.parametrize(
    ("roles", "role"),
    [
        ({}, Role.ADMIN),
        ({"viewer": ["4242"]}, Role.VIEWER),
        ({"viewer": [4242]}, Role.VIEWER),
        ({"viewer": [1], "operator": ["@77"]}, Role.OPERATOR),
        ({"viewer": ["@77"], "admin": [4242]}, Role.ADMIN),
        ({"admin": ["@77"], "viewer": [4242]}, Role.ADMIN),
        ({"admin": [1]}, None),
        ({"admin": ["77", "@4242"]}, None),
        ({"viewer": ["root"]}, None),
        ({"admin": ["no-such-user", "@no-such-group"]}, None),
    ],
)
def test_the_highest_role_counts(roles, role, caplog):
    """A user has the highest of their own and their groups' roles; without any roles every user is admin."""
    assert access(roles=roles).role_of(PEER) == role


def test_root_and_the_daemons_own_user_may_do_all():
    """Root and the daemon's own user are always admins, because they could send it signals anyway."""
    granted = access(roles={"viewer": [4242]})
    assert granted.role_of(Peer(uid=0)) == granted.role_of(Peer(uid=os.geteuid())) == Role.ADMIN


@pytest.mark.parametrize(
    ("role", "line", "message"),
    [
        ("viewer", "status", None),
        ("viewer", "log-level", None),
        (
            "viewer",
            "log-level debug",
            "log-level needs the role operator; uid 4242 has the role viewer (control.roles)",
        ),
        ("viewer", "drain", "drain needs the role operator; uid 4242 has the role viewer (control.roles)"),
        ("operator", "drain", None),
        ("operator", "stop", "stop needs the role admin; uid 4242 has the role operator (control.roles)"),
        ("admin", "stop", None),
    ],
)
def test_a_refusal_names_the_role_that_is_needed(role, line, message):
    """A client may do what its role allows; a refusal names the role that is needed."""
    command = from_words(line.split(), PEER)
    granted = access(roles={role: [4242]})
    if message is None:
        granted.check(command)
    else:
        with pytest.raises(ForbiddenError) as caught:
            granted.check(command)
        assert str(caught.value) == message


def test_nobody_gets_help_only():
    """A client without a role may only ask for help."""
    granted = access(roles={"admin": [1]})
    granted.check(from_words(["help"], PEER))
    with pytest.raises(ForbiddenError, match="status needs the role viewer; uid 4242 has no role"):
        granted.check(from_words(["status"], PEER))


@pytest.mark.parametrize(
    ("control", "takes"),
    [
        ({}, set(VERBS)),
        ({"fifo": ["drain", "resume"]}, {"drain", "resume"}),
        ({"fifo": []}, set()),
        ({"roles": {"admin": [1]}}, set()),
        ({"roles": {"admin": [1]}, "fifo": "drain"}, {"drain"}),
    ],
)
def test_what_the_fifo_takes(control, takes):
    """The FIFO accepts all verbs without roles, none with roles, and in either case what `control.fifo` lists."""
    granted = access(**control)
    assert granted.fifo == takes
    for name in VERBS:
        command = from_words([name], FIFO_PEER)
        if name in takes:
            granted.check(command)
        else:
            with pytest.raises(ForbiddenError, match=f"{name} is not for the FIFO"):
                granted.check(command)


# --- a connection -----------------------------------------------------------------------------------------------------


def connect(execute):
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    return ours, Connection(theirs, execute, lambda: None)


def turn(client):
    """Do what the control thread does with a client, until nothing more happens."""
    while True:
        heard = client.last_heard
        if client.wants_to_read:
            client.read()
        more, output = client.work(), client.has_output
        client.flush()
        if not more and client.last_heard == heard and client.has_output == output:
            return


@given(st.lists(st.binary(max_size=300), max_size=8))
@settings(max_examples=150, deadline=None)
def test_no_bytes_hurt_a_connection(pieces):
    """Any bytes in any pieces raise no exception, and only commands are carried out."""
    done = []

    def execute(command, reply):
        done.append(command)
        reply.ok("done")

    ours, client = connect(execute)
    with ours, client.sock:
        for piece in [*pieces, b"\n"]:
            if not client.wants_to_read:
                break
            ours.sendall(piece)
            turn(client)
        ours.shutdown(socket.SHUT_WR)
        turn(client)
        assert all(command.name in VERBS for command in done)
        assert client.pending == 0


LINES = st.one_of(
    st.sampled_from([b"status", b"drain wait", b'{"cmd":"drain","wait":true}', b"GET /status HTTP/1.1", b"{", b"\xff"]),
    st.binary(max_size=40).map(lambda text: text.replace(b"\n", b"")),
)


@given(st.lists(LINES, max_size=12), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_how_lines_are_cut_into_pieces_does_not_matter(lines, size):
    """The same bytes mean the same commands, however they are split."""
    data = b"".join(line + b"\r\n" for line in lines)
    meant = []
    for step in (size, len(data) or 1):
        done = []

        def execute(command, reply, done=done):
            done.append(str(command))
            reply.ok("done")

        ours, client = connect(execute)
        with ours, client.sock:
            for start in range(0, len(data), step):
                if client.wants_to_read:
                    ours.sendall(data[start : start + step])
                    turn(client)
            if client.wants_to_read:
                ours.shutdown(socket.SHUT_WR)
                turn(client)
        meant.append(done)
    assert meant[0] == meant[1]


@pytest.mark.parametrize(
    ("request_bytes", "answer"),
    [
        (b"GET /status HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /status HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"),
        (b"GET /status HTTP/1.1\nHost: x\n\n", b"HTTP/1.1 200"),
        (b"PUT /status HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 405"),
        (b'POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n{"wait": true}', b"HTTP/1.1 200"),
        (b'POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{"wait": true}', b"HTTP/1.1 400"),
        (b"POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 9\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST /drain HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST /drain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST /drain HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.1 400"),
        (b"GET /status HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"HTTP/1.1 400"),
        (b"GET /status HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 20000, b"HTTP/1.1 400"),
        *[
            (b"POST /drain HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n", b"HTTP/1.1 400")
            for line in (
                b"host: y",
                b"Content-Length : 0",
                b"Content-Length: +0",
                b"Content-Length: 0, 0",
                b"Content-Length:",
                b" folded",
                b"Content-Length: " + b"0" * 5000,
                b"Content-Length: 0\rA: b",
                b"A",
                b": a",
                b"A\0: b",
                b"A: \0",
                b"A: \x7f",
                b"transfer-encoding: identity",
                b"Transfer-Encoding\x0b: chunked",
            )
        ],
        *[
            (b"POST /drain HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", b"HTTP/1.1 400")
            for host in (b"a b", b"a/b", b"[::1", b"\xe4")
        ],
        (b"POST /drain HTTP/1.0\r\nHost: a/b\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /status HTTP/1.1\r\nHost:\r\nA: b\r\nA: b\r\n\r\n", b"HTTP/1.1 200"),
        (b"GET /drian HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 404"),
        (b"STATUS\n", b"ERR unknown-command"),
        (b"DRAIN", b"ERR unknown-command"),
    ],
)
def test_http_requests_whole_and_broken(request_bytes, answer):
    """A complete request is carried out once; one that is broken, cut short or too long is refused."""
    done = []

    def execute(command, reply):
        done.append(command)
        reply.ok("done")

    ours, client = connect(execute)
    with ours, client.sock:
        ours.sendall(request_bytes)
        ours.shutdown(socket.SHUT_WR)
        turn(client)
        assert ours.recv(65536).startswith(answer)
        assert len(done) == (answer == b"HTTP/1.1 200")
        assert client.done


def test_an_http_request_is_looked_at_once_however_it_is_cut(monkeypatch):
    """A head is parsed once when it is complete, and not again with each byte of the body."""
    fields, done = [], []

    def execute(command, reply):
        done.append(str(command))
        reply.ok("done")

    real = connection.field
    monkeypatch.setattr(connection, "field", lambda line: fields.append(line) or real(line))
    ours, client = connect(execute)
    with ours, client.sock:
        for byte in b'POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n{"wait": true}':
            assert not done
            ours.sendall(bytes([byte]))
            turn(client)
    assert (fields, done) == ([b"Host: x", b"Content-Length: 14"], ["drain wait"])


@pytest.mark.parametrize(
    ("asked", "allowed"), [("GET /drain", b"POST"), ("PUT /status", b"GET, HEAD, POST"), ("GET /drian", None)]
)
def test_the_methods_that_are_allowed_are_named(asked, allowed):
    """A 405 has an Allow header with the methods (RFC 9110 §15.5.6); no other answer has one."""
    ours, client = connect(lambda *_: None)
    with ours, client.sock:
        ours.sendall(f"{asked} HTTP/1.0\r\n\r\n".encode())
        turn(client)
        head = ours.recv(65536).partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert head[0].startswith(b"HTTP/1.1 405" if allowed else b"HTTP/1.1 404")
    assert [line for line in head if line.startswith(b"Allow:")] == ([b"Allow: " + allowed] if allowed else [])


@pytest.mark.parametrize("line", [b"plan\n", b'{"cmd": "plan"}\n', b"GET /plan HTTP/1.0\r\n\r\n"])
def test_a_fault_in_a_verb_is_an_answer(line, caplog):
    """If a verb raises, the client gets an error in its own dialect."""

    def execute(_command, _reply):
        raise RuntimeError("no name")

    ours, client = connect(execute)
    with ours, client.sock:
        ours.sendall(line)
        turn(client)
        answer = ours.recv(65536).decode()
        assert "failed" in answer
        assert "cannot carry out the command: RuntimeError; the log says more" in answer
        assert client.pending == 0
    assert "cannot carry out a control command" in caplog.text


def test_a_fault_in_a_verb_costs_the_fifo_that_line_alone(tmp_path, caplog, monkeypatch):
    """If a command from the FIFO raises, that is logged, and the next line is carried out."""
    reached = threading.Event()

    def broken(_daemon, _command, _reply):
        raise RuntimeError("no name")

    verbs = {"plan": broken, "health": lambda _daemon, _command, _reply: reached.set()}
    monkeypatch.setattr(plane, "RUN", verbs)
    config = Config.model_validate({})
    daemon = SimpleNamespace(configuration=SimpleNamespace(values=config))
    control = plane.ControlPlane(daemon, "shop", {"RUNTIME_DIRECTORY": str(tmp_path)})
    control.open(config)
    try:
        with (tmp_path / "control").open("w") as fifo:
            fifo.write("plan\nhealth\n")
        assert reached.wait(20.0)
    finally:
        control.close()
    assert "cannot carry out a control command" in caplog.messages
    assert "control: 'plan' from the FIFO: ERR failed cannot carry out the command: RuntimeError" in caplog.messages


@pytest.mark.parametrize("given", ["7", "-1", '"seven"', '""', "null"])
def test_an_id_comes_back(given):
    """An id that is text, a whole number or null comes back unchanged; a missing one is null."""
    ours, client = connect(lambda _, reply: reply.ok("done"))
    with ours, client.sock:
        ours.sendall(f'{{"id": {given}, "cmd": "status"}}\n{{"cmd": "status"}}\n'.encode())
        turn(client)
        answers = ours.recv(65536).splitlines()
    assert [json.loads(each)["id"] for each in answers] == [json.loads(given), None]


@pytest.mark.parametrize("given", ["NaN", "Infinity", "1.5", "true", "{}", "[7]", "[" * 900 + "]" * 900])
def test_an_id_that_could_not_come_back_is_refused(given):
    """An id that is no valid JSON, or nested too deeply, is an error; the command is not carried out."""
    done = []
    ours, client = connect(lambda command, _: done.append(command))
    with ours, client.sock:
        ours.sendall(f'{{"id": {given}, "cmd": "status"}}\n'.encode())
        turn(client)
        answer = json.loads(ours.recv(65536))
    assert (answer["id"], answer["ok"], answer["error"]["code"]) == (None, False, "usage")
    assert 'expected "id" to be text, a whole number or null' in answer["error"]["message"]
    assert done == []
    assert client.pending == 0


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_who_has_said_all_is_let_go(end):
    """The commands that a client has sent before it closes are all carried out, once; then it is dropped."""
    done = []

    def execute(command, reply):
        done.append(command.name)
        reply.ok("done")

    ours, client = connect(execute)
    with ours, client.sock:
        ours.sendall(b'{"cmd": "status"}\n{"cmd": "health"}\n{"cmd": "ready"}' + end)
        ours.shutdown(socket.SHUT_WR)
        client.read()
        client.read()  # the client has closed before the first is carried out
        assert client.ended
        for _ in range(4):
            assert not client.work()
            client.flush()
        assert done == ["status", "health", "ready"]
        assert client.done


def test_who_does_not_read_is_given_up():
    """The unread output of a client is limited; above the limit it is dropped."""
    replies = []
    ours, client = connect(lambda _, reply: replies.append(reply))
    with ours, client.sock:
        ours.sendall(b"drain wait\n")
        turn(client)
        for _ in range(3 * MAX_OUTPUT // 1000):
            replies[0].progress({"note": "x" * 1000})
        assert client.overflowed
        kept = 0
        while client.has_output:
            client.flush()
            kept += len(ours.recv(65536))
        client.sock.shutdown(socket.SHUT_WR)
        kept += sum(map(len, iter(lambda: ours.recv(65536), b"")))
        assert MAX_OUTPUT < kept < MAX_OUTPUT + 2000


def test_a_client_with_many_commands_waits_for_its_turn():
    """No more commands are read from a client than may wait, until there are outcomes."""
    replies = []
    ours, client = connect(lambda _, reply: replies.append(reply))
    with ours, client.sock:
        ours.sendall(b'{"cmd":"drain","wait":true}\n' * 100)
        turn(client)
        assert (len(replies), client.wants_to_read) == (32, False)
        for reply in replies[:10]:
            reply.ok("drained")
        client.flush()
        client.work()
        assert len(replies) == 42


def test_blanks_of_all_kinds_stay_out_of_the_log(caplog):
    """The words of a FIFO line are separated by blanks in the log, whatever separated them in the line."""
    caplog.set_level("INFO", "flaskd.control")
    LogReply("log-level\x1cinfo\r\x85").ok("info")
    assert caplog.messages == ["control: log-level info: OK info"]


def test_a_client_has_the_name_of_its_program_while_that_runs():
    """The log names the client's program while it runs; there is no name for ended ones and for writers of the FIFO."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = Peer.of(theirs)
    name = Path("/proc/self/comm").read_text().strip()
    assert str(peer) == f"uid={os.geteuid()} pid={os.getpid()} command={name}"
    assert str(Peer(uid=7, pid=2**22 + 1)) == "uid=7 pid=4194305"
    assert str(FIFO_PEER) == "the FIFO"


def test_many_who_come_at_once_are_all_answered(tmp_path, monkeypatch):
    """One client is accepted in each turn, and all that connect at once are answered."""
    monkeypatch.setattr(plane, "RUN", {"health": lambda _daemon, _command, reply: reply.ok("healthy")})
    config = Config.model_validate({})
    daemon = SimpleNamespace(configuration=SimpleNamespace(values=config))
    control = plane.ControlPlane(daemon, "shop", {"RUNTIME_DIRECTORY": str(tmp_path)})
    control.open(config)
    try:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(30)]
            for client in clients:
                client.settimeout(20.0)
                client.connect(str(tmp_path / "control.sock"))
            for client in clients:
                client.sendall(b"health\n")
            assert [client.recv(100) for client in clients] == [b"OK healthy\n"] * 30
    finally:
        control.close()


def test_an_app_s_timeout_for_sockets_is_none_of_the_control_plane_s(tmp_path, monkeypatch):
    """After the app calls socket.setdefaulttimeout(), a silent client still delays no other."""
    monkeypatch.setattr(plane, "RUN", {"health": lambda _daemon, _command, reply: reply.ok("healthy")})
    config = Config.model_validate({})
    daemon = SimpleNamespace(configuration=SimpleNamespace(values=config))
    control = plane.ControlPlane(daemon, "shop", {"RUNTIME_DIRECTORY": str(tmp_path)})
    before = socket.getdefaulttimeout()
    control.open(config)
    try:
        socket.setdefaulttimeout(60.0)
        with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as client:
            for each in (silent, client):
                each.settimeout(20.0)
                each.connect(str(tmp_path / "control.sock"))
            client.sendall(b"health\n")
            assert client.recv(100) == b"OK healthy\n"
    finally:
        socket.setdefaulttimeout(before)
        control.close()


def test_a_client_that_cannot_be_listened_to_is_dropped(tmp_path, monkeypatch, caplog):
    """If the system cannot watch a client, that one is dropped and the others are served."""
    full = []

    class Selector(selectors.DefaultSelector):
        def register(self, fileobj, events, data=None):
            if full:
                full.clear()
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().register(fileobj, events, data)

    monkeypatch.setattr("flaskd.control.plane.selectors.DefaultSelector", Selector)
    monkeypatch.setattr(plane, "RUN", {"health": lambda _daemon, _command, reply: reply.ok("healthy")})
    config = Config.model_validate({})
    daemon = SimpleNamespace(configuration=SimpleNamespace(values=config))
    control = plane.ControlPlane(daemon, "shop", {"RUNTIME_DIRECTORY": str(tmp_path)})
    control.open(config)
    full.append(True)
    try:
        with socket.socket(socket.AF_UNIX) as unlucky, socket.socket(socket.AF_UNIX) as client:
            for each in (unlucky, client):
                each.settimeout(20.0)
                each.connect(str(tmp_path / "control.sock"))
                if each is unlucky:
                    assert unlucky.recv(100) == b""
            client.sendall(b"health\n")
            assert client.recv(100) == b"OK healthy\n"
    finally:
        control.close()
    assert "cannot listen to a control client: No space left on device" in caplog.text
