"""One connection in random splits, pipelines, pauses and a drain: the client and the ledger count the same."""

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
    """What a client sends, and when the drain begins."""

    requests: list[bytes]
    pieces: list[bytes]
    """The requests, as bytes."""
    pauses: list[bool]
    """The pieces before which the client waits until the server has read all earlier ones."""
    drain_at: int
    """The pieces before which the drain begins."""
    drain_timeout: float
    """The drain's timeout: short, with requests for /gate that never end; or long, and they end during the drain."""


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
    """What came before the drain is answered, refused or cut, and counted once; with enough time nothing is lost."""
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
    """Send all, and begin the drain meanwhile; returns how many requests the server must have read before."""
    sent = come = 0
    try:
        for number, piece in enumerate([*talk.pieces, b""]):
            if number == talk.drain_at:
                assert server.turns(PATIENCE)  # all that was sent so far has been read
                come = complete(talk.requests, sent)
                begin_drain()
            elif piece and talk.pauses[number]:
                assert server.turns(PATIENCE)
            if piece:
                client.socket.sendall(piece)
                sent += len(piece)
    except OSError:
        pass  # the server has closed it, after the grace or at the deadline
    if talk.drain_timeout < PATIENCE and get("/gate") in talk.requests[:come]:
        return talk.requests.index(get("/gate")) + 1  # what follows may be unread, and then it is not known what it is
    return come


def answers_to(client):
    """The status codes of all responses, until the end of the connection."""
    statuses = []
    with contextlib.suppress(OSError):  # it was reset already
        client.socket.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            statuses.append(client.response().status)
    assert set(statuses) <= {200, 204, 503}
    return statuses


def complete(requests, sent):
    """How many requests are complete in the first bytes of the stream."""
    count = 0
    for request in requests:
        sent -= len(request)
        if sent < 0:
            break
        count += 1
    return count
