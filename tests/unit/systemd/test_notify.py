import gc
import itertools
import logging
import os
import time

import pytest
from fake_notify import receiving

from flaskd.systemd.notify import Notifier


@pytest.fixture
def address(tmp_path):
    return tmp_path / "notify"


@pytest.fixture
def notifier(address):
    """A notifier with an environment of its own that names a manager."""
    notifier = Notifier({"NOTIFY_SOCKET": str(address)})
    yield notifier
    notifier.close()
    gc.collect()  # a socket that was not closed would warn now


def warnings(caplog):
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("tell", "message"),
    [
        (lambda notifier: notifier.ready("serving"), b"READY=1\nSTATUS=serving"),
        (lambda notifier: notifier.status("draining: 3 in flight"), b"STATUS=draining: 3 in flight"),
        (lambda notifier: notifier.reloading(12.3456789), b"RELOADING=1\nMONOTONIC_USEC=12345678\nSTATUS=reloading"),
        (lambda notifier: notifier.stopping("signal: SIGTERM"), b"STOPPING=1\nSTATUS=signal: SIGTERM"),
        (lambda notifier: notifier.failed("cannot bind", 98), b"STATUS=cannot bind\nERRNO=98"),
        (lambda notifier: notifier.status(""), b"STATUS="),
        (lambda notifier: notifier.stopping("a", extend=2), b"STOPPING=1\nSTATUS=a\nEXTEND_TIMEOUT_USEC=2000000"),
        (lambda notifier: notifier.extend(0.25), b"EXTEND_TIMEOUT_USEC=250000"),
        (lambda notifier: notifier.alive(), b"WATCHDOG=1"),
        (lambda notifier: notifier.remove("a"), b"FDSTOREREMOVE=1\nFDNAME=a"),
    ],
)
def test_messages_byte_for_byte(tell, message, notifier, address):
    """Each message is one datagram in the form of sd_notify(3)."""
    with receiving(address) as receiver:
        tell(notifier)
        assert receiver.messages() == [message]


@pytest.mark.parametrize(
    ("status", "arrives"),
    [
        ("GET /café ✓", "GET /café ✓"),
        ("日本 🎉", "日本 🎉"),
        ("one\ntwo", "one two"),
        ("READY\nSTOPPING=1", "READY STOPPING=1"),
        ("a\r\n\tb\0c\x1b[31md\x7f", "a   b c [31md "),
        ("line\u2028separator\x85next", "line separator next"),
        ("half \ud800 pair", "half   pair"),
    ],
)
def test_a_status_arrives_as_utf8_on_one_line(status, arrives, notifier, address):
    """A status may be any text; characters that could forge a field, or are invalid, become spaces."""
    with receiving(address) as receiver:
        notifier.status(status)
        assert receiver.messages() == [b"STATUS=" + arrives.encode()]


@pytest.mark.parametrize(
    ("status", "arrives"),
    [("x" * 5000, "x" * 1024), ("é" * 5000, "é" * 512), ("✓" * 5000, "✓" * 341), ("a" + "🎉" * 300, "a" + "🎉" * 255)],
)
def test_a_long_status_is_cut_at_a_character(status, arrives, notifier, address):
    """A long status is cut below systemd's limit, and stays valid UTF-8."""
    with receiving(address) as receiver:
        notifier.status(status)
        assert receiver.messages() == [b"STATUS=" + arrives.encode()]


def test_an_abstract_address():
    """An address that starts with "@" is in the abstract namespace: unix(7)."""
    name = f"@flaskd-test-notify-{os.getpid()}"
    notifier = Notifier({"NOTIFY_SOCKET": name})
    with receiving(name) as receiver:
        notifier.ready("serving")
        assert receiver.messages() == [b"READY=1\nSTATUS=serving"]
    notifier.close()


