"""Where a client looks for a daemon, and what it says when it may not."""

import os
import stat
from pathlib import Path

import pytest

from flaskd.client import ControlClient, find_socket
from flaskd.errors import ForbiddenError, NoDaemonError

NAME = "nobody-runs-this"
ENVIRON = {"RUNTIME_DIRECTORY": "/nowhere/one", "XDG_RUNTIME_DIR": "/nowhere"}


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
