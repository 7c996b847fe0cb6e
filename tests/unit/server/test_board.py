"""The board: what a worker writes and its supervisor reads, while the worker writes and after its death."""

import fcntl
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import patience
import pytest
from server_kit import PATIENCE, answers, app, connect, draining, get, no_thread_left, post, serve, until

import flaskd
from flaskd.errors import FlaskdError
from flaskd.server import Histogram, Tally
from flaskd.server.board import ROWS, Board
from flaskd.server.request import Request
from flaskd.server.request_ids import read_ids

pytestmark = [
    pytest.mark.usefixtures("no_thread_left"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="workers need memfds"),
]
KILLS = 1000 if os.environ.get("FLASKD_LONG") else 60


@pytest.fixture
def board():
    board = Board.make()
    yield board
    board.close()


@pytest.fixture
def read(board):
    """The same board as another process sees it."""
    other = Board.attach(os.dup(board.fd))
    yield other
    other.close()


@pytest.fixture
def server(board, serve):
    return serve(board=board, threads=2)


class Channel:
    """The part of a connection that a request uses."""

    internal = False
    client = "127.0.0.1"
    flushed = 0

    def client_told_by(self, headers):
        return ""

    def ids_told_by(self, headers):
        return read_ids(headers)


def request(number, path="/"):
    made = Request(Channel(), None)
    made.id, made.command, made.request_uri, made.headers_finished = number, "GET", path, True
    made.first_byte = made.complete = time.monotonic()
    return made


def shown(entries):
    return [(each.id, each.method, each.path, each.phase, each.thread, each.client) for each in entries]


# --- what a server notes ----------------------------------------------------------------------------------------------


def test_a_request_in_flight_is_on_it(server, board, read, app, connect):
    """The board shows the same as the worker itself, with the thread; after the answer the request is gone from it."""
    client = connect(server).send("/gate/one?secret=1")
    app.entered(1)
    [there], [here] = read.in_flight(), server.requests()
    assert shown([there]) == shown([here])
    assert (there.path, there.phase, there.client) == ("/gate/one", "running", "127.0.0.1")
    assert there.thread.startswith("flaskd-thread-")
    assert 0 < there.age <= here.age + 1
    app.released.set()
    assert client.response().status == 200
    until(server, lambda: not server.in_flight)
    assert read.in_flight() == []


def test_who_waits_is_queued_and_the_oldest_comes_first(server, read, app, connect):
    """Running and waiting requests are counted, and no longer when they are over; the oldest comes first."""
    clients = [connect(server).send(f"/gate/{number}") for number in range(2)]
    app.entered(2)
    clients += [connect(server).send(f"/gate/{number}") for number in (2, 3)]
    until(server, lambda: server.queued == 2)
    entries = read.in_flight()
    assert [each.phase for each in entries] == ["running", "running", "queued", "queued"]
    assert [each.id for each in entries] == sorted(each.id for each in entries)
    assert [each.thread for each in entries[2:]] == ["", ""]
    assert (read.queued, read.busy, read.connections) == (2, 2, 4)
    app.released.set()
    for client in clients:
        assert client.response().status == 200
    until(server, lambda: not server.in_flight)
    patience.until(lambda: (read.queued, read.busy) == (0, 0))


def test_an_answer_that_waits_to_be_sent_is_sending(server, read, connect):
    """After the app has finished, the request is shown as sending, without a thread."""
    client = connect(server, receive_buffer=4096).send("/big")
    until(server, lambda: [each.phase for each in read.in_flight()] == ["sending"])
    assert read.in_flight()[0].thread == ""
    assert client.response().status == 200
    until(server, lambda: not read.in_flight())


def test_the_tally_is_the_same(server, read, app, connect):
    """The board's tally has the worker's outcomes, statuses and histograms, at any moment."""
    client = connect(server)
    for path in ("/hello", "/chunks", "/boom"):
        client = client if client.ask(path).status == 200 else connect(server)
    left = connect(server).send("/late")
    until(server, lambda: "/late" in app.entered(1))
    left.reset()
    app.released.set()
    until(server, lambda: not server.in_flight)
    with draining(server, app):
        pass
    assert read.tally() == server.tally()
    assert sum(read.tally().outcomes.values()) == 4
    assert sum(read.tally().took.counts) == 4
    assert read.tally().statuses[5] == 1
    assert read.tally().took.total > 0


def test_connections_are_counted(server, read, connect):
    """Connections are counted when they are accepted and closed; those of probes are not."""
    clients = [connect(server) for _ in range(3)]
    until(server, lambda: read.connections == 3)
    assert server.probe("/hello", PATIENCE) == 200
    assert read.connections == 3
    for client in clients:
        client.close()
    until(server, lambda: read.connections == 0)


def test_the_loop_notes_when_it_turned(server, read):
    """The board has the time.monotonic() moment of the loop's last turn."""
    before = time.monotonic()
    assert server.turns(PATIENCE)
    until(server, lambda: before < read.last_turn <= time.monotonic())


