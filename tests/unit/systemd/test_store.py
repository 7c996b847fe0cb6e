"""The service manager's store of listeners, with a manager that only listens."""

import socket
import subprocess
import sys
from contextlib import ExitStack, closing

import pytest
from fake_notify import receiving

from flaskd.sockets import Address, Listener
from flaskd.systemd.notify import Notifier
from flaskd.systemd.store import Store, name_of


@pytest.fixture
def manager(tmp_path):
    with receiving(tmp_path / "notify") as receiver:
        yield receiver


@pytest.fixture
def notifier(manager):
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    yield notifier
    notifier.close()


@pytest.fixture
def make():
    """Makes listeners on loopback; all are closed at the end."""
    made = []

    def make(text="127.0.0.1:0"):
        made.append(Listener.bind(Address.parse(text)))
        made[-1].listen(8)
        return made[-1]

    yield make
    for each in made:
        each.close()


def as_passed(listener):
    """The same listener, as it would be passed to the next process."""
    return Listener(listener.address, listener.socket.dup(), shared=True)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("127.0.0.1:8000", "listen-127.0.0.1%3A8000"),
        ("[::1]:80", "listen-[%3A%3A1]%3A80"),
        ("unix:/run/shop/http", "listen-unix%3A/run/shop/http"),
    ],
)
def test_names_have_no_colon(address, name):
    """A colon separates names (LISTEN_FDNAMES in sd_listen_fds(3))."""
    assert name_of(address) == name


def test_a_long_name_is_short_enough():
    """A name has at most 255 bytes, and different addresses have different names."""
    first, second = (name_of("unix:/" + "ü" * 50 + last) for last in "ab")
    assert len(first) <= 255
    assert first != second


def test_what_is_kept_is_stored_with_its_descriptor(manager, notifier, make):
    """Each listener is stored with one message that has its descriptor; a stored one is not stored again."""
    store, listener = Store(notifier), make()
    store.keep([("127.0.0.1:0", listener)])
    message, fds = manager.message_with_descriptors()
    assert message == b"FDSTORE=1\nFDNAME=listen-127.0.0.1%3A0"
    with closing(socket.socket(fileno=fds[0])) as stored:
        assert stored.getsockname() == listener.socket.getsockname()
    assert (listener.shared, listener.stored) == (True, "listen-127.0.0.1%3A0")
    store.keep([("127.0.0.1:0", listener)])
    assert manager.messages() == []


def test_without_a_manager_nothing_is_stored(make):
    """Without a manager a listener is not stored, and not shared."""
    listener = make()
    Store(Notifier({})).keep([("127.0.0.1:0", listener)])
    assert (listener.shared, listener.stored) == (False, "")


def test_what_comes_back_is_the_same_listener(manager, notifier, make):
    """A stored listener is found by its address in the configuration; one that is not wanted yet stays open."""
    store, listener = Store(notifier), make()
    with closing(as_passed(listener)) as back:
        passed = {name_of("127.0.0.1:0"): [back], "http": []}
        store.open(passed, ["127.0.0.1:0"])
        assert list(passed) == ["http"]
        assert store.take("127.0.0.1:1") is None
        assert store.take("127.0.0.1:0") is back
        assert (back.address, back.stored, back.shared) == (listener.address, name_of("127.0.0.1:0"), True)
        assert store.take("127.0.0.1:0") is None
    assert manager.messages() == []


@pytest.mark.parametrize("text", ["127.0.0.1:0", "unix:"])
def test_what_nobody_wants_leaves_the_store(manager, notifier, make, tmp_path, text):
    """A listener that is not wanted any more leaves the store, and its address is free although the manager has a copy."""
    text = f"unix:{tmp_path}/http" if text == "unix:" else text
    store, copy_of_the_manager = Store(notifier), make(text)
    copy_of_the_manager.stored = "so"
    back = as_passed(copy_of_the_manager)
    store.open({name_of(text): [back]}, [])
    assert manager.messages() == [f"FDSTOREREMOVE=1\nFDNAME={name_of(text)}".encode()]
    assert back.socket.fileno() == -1
    assert store.take(text) is None
    make(str(back.address))


def test_a_unix_listener_that_nobody_wants_takes_its_node_along(manager, notifier, make, tmp_path, caplog):
    """The node of a Unix listener that is not wanted any more is removed."""
    caplog.set_level("INFO")
    text = f"unix:{tmp_path}/http"
    store, copy_of_the_manager = Store(notifier), make(text)
    back = as_passed(copy_of_the_manager)
    back.address = Address(path=f"{tmp_path}/.123")
    store.open({name_of(text): [back]}, [])
    assert list(tmp_path.glob("http")) == []
    assert caplog.messages == [f"{text} is not listened on any more: taken out of the store"]


@pytest.mark.parametrize("another", [False, True], ids=["gone", "another's"])
def test_a_unix_listener_that_nobody_could_reach_is_not_taken(manager, notifier, make, tmp_path, another, caplog):
    """A stored Unix listener whose node is gone, or replaced, leaves the store with a warning."""
    text = f"unix:{tmp_path}/http"
    store, copy_of_the_manager = Store(notifier), make(text)
    back = as_passed(copy_of_the_manager)
    (tmp_path / "http").unlink()
    with ExitStack() as stack:
        if another:
            theirs = stack.enter_context(socket.socket(socket.AF_UNIX))
            theirs.bind(f"{tmp_path}/http")
            subprocess.run([sys.executable, "-c", LISTEN, str(theirs.fileno())], pass_fds=[theirs.fileno()], check=True)
        store.open({name_of(text): [back]}, [text])
        assert store.take(text) is None
    assert (tmp_path / "http").exists() == another
    assert manager.messages() == [f"FDSTOREREMOVE=1\nFDNAME={name_of(text)}".encode()]
    assert back.socket.fileno() == -1
    assert f"the listener kept for {text} cannot be reached there any more: bound anew" in caplog.text


LISTEN = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).listen()"
"""Another process, whose credentials the socket has from then on."""


def test_what_is_let_go_is_ours_alone(manager, notifier, make):
    """A listener that left the store can be gated and withdrawn like any other."""
    store, listener, other = Store(notifier), make(), make()
    store.keep([("a:1", listener)])
    manager.messages()
    store.let_go([listener, other])
    assert manager.messages() == [b"FDSTOREREMOVE=1\nFDNAME=listen-a%3A1"]
    assert (listener.shared, listener.stored) == (False, "")


def test_a_unix_node_stays_while_it_is_stored(notifier, make, tmp_path):
    """A Unix node stays while its listener is stored; after that it is removed with the listener."""
    path, store = tmp_path / "http", Store(notifier)
    text = f"unix:{path}"
    listener = make(text)
    store.keep([(text, listener)])
    passed = as_passed(listener)
    passed.address = Address(path=f"{tmp_path}/.123")  # what getsockname(2) says: it was bound under a hidden name
    listener.close()
    assert path.exists()
    store.open({name_of(text): [passed]}, [text])
    back = store.take(text)
    assert back.address == Address(path=str(path))
    back.withdraw()
    assert path.exists()
    store.let_go([back])
    back.close()
    assert not path.exists()