def test_the_environment_of_the_process_is_the_default(address, monkeypatch):
    """Without an environment given, the process's own is read, once, when the notifier is made."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(address))
    notifier = Notifier()
    monkeypatch.delenv("NOTIFY_SOCKET")  # an app may do that while it is imported
    with receiving(address) as receiver:
        notifier.ready("serving")
        assert receiver.messages() == [b"READY=1\nSTATUS=serving"]
    notifier.close()


def test_without_a_manager_nothing_happens(caplog, monkeypatch):
    """Outside of a service every call does nothing, whatever the process's environment has."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    notifier = Notifier({})
    notifier.ready("serving")
    notifier.stopping("signal: SIGTERM")
    notifier.close()
    assert warnings(caplog) == []


def test_a_receiver_that_was_made_anew_gets_the_next_message(notifier, address, caplog):
    """If the manager's socket is made again, as when it re-executes, the notifier connects again."""
    with receiving(address) as receiver:
        notifier.ready("serving")
        assert receiver.message() == b"READY=1\nSTATUS=serving"
    address.unlink()
    with receiving(address) as receiver:
        notifier.status("still serving")
        assert receiver.messages() == [b"STATUS=still serving"]
    assert warnings(caplog) == []


def test_without_a_receiver_there_is_one_warning(notifier, address, caplog):
    """A missing manager costs one warning, and never an exception."""
    for _ in range(3):
        notifier.status("anybody?")
    (warning,) = warnings(caplog)
    assert warning.startswith(f"cannot notify the service manager at {address}: ")


def test_a_receiver_that_died_costs_one_warning(notifier, address, caplog):
    """A manager with a closed socket costs one warning; once one has answered again, a new loss is logged again."""
    with receiving(address):
        notifier.ready("serving")
    for _ in range(3):
        notifier.status("anybody?")
    assert len(warnings(caplog)) == 1
    address.unlink()
    with receiving(address) as receiver:
        notifier.status("there you are")
        assert receiver.messages() == [b"STATUS=there you are"]
    notifier.status("gone again")
    assert len(warnings(caplog)) == 2


def test_an_address_that_is_no_socket_address_costs_one_warning(caplog, tmp_path):
    """A NOTIFY_SOCKET that is too long costs one warning."""
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / ("x" * 200))})
    notifier.ready("serving")
    notifier.ready("serving")
    assert len(warnings(caplog)) == 1


def test_a_full_receiver_blocks_no_longer_than_the_timeout(notifier, address, caplog, monkeypatch):
    """If the manager does not read, the call takes the timeout and the message is lost."""
    monkeypatch.setattr("flaskd.systemd.notify._SEND_TIMEOUT", 0.05)
    with receiving(address) as receiver:
        began = time.monotonic()
        sent = next(number for number in itertools.count() if notifier.ready(str(number)) or warnings(caplog))
        assert time.monotonic() - began < 5
        (warning,) = warnings(caplog)
        assert "timed out" in warning
        assert receiver.messages() == [f"READY=1\nSTATUS={number}".encode() for number in range(sent)]
        notifier.status("room again")
        assert receiver.messages() == [b"STATUS=room again"]


def test_a_status_is_never_waited_for(notifier, address, caplog, monkeypatch):
    """If the manager is behind, a status is dropped at once, without a warning: a newer one follows."""
    monkeypatch.setattr("flaskd.systemd.notify._SEND_TIMEOUT", 60)
    with receiving(address) as receiver:
        for number in range(1000):
            notifier.status(str(number))
        assert warnings(caplog) == []
        received = receiver.messages()
        assert received == [f"STATUS={number}".encode() for number in range(len(received))]
        assert len(received) < 1000


def test_closing_twice_and_speaking_again(notifier, address):
    """A closed notifier can be closed again, and connects again when it has something to send."""
    with receiving(address) as receiver:
        notifier.status("one")
        notifier.close()
        notifier.close()
        notifier.status("two")
        assert receiver.messages() == [b"STATUS=one", b"STATUS=two"]
