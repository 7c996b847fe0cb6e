"""Where a client looks for a daemon, and what it says if it may not look."""

import contextlib
import json
import os
import socket
import stat
import struct
import tempfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from flaskd import client as flaskd_client
from flaskd import finding
from flaskd.cli import asking, cli
from flaskd.client import ControlClient
from flaskd.errors import ForbiddenError, NoDaemonError
from flaskd.finding import find_socket, running

NAME = "nobody-runs-this"
ENVIRON = {"RUNTIME_DIRECTORY": "/nowhere/one", "XDG_RUNTIME_DIR": "/nowhere"}


@contextlib.contextmanager
def answering(path, answer):
    """A process' thread that gives one client that answer, whatever it asks for."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            sock, _ = listener.accept()
            with sock:
                sock.recv(100)
                sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.fixture
def closed(monkeypatch):
    """A directory that others may not search; simulated, because root may search all."""
    real = os.stat

    def look(path, *args, **kwargs):
        if str(path).startswith("/nowhere/one/"):
            raise PermissionError(13, "Permission denied")
        if str(path) == "/nowhere/one":
            return os.stat_result((stat.S_IFDIR | 0o750, 0, 0, 2, 0, 0, 0, 0, 0, 0))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", look)


@pytest.mark.usefixtures("closed")
def test_a_place_where_one_must_not_look_is_no_empty_place():
    """A directory that this user may not search is named, with its owner, before the places without a daemon."""
    with pytest.raises(ForbiddenError) as caught:
        find_socket(None, NAME, ENVIRON)
    said = str(caught.value)
    assert said.startswith(
        "cannot look for a daemon in /nowhere/one: Permission denied; it is for the user root and the group root;"
    )
    assert "no /nowhere/nobody-runs-this/control.sock" in said
    assert "no /nowhere/one/control.sock" not in said
    assert caught.value.exit_code == 77


@pytest.mark.usefixtures("closed")
def test_a_place_named_is_taken_as_the_socket_where_one_must_not_look():
    """A path given by name is used as the socket even if the directory cannot be searched; connecting tells the fault."""
    assert find_socket("/nowhere/one/control.sock", NAME, {}) == Path("/nowhere/one/control.sock")


def test_a_place_is_named_once():
    """A place is named once, even if two variables lead to it."""
    with pytest.raises(NoDaemonError) as caught:
        find_socket(None, NAME, {"RUNTIME_DIRECTORY": "/nowhere/nobody-runs-this", "XDG_RUNTIME_DIR": "/nowhere"})
    assert str(caught.value).count("/nowhere/nobody-runs-this/control.sock") == 1


def test_a_stale_socket_hides_no_daemon_in_a_later_place(tmp_path, monkeypatch):
    """A stale socket is skipped for one that answers; if there is no other, connecting to it tells what is wrong."""
    monkeypatch.setattr(finding, "running", lambda _: iter(()))  # one may run in the machine's own directories
    environ = {"RUNTIME_DIRECTORY": str(tmp_path / "one"), "XDG_RUNTIME_DIR": str(tmp_path)}
    places = [tmp_path / "one" / "control.sock", tmp_path / NAME / "control.sock"]
    listeners = []
    for place in places:
        place.parent.mkdir()
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(str(place))
        listeners[-1].listen()
    with listeners[0], listeners[1]:
        assert find_socket(None, NAME, environ) == places[0]
        listeners[0].close()
        assert find_socket(None, NAME, environ) == places[1]
    assert find_socket(None, NAME, environ) == places[0]
    with pytest.raises(NoDaemonError, match=f"{places[0]}: Connection refused"), ControlClient(places[0]):
        raise AssertionError


STATUS = (
    b'{"ok": true, "name": "shop", "state": "ready", "app": "shop:app", "pid": 7, "uptime": 61.5, "listen": [":1"], '
    b'"more": 1}\n'
)


@pytest.fixture(autouse=True)
def _no_others(monkeypatch):
    """Daemons that other tests run on this machine are not seen."""
    monkeypatch.setattr(finding, "_BOUND", Path("/nowhere"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without daemons, except those that the test adds: `machine(place, answer)` gives the control socket."""
    listeners = []

    def places(name, _environ):
        return iter([tmp_path / "run" / name, tmp_path / "tmp" / f"{name}-7"])

    def serve(listener, answer):
        with contextlib.suppress(OSError):  # the test shuts it down at the end
            while True:
                sock, _ = listener.accept()
                with sock:
                    if sock.recv(100):  # otherwise the client only looked whether one listens
                        sock.sendall(answer)

    def put(place, answer):
        path = tmp_path / place / "control.sock"
        path.parent.mkdir(parents=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener, answer))
        thread.start()
        listeners.append((listener, thread))
        return path

    monkeypatch.setattr(finding, "runtime_directories", places)
    monkeypatch.setattr(finding, "_OF_ALL_USERS", tmp_path / "user" / "*" / "*")
    monkeypatch.setattr(finding, "_BOUND", tmp_path / "bound")
    yield put
    for listener, thread in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


