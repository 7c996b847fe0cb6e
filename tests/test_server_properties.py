"""One connection, driven at random through splits, pipelines, pauses and a drain: the client's account is the ledger's."""

import http.client
import itertools
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_kit import PATIENCE, App, Client, get, no_thread_left, post

from flaskd.server import WaitressThread

pytestmark = pytest.mark.usefixtures("no_thread_left")

REQUESTS = st.one_of(
    st.sampled_from([get("/"), get("/chunks"), get("/empty")]),
    st.binary(min_size=1, max_size=3000).map(lambda body: post("/echo", body)),
    st.just(get("/hello?with=a&query=string", "X-Filler: " + "x" * 500)),
)


@st.composite
def conversations(draw):
    """Requests as bytes, where the stream is split into sends, and before which send the drain begins."""
    requests = draw(st.lists(REQUESTS, min_size=1, max_size=6))
    stream = b"".join(requests)
    cuts = draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]
    return requests, pieces, draw(st.integers(0, len(pieces)))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations())
def test_the_clients_account_is_the_ledgers(conversation):
    """Whatever had begun to arrive when the drain began is answered, and each answer is counted once, on both sides."""
    requests, pieces, drain_at = conversation
    with WaitressThread(App(), threads=2, keepalive_grace=0.05) as server:
        client = Client(server.addresses[0])
        reports = []
        drainer = threading.Thread(target=lambda: reports.append(server.drain(PATIENCE)))
        sent = begun = 0
        try:
            for number, piece in enumerate([*pieces, b""]):
                if number == drain_at:
                    assert server.turns(PATIENCE)  # what was sent so far has been read
                    begun = complete(requests, sent)
                    drainer.start()
                if piece:
                    client.socket.sendall(piece)
                    sent += len(piece)
        except OSError:
            pass  # closed under us, after the grace: what was not answered was not accepted
        answered = 0
        try:
            client.socket.shutdown(1)
            while True:
                assert client.response().status in {200, 204}
                answered += 1
        except (OSError, http.client.HTTPException):
            pass  # the end of the connection
        drainer.join(PATIENCE)
        client.close()
        assert begun <= answered <= len(requests)
        assert answered == server.completed
        assert (reports[0].cut, reports[0].rejected) == ((), 0)


def complete(requests, sent):
    """How many requests are whole in the first so many bytes of the stream."""
    count = 0
    for request in requests:
        sent -= len(request)
        if sent < 0:
            break
        count += 1
    return count
