"""The wire: messages and descriptors arrive in order, however they are cut into pieces; and its ends."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from flaskd.pool.messages import CloseListeners, LogLevel
from flaskd.pool.wire import Wire, WireClosedError
from flaskd.version import __version__

HELLO = f"flaskd {__version__} wire 1\n".encode()


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and the raw socket of its other end."""
    wire, raw = Wire.pair()
    with raw:
        yield wire, raw
        wire.close()


def packed(message: object, descriptors: int = 0) -> bytes:
    data = pickle.dumps(message)
    return struct.pack("!IB", len(data), descriptors) + data


def test_messages_with_descriptors(ends: tuple[Wire, socket.socket]) -> None:
    """Each message has its own descriptors, which are copies, and close-on-exec."""
    wire, raw = ends
    other = Wire(raw)
    with Path(os.devnull).open() as null, socket.socket() as sock:
        wire.send("one", [null.fileno(), sock.fileno()])
        wire.send("two")
        wire.send("three", [null.fileno()])
        got = [other.receive() for _ in range(3)]
        assert [(message, len(fds)) for message, fds in got] == [("one", 2), ("two", 0), ("three", 1)]
        for descriptor in (each for _, fds in got for each in fds):
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)
        assert os.fstat(null.fileno())


def test_a_message_in_pieces(ends: tuple[Wire, socket.socket]) -> None:
    """A message in pieces is complete with its last byte; two messages may come in one piece."""
    wire, raw = ends
    data = packed("whole")
    for at, byte in enumerate(data):
        assert not wire.has_message, at
        raw.sendall(bytes([byte]))
        wire.read()
    assert wire.has_message
    assert wire.receive() == ("whole", [])
    raw.sendall(packed(LogLevel("info")) + packed(CloseListeners()))
    wire.read()
    assert [wire.has_message and wire.receive()[0] for _ in range(2)] == [LogLevel("info"), CloseListeners()]
    assert not wire.has_message


def test_a_large_message(ends: tuple[Wire, socket.socket]) -> None:
    """A message that is larger than the kernel's buffer is sent while the other end reads."""
    wire, raw = ends
    other = Wire(raw)
    message = b"x" * (5 << 20)
    sender = threading.Thread(target=wire.send, args=[message])
    sender.start()
    assert other.receive() == (message, [])
    sender.join()


def test_an_end_that_does_not_read(ends: tuple[Wire, socket.socket]) -> None:
    """If the other end does not read, `send` without waiting raises, and the wire is closed."""
    wire, raw = ends
    sends = iter(lambda: wire.send("x" * 1000, wait=False), 0)
    with pytest.raises(WireClosedError):
        deque(sends, maxlen=0)
    with pytest.raises(WireClosedError):
        wire.send("more")
    other = Wire(raw)
    got = iter(other.receive, 0)
    with pytest.raises(WireClosedError):
        deque(got, maxlen=0)


def test_an_end_that_is_gone(ends: tuple[Wire, socket.socket]) -> None:
    """If the other end is closed, `send` raises without SIGPIPE, and `receive` first returns earlier messages."""
    wire, raw = ends
    raw.sendall(packed("last") + packed("half")[:-1])
    raw.close()
    assert wire.receive() == ("last", [])
    with pytest.raises(WireClosedError):
        wire.receive()
    with pytest.raises(WireClosedError):
        wire.send("hello?")


def test_a_close_ends_who_waits(ends: tuple[Wire, socket.socket]) -> None:
    """After `close`, a thread that waits for a message gets WireClosedError."""
    wire, _ = ends
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(WireClosedError):
            wire.receive()
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    wire.close()
    assert ended.wait(20)
    thread.join()


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (HELLO, ""),
        (b"flaskd 0.0.1 wire 1\n", f"it is flaskd 0.0.1, and this is {__version__}: restart flaskd"),
        (HELLO.replace(b"wire 1", b"wire 2"), "restart flaskd"),
        (b"hello\n", "restart flaskd"),
        (b"x" * 1000, "it does not send a worker's greeting"),
    ],
)
def test_the_greeting(ends: tuple[Wire, socket.socket], said: bytes, fault: str) -> None:
    """The greeting shows another version of flaskd before anything is unpickled."""
    wire, raw = ends
    raw.sendall(said)
    found = wire.greeted()
    assert found.endswith(fault)
    assert bool(found) == bool(fault)


def test_what_follows_the_greeting_is_kept(ends: tuple[Wire, socket.socket]) -> None:
    """A message that comes in one piece with the greeting is kept."""
    wire, raw = ends
    raw.sendall(HELLO + packed("at once"))
    assert wire.greeted() == ""
    assert wire.receive() == ("at once", [])


@pytest.mark.parametrize("data", [struct.pack("!IB", 1 << 30, 0), packed("x", descriptors=2)])
def test_what_is_no_message(ends: tuple[Wire, socket.socket], data: bytes) -> None:
    """A message that is too long, or lacks its descriptors, ends the wire at once."""
    wire, raw = ends
    raw.sendall(data)
    wire.read()
    assert wire.has_message
    with pytest.raises(WireClosedError, match="a message"):
        wire.receive()


def test_a_forked_child_lets_go_of_it(ends: tuple[Wire, socket.socket]) -> None:
    """A forked child closes its copy, and the wire of its parent works on."""
    wire, raw = ends
    copy = Wire(socket.socket(fileno=os.dup(wire.fileno())))
    copy.forget()
    raw.sendall(packed("still"))
    assert wire.receive() == ("still", [])