@pytest.mark.parametrize(
    ("place", "way"), [("run/shop", "--name shop"), ("tmp/shop-7", "--name shop"), ("user/9/shop", "--socket {}")]
)
def test_where_no_daemon_of_a_name_runs_those_of_other_names_are_told(machine, tmp_path, place, way):
    """Daemons of other names are named with the options that lead to them."""
    path = machine(place, STATUS)
    with pytest.raises(NoDaemonError) as caught:
        find_socket(None, NAME, {})
    said = str(caught.value)
    assert said.startswith(f"cannot find a daemon named {NAME}: there is no {tmp_path}/run/{NAME}/control.sock, no ")
    assert said.endswith(f"; running here: {way.format(path)}")


def test_a_daemon_in_another_directory_is_found_by_the_socket_that_it_bound(machine, tmp_path):
    """The kernel tells of each, also where $RUNTIME_DIRECTORY or $TMPDIR was another one for the daemon."""
    path = machine("elsewhere/shop", STATUS)
    rows = [f"0: 2 0 10000 1 1 7 {each}" for each in (path.with_name(".77"), tmp_path / ".78", "@abstract", "/x/.a")]
    (tmp_path / "bound").write_text(
        "\n".join(["Num RefCount Protocol Flags Type St Inode Path", "0: 2 0 0 1 1 8", *rows])
    )
    [(found, told)] = running({})
    assert (found, told["name"]) == (path, "shop")
    with pytest.raises(NoDaemonError, match=rf"No such file or directory; running here: --socket {path}$"):
        find_socket(str(tmp_path / "none.sock"), NAME, {})


def test_a_socket_that_was_left_behind_hides_no_daemon_of_another_name(machine, tmp_path):
    """With a stale socket of one name, daemons of other names are still named."""
    machine("run/shop", STATUS)
    stale = tmp_path / "run" / NAME / "control.sock"
    stale.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    with pytest.raises(NoDaemonError, match=f"{stale} was left behind .*; running here: --name shop$"):
        find_socket(None, NAME, {})


def test_every_daemon_is_listed(machine):
    """The list has each daemon's state, also of those that do not answer or refuse; sockets of other programs are left out."""
    machine("run/shop", STATUS)
    machine("run/others", b"220 mail\n")
    machine("run/strange", STATUS.replace(b"61.5", b'"long"'))
    machine("run/closed", b'{"ok": false, "error": {"code": "forbidden", "message": "status needs a role"}}\n')
    os.mkfifo(machine("run/dumb", b"").with_name("control"))
    listed = CliRunner().invoke(cli, ["list"], standalone_mode=False)
    head, *rows = sorted(listed.output.splitlines())
    assert head.split() == ["NAME", "STATE", "APP", "PID", "UPTIME", "LISTEN"]
    assert [row.split() for row in rows] == [
        ["closed", "not", "told", "-", "-", "-", "-"],
        ["dumb", "no", "answer", "-", "-", "-", "-"],
        ["shop", "ready", "shop:app", "7", "1m2s", ":1"],
    ]
    told = json.loads(CliRunner().invoke(cli, ["list", "--json"], standalone_mode=False).output)
    found = {Path(each["socket"]).parent.name: each for each in told["daemons"]}
    assert found.keys() == {"closed", "dumb", "shop"}
    assert (found["shop"]["state"], found["closed"]["fault"]) == ("ready", "status needs a role")


