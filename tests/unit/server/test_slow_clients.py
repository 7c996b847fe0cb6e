"""Slow clients, and many clients: each row of the table in docs/limits.md, and whether others are served meanwhile."""

import contextlib
import http.client
import queue
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import patience
import pytest
from server_kit import BIG, PATIENCE, answers, app, app_threads, connect, get, no_thread_left, post, serve, until

from flaskd.server import Board, Limits, connections, slow
from flaskd.serving.configuration import read
from flaskd.sockets import Address, Listener

pytestmark = pytest.mark.usefixtures("no_thread_left")

LIMITS = Path(__file__).parents[3] / "docs" / "limits.md"
WATERMARK = 1 << 18
"""Bytes of an answer that are buffered for a client; it takes longer to fill the default."""
SMALL = 4096
"""SO_RCVBUF of a client, so that few bytes are on their way."""
ROWS = set()


def row(kind):
    """The row of the table that a test is about."""
    ROWS.add(kind)
    return lambda test: test


def table():
    """The rows of the table: the kind of client, and the cell with the keys."""
    lines = [line for line in LIMITS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return {
        kind: keys for kind, *_, keys in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    }


def test_each_row_has_a_test():
    """The table has a row for each kind of clients that is tested here, and no others."""
    assert set(table()) == ROWS


def test_the_table_tells_the_defaults(tmp_path):
    """A configuration with the values that the table gives for each key is the default configuration."""
    told = re.findall(r"`([\w.]+): ([^`]+)`", " ".join(table().values()))
    assert len(told) > 10
    for key, value in told:
        (file := tmp_path / "flaskd.yaml").write_text(f"{key.replace('.', ': {')}: {value}{'}' * key.count('.')}")
        assert read(file).values.model_dump() == read(None).values.model_dump(), key


# --- a server, its clients, and the time that passes for them ---------------------------------------------------------


def limited(server):
    """How often limits took effect, by the names of their settings."""
    return {limit: count for limit, count in server.loop.account.tally().limited.items() if count}


def in_loop(server, function):
    """Call a function in the loop's thread, and return its result."""
    given = queue.SimpleQueue()
    server.loop.call(lambda: given.put(function()))
    return given.get(timeout=PATIENCE)


def look(server, seconds=0.0):
    """Let the loop look at its connections as if so many seconds had passed; it does not do so by itself any more."""

    def reap():
        server.loop.connections.reap(time.monotonic() + seconds)
        server.loop.connections.next_reaping = float("inf")

    in_loop(server, reap)


def others_are_served(server, connect):
    """A new client is answered now."""
    return connect(server).ask("/hello").status == 200


def arriving(server):
    """The requests of which a part has come."""
    return [each.arriving for each in server.loop.connections.channels() if each.arriving is not None]


def reading(server):
    """The connections whose clients have not read all of their output."""
    return [each for each in server.loop.connections.channels() if each.total_outbufs_len]


def wait(server, condition):
    until(server, lambda: condition(server))


# --- connections ------------------------------------------------------------------------------------------------------


@row("says nothing, at first or between two requests")
def test_who_says_nothing_is_closed(serve, connect):
    """A silent connection is closed after channel_timeout, and not before."""
    server = serve()
    new, kept = connect(server), connect(server)
    assert kept.ask("/hello").status == 200
    until(server, lambda: server.connections == 2)
    look(server, 119)
    assert server.connections == 2
    look(server, 121)
    assert new.ended()
    assert kept.ended()


@row("connects beyond the limit")
def test_at_the_limit_the_oldest_makes_room(monkeypatch, serve, connect):
    """A new client is served at once; the connection that was idle the longest is closed for it, and no other."""
    monkeypatch.setattr(connections, "PATIENCE", 0.0)
    server = serve(adjustments={"connection_limit": 4})
    idle = [connect(server) for _ in range(4)]
    until(server, lambda: server.connections == 4)
    assert idle[0].ask("/hello").status == 200  # now it is the newest
    assert others_are_served(server, connect)
    assert idle[1].ended()
    assert limited(server) == {"connection_limit": 1}
    assert [each.ask("/hello").status for each in (idle[0], *idle[2:])] == [200] * 3


@row("connects beyond the limit")
def test_room_is_made_on_a_unix_socket(monkeypatch, serve, connect, tmp_path):
    """Room is made although the system does not tell how many clients of a Unix socket wait."""
    monkeypatch.setattr(connections, "PATIENCE", 0.0)
    listener = Listener.bind(Address.parse(f"unix:{tmp_path}/http.sock"))
    server = serve(listeners=[listener], adjustments={"connection_limit": 2})
    for _ in range(2):
        connect(server)
    until(server, lambda: server.connections == 2)
    assert others_are_served(server, connect)


@row("connects beyond the limit")
def test_what_is_in_hand_makes_no_room(monkeypatch, serve, connect, app):
    """Connections with a running request, unread bytes, or a new client are not closed; new ones wait."""
    server = serve(adjustments={"connection_limit": 2}, threads=1)
    running = connect(server).send("/gate")
    app.entered(1)
    idle = connect(server)
    until(server, lambda: server.connections == 2)
    late = connect(server).send("/hello")
    until(server, lambda: server.loop.admission.paused)
    assert in_loop(server, lambda: server.loop.connections.make_room(1)) == 0
    monkeypatch.setattr(connections, "PATIENCE", 0.0)
    assert in_loop(server, lambda: idle.send("/gate") and server.loop.connections.make_room(1)) == 0
    app.released.set()
    assert [each.response().status for each in (running, idle)] == [200] * 2
    assert late.response().status == 200


def test_who_has_asked_meanwhile_does_not_make_room(monkeypatch, serve, connect):
    """A connection that has asked meanwhile is not the oldest any more, and is not closed."""
    monkeypatch.setattr(connections, "PATIENCE", 0.0)
    server = serve()
    clients = []
    for _ in range(3):
        clients.append(connect(server))
        until(server, lambda: server.connections == len(clients))
    assert in_loop(server, lambda: server.loop.connections.make_room(1)) == 1
    assert clients[0].ended()
    assert clients[1].ask("/hello").status == 200
    assert in_loop(server, lambda: server.loop.connections.make_room(1)) == 1
    assert clients[2].ended()
    assert clients[1].ask("/hello").status == 200


def test_a_transfer_makes_room_last(monkeypatch, serve, connect):
    """Idle connections are closed first, then the slowest bodies and answers; quick ones never."""
    monkeypatch.setattr(connections, "PATIENCE", 0.0)
    monkeypatch.setattr(connections, "SLOW", float("inf"))
    server = serve()

    def make_room():
        return in_loop(server, lambda: server.loop.connections.make_room(1))

    slower = connect(server).send(post("/echo", b"x" * 200_000)[:-199_999])
    wait(server, arriving)
    faster = connect(server).send(post("/echo", b"x" * 200_000)[:-100_000])
    until(server, lambda: sum(each.body_bytes_received for each in arriving(server)) == 100_001)
    reader = connect(server, receive_buffer=SMALL).send("/big")
    until(server, lambda: bool(reading(server)))
    idle = connect(server)
    until(server, lambda: server.connections == 4)
    for first in (idle, slower):
        assert make_room() == 1
        assert first.ended()
    monkeypatch.setattr(connections, "SLOW", 0.0)
    assert make_room() == 0
    assert faster.send(b"x" * 100_000).response().body == b"x" * 200_000
    assert len(reader.response().body) == BIG


# --- heads ------------------------------------------------------------------------------------------------------------


@row("sends a head slowly")
def test_a_slow_head_is_refused(serve, connect):
    """A slow head gets 408 after head_timeout, counted from its first byte, and the connection ends."""
    server = serve(limits=Limits(head_timeout=20))
    client = connect(server).send(b"GET /hello HTTP/1.1\r\nHost: te")
    wait(server, arriving)
    look(server, 19)
    client.send(b"s")
    assert len(arriving(server)) == 1
    look(server, 21)
    response = client.response()
    assert (response.status, response.last) == (408, True)
    assert limited(server) == {"head_timeout": 1}
    assert others_are_served(server, connect)


def test_a_head_that_waits_for_its_turn_is_not_slow(serve, connect, app):
    """The time of a partial head behind a long request counts from that request's answer."""
    server = serve(limits=Limits(head_timeout=20))
    client = connect(server).send(get("/gate") + b"GET /hello HTTP/1.1\r\nHost: te")
    app.entered(1)
    wait(server, arriving)
    look(server, 60)
    assert len(arriving(server)) == 1
    arriving(server)[0].first_byte -= 60
    app.released.set()
    assert client.response().status == 200
    until(server, lambda: not server.in_flight)
    look(server, 19)
    assert client.send(b"st\r\n\r\n").response().status == 200


@row("sends a head without end")
@pytest.mark.parametrize("more", [b"X: y\r\n", b"x"], ids=["fields", "a line"])
def test_an_endless_head_is_refused(more, serve, connect):
    """An endless head is refused at max_request_header_size."""
    server = serve(adjustments={"max_request_header_size": 4096})
    client = connect(server).send(b"GET /hello HTTP/1.1\r\nHost: test\r\n" + more * 4096)
    assert client.response().status == 431
    assert others_are_served(server, connect)


# --- bodies -----------------------------------------------------------------------------------------------------------


@row("sends a body slowly")
@pytest.mark.parametrize("chunked", [False, True])
def test_a_slow_body_is_refused(chunked, serve, connect):
    """A body is refused if less than min_rate of it came in channel_timeout; no thread was busy with it."""
    server = serve(limits=Limits(min_rate=10), threads=1)
    head = get("/echo", "Transfer-Encoding: chunked" if chunked else "Content-Length: 10000", method="POST")
    client = connect(server).send(head + (b"800\r\n" if chunked else b""))
    wait(server, lambda server: [each for each in arriving(server) if each.headers_finished])
    look(server, -250)
    client.send(b"x" * 1200)
    wait(server, lambda server: arriving(server)[0].body_bytes_received >= 1200)
    look(server, -130)  # 10 bytes a second for 120 s are enough
    client.send(b"x")
    wait(server, lambda server: arriving(server)[0].body_bytes_received >= 1201)
    assert others_are_served(server, connect)
    look(server)
    response = client.response()
    assert (response.status, response.last) == (408, True)
    assert limited(server) == {"min_rate": 1}


@row("sends a body without end")
def test_an_endless_body_is_refused(serve, connect):
    """A body beyond max_request_body_size is refused, in chunks of any size."""
    server = serve(adjustments={"max_request_body_size": 1000})
    client = connect(server).send(get("/echo", "Transfer-Encoding: chunked", method="POST") + b"1\r\nx\r\n" * 1001)
    assert client.response().status == 413
    assert others_are_served(server, connect)


@row("sends chunk extensions or trailers without end")
@pytest.mark.parametrize(
    ("rest", "status"),
    [(b"1;" + b"x" * 20_000, 400), (b"1;x=y\r\nx\r\n" * 6000, 400), (b"0\r\n" + b"X: y\r\n" * 60_000, 431)],
    ids=["a line", "many", "trailers"],
)
def test_endless_framing_is_refused(rest, status, serve, connect):
    """Extensions beyond 16 KiB in one body are refused, and trailers beyond max_request_header_size."""
    server = serve(threads=1)
    client = connect(server)
    client.send(get("/echo", "Transfer-Encoding: chunked", method="POST"))
    with contextlib.suppress(OSError):  # it may be refused before all was sent
        client.send(rest)
    assert client.head()[0] == status
    assert others_are_served(server, connect)


@row("is told to continue, and sends no body")
def test_a_body_that_never_comes_is_no_thread(serve, connect):
    """A body that never comes keeps no thread, and its connection is closed after channel_timeout."""
    server = serve(threads=1)
    client = connect(server).send(get("/echo", "Expect: 100-continue", "Content-Length: 5", method="POST"))
    assert client.head()[0] == 100
    assert others_are_served(server, connect)
    look(server, 121)
    assert client.ended()


@row("sends on after it was refused")
def test_who_sends_on_after_a_refusal(monkeypatch, serve, connect):
    """A client that goes on sending after a refusal is read for a while, so that it can read why, and then closed."""
    monkeypatch.setattr("flaskd.server.output._LINGER_SENDING", 0.1)
    server = serve(adjustments={"max_request_body_size": 10})
    client = connect(server).send(post("/echo", b"x" * 11))
    assert client.response().status == 413

    def closed():
        with contextlib.suppress(OSError):
            client.send(b"x")
        return not server.connections

    until(server, closed)


# --- readers ----------------------------------------------------------------------------------------------------------


@row("reads nothing")
def test_who_reads_nothing_has_no_thread(serve, connect):
    """An answer below the watermark waits without a thread; its connection is closed after channel_timeout."""
    server = serve(threads=1)
    client = connect(server, receive_buffer=SMALL).send("/big")
    until(server, lambda: bool(reading(server)))
    [channel] = reading(server)
    assert others_are_served(server, connect)
    look(server, 121)
    assert not channel.connected
    assert not server.in_flight
    assert limited(server) == {"channel_timeout": 1}
    with pytest.raises(http.client.IncompleteRead):
        client.response()


@row("reads slowly")
def test_who_reads_slowly_is_closed(serve, connect):
    """A client that reads less than min_rate in channel_timeout is closed."""
    server = serve(threads=1, limits=Limits(min_rate=100_000))
    client = connect(server, receive_buffer=SMALL).send("/big")
    until(server, lambda: bool(reading(server)))
    [slow_one] = reading(server)
    look(server, -250)
    before = slow_one.flushed
    until(server, lambda: client.socket.recv(SMALL) and slow_one.flushed > before)
    look(server)
    assert not slow_one.connected
    assert limited(server) == {"min_rate": 1}
    assert others_are_served(server, connect)


def test_a_stream_with_little_to_say_is_not_slow(serve, connect, app):
    """A client that has read all of a slow stream is not slow."""
    server = serve(limits=Limits(min_rate=100_000))
    client = connect(server).send("/stream")
    app.entered(1)
    assert client.head()[0] == 200
    look(server, -250)
    look(server)
    app.released.set()
    assert client.file.read(24) == b"5\r\nfirst\r\n4\r\nlast\r\n0\r\n\r\n"


@pytest.fixture
def flooded(serve, connect):
    """A server whose two threads wait for clients that read nothing of an endless answer."""
    server = serve(threads=2, adjustments={"outbuf_high_watermark": WATERMARK})
    clients = []
    for _ in range(4):
        clients.append(connect(server, receive_buffer=SMALL).send("/flood"))
        until(server, lambda: len(waiting(server)) == len(clients))
    return server, clients


def waiting(server):
    """The connections for which threads wait."""
    return [each for each in server.loop.connections.channels() if each in server.loop.context.waiting]


@row("reads slowly what is larger than `server.outbuf_high_watermark`")
def test_a_thread_that_waits_for_its_client_has_no_place(flooded, connect):
    """With twice as many slow readers as threads, other clients are served."""
    server, _ = flooded
    assert (len(waiting(server)), server.loop.context.pool.busy) == (4, 0)
    assert all(each.total_outbufs_len < 2 * WATERMARK for each in waiting(server))
    assert server.loop.account.all_are_at() is None
    assert [(each.phase, each.thread) for each in server.requests()] == [("sending", "")] * 4
    assert others_are_served(server, connect)


@pytest.fixture
def board():
    board = Board.make()
    yield board
    board.close()


def test_the_board_tells_of_threads_that_wait_for_clients(monkeypatch, board, serve, connect):
    """While a worker's threads wait for clients, its board shows them as sending, and no place as taken."""
    noted, send = [], Board.send
    monkeypatch.setattr(
        Board, "send", lambda self, each, *, sending=True: [noted.append(sending), send(self, each, sending=sending)]
    )
    server = serve(threads=1, board=board, adjustments={"outbuf_high_watermark": WATERMARK})
    client = connect(server, receive_buffer=SMALL).send("/flood")
    until(server, lambda: bool(waiting(server)))
    assert [each.phase for each in board.in_flight()] == ["sending"]
    until(server, lambda: client.socket.recv(65536) and noted[:3] == [True, False, True])


def test_a_thread_goes_on_when_its_client_reads(flooded):
    """A thread writes on when its client reads, and waits again; no byte is lost."""
    server, clients = flooded
    client = clients[2]
    assert client.head()[0] == 200
    for _ in range(64):
        size = int(client.file.readline(), 16)
        assert client.file.read(size + 2) == b"x" * size + b"\r\n"
    until(server, lambda: len(waiting(server)) == 4)


def test_who_reads_nothing_of_a_large_answer_is_closed(flooded, connect, app):
    """When the client is closed, its thread notices that, and has a place of the server again."""
    server, _ = flooded
    look(server, 121)
    until(server, lambda: not waiting(server) and not server.in_flight)
    until(server, lambda: len(app_threads()) == 3)
    app.entered(4)
    until(server, lambda: server.loop.context.pool.busy == 0)
    for _ in range(2):
        connect(server).send("/gate")
    app.entered(2)


def test_of_too_many_slow_readers_the_slowest_is_closed(monkeypatch, flooded, connect):
    """If as many threads wait as are allowed, one more has the slowest client closed."""
    server, _ = flooded
    before = waiting(server)
    monkeypatch.setattr(slow, "MOST_WAITING", 4)
    monkeypatch.setattr(slow, "PATIENCE", 0.02)
    connect(server, receive_buffer=SMALL).send("/flood")
    until(server, lambda: not all(each.connected for each in before))
    assert limited(server) == {"outbuf_high_watermark": 1}
    until(server, lambda: len(waiting(server)) == 4)
    assert sum(each.connected for each in before) == 3
    assert others_are_served(server, connect)


class Reader:
    """A slow reader: how many bytes it has read, and whether its thread is to wait."""

    def __init__(self, waiting):
        self.flushed, self.backed_up, self.server = 0, True, self
        self.serving, self.context = SimpleNamespace(here=False), SimpleNamespace(board=None)
        self.outbuf_lock = threading.Condition()
        self.thread = threading.Thread(target=waiting.for_client, args=(self,), daemon=True)
        self.thread.start()

    def pull_trigger(self):
        pass

    def leave(self):
        self.backed_up = False
        with self.outbuf_lock:
            self.outbuf_lock.notify()
        self.thread.join()


@pytest.mark.parametrize(("rate", "closed"), [(float("inf"), [1]), (0.0, [])])
def test_who_reads_most_slowly_is_closed_if_it_is_slow(monkeypatch, rate, closed):
    """The client with the fewest bytes since its thread waits is closed; if none is slow, a fourth thread stays."""
    monkeypatch.setattr(slow, "MOST_WAITING", 3)
    monkeypatch.setattr(slow, "PATIENCE", 0.0)
    monkeypatch.setattr(slow, "SLOW", rate)
    left, closings = [], queue.SimpleQueue()
    pool = SimpleNamespace(without_place=lambda: contextlib.nullcontext(left.append(1)))
    waiting = slow.Waiting(pool)
    waiting.close = lambda reader, why: closings.put(reader)
    readers = []
    for moved in (500, 5, 5000):
        readers.append(Reader(waiting))
        patience.until(lambda: readers[-1] in waiting)
        readers[-1].flushed = moved
    readers.append(Reader(waiting))
    assert [closings.get(timeout=PATIENCE) for _ in closed] == [readers[each] for each in closed]
    readers[-1].leave()
    for each in readers:
        each.leave()
    assert len(left) == 3 + len(closed)
    assert closings.empty()
    assert not any(each in waiting for each in readers)


def test_progress_is_counted_in_each_length_of_time():
    """Enough bytes in each period, or all that there are, are not slow; a new request begins a new period."""
    progress, what, other = slow.Progress(), object(), object()

    def too_slow(now, moved, what=what, owed=0):
        return progress.too_slow(now, what, moved, owed=owed, timeout=10, least=100)

    assert [too_slow(0, 0), too_slow(9, 0), too_slow(10, 100), too_slow(19, 100)] == [False] * 4
    assert too_slow(20, 199)
    assert [too_slow(21, 0, other), too_slow(30, 0, other)] == [False] * 2
    assert too_slow(31, 0, other)
    assert [too_slow(40, 0, what, owed=5), too_slow(60, 5, what, owed=9), too_slow(69, 6, what, owed=9)] == [False] * 3
    assert too_slow(70, 6, what, owed=9)


def test_a_quick_reader_is_never_closed_for_others(monkeypatch, flooded, connect):
    """If all clients read quickly, none is closed, and the thread waits in its place."""
    server, _ = flooded
    monkeypatch.setattr(slow, "MOST_WAITING", 4)
    monkeypatch.setattr(slow, "PATIENCE", 0.02)
    monkeypatch.setattr(slow, "SLOW", -1)
    connect(server, receive_buffer=SMALL).send("/flood")
    until(server, lambda: server.loop.context.pool.busy == 1)
    assert others_are_served(server, connect)
    assert server.connections >= 5


# --- pipelines, and ends ----------------------------------------------------------------------------------------------


@row("pipelines requests")
def test_a_pipeline_is_read_as_it_is_answered(serve, connect, app):
    """Pipelined requests are not read while one runs; they have one thread at a time."""
    server = serve(threads=2)
    client = connect(server).send(get("/gate") + get("/hello") * 20_000)
    app.entered(1)
    [channel] = server.loop.connections.channels()
    assert len(channel.requests) < 8192 / len(get("/hello"))
    assert server.loop.context.pool.busy == 1
    assert others_are_served(server, connect)
    app.released.set()
    assert [client.response().status for _ in range(300)] == [200] * 300


def test_the_loop_waits_for_no_client(serve, connect):
    """The loop's own answer is written even if the output has reached the watermark."""
    server = serve(threads=1, adjustments={"outbuf_high_watermark": WATERMARK})
    server.answer_health("/up", lambda: ("200 OK", "ready"))
    connect(server, receive_buffer=SMALL).send(get("/file") + get("/up") * 20)
    until(server, lambda: bool(waiting(server)))
    [channel] = waiting(server)

    def health():
        channel.adj.outbuf_high_watermark = WATERMARK
        return "200 OK", "ready"

    server.answer_health("/up", health)
    channel.adj.outbuf_high_watermark = 2 * BIG  # its thread has finished with the file
    with channel.outbuf_lock:
        channel.outbuf_lock.notify()
    until(server, lambda: not waiting(server) and channel.adj.outbuf_high_watermark == WATERMARK)
    assert others_are_served(server, connect)


@row("closes its side behind its request")
def test_a_half_closed_client_has_its_answer(serve, connect):
    """A half-closed client gets its answer, also a late one; then the connection is closed."""
    server = serve(threads=1)
    client = connect(server).send("/big")
    client.socket.shutdown(socket.SHUT_WR)
    assert len(client.response().body) == 8 * 1024 * 1024
    assert client.ended()


@row("any of them, in a drain")
def test_a_drain_waits_for_slow_clients_no_longer_than_its_time(flooded, app, connect):
    """Slow heads, bodies and readers are cut at a drain's deadline."""
    server, _ = flooded
    connect(server).send(b"GET /hello HTTP/1.1\r\nHost: te")
    connect(server).send(post("/echo", b"12345")[:-2])
    until(server, lambda: len(arriving(server)) == 2)
    began = time.monotonic()
    report = server.drain(0.3)
    assert time.monotonic() - began < 1.3
    assert len(report.cut) == 6
    assert server.connections == 0