def test_what_moved_and_what_hangs_is_looked_at_every_second(server, read, app, connect):
    """`moved` changes when a request begins or ends; `all_are_at` stays the same while all threads hang."""
    assert read.all_are_at() is None
    before = read.moved()
    clients = [connect(server).send("/gate") for _ in range(2)]
    app.entered(2)
    at = patience.until(read.all_are_at)
    held = patience.until(lambda: read.moved() != before and read.moved())
    last = read.last_turn
    patience.until(lambda: read.last_turn > last + 2.0)
    assert (read.all_are_at(), read.moved()) == (at, held)
    app.released.set()
    assert [each.response().status for each in clients] == [200, 200]
    patience.until(lambda: read.all_are_at() is None and read.moved() != held)


def test_a_stream_that_sends_moves(server, read, connect):
    """`moved` changes with each byte of a stream that is sent, and a thread that serves a stream does not hang."""
    client = connect(server).send("/flood")
    client.head()
    before = read.moved()
    patience.until(lambda: client.file.read1(1 << 20) and read.moved() != before)


def test_work_in_the_background_is_counted(server, read):
    """Background work is counted when the loop looks, every second."""
    with flaskd.background("one"), flaskd.background("two"):
        patience.until(lambda: read.background == 2)
    patience.until(lambda: read.background == 0)


def test_probes_are_not_on_it(server, read, app):
    """Probes are in no count of the board."""
    asked = threading.Thread(target=server.probe, args=("/gate", PATIENCE))
    asked.start()
    app.entered(1)
    assert read.in_flight() == []
    app.released.set()
    asked.join()


# --- rows -------------------------------------------------------------------------------------------------------------


def test_without_a_free_row_a_request_is_counted(board, read):
    """A request without a row is only counted; the next one gets a row once one is free."""
    requests = [request(number) for number in range(1, ROWS + 3)]
    for each in requests:
        board.enter(each)
        board.begin(each)
        board.send(each)
    assert (len(read.in_flight()), read.unnamed) == (ROWS, 2)
    assert [each.id for each in read.in_flight()] == [*range(1, ROWS + 1)]
    board.leave(requests[-1])
    board.leave(requests[0])
    assert (len(read.in_flight()), read.unnamed) == (ROWS - 1, 1)
    board.enter(last := request(9999))
    assert (last.row > 0, read.in_flight()[-1].id, read.unnamed) == (True, 9999, 1)


def test_a_request_that_is_over_changes_no_row(board, read):
    """A request that is over does not change its old row, which may belong to another request."""
    first, second = request(1, "/first"), request(2, "/second")
    board.enter(first)
    board.leave(first)
    board.enter(second)
    first.thread, first.began = threading.current_thread(), time.monotonic()
    board.begin(first)
    board.send(first)
    assert shown(read.in_flight()) == [(2, "GET", "/second", "queued", "", "127.0.0.1")]