@pytest.mark.usefixtures("machine")
def test_where_no_daemon_runs_the_list_says_so():
    """Without a daemon the list is empty, and standard error says so."""
    listed = CliRunner().invoke(cli, ["list"], standalone_mode=False)
    assert (listed.stdout, listed.stderr) == ("", "flaskd: no daemon is running that this user can see\n")


def test_a_socket_that_one_may_not_open(monkeypatch, tmp_path):
    """The refusal names the users whom the socket is for, with exit code 77, and does not say that no daemon runs."""
    path = tmp_path / "control.sock"
    path.touch(0o600)

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ControlClient, "_connect", refuse)
    with (
        pytest.raises(ForbiddenError, match=r"Permission denied; it is for the user .+$") as caught,
        ControlClient(path),
    ):
        raise AssertionError
    assert str(caught.value).startswith(f"cannot talk to the daemon at {path}: ")


@pytest.mark.usefixtures("closed")
def test_what_needs_no_daemon_is_told_though_a_place_is_closed(monkeypatch, tmp_path):
    """last-stop and an offline plan work without a daemon, even if a directory cannot be searched."""
    for name, value in {**ENVIRON, "STATE_DIRECTORY": str(tmp_path), "FLASKD_CONFIG": str(tmp_path / "c.yaml")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "last-stop.json").write_text(json.dumps({"reason": "signal: SIGTERM"}))
    (tmp_path / "c.yaml").write_text("cleanup: {policies: {one: {use: command, with: {argv: ['true']}}}}")
    told = CliRunner().invoke(cli, ["last-stop", "--name", NAME])
    assert "reason: signal: SIGTERM" in told.output
    planned = CliRunner().invoke(cli, ["plan", "--name", NAME, "--simulate-hang", "one"])
    assert "one" in planned.output, planned.exception


