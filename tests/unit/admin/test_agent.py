"""The agent that answers HAProxy's agent-check, without a daemon."""

import contextlib
import errno
import logging
import socket
import threading

import pytest
from patience import PATIENCE, until

from flaskd.admin import Agent
from flaskd.admin import agent as module
from flaskd.admin.agent import words
from flaskd.sockets import Address, Listener


class Source:
    def __init__(self):
        self.answer = "200 OK", "ready"

    def readiness(self):
        return self.answer


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def agent(source):
    before = threading.active_count()
    agent = Agent(source)
    agent.open([Listener.bind(Address("127.0.0.1", 0))])
    yield agent
    agent.close()
    agent.close()
    assert threading.active_count() == before


@pytest.fixture
def connect(agent):
    """Connects to the agent."""
    with contextlib.ExitStack() as stack:
        where = agent.addresses[0]
        yield lambda: stack.enter_context(socket.create_connection((where.host, where.port), PATIENCE))


def line(client):
    """All that the agent sends."""
    return b"".join(iter(lambda: client.recv(100), b""))


def is_closed(client):
    """Whether the agent has closed its connection: what is sent then is answered with a reset."""
    try:
        client.send(b"x")
    except OSError:
        return True
    return False


@pytest.mark.parametrize(
    ("readiness", "said"),
    [
        (("200 OK", "ready"), b"up ready\n"),
        (("503 Service Unavailable", "draining"), b"drain\n"),
        (("404 Not Found", "drained"), b"drain\n"),
        (("503 Service Unavailable", "stopping"), b"drain\n"),
        (("503 Service Unavailable", "stopped"), b"drain\n"),
        (("503 Service Unavailable", "starting"), b"down#starting\n"),
        (("503 Service Unavailable", "no worker is ready"), b"down#no worker is ready\n"),
        (("503 Service Unavailable", "drained\nup ready"), b"down#drained?up ready\n"),
        (("503 Service Unavailable", "h\u00e4ngt\t\x1b[31m"), b"down#h?ngt??[31m\n"),
        (("503 Service Unavailable", "x" * 5000), b"down#" + b"x" * 100 + b"\n"),
    ],
)
def test_each_readiness_has_its_word(readiness, said):
    """The line is ready, draining, or down with the reason: short and printable ASCII, whatever the reason is."""
    assert words(readiness) == said


def test_each_connection_is_told_what_is_true_now(connect, source):
    """Each connection gets the line for its moment and is closed, although the client says nothing."""
    assert line(connect()) == b"up ready\n"
    source.answer = "503 Service Unavailable", "draining"
    assert line(connect()) == b"drain\n"
    source.answer = "200 OK", "ready"
    assert line(connect()) == b"up ready\n"


def test_what_a_client_says_does_not_reset_its_answer(connect):
    """A client that sends a string (agent-send) reads the line and the end, and no error."""
    client = connect()
    client.sendall(b"who are you?\n")
    assert line(client) == b"up ready\n"


def test_clients_that_do_not_hang_up_make_room(connect, monkeypatch):
    """Of 200 clients that stay, at most 64 are kept, the oldest are closed first, and all get their answer."""
    monkeypatch.setattr(module, "_LINGER", PATIENCE)
    silent = [connect() for _ in range(200)]
    assert line(connect()) == b"up ready\n"
    until(lambda: is_closed(silent[136]))
    assert not any(map(is_closed, silent[138:]))


def test_a_client_that_stays_is_closed(connect, monkeypatch):
    """A client that does not hang up is closed after its time, or after 4096 bytes."""
    monkeypatch.setattr(module, "_LINGER", PATIENCE)
    loud = connect()
    loud.sendall(b"x" * 5000)
    until(lambda: is_closed(loud))
    monkeypatch.setattr(module, "_LINGER", 0.1)
    silent = connect()
    assert line(silent) == b"up ready\n"
    until(lambda: is_closed(silent))


def test_a_client_that_cannot_be_accepted_is_answered_later(agent, connect, monkeypatch, caplog):
    """Without a descriptor for a client, the agent accepts it later, and logs that."""

    class Full:
        def open(self, make):
            monkeypatch.undo()
            raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module, "_PAUSE", 0.01)
    monkeypatch.setattr(module, "open_files", Full())
    with caplog.at_level(logging.WARNING, "flaskd.admin"):
        assert line(connect()) == b"up ready\n"
    assert "cannot accept an agent check: Too many open files" in caplog.text
    assert agent.addresses


def test_a_fault_leaves_the_agent_alive(connect, source, caplog):
    """A check that cannot be answered is logged, and the next one is answered."""
    source.answer = None
    with caplog.at_level(logging.ERROR, "flaskd.admin"):
        assert line(connect()) == b""
    assert "cannot answer an agent check" in caplog.text
    source.answer = "200 OK", "ready"
    assert line(connect()) == b"up ready\n"


def test_a_default_timeout_of_the_app_changes_nothing(connect, monkeypatch):
    """After the app calls socket.setdefaulttimeout(), clients are answered as before."""
    client = connect()
    try:
        socket.setdefaulttimeout(0.0)
        assert line(client) == b"up ready\n"
        again = connect()
        assert line(again) == b"up ready\n"
    finally:
        socket.setdefaulttimeout(None)


def test_it_gives_its_address_back(agent, source):
    """After `close` the address is free, and nothing answers there."""
    where = agent.addresses[0]
    agent.close()
    assert agent.addresses == []
    again = Agent(source)
    again.open([Listener.bind(where)])
    assert again.addresses == [where]
    again.close()


def test_without_an_address_there_is_none(source):
    """Without an address nothing is started, and `close` does nothing."""
    before = threading.active_count()
    none = Agent(source)
    none.open([])
    none.forget()
    none.close()
    assert (none.addresses, threading.active_count()) == ([], before)