def test_a_row_that_changes_hands_while_it_is_read_is_read_again(board, read, monkeypatch):
    """A row that changes while it is read is read again, so that all shown values belong to one request."""
    first, second = request(1, "/first"), request(2, "/second")
    board.enter(first)

    class Memory:
        """Memory that changes while it is read for the first time."""

        def __init__(self, memory):
            self.memory, self.changes = memory, [lambda: board.leave(first), lambda: board.enter(second)]

        def __getitem__(self, place):
            while self.changes:
                self.changes.pop(0)()
            return self.memory[place]

    with monkeypatch.context() as patch:
        patch.setattr(read, "_map", Memory(read._map))  # noqa: SLF001 - where it reads
        assert [(each.id, each.path) for each in read.in_flight()] == [(2, "/second")]


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/%1b" + "x" * 1000, "/%1b" + "x" * 196 + "..."), ("/\x1b[31m\xff\n2", "/%1B[31m%FF%0A2"), ("", "?")],
)
def test_a_path_is_short_and_can_be_seen(board, read, path, expected):
    """A path on the board is short and printable, whatever the client sent."""
    board.enter(request(1, path))
    assert [each.path for each in read.in_flight()] == [expected]


def test_a_method_without_end_leaves_room_for_other_rows(board, read):
    """A very long method is cut to its row's size, together with what follows it in the row."""
    board.enter(long := request(1))
    board.leave(long)
    long.command = "M" * 5000
    board.enter(long)
    board.enter(request(2, "/next"))
    first, second = read.in_flight()
    assert (set(first.method), len(first.method) < 256, first.path) == ({"M"}, True, "?")
    assert second.path == "/next"


# --- the memory -------------------------------------------------------------------------------------------------------


def test_a_child_gets_the_descriptor_only_where_it_is_passed(board):
    """The descriptor is close-on-exec, and stays so in the process that attached to it."""
    assert not os.get_inheritable(board.fd)
    copy = os.dup(board.fd)
    os.set_inheritable(copy, True)
    other = Board.attach(copy)
    assert not os.get_inheritable(other.fd)
    other.close()


def test_its_size_cannot_be_changed(board):
    """The memory cannot be resized: otherwise a worker's app could end the supervisor (SIGBUS)."""
    with pytest.raises(PermissionError):
        os.ftruncate(board.fd, 0)


@pytest.mark.parametrize("size", [0, 4096, 672_256])
def test_another_layout_is_refused(size):
    """A board with another layout is refused, with advice."""
    fd = os.memfd_create("other")
    os.ftruncate(fd, size)
    with pytest.raises(FlaskdError, match=r"cannot use the board .* another version; restart flaskd"):
        Board.attach(fd)
    os.close(fd)


def test_closing_it_twice_closes_it_once(board):
    """A second close does nothing: by then the descriptor's number may belong to another file."""
    other = Board.attach(os.dup(board.fd))
    other.close()
    again = os.dup(board.fd)
    other.close()
    assert fcntl.fcntl(again, fcntl.F_GETFD) >= 0
    os.close(again)


def test_tallies_add_up():
    """Tallies of two living workers and a dead one can be added."""
    some = Tally({"completed": 7, "rejected": 1, "cut": 2, "gone": 3}, [1, 0, 5, 1, 1, 1], Histogram([1] * 14, 2.5))
    both = some + some + Tally()
    assert both.outcomes == {"completed": 14, "rejected": 2, "cut": 4, "gone": 6}
    assert (both.statuses, both.took, both.waited) == ([2, 0, 10, 2, 2, 2], Histogram([2] * 14, 5.0), Histogram())


def test_what_requests_are_called_is_on_it(board, read):
    """The board has X-Request-ID and traceparent of the greatest length; a reused row does not show old ones."""
    names = {"HTTP_X_REQUEST_ID": "x" * 128, "HTTP_TRACEPARENT": f"00-{'a' * 32}-{'b' * 16}-01"}
    for headers in (names, {}, {"HTTP_TRACEPARENT": names["HTTP_TRACEPARENT"]}, {"HTTP_X_REQUEST_ID": "abc"}):
        made = request(1)
        made.headers = headers
        board.enter(made)
        [shown] = read.in_flight()
        assert shown.request_id == headers.get("HTTP_X_REQUEST_ID", "")
        assert shown.traceparent == headers.get("HTTP_TRACEPARENT", "")
        board.leave(made)


# --- a worker that is killed ------------------------------------------------------------------------------------------

WRITERS = """
import os, sys, threading, time
from flaskd.server.board import Board
from flaskd.server.request import Request

class Channel:
    internal = False
    client = "127.0.0.1"
    def client_told_by(self, headers):
        return ""

def write(board):
    held, number = [], 0
    while True:
        number += 1
        each = Request(Channel(), None)
        each.id, each.command, each.headers_finished = number, "GET", True
        each.request_uri = f"/{number}/" + chr(97 + number % 26) * (number % 190)
        each.first_byte = each.complete = time.monotonic()
        board.enter(each)
        each.thread, each.began = threading.current_thread(), each.first_byte
        board.begin(each)
        held.append(each)
        if len(held) > 3:
            over = held.pop(number % 4)
            over.status = "200 OK"
            board.counts.add(over, "completed", time.monotonic())
            board.leave(over)

for fd in map(int, sys.argv[1:]):
    if not sys.stdin.readline():
        break
    pid = os.fork()
    if not pid:
        write(Board.attach(fd))
    print(pid, flush=True)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_killed_writer_leaves_no_torn_row_and_no_count_falls():
    """A reader of a board never sees a torn row, while it is written and after the writer was killed."""
    boards, seen = [Board.make() for _ in range(KILLS)], 0
    fds = [board.fd for board in boards]
    argv = [sys.executable, "-c", WRITERS, *map(str, fds)]
    with subprocess.Popen(argv, pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as writers:
        for board in boards:
            writers.stdin.write(b"next\n")
            pid, before, after_some = int(writers.stdout.readline()), Tally(), time.monotonic() + 0.02
            try:
                while time.monotonic() < after_some or not before.outcomes["completed"]:
                    before, rows = _read(board, before)
                    seen += rows
            finally:
                os.kill(pid, signal.SIGKILL)
            assert int(writers.stdout.readline()) == signal.SIGKILL
            after, rows = _read(board, before)
            assert 2 <= rows <= 4  # there may be one request more than three, and one in the making
            assert _read(board, after) == (after, rows)
            board.close()
    assert seen > KILLS


def _read(board, before):
    """Check all figures of a board; returns its tally and its number of rows."""
    now = board.tally()
    assert now.outcomes["completed"] >= before.outcomes["completed"]
    assert all(count >= then for count, then in zip(now.took.counts, before.took.counts, strict=True))
    entries = board.in_flight()
    for each in entries:
        letter = chr(97 + each.id % 26)
        assert each.path == f"/{each.id}/" + letter * (each.id % 190)
        assert (each.method, each.client) == ("GET", "127.0.0.1")
        assert each.phase == "queued" or each.thread == "MainThread"
    return now, len(entries)
