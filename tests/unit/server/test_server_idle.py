"""Idleness: which requests count, and when the idle time is over."""

import queue
import socket
import threading
import time

import pytest
from server_kit import PATIENCE, answers, app, connect, get, no_thread_left, post, serve, until

import flaskd
from flaskd.server.board import Board

AFTER = 0.15
"""Seconds; each test except one waits that long."""
NEVER = 3600.0


class Idle:
    """A server with an idle watch, and the moments at which it was idle."""

    def __init__(self, server, after=AFTER, ignore=()):
        self.server = server
        self.moments = queue.SimpleQueue()
        self.watch(after, ignore)

    def watch(self, after, ignore=()):
        self.began = time.monotonic()
        self.server.watch_idle(after, ignore, lambda: self.moments.put(time.monotonic()))
        assert self.server.turns(PATIENCE)

    def came(self):
        """Wait until the server is idle; returns the moment."""
        return self.moments.get(timeout=PATIENCE)

    @property
    def was(self):
        return not self.moments.empty()

    def passes(self):
        """Let more than the idle time pass, in turns of the loop."""
        over = time.monotonic() + 2 * AFTER
        until(self.server, lambda: time.monotonic() > over)


@pytest.fixture
def server(no_thread_left, serve):
    return serve()


def test_nobody_asks(server):
    """The server is idle when that much time has passed since the watch began, not before."""
    idle = Idle(server)
    assert idle.came() - idle.began >= AFTER


def test_who_is_not_heard_is_told_again(server):
    """If the server still serves, `on_idle` is called again a second later."""
    idle = Idle(server)
    first = idle.came()
    assert 0.9 <= idle.came() - first < PATIENCE


def test_time_counts_from_the_last_answer(server, connect):
    """Each answer begins the time anew."""
    idle = Idle(server)
    client = connect(server)
    for _ in range(3):
        last = time.monotonic()
        assert client.ask("/hello").status == 200
    assert idle.came() - last >= AFTER


def test_a_request_in_flight_keeps_it(server, connect, app):
    """A request in flight keeps the server from being idle, however long; the time begins with its answer."""
    idle = Idle(server)
    client = connect(server).send("/gate")
    app.entered(1)
    idle.passes()
    assert (idle.was, server.idle[0]) == (False, 0.0)
    released = time.monotonic()
    app.released.set()
    client.response()
    assert idle.came() - released >= AFTER


def test_a_stream_keeps_it(server, connect, app):
    """A stream keeps the server from being idle as long as it is sent."""
    idle = Idle(server)
    connect(server).send("/stream")
    app.entered(1)
    idle.passes()
    assert not idle.was
    app.released.set()
    idle.came()


def test_an_upload_that_is_still_coming_keeps_it(server, connect):
    """A request with a complete head keeps the server from being idle, however long its body takes."""
    idle = Idle(server)
    client = connect(server).send(post("/echo", b"12345")[:-2])
    until(server, lambda: server.idle[0] == 0.0)
    idle.passes()
    assert not idle.was
    assert client.send(b"45").response().body == b"12345"
    idle.came()


def test_work_in_the_background_keeps_it(server):
    """Background work keeps the server from being idle as long as it lasts."""
    with flaskd.background("export"):
        idle = Idle(server)
        idle.passes()
        assert (idle.was, server.idle[0]) == (False, 0.0)
    idle.came()


@pytest.mark.parametrize(
    "path", ["/gate", "/gate/x", "/gate?x=/y", "/hello/deep/down", "/hello/", "/st%72eam", "/gate/caf%C3%A9"]
)
def test_what_is_ignored_keeps_nothing(server, connect, app, path):
    """Requests for ignored paths do not count: in flight, streamed or repeated, exact or by pattern."""
    idle = Idle(server, ignore=["/gate", "/gate/x", "/gate/caf%c3%a9", "/hello/*", "/stream"])
    connect(server).send(path)
    app.entered(1)
    assert idle.came() - idle.began < PATIENCE / 2


@pytest.mark.parametrize(("path", "counts"), [("/gate", False), ("/gate/x", True), ("/gate/", True)])
def test_only_a_star_stands_for_more(server, connect, app, path, counts):
    """An ignored path without a star stands for itself alone."""
    Idle(server, after=NEVER, ignore=["/gate", "/gat", "/hello*"])
    connect(server).send(path)
    app.entered(1)
    assert (server.idle[0] == 0.0) is counts


def test_polling_an_ignored_path_does_not_keep_it(server, connect):
    """If a client polls an ignored path, the server becomes idle all the same."""
    idle = Idle(server, ignore=["/hello"])
    client = connect(server)
    while not idle.was:
        assert client.ask("/hello").status == 200
        assert time.monotonic() - idle.began < PATIENCE


def test_health_and_probes_do_not_count(server, connect):
    """`health.path`, a probe from inside, and malformed requests do not count."""
    server.answer_health("/healthz", lambda: ("200 OK", "ready"))
    idle = Idle(server)
    assert server.turns(PATIENCE)
    client = connect(server)
    while not idle.was:
        assert client.ask("/healthz").status == 200
        assert server.probe("/hello", PATIENCE) == 200
        assert connect(server).ask(b"nonsense\r\n\r\n").status == 400
        assert connect(server).ask(b"GET /hello HTTP/1.1\r\n\r\n").status == 400
        assert time.monotonic() - idle.began < PATIENCE


