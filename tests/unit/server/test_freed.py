"""A closed connection is freed at once: nothing waits for the garbage collector, which looks at old objects rarely."""

import gc
import logging

import pytest
from server_kit import BIG, PATIENCE, answers, app, connect, draining, get, no_thread_left, post, serve, until

from flaskd.server.channel import Channel
from flaskd.server.request import Request

pytestmark = pytest.mark.usefixtures("no_thread_left")


def kept(client, app):
    """The connection is kept, and the client closes it."""
    for _ in range(2):
        client.ask("/")


def closed(client, app):
    """The server closes it, as the client asked for."""
    client.ask(get("/", "Connection: close"))


def refused(client, app):
    """The request cannot be read."""
    assert client.ask(b"GET  / HTTP/1.1\r\n\r\n").status == 400


def failed(client, app):
    """The app raises."""
    logger = logging.getLogger("waitress")
    logger.disabled = True  # pytest would keep the log record, and with it the frames of its traceback
    try:
        assert client.ask("/boom").status == 500
    finally:
        logger.disabled = False


def uncommon(client, app):
    """The request has a body in chunks."""
    chunks = b"5\r\nhello\r\n0\r\n\r\n"
    assert client.ask(get("/echo", "Transfer-Encoding: chunked", method="POST") + chunks).body == b"hello"


def with_a_body(client, app):
    """The request has a body."""
    assert client.ask(post("/echo", b"hello")).body == b"hello"


def pipelined(client, app):
    """Several requests come at once."""
    client.send("/", "/empty", "/big", "/")
    assert [client.response().status for _ in range(4)] == [200, 204, 200, 200]


def pipelined_and_left(client, app):
    """The client leaves while the app runs for the first of several requests."""
    client.send("/gate", "/", "/")
    app.entered(1)
    client.reset()
    app.released.set()


def left_while_the_app_runs(client, app):
    """The client leaves while the app runs."""
    client.send("/gate")
    app.entered(1)
    client.close()
    app.released.set()


def left_in_an_answer(client, app):
    """The client leaves before it has read all of a large answer."""
    client.send("/big")
    client.head()
    client.reset()


def left_in_a_head(client, app):
    """The client leaves in the middle of a head."""
    client.send(b"GET / HTTP/1.1\r\nHo")


def left_in_a_body(client, app):
    """The client leaves in the middle of a body."""
    client.send(get("/echo", f"Content-Length: {BIG}", method="POST") + b"x" * 100_000)


def silent(client, app):
    """The client sends nothing."""


def of(*kinds):
    """All objects of these classes; asks no object for its class, because a weak proxy may have lost its own."""
    return [each for each in gc.get_objects() if issubclass(type(each), kinds)]


@pytest.fixture
def left():
    """What is left of the objects of some classes that a test has made; the garbage collector is off."""
    gc.collect()
    gc.disable()
    before = {id(each) for each in of(Channel, Request)}
    yield lambda *kinds: [each for each in of(*kinds) if id(each) not in before]
    gc.enable()


HOW = [
    kept, closed, refused, failed, uncommon, with_a_body, pipelined, pipelined_and_left, left_while_the_app_runs,
    left_in_an_answer, left_in_a_head, left_in_a_body, silent,
]  # fmt: skip


@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
def test_a_closed_connection_is_freed(how, serve, connect, app, left):
    """However it ended, neither the connection nor its requests are left."""
    server = serve()
    client = connect(server)
    until(server, lambda: left(Channel))
    how(client, app)
    client.close()
    until(server, lambda: not left(Channel, Request))


def test_what_a_drain_closes_is_freed(serve, connect, app, left):
    """A connection that is kept, and two whose requests are cut: their threads' stacks are read, and not kept."""
    server = serve(threads=2, keepalive_grace=0.0)
    idle, one, other = (connect(server) for _ in range(3))
    idle.ask("/")
    one.send("/gate")
    app.entered(2)
    other.send("/gate")
    app.entered(1)
    with draining(server, app, timeout=0.2) as report:
        assert len(report.result(PATIENCE).cut) == 2
    for client in (idle, one, other):
        client.close()
    until(server, lambda: not left(Channel, Request))