PROGRESS = b'{"event": "progress", "in_flight": 1}\n'
ANSWERS = {
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n",
    "a list": b"[1]\n",
    "nothing of it": b"{}\n",
    "not UTF-8": b"\xff\n",
    "cut off": b'{"ok": tr',
    "too deep": b"[" * 100_000 + b"\n",
    "a number without end": b'{"ok": ' + b"9" * 5000 + b"}\n",
    "no number": b'{"ok": true, "result": "x", "for": NaN}\n',
    "infinity": b'{"ok": true, "result": "x", "for": 1e999}\n',
    "ok is no answer": b'{"ok": "yes"}\n',
    "an error without words": b'{"ok": false}\n',
    "an error that is none": b'{"ok": false, "error": {"code": [], "message": 1}}\n',
    "another event": b'{"event": "party"}\n',
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_who_is_not_flaskd_is_named(tmp_path, answer):
    """An answer in another format is a fault in one line."""
    path = tmp_path / "other.sock"
    with answering(path, answer), ControlClient(path) as client, pytest.raises(NoDaemonError) as caught:
        client.request("status")
    assert str(caught.value).startswith(f"cannot talk to {path}: what answers")


FIELDS = {
    "none": b'{"ok": true}\n',
    "of other kinds": b'{"ok": true, "result": 7, "state": [], "for": "long", "pid": {}, "listen": 3, "requests": 5, '
    b'"list": 1, "budget": [], "policies": {}, "text": null, "yaml": 7, "level": [], "cut": 3, "reason": 1}\n',
    "wrong within": b'{"ok": true, "result": "x", "state": "ready", "for": 1e300, "pid": 1, "listen": [1], "requests": '
    b'[7], "list": [[]], "budget": {"x": 1}, "policies": [{}], "tally": {"statuses": []}, "cut": [{}]}\n',
}


@pytest.mark.parametrize("verb", ["status", "requests", "threads", "config", "last-stop", "plan", "top", "log-level"])
@pytest.mark.parametrize("answer", FIELDS.values(), ids=FIELDS)
def test_fields_that_are_not_flaskds_are_no_traceback(tmp_path, monkeypatch, answer, verb):
    """An answer with unknown fields ends each verb with one line and its exit code, or is shown as far as possible."""
    path = tmp_path / "control.sock"
    monkeypatch.setenv("FLASKD_CONTROL", str(path))
    more = ["--simulate-hang", "x"] if verb == "plan" else []
    with answering(path, answer):
        done = CliRunner().invoke(cli, [verb, *more], standalone_mode=False)
    assert isinstance(done.exception, NoDaemonError | None), done.exc_info
    if done.exception is None:
        assert done.return_value in {0, None}
    else:
        assert str(done.exception).startswith(f"cannot talk to {path}: what answers there is not flaskd")


@pytest.mark.parametrize(
    "progress",
    [b'{"event": "progress", "policy": "x"}\n', b'{"event": "progress", "oldest": 7}\n',
     b'{"event": "progress", "in_flight": "x", "oldest": {"age": []}}\n'],
)  # fmt: skip
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_that_is_not_flaskds_is_no_traceback(tmp_path, monkeypatch, capfd, progress, terminal):
    """Malformed progress raises neither in the client nor in the thread that draws the bar."""
    path = tmp_path / "control.sock"
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with answering(path, progress), pytest.raises(NoDaemonError):
        asking.ask(path, "drain", {"wait": True})
    assert "Traceback" not in capfd.readouterr().err


@contextlib.contextmanager
def pouring(path, piece, pause=0.0):
    """Sends one client an endless answer."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        over = threading.Event()

        def serve():
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                while not over.wait(pause):
                    sock.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize(("piece", "pause"), [(b" ", 0.01), (PROGRESS, 0.01), (PROGRESS, 0.0)])
def test_an_answer_without_end_is_given_up(tmp_path, piece, pause):
    """The timeout is for the whole answer, not for each silence; without wait, progress does not extend it."""
    path = tmp_path / "control.sock"
    with (
        pouring(path, piece, pause),
        ControlClient(path, timeout=0.3) as client,
        pytest.raises(NoDaemonError, match='no answer to "status": lost the daemon at .*: it does not answer'),
    ):
        client.request("status")


def test_a_stop_whose_daemon_never_goes_is_told(tmp_path, monkeypatch, capfd):
    """If the daemon says that it stops and never closes the connection, that is a fault after a while."""
    monkeypatch.setattr(asking, "_LONG", 0.3)
    path = tmp_path / "control.sock"
    with (
        pouring(path, b'{"ok": true, "result": "stopped"}\n', 0.01),
        pytest.raises(NoDaemonError, match="does not close the connection"),
    ):
        asking.ask(path, "stop", {"wait": True})
    assert capfd.readouterr().out == "stopped\n"


def test_an_answer_of_any_size_is_given_up(tmp_path, monkeypatch):
    """A line without end is read only up to a limit."""
    monkeypatch.setattr(flaskd_client, "_LONGEST", 1 << 20)
    path = tmp_path / "control.sock"
    with (
        pouring(path, b"x" * 65536),
        ControlClient(path) as client,
        pytest.raises(NoDaemonError, match="what answers there is not flaskd: it says more than 1 MiB at a time"),
    ):
        client.request("status")


def test_what_others_named_paints_no_terminal(tmp_path, monkeypatch):
    """Paths and names from a client or the app are shown as escaped text, on one line each."""
    path = tmp_path / "control.sock"
    entry = {"id": 1, "method": "GET", "path": "/\x1b[2J\n1: forged\u202e", "client": "a", "phase": "running", "age": 1,
             "sent": 0, "stack": "one\n\x1b[31mtwo"}  # fmt: skip
    answer = json.dumps({"ok": True, "result": "requests", "requests": [entry]})
    with answering(path, answer.encode() + b"\n"):
        told = CliRunner().invoke(cli, ["requests", "--socket", str(path)])
    assert told.output.splitlines() == [
        r"1: GET /\x1B[2J\x0A1: forged\x202E from a, running for 1s, 0 bytes sent",
        "    one",
        r"    \x1B[31mtwo",
    ]


# --- whom to trust ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short_directory():
    """A directory with a short name, because the path of a Unix socket has at most 107 bytes (unix(7))."""
    with tempfile.TemporaryDirectory(prefix="flaskd-") as path:
        yield Path(path).resolve()


@pytest.fixture
def temporary(short_directory, monkeypatch):
    """A public directory, like /tmp."""
    path = short_directory / "tmp"
    path.mkdir()
    path.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(path))
    return path / f"{NAME}-{os.geteuid()}"


def owned_by(monkeypatch, place, uid):
    """Make a directory appear to belong to another user, because tests without root cannot change the owner."""
    for name in ("stat", "lstat"):
        real = getattr(os, name)

        def look(path, *args, real=real, **kwargs):
            found = real(path, *args, **kwargs)
            return os.stat_result((*found[:4], uid, *found[5:10])) if str(path) == str(place) else found

        monkeypatch.setattr(os, name, look)


def test_a_directory_that_another_user_made_in_tmp_is_not_trusted(temporary, monkeypatch):
    """A directory of another user in /tmp is not trusted, because its daemon would get the commands."""
    temporary.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(temporary / "control.sock"))
        listener.listen()
        assert find_socket(None, NAME, {}) == temporary / "control.sock"
        owned_by(monkeypatch, temporary, 54321)
        with pytest.raises(ForbiddenError, match=f"cannot trust {temporary}/control.sock: .* belongs to uid 54321"):
            find_socket(None, NAME, {})


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_directory_in_tmp_that_others_may_write_to_is_not_trusted(temporary, mode):
    """A directory in /tmp that others may write to is not trusted, because they could have put the socket there."""
    temporary.mkdir()
    temporary.chmod(mode)
    (temporary / "control.sock").touch()
    with pytest.raises(ForbiddenError, match=f"cannot trust .*: others may write to {temporary}"):
        find_socket(None, NAME, {})


def test_a_link_in_tmp_is_not_trusted(temporary, tmp_path):
    """A link in /tmp is not trusted, because its maker chooses where it leads."""
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "mine" / "control.sock").touch()
    temporary.symlink_to(tmp_path / "mine")
    with pytest.raises(ForbiddenError, match=f"{temporary} is no directory"):
        find_socket(None, NAME, {})


def listened_to_by(monkeypatch, uid):
    """Have the kernel say that the process at the other end of each socket belongs to this user and group."""
    real = socket.socket.getsockopt

    def getsockopt(self, level, option, *size):
        if (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED):
            return struct.pack("3i", 1, uid, uid)
        return real(self, level, option, *size)

    monkeypatch.setattr(socket.socket, "getsockopt", getsockopt)


def test_who_listens_must_be_this_user_root_or_the_directorys_owner(tmp_path, monkeypatch):
    """A listening process of another user gets no command (SO_PEERCRED, unix(7))."""
    path = tmp_path / "control.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with answering(path, b'{"ok": true, "result": "fine"}\n'), ControlClient(path) as client:
        assert client.request("ready") == {"result": "fine"}  # the owner's
    path.unlink()
    listened_to_by(monkeypatch, 54322)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ForbiddenError, match="cannot trust the process that listens at .*: it runs as uid 54322"):
            ControlClient(path).__enter__()


@pytest.mark.parametrize(
    ("above", "mode", "trusted"), [(0, 0o755, True), (54323, 0o755, False), (0, 0o775, False), (0, 0o757, False)]
)
def test_the_directory_of_a_dynamic_user_is_nobodys(short_directory, monkeypatch, above, mode, trusted):
    """The directory of a DynamicUser= service, owned by nobody from systemd 257 on, is trusted if only root can make it."""
    directory = short_directory / "shop"
    directory.mkdir()
    directory.chmod(mode)
    short_directory.chmod(0o755)
    owned_by(monkeypatch, directory, 65534)
    owned_by(monkeypatch, short_directory, above)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    listened_to_by(monkeypatch, 61197)
    path = directory / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        if trusted:
            with ControlClient(path):
                pass
        else:
            with pytest.raises(ForbiddenError, match="belongs to the user nobody"):
                ControlClient(path).__enter__()


def test_places_are_found_where_no_temporary_directory_can_be_written_to(monkeypatch):
    """On a read-only root the client only says that there is no daemon."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", list)
    with pytest.raises(NoDaemonError, match=f"no /tmp/{NAME}-"):
        find_socket(None, NAME, {"TMPDIR": "/nowhere"})