def test_a_head_that_never_ends_keeps_nothing(server, connect):
    """A client that has not sent its path does not count."""
    idle = Idle(server)
    connect(server).send(b"GET /hello HTTP/1.1\r\n")
    idle.came()


def test_a_probe_under_way_keeps_nothing(server):
    """A probe under way does not count, even if it never ends."""
    idle = Idle(server)
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(post("/echo", b"12345")[:-2])
        server.loop.call(lambda: server.loop.connections.attach(theirs))
        until(
            server, lambda: any(channel.internal and channel.arriving for channel in server.loop.connections.channels())
        )
        assert server.idle[0] > 0.0
        idle.came()


def test_a_client_that_goes_away_has_asked(server, connect, app):
    """A request whose client left counts until it is over."""
    Idle(server, after=NEVER)
    client = connect(server).send("/gate")
    app.entered(1)
    assert server.idle[0] == 0.0
    client.reset()
    app.released.set()
    until(server, lambda: server.in_flight == 0)
    assert 0.0 < server.idle[0] < PATIENCE


def test_a_drain_stops_the_clock(server, connect):
    """A drained server is not idle; after a resume the time begins anew."""
    idle = Idle(server)
    server.drain(PATIENCE)
    idle.passes()
    assert not idle.was
    resumed = time.monotonic()
    server.resume()
    assert idle.came() - resumed >= AFTER


def test_a_new_watch_goes_on_where_the_last_was(server):
    """A new watch continues the old count at once; None ends it."""
    idle = Idle(server, after=NEVER)
    idle.passes()
    assert server.idle[0] >= 2 * AFTER
    idle.watch(AFTER)
    assert server.idle[0] >= 2 * AFTER
    idle.came()
    idle.watch(None)
    assert server.idle is None
    while idle.was:
        idle.moments.get()
    idle.passes()
    assert not idle.was


def test_it_is_shown(server, connect, app):
    """`idle` has the seconds since the last request, and those that are left."""
    assert server.idle is None
    Idle(server, after=NEVER)
    for_seconds, left = server.idle
    assert 0 <= for_seconds < PATIENCE
    assert NEVER - PATIENCE < left <= NEVER
    connect(server).send("/gate")
    app.entered(1)
    assert server.idle == (0.0, NEVER)


def test_an_answer_is_never_missed(server, connect):
    """The moment of an answer is noted before its request leaves those in flight, so the server never looks idle."""
    Idle(server, after=NEVER)
    watch = server.loop.idle
    watch.used = 0.0
    seen = []

    class Watched(dict):
        def __delitem__(self, key):
            seen.append(watch.used)
            super().__delitem__(key)

    server.loop.account.in_hand = Watched()
    assert connect(server).ask("/hello").status == 200
    assert len(seen) == 1
    assert seen[0] > 0.0


def test_threads_are_as_before(server):
    """The watch needs no thread of its own."""
    before = threading.active_count()
    Idle(server, after=NEVER)
    assert threading.active_count() == before


# --- where the supervisor decides -------------------------------------------------------------------------------------


@pytest.fixture
def board():
    board = Board.make()
    yield board
    board.close()


@pytest.fixture
def noting(no_thread_left, board, serve):
    """A server that only writes its idleness to its board."""
    server = serve(board=board)
    server.watch_idle(AFTER, ["/empty"], None)
    assert server.turns(PATIENCE)
    return server


def test_the_board_tells_since_when_nothing_was_asked(noting, board, connect):
    """The board has the time since the watch began or the last answer that counts; nothing is called."""
    before = board.idle_for()
    assert 0 <= before < PATIENCE
    client = connect(noting)
    until(noting, lambda: board.idle_for() > 2 * AFTER)
    assert client.ask("/empty").status == 204
    assert board.idle_for() > 2 * AFTER
    asked = time.monotonic()
    assert client.ask("/hello").status == 200
    assert board.idle_for() <= time.monotonic() - asked


def test_the_board_tells_of_what_is_in_hand(noting, board, connect, app):
    """The board shows no idleness from the moment at which a request has come, however long it runs."""
    until(noting, lambda: board.idle_for() > 2 * AFTER)
    client, sent = connect(noting), time.monotonic()
    client.send("/gate")
    app.entered(1)
    longest = 0.0
    while time.monotonic() < sent + 3 * AFTER:
        longest = max(longest, board.idle_for() - (time.monotonic() - sent))
    assert longest <= 0
    until(noting, lambda: board.idle_for() == 0)
    app.released.set()
    assert client.response().status == 200
    until(noting, lambda: board.idle_for() > AFTER)


def test_the_board_tells_of_what_is_not_a_request_yet(noting, board, connect):
    """The board shows no idleness while a body is coming or background work is under way."""
    client = connect(noting).send(post("/echo", b"12")[:-1])
    until(noting, lambda: board.idle_for() == 0)
    client.send(b"2")
    assert client.response().status == 200
    until(noting, lambda: board.idle_for() > 0)
    with flaskd.background("export"):
        until(noting, lambda: board.idle_for() == 0)
    until(noting, lambda: board.idle_for() > 0)


def test_a_new_watch_goes_on_on_the_board(noting, board):
    """A changed setting does not begin the time anew; a resume does."""
    until(noting, lambda: board.idle_for() > 2 * AFTER)
    noting.watch_idle(NEVER, [], None)
    assert noting.turns(PATIENCE)
    assert board.idle_for() > 2 * AFTER
    noting.drain(PATIENCE)
    before = time.monotonic()
    noting.resume()
    assert board.idle_for() <= time.monotonic() - before
