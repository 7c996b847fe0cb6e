"""One connection, driven at random through splits, pipelines, pauses and a drain: the client's account is the ledger's."""

import contextlib
import http.client
import itertools
import socket
import threading
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_kit import PATIENCE, App, Client, get, no_thread_left, post

from flaskd.server import WaitressThread

pytestmark = pytest.mark.usefixtures("no_thread_left")

REQUESTS = st.one_of(
    st.sampled_from([get("/"), get("/chunks"), get("/empty"), get("/gate")]),
    st.binary(min_size=1, max_size=3000).map(lambda body: post("/echo", body)),
    st.just(get("/hello?with=a&query=string", "X-Filler: " + "x" * 500)),
)


@dataclass
class Conversation:
    """What a client does, and when the drain comes."""

    requests: list[bytes]
    pieces: list[bytes]
    """The requests as they are sent."""
    pauses: list[bool]
    """Before which of the pieces it waits until the server has read what came before."""
    drain_at: int
    """Before which of the pieces the drain begins."""
    drain_timeout: float
    """Short, and requests for /gate never end; or long, and they end in the drain."""


@st.composite
def conversations(draw):
    requests = draw(st.lists(REQUESTS, min_size=1, max_size=6))
    stream = b"".join(requests)
    cuts = draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]
    return Conversation(
        requests,
        pieces,
        draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces))),
        draw(st.integers(0, len(pieces))),
        draw(st.sampled_from([0, 0.02, PATIENCE, PATIENCE])),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(conversations())
def test_the_clients_account_is_the_ledgers(talk):
    """Whatever had come when the drain began is answered, refused in words or named as cut, and counted once.

    With time enough nothing is refused or cut. What was cut in the moment in which it was answered may have arrived.
    """
    app, reports = App(), []
    with WaitressThread(app, threads=2, keepalive_grace=0.05) as server:
        drainer = threading.Thread(target=lambda: reports.append(server.drain(talk.drain_timeout)))

        def begin_drain():
            drainer.start()
            if talk.drain_timeout == PATIENCE:
                app.released.set()

        client = Client(server.addresses[0])
        come = converse(client, server, talk, begin_drain)
        statuses = answers_to(client)
        drainer.join(PATIENCE)
        client.close()
        app.released.set()
        assert server.in_flight == 0
        (report,), (completed, rejected) = reports, server.counted
    refused, cut = statuses.count(503), len(report.cut)
    answered = len(statuses) - refused
    assert rejected == report.rejected == refused
    assert report.completed <= completed <= answered <= completed + cut
    assert come <= completed + rejected + cut <= len(talk.requests)
    if talk.drain_timeout == PATIENCE:
        assert (report.rejected, report.cut) == (0, ())


def converse(client, server, talk, begin_drain):
    """Send all, and begin the drain meanwhile; how many requests the server must have read by then."""
    sent = come = 0
    try:
        for number, piece in enumerate([*talk.pieces, b""]):
            if number == talk.drain_at:
                assert server.turns(PATIENCE)  # what was sent so far has been read
                come = complete(talk.requests, sent)
                begin_drain()
            elif piece and talk.pauses[number]:
                assert server.turns(PATIENCE)
            if piece:
                client.socket.sendall(piece)
                sent += len(piece)
    except OSError:
        pass  # closed under us, after the grace or at the deadline
    if talk.drain_timeout < PATIENCE and get("/gate") in talk.requests[:come]:
        return talk.requests.index(get("/gate")) + 1  # what follows it may be unread, and then nobody knows what it is
    return come


def answers_to(client):
    """The status codes of all responses, until the end of the connection."""
    statuses = []
    with contextlib.suppress(OSError):  # reset already
        client.socket.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            statuses.append(client.response().status)
    assert set(statuses) <= {200, 204, 503}
    return statuses


def complete(requests, sent):
    """How many requests are whole in the first so many bytes of the stream."""
    count = 0
    for request in requests:
        sent -= len(request)
        if sent < 0:
            break
        count += 1
    return count
