"""The journal's native protocol, byte for byte, and what happens if no journal listens."""

import array
import io
import logging
import os
import socket
import sys

import pytest

from flaskd.log import journal
from flaskd.log.access import log_access
from flaskd.log.journal import Journal, encode, field_name
from flaskd.log.setup import Logs


@pytest.fixture
def listening(tmp_path):
    """A journal's socket; gives its path and a function that receives one entry, from a file or a datagram."""
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(10)

        def take():
            data, rights, _, _ = sock.recvmsg(1 << 21, 64)
            if not rights:
                return data, False
            (fd,) = array.array("i", rights[0][2])
            with os.fdopen(fd, "rb") as file:
                file.seek(0)
                return file.read(), True

        yield str(path), take


@pytest.fixture
def sender(listening):
    made = Journal(listening[0])
    yield made
    made.close()


def test_an_entry_byte_for_byte():
    """Plain fields are lines; a value with newlines has its length before it."""
    entry = encode({"MESSAGE": "é\nb", "PRIORITY": "6", "A": "x=y"})
    assert entry == b"PRIORITY=6\nA=x=y\nMESSAGE\n" + (4).to_bytes(8, "little") + b"\xc3\xa9\nb\n"


@pytest.mark.parametrize(
    ("key", "name"),
    [("took", "FLASKD_TOOK"), ("request-id", "FLASKD_REQUEST_ID"), ("ü", "FLASKD__"), ("x" * 99, "FLASKD_" + "X" * 57)],
)
def test_names_are_what_the_journal_takes(key, name):
    """Capitals, digits and underscores, at most 64."""
    assert field_name(key) == name


def test_a_value_is_bounded():
    """A value is cut at a maximum length."""
    assert len(encode({"MESSAGE": "x" * (1 << 21)})) < (1 << 20) + 50


def test_an_entry_goes_as_a_datagram_or_as_a_file(listening, sender):
    """A large entry is sent as a sealed memory file; large and small ones arrive whole."""
    for size, as_file in ((10, False), (900_000, True)):
        entry = encode({"MESSAGE": "x" * size})
        sender.send(entry)
        assert listening[1]() == (entry, as_file)


def test_logs_go_there_with_their_fields(listening, monkeypatch):
    """If standard error is the journal, records arrive with their fields, access lines with id and duration."""
    path, take = listening
    monkeypatch.setattr(Journal.__init__, "__defaults__", (path,))
    monkeypatch.setattr("flaskd.log.setup.in_journal", lambda _: True)
    with Logs() as logs:
        logs.apply(level="info", log_format="auto", access="combined")
        logging.getLogger("flaskd.test").warning(
            "two\nlines", extra={"fields": {"policy": "p", "cut": [1], "no": None}}
        )
        data, _ = take()
        assert data.startswith(b"PRIORITY=4\nSYSLOG_IDENTIFIER=flaskd\nFLASKD_LOGGER=flaskd.test\nFLASKD_POLICY=p\n")
        assert b"\nFLASKD_CUT=[1]\n" in data
        assert b"FLASKD_NO" not in data
        assert data.endswith(b"MESSAGE\n" + (9).to_bytes(8, "little") + b"two\nlines\n")
        log_access(
            "combined",
            {
                "id": 7, "client": "::1", "time": 0.0, "method": "GET", "target": "/a\nb", "protocol": "HTTP/1.1",
                "status": 200, "bytes": 5, "referer": "", "agent": "", "took": 0.25, "request_id": "4bf9",
                "traceparent": "00-x",
            },
        )  # fmt: skip
        data, _ = take()
        assert b"\nFLASKD_REQUEST_ID=7\n" in data
        assert b"\nFLASKD_X_REQUEST_ID=4bf9\nFLASKD_TRACEPARENT=00-x\n" in data
        assert b"\nFLASKD_TOOK=0.25\n" in data
        assert b"FLASKD_TARGET\n" + (4).to_bytes(8, "little") + b"/a\nb\n" in data
        assert (
            b'MESSAGE=::1 - - [01/Jan/1970:00:00:00 +0000] "GET /a\\x0Ab HTTP/1.1" 200 5 "-" "-" request_id=4bf9 traceparent=00-x\n'
            in data
        )


def test_a_worker_is_named_in_each_of_its_entries(listening, monkeypatch):
    """The fields of `always` are in each entry, unless the entry has a field of that name."""
    path, take = listening
    monkeypatch.setattr(Journal.__init__, "__defaults__", (path,))
    monkeypatch.setattr("flaskd.log.setup.in_journal", lambda _: True)
    with Logs() as logs:
        logs.always = {"worker": 3}
        logs.apply(level="info", log_format="auto", access="off")
        logging.getLogger("flaskd.test").info("of its own")
        logging.getLogger("flaskd.test").info("of another", extra={"fields": {"worker": 1}})
        assert b"FLASKD_WORKER=3\n" in take()[0]
        assert b"FLASKD_WORKER=1\n" in take()[0]


def test_a_journal_that_is_gone_costs_only_the_fields(tmp_path, monkeypatch):
    """If the journal does not answer, the line goes to standard error with its priority."""
    stream = io.StringIO()
    monkeypatch.setattr(Journal.__init__, "__defaults__", (str(tmp_path / "gone"),))
    monkeypatch.setattr("flaskd.log.setup.in_journal", lambda _: True)
    monkeypatch.setattr(sys, "stderr", stream)
    with Logs() as logs:
        logs.apply(level="info", log_format="auto", access="off")
        logging.getLogger("flaskd.test").error("two\nlines")
    assert stream.getvalue() == "<3>two\n<3>  lines\n"


def test_the_socket_is_where_the_journal_has_it():
    """The path of the socket is the journal's."""
    assert journal.SOCKET == "/run/systemd/journal/socket"
