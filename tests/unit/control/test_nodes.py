"""The two nodes and their directory: they get their group if possible, and leave nothing if they cannot be made."""

import fcntl
import os
import stat

import pytest

from flaskd.config import load_mapping
from flaskd.control.nodes import fifo_node, mode_and_group, socket_node
from flaskd.errors import CannotCreateError, NotNowError
from flaskd.places.runtime import RuntimeDirectory


@pytest.fixture
def directory(tmp_path):
    directory = RuntimeDirectory("flaskd", {"RUNTIME_DIRECTORY": str(tmp_path / "run")})
    yield directory
    directory.release()


def refuse(*_, **__):
    raise PermissionError(1, "Operation not permitted")


def control(**fields):
    return load_mapping({"control": fields}, actions={}).values.control


@pytest.mark.parametrize("place", [socket_node, fifo_node])
def test_a_group_that_cannot_be_given_costs_a_warning_and_no_node(place, directory, monkeypatch, caplog):
    """Without the right to set the group, directory and nodes are for this user alone, with a warning for each."""
    monkeypatch.setattr(os, "chown", refuse)
    directory.acquire(12345)
    node = place(directory)
    node.open(0o660, 12345)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (directory.path, node.node.path)] == [0o700, 0o600]
    assert [path.name for path in directory.path.iterdir()] == [node.node.path.name]
    assert caplog.text.count("to group 12345: Operation not permitted") == 2
    node.remove()
    node.close()


def test_a_directory_made_here_lets_the_group_in(directory, monkeypatch):
    """A new directory has the group of the nodes, and the group may search it whatever the umask is."""
    given = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: given.append((path, uid, gid)))
    before = os.umask(0o077)
    try:
        directory.acquire(12345)
    finally:
        os.umask(before)
    assert given == [(directory.path, -1, 12345)]
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o750


def test_a_directory_that_was_there_keeps_its_group(directory, monkeypatch):
    """A directory that the service manager or an administrator made keeps its group."""
    monkeypatch.setattr(os, "chown", refuse)
    directory.path.mkdir(mode=0o755)
    directory.acquire(12345)
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o755


@pytest.mark.parametrize("step", ["chmod", "open", "rename"])
def test_a_fifo_that_cannot_be_made_leaves_nothing(step, directory, monkeypatch):
    """Whichever step fails, no hidden node stays, and the fault names the FIFO."""
    directory.acquire()
    with monkeypatch.context() as patched:
        patched.setattr(os, step, refuse)  # the functions that pathlib calls
        with pytest.raises(CannotCreateError) as caught:
            fifo_node(directory).open(0o660, -1)
    assert str(caught.value) == f"cannot make the FIFO {directory.path / 'control'}: Operation not permitted"
    assert list(directory.path.iterdir()) == []


def test_a_group_that_is_not_known_narrows_the_mode():
    """With an unknown group, the nodes' mode gives the group no more than others; with a known one it is unchanged."""
    assert mode_and_group(control(mode="0660", group="no-such-group")) == (0o600, -1)
    assert mode_and_group(control(mode="0660", group="77")) == (0o660, 77)
    assert mode_and_group(control(mode="0660", group="root")) == (0o660, 0)
    assert mode_and_group(control(mode="0660")) == (0o660, -1)


def test_a_directory_may_be_a_link_of_the_service_manager(tmp_path):
    """With DynamicUser= the runtime directory is a link to a private one (systemd.exec(5)), and works the same."""
    private = tmp_path / "private"
    (private / "shop").mkdir(parents=True)
    os.mkfifo(private / "shop" / ".control.12345")
    (tmp_path / "shop").symlink_to("private/shop")
    directory = RuntimeDirectory("shop", {"RUNTIME_DIRECTORY": str(tmp_path / "shop")})
    directory.acquire()
    try:
        assert directory.stands
        assert directory.tidy() == [".control.12345"]
        with pytest.raises(NotNowError):
            RuntimeDirectory("shop", {"RUNTIME_DIRECTORY": str(private / "shop")}).acquire()
        for place in (socket_node(directory), fifo_node(directory)):
            place.open(0o660, -1)
            assert place.keep(0o660, -1) is None
            place.remove()
            place.close()
        (tmp_path / "shop").unlink()
        assert not directory.stands
    finally:
        directory.release()
    assert (private / "shop").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, who may give a link away")
def test_a_link_that_another_user_made_is_not_followed(tmp_path):
    """A link that another user made in a public directory, such as /tmp, is not followed."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "shop").symlink_to("ours")
    os.chown(tmp_path / "shop", 65534, -1, follow_symlinks=False)
    directory = RuntimeDirectory("shop", {"RUNTIME_DIRECTORY": str(tmp_path / "shop")})
    with pytest.raises(CannotCreateError, match="cannot use"):
        directory.acquire()
    assert list((tmp_path / "ours").iterdir()) == []


@pytest.mark.parametrize("held", [False, True])
def test_a_directory_of_another_user_is_refused_whoever_holds_its_lock(directory, monkeypatch, held):
    """A directory of another user in /tmp is refused, even if that user holds its lock."""
    directory.path.mkdir(mode=0o700)
    lock = os.open(directory.path, os.O_RDONLY)
    if held:
        fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(CannotCreateError, match=f"it belongs to uid {os.getuid()}, not {os.getuid() + 1}"):
        directory.acquire()
    os.close(lock)


def test_a_directory_in_tmp_is_this_users_alone(tmp_path, monkeypatch):
    """A directory made in /tmp is private; one that others may write to is refused there."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = RuntimeDirectory("shop", {"RUNTIME_DIRECTORY": str(tmp_path / "shop")})
    directory.acquire()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    directory.path.chmod(0o770)
    directory.forget()
    with pytest.raises(CannotCreateError, match="other users may write to it"):
        directory.acquire()
