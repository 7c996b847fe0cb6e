"""Where a client looks for a daemon, and what it says when it may not."""

import contextlib
import json
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from flaskd.cli import cli
from flaskd.client import ControlClient, find_socket
from flaskd.errors import ForbiddenError, NoDaemonError

NAME = "nobody-runs-this"
ENVIRON = {"RUNTIME_DIRECTORY": "/nowhere/one", "XDG_RUNTIME_DIR": "/nowhere"}


@contextlib.contextmanager
def answering(path, answer):
    """Somebody who gives one client that answer, whatever it asks for."""
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
    """A directory that others may not search: root, as whom the tests may run, may search all."""
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
    """It is named, with whom it is for, before the places where there is nothing."""
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
    """Connecting to it says what is wrong."""
    assert find_socket("/nowhere/one/control.sock", NAME, {}) == Path("/nowhere/one/control.sock")


def test_a_place_is_named_once():
    """Though two of the variables lead there."""
    with pytest.raises(NoDaemonError) as caught:
        find_socket(None, NAME, {"RUNTIME_DIRECTORY": "/nowhere/nobody-runs-this", "XDG_RUNTIME_DIR": "/nowhere"})
    assert str(caught.value).count("/nowhere/nobody-runs-this/control.sock") == 1


def test_a_stale_socket_hides_no_daemon_in_a_later_place(tmp_path):
    """It is passed over for one that answers; where there is no other, connecting to it tells what is wrong."""
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


def test_a_socket_that_one_may_not_open(monkeypatch, tmp_path):
    """The refusal says for whom it is, with exit code 77, and nothing of a daemon that is not there."""
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
    """One's own record, and a plan of the file."""
    for name, value in {**ENVIRON, "STATE_DIRECTORY": str(tmp_path), "FLASKD_CONFIG": str(tmp_path / "c.yaml")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "last-stop.json").write_text(json.dumps({"reason": "signal: SIGTERM"}))
    (tmp_path / "c.yaml").write_text("cleanup: {policies: {one: {use: command, with: {argv: ['true']}}}}")
    told = CliRunner().invoke(cli, ["last-stop", "--name", NAME])
    assert "reason: signal: SIGTERM" in told.output
    planned = CliRunner().invoke(cli, ["plan", "--name", NAME, "--simulate-hang", "one"])
    assert "one" in planned.output, planned.exception


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b'{"id": 1, "ok": false, "error": {"code": "forbidden", "message": "status needs a role"}}\n', "status needs"),
        (b"", 'no answer to "status"'),
    ],
)
def test_the_command_alone_overlooks_no_daemon(tmp_path, monkeypatch, answer, why):
    """One that tells this user nothing, or nothing any more, is there all the same; to start another is no advice."""
    path = tmp_path / "control.sock"
    monkeypatch.setenv("FLASKD_CONTROL", str(path))
    with answering(path, answer):
        told = CliRunner().invoke(cli, [])
    assert f"A daemon may be running here, but it does not say how it is: {why}" in told.output
    assert "flaskd serve " not in told.output


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b"[1]\n", b"{}\n", b"\xff\n"])
def test_who_is_not_flaskd_is_named(tmp_path, answer):
    """An answer in other words is a fault in one line."""
    path = tmp_path / "other.sock"
    with answering(path, answer), ControlClient(path) as client, pytest.raises(NoDaemonError) as caught:
        client.request("status")
    assert str(caught.value).startswith(f"cannot talk to {path}: who answers")
