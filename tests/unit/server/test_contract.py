"""What flaskd.server relies on in waitress; each test says what of flaskd depends on it."""

import inspect
import io
import logging
import socket
import threading
from collections import deque
from types import SimpleNamespace

import pytest
from patience import PATIENCE
from waitress import trigger, wasyncore
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer, ReadOnlyFileBasedBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.proxy_headers import PROXY_HEADERS, MalformedProxyHeader, parse_proxy_headers
from waitress.receiver import FixedStreamReceiver
from waitress.server import TcpWSGIServer, UnixWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import BadRequest, Error

from flaskd.config import ServerConfig
from flaskd.server import WaitressThread, adjustments

GET = b"GET /path?q=1 HTTP/1.1\r\nHost: test\r\n\r\n"


def hello(environ, start_response):
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]


class Server:
    """The part of a waitress server that a channel needs; tasks run when the test says so."""

    def __init__(self, application=hello):
        self.adj = Adjustments()
        self.application = application
        self.effective_port = 80
        self.server_name = "test"
        self.active_channels = {}
        self.tasks = []
        self.pulls = 0

    def add_task(self, task):
        self.tasks.append(task)

    def pull_trigger(self):
        self.pulls += 1


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def channel(pair):
    """A channel on one end of a socket pair; the client's end is `channel.client`."""
    client, theirs = pair
    made = HTTPChannel(Server(), theirs, ("192.0.2.7", 1), Adjustments(), map={})
    made.client = client
    yield made
    made.handle_close()


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def server(listener):
    """A server built as flaskd builds its acceptors, on a listener of flaskd."""
    made = acceptor(TcpWSGIServer, listener)
    yield made
    made.close()


def acceptor(kind, sock):
    adj, sockinfo = Adjustments(), (sock.family, sock.type, sock.proto, sock.getsockname())
    return kind(
        hello, {}, False, sock, dispatcher=ThreadedTaskDispatcher(), adj=adj, sockinfo=sockinfo, bind_socket=False
    )


def parsed(data):
    parser = HTTPRequestParser(Adjustments())
    assert parser.received(data) == len(data)
    return parser


# --- servers and the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TcpWSGIServer, UnixWSGIServer])
def test_the_servers_constructors(kind):
    """Acceptors get bound listeners: with these parameters, waitress neither binds nor starts anything."""
    parameters = inspect.signature(kind).bind(
        hello, {}, False, None, dispatcher=None, adj=None, sockinfo=None, bind_socket=False
    )
    names = ["application", "map", "_start", "_sock", "dispatcher", "adj", "sockinfo"]
    assert [name for name in parameters.arguments if name not in {"kw", "bind_socket"}] == names


def test_a_server_takes_the_listener_as_it_is(listener, server):
    """An acceptor uses the socket that it was given, and does nothing with it until it is told to accept."""
    assert server.socket is listener
    assert server.accepting is False
    assert not server.readable()
    server.accepting = True
    assert server.readable()
    assert (listener.getblocking(), server.active_channels) == (False, {})
    assert server._map == {listener.fileno(): server, server.trigger._fileno: server.trigger}


def test_handle_accept_accepts_one_and_never_raises(listener, server):
    """`handle_accept` accepts one connection as a `channel_class`, or none; calling it empties a backlog."""
    made = []
    server.channel_class = lambda *args, **more: made.append((args, more))
    server.handle_accept()
    assert made == []
    clients = [socket.create_connection(listener.getsockname()) for _ in range(2)]
    server.handle_accept()
    ((given, sock, address, adj), more) = made.pop()
    assert (given, adj, more) == (server, server.adj, {"map": server._map})
    assert address == clients[0].getsockname()
    sock.close()
    server.handle_accept()
    made.pop()[0][1].close()
    for client in clients:
        client.close()


def test_a_unix_client_has_no_port(tmp_path):
    """Clients of a Unix socket are shown as "unix", because their address has no port."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "s"))
        made = acceptor(UnixWSGIServer, sock)
        assert made.fix_addr("")[1] is None
        made.close()


def test_closing_the_dispatcher_closes_the_listener_only(listener, server):
    """`dispatcher.close` closes the listener and ends `accepting`; trigger and channels stay. A drain uses it."""
    server.accepting = True
    wasyncore.dispatcher.close(server)
    assert listener.fileno() == -1
    assert server.accepting is False
    assert server._map == {server.trigger._fileno: server.trigger}
    server.pull_trigger()


def test_set_socket_gives_a_closed_server_a_new_listener(listener, server):
    """`set_socket` registers a new listener in the map. A resume uses it."""
    wasyncore.dispatcher.close(server)
    with socket.create_server(("127.0.0.1", 0)) as another:
        another.setblocking(False)
        server.set_socket(another, server._map)
        server.accepting = True
        assert server._map[another.fileno()] is server
        assert server.readable()


def test_poll2_waits_in_seconds_and_is_woken_by_the_trigger(listener, server):
    """The loop waits in `poll2(seconds, map)`, and `pull_trigger` from another thread ends the wait."""
    wasyncore.poll2(0.0, server._map)
    wasyncore.poll2(0.001, server._map)
    waker = threading.Thread(target=server.pull_trigger)
    waker.start()
    wasyncore.poll2(PATIENCE, server._map)  # returns at once, not only after the timeout
    waker.join(PATIENCE)
    assert inspect.signature(wasyncore.poll2).parameters.keys() == {"timeout", "map"}


def test_poll2_takes_handles_above_1023():
    """`poll2` uses poll(2), not select(2), so only RLIMIT_NOFILE limits the connections."""
    assert "select.poll()" in inspect.getsource(wasyncore.poll2)


def test_close_all_closes_everything_in_the_map(listener, server):
    """`close_all` closes listeners, triggers and channels. A stop ends with it."""
    wasyncore.close_all(server._map)
    assert server._map == {}
    assert listener.fileno() == -1
    assert server.trigger._closed
    server.trigger.close()  # a second close does no harm


def test_the_trigger_may_be_pulled_without_a_thunk():
    """`pull_trigger` works without a thunk; with one it takes a lock that can deadlock in the loop's thread."""
    map_ = {}
    pulled = trigger.trigger(map_)
    pulled.pull_trigger()
    wasyncore.poll2(0, map_)
    pulled.close()
    assert map_ == {}


def test_the_connection_limit_counts_the_whole_map(server):
    """The limit is compared with the size of the whole map, so flaskd must add listeners and triggers."""
    server.accepting = True
    server.adj.connection_limit = len(server._map) + 1
    assert server.readable()
    server.adj.connection_limit = len(server._map)
    assert not server.readable()


def test_idle_connections_are_reaped_by_the_acceptor(server):
    """`maintenance` sets `will_close` on idle channels without requests, which keeps `channel_timeout`."""
    idle, busy = (SimpleNamespace(requests=requests, last_activity=0, will_close=False) for requests in ([], [1]))
    server.active_channels = {1: idle, 2: busy}
    server.maintenance(server.adj.channel_timeout + 1)
    assert (idle.will_close, busy.will_close) == (True, False)


def test_waitress_takes_every_setting():
    """Each setting that flaskd passes on has a name that waitress knows, and takes effect."""
    config = ServerConfig(url_prefix="/shop", url_scheme="https", ident="shop")
    settings = adjustments(config, 1000)
    made = Adjustments(threads=3, asyncore_use_poll=True, **settings)
    assert made.threads == 3
    assert {name: getattr(made, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("limit", "open_files", "expected"), [(None, 1000, 872), (100, 1000, 100), (5000, 1000, 872), (None, 64, 16)]
)
def test_connections_are_limited_by_open_files(limit, open_files, expected):
    """Some open files are kept for the rest of the daemon, whatever limit is configured."""
    config = ServerConfig(connection_limit=limit)
    assert adjustments(config, open_files)["connection_limit"] == expected


# --- the parser --------------------------------------------------------------------------------------------------------


class Scripted(HTTPRequestParser):
    """A parser that does what the test says, in the place of flaskd's own; waitress calls its `received` alone."""

    steps = ()

    def received(self, data):
        step, *self.steps = self.steps
        for name, value in step.items():
            setattr(self, name, value)
        return len(data)


def test_what_a_parser_starts_with(pair):
    """These are the initial values of a parser; flaskd's parser sets what it reads, and leaves the rest."""
    request = HTTPRequestParser(Adjustments())
    assert (request.completed, request.headers_finished, request.empty, request.error) == (False, False, False, None)
    assert (request.expect_continue, request.chunked, request.content_length, request.body_rcv) == (
        False,
        False,
        0,
        None,
    )
    assert (request.version, request.headers, request.header_bytes_received) == ("1.0", {}, 0)
    assert request.get_body_stream().read() == b""
    request.close()


def test_a_parser_is_asked_for_body_and_end():
    """The app reads the body from `body_rcv.getfile`, and `getbuf` is closed with the request."""
    request, buffer = HTTPRequestParser(Adjustments()), OverflowableBuffer(2)
    request.body_rcv = FixedStreamReceiver(5, buffer)
    assert request.body_rcv.received(b"123") == 3
    assert not request.body_rcv.completed
    assert request.body_rcv.received(b"45GET") == 2
    assert (request.body_rcv.completed, len(buffer)) == (True, 5)
    assert request.get_body_stream().read() == b"12345"
    body = buffer.getfile()
    request.close()
    assert body.closed


def test_small_bodies_stay_in_memory():
    """A buffer takes pieces of any size, and continues in a file when it is too long for memory."""
    buffer = OverflowableBuffer(10)
    for _ in range(3):
        buffer.append(b"xxxxx")
    assert (len(buffer), buffer.getfile().read()) == (15, b"x" * 15)
    buffer.close()


def test_a_refusal_is_an_error_with_its_own_status():
    """`Error` answers with the `code` and `reason` that it is given, for every status."""
    error = Error("why")
    error.code, error.reason = 505, "Sorry"
    status, headers, body = error.to_response("ident")
    assert (status, headers) == ("505 Sorry", [("Content-Type", "text/plain; charset=utf-8")])
    assert b"why" in body


def test_an_expectation_is_met_by_the_channel(channel):
    """If `expect_continue` is set on an unfinished request with a finished head, one 100 is sent."""
    channel.parser_class = Scripted
    Scripted.steps = [{"headers_finished": True, "expect_continue": True}, {"completed": True}]
    channel.received(b"head")
    assert channel.client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert (channel.requests, channel.request.expect_continue) == ([], False)
    channel.received(b"body")
    assert [each.completed for each in channel.requests] == [True]


def test_an_expectation_on_a_completed_request_would_be_met_all_the_same(channel):
    """A completed request would get a 100, and waitress would wait for its body, so flaskd clears the flag."""
    channel.parser_class = Scripted
    Scripted.steps = [{"headers_finished": True, "completed": True, "expect_continue": True}]
    channel.received(b"head")
    assert (channel.requests, channel.request.completed) == ([], False)


def test_a_refused_request_stands_in_line(channel):
    """A request that cannot be parsed is answered if it is completed, has an `error`, and takes all data."""
    channel.parser_class = Scripted
    Scripted.steps = [{"completed": True, "error": Error("why")}]
    channel.received(b"GARBAGE" + GET)
    assert [each.error.body for each in channel.requests] == ["why"]
    channel.service()
    assert channel.client.recv(1000).startswith(b"HTTP/1.0 500 ")
    assert channel.close_when_flushed


# --- tasks -------------------------------------------------------------------------------------------------------------


class Recording(SimpleNamespace):
    """The part of a channel that a task needs."""

    def __init__(self, application=hello):
        super().__init__(server=Server(application), adj=Adjustments(), addr=("192.0.2.7", 1), written=b"")

    def write_soon(self, data):
        self.written += data

    def check_client_disconnected(self):
        return False


@pytest.mark.parametrize("chunked", [True, False])
def test_a_task_may_build_its_own_header(chunked):
    """A task sends the header that flaskd's method builds, and keeps to its decision on chunks."""

    class Own(WSGITask):
        def build_response_header(self):
            assert (self.status, self.response_headers, self.content_length) == ("200 OK", [("X", "y")], None)
            assert self.start_time > 0
            self.chunked_response, self.close_on_finish = chunked, False
            return b"mine "

    def app(environ, start_response):
        start_response("200 OK", [("X", "y")])
        return iter([b"hello"])

    task = Own(Recording(app), parsed(GET))
    task.service()
    assert task.channel.written == (b"mine 5\r\nhello\r\n0\r\n\r\n" if chunked else b"mine hello")
    assert (task.wrote_header, task.close_on_finish) == (True, False)


def test_what_a_proxy_says_is_read_from_an_environ():
    """The client's address in the log comes from the same function as the app's REMOTE_ADDR."""
    request = parsed(GET[:-2] + b"X-Forwarded-For: 192.0.2.9\r\n\r\n")
    assert request.headers.keys() & PROXY_HEADERS == {"X_FORWARDED_FOR"}
    environ = {"REMOTE_ADDR": "", "wsgi.url_scheme": "http", "HTTP_X_FORWARDED_FOR": "192.0.2.9"}
    parse_proxy_headers(environ, 1, {"x-forwarded-for"}, logger=logging.getLogger())
    assert environ["REMOTE_ADDR"] == "192.0.2.9"
    with pytest.raises(MalformedProxyHeader):
        parse_proxy_headers(environ | {"HTTP_FORWARDED": "x"}, 1, {"forwarded"}, logger=logging.getLogger())


# --- the channel -------------------------------------------------------------------------------------------------------


def test_a_new_channel(channel):
    """These attributes tell whether a connection is idle; the server finds a channel by its descriptor."""
    assert (channel.requests, channel.request, channel.total_outbufs_len) == ([], None, 0)
    assert (channel.connected, channel.will_close, channel.close_when_flushed) == (True, False, False)
    assert channel.addr == ("192.0.2.7", 1)
    assert channel.server.active_channels == {channel.socket.fileno(): channel}


def test_received_requests_stand_in_line(channel):
    """`requests` has the complete requests, `request` the partial one, and one task at a time serves a channel."""
    channel.received(GET + GET + GET[:-9])
    assert [each.completed for each in channel.requests] == [True, True]
    assert not channel.request.completed
    assert channel.server.tasks == [channel]
    channel.service()
    assert len(channel.requests) == 1
    assert channel.server.tasks == [channel, channel]


def test_the_locks_can_be_taken_again(channel):
    """`outbuf_lock` can be taken again by the thread that holds it."""
    with channel.outbuf_lock, channel.outbuf_lock, channel.requests_lock:
        pass


def test_all_output_passes_through_send(channel):
    """Every byte of output goes through `send`, and `total_outbufs_len` is the number of those still to send."""
    sent = []
    original = channel.send
    channel.send = lambda data, do_close=True: sent.append(original(data, do_close=do_close)) or sent[-1]
    channel.received(GET)
    channel.service()
    header = len(channel.client.recv(65536))
    assert (channel.total_outbufs_len, sum(sent)) == (0, header)
    channel.write_soon(b"x" * 8_000_000)
    assert channel.total_outbufs_len > 0
    assert sum(sent) + channel.total_outbufs_len == header + 8_000_000
    before = sum(sent)
    channel.client.recv(1_000_000)
    channel.handle_write()
    assert sum(sent) > before
    assert sum(sent) + channel.total_outbufs_len == header + 8_000_000


def test_sending_to_nobody_takes_nothing(channel):
    """A `send` that fails returns 0, and leaves the close to the loop if it is told to."""
    channel.client.close()
    assert channel.send(b"x", do_close=False) == 0
    assert channel.connected
    assert not channel.send(b"x")
    assert not channel.connected


def test_what_is_sent_is_activity(channel):
    """`last_activity` is set whenever output could be sent; connections whose client stalls are found by it."""
    channel.last_activity = 0
    channel.write_soon(b"x")
    assert channel.last_activity > 0
    channel.write_soon(b"x" * 8_000_000)
    channel.last_activity = 0
    channel.handle_write()
    assert channel.last_activity == 0  # the kernel took no bytes


def test_tasks_are_added_under_the_requests_lock(channel):
    """Tasks are added under `requests_lock`, so it can be decided there which thread owns the connection."""
    held = []

    def add_task(_):
        thread = threading.Thread(target=lambda: held.append(not channel.requests_lock.acquire(blocking=False)))
        thread.start()
        thread.join()

    channel.server.add_task = add_task
    channel.received(GET + GET)
    assert held == [True]


def test_a_body_arrives_where_its_head_is_finished(channel):
    """A partial request says whether its head is finished: bodies are read in larger pieces than heads."""
    channel.received(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n")
    assert not channel.request.headers_finished
    channel.received(b"\r\n1234")
    assert channel.request.headers_finished
    channel.received(b"56789")
    assert channel.request is None


def test_will_close_and_close_when_flushed(channel):
    """`will_close` ends a connection at once, `close_when_flushed` after its output."""
    channel.write_soon(b"x" * 8_000_000)
    channel.close_when_flushed = True
    channel.handle_write()
    assert channel.connected
    while channel.total_outbufs_len:
        channel.client.recv(1_000_000)
        channel.handle_write()
    assert not channel.connected


def test_handle_close_empties_the_output(channel):
    """After `handle_close` nothing is connected, pending or registered, and a waiting thread goes on."""
    descriptor = channel.socket.fileno()
    channel.write_soon(b"x" * 8_000_000)
    channel.handle_close()
    assert (channel.connected, channel.total_outbufs_len, channel.server.active_channels) == (False, 0, {})
    assert descriptor not in channel._map
    channel.handle_close()


def test_nothing_is_read_while_a_request_is_in_line(channel):
    """Without lookahead, `readable` is False while requests are served, so no request is read and lost."""
    assert channel.readable()
    channel.received(GET)
    assert not channel.readable()
    assert channel.adj.channel_request_lookahead == 0


def test_a_hundred_continue_is_asked_for_once_the_headers_are_there(channel):
    """It is waitress that sends 100; flaskd only prevents it where no body follows."""
    channel.received(b"POST / HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert channel.client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert channel.request.headers_finished
    channel.received(b"12345")
    assert len(channel.requests) == 1


def test_a_body_is_kept_in_the_receivers_buffer():
    """A buffer of flaskd is put into the receiver once the head is parsed, before any byte of the body."""
    for head in (b"Content-Length: 5\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        request = HTTPRequestParser(Adjustments())
        request.received(b"POST / HTTP/1.1\r\nHost: test\r\n" + head)
        assert len(request.body_rcv.buf) == 0
        request.body_rcv.buf = buffer = OverflowableBuffer(10)
        request.received(b"hello" if request.content_length else b"5\r\nhello\r\n0\r\n\r\n")
        assert request.body_rcv.getbuf() is buffer
        assert request.get_body_stream().read() == b"hello"
        request.close()


def test_output_goes_into_the_last_buffer(channel):
    """Output goes into the last buffer; waitress begins another one at the watermark and after a file."""
    buffer = channel.outbufs[-1]
    channel.connected, channel._flush_some = True, lambda **_: True
    channel.write_soon(b"hello")
    assert (channel.outbufs, len(buffer), channel.current_outbuf_count) == ([buffer], 5, 5)
    channel.current_outbuf_count = channel.adj.outbuf_high_watermark
    channel.write_soon(b"hello")
    assert (len(channel.outbufs), channel.current_outbuf_count) == (2, 5)
    file = ReadOnlyFileBasedBuffer(io.BytesIO(b"hello"))
    file.prepare()
    channel.write_soon(file)
    assert (channel.outbufs[2], len(channel.outbufs), channel.current_outbuf_count) == (file, 4, 0)


def test_a_file_that_ended_early_is_sent_as_nothing(channel, monkeypatch):
    """For a file that ended early waitress calls `send` with no data, which never happens otherwise."""
    file = ReadOnlyFileBasedBuffer(io.BytesIO(b"hello"))
    file.prepare()
    file.file.truncate(0)
    sent = []
    monkeypatch.setattr(type(channel), "send", lambda _, data, **__: sent.append(data) or len(data))
    channel.outbufs, channel.total_outbufs_len = [file, *channel.outbufs], 5
    channel._flush_some()
    assert sent == [b""]


@pytest.mark.parametrize("running", [True, False])
def test_every_flush_goes_through_one_method(running, channel, monkeypatch):
    """All flushes go through `_flush_exception`; its second result ends a thread's wait."""
    flushed = []
    channel.requests = [parsed(GET)] if running else []
    channel.total_outbufs_len = 5
    monkeypatch.setattr(
        type(channel), "_flush_exception", lambda _, flush, do_close=True: flushed.append(flush) or (False, True)
    )
    channel.handle_write()
    assert flushed == [channel._flush_some_if_lockable if running else channel._flush_some]
    channel.total_outbufs_len = 0
    channel.write_soon(b"hello")
    assert flushed[1:] == [channel._flush_some]


def test_the_environ_is_waitress():
    """The environ has waitress' values, and flaskd's event for drains."""
    lines = (
        b"POST /a%20b?c=d HTTP/1.1\r\nHost: shop:80\r\nX-Two: 1\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n"
    )
    seen = []

    def app(environ, start_response):
        seen.append(environ | {"wsgi.input": environ["wsgi.input"].read()})
        return hello(environ, start_response)

    with WaitressThread(app, port=0) as ours, socket.create_connection(("127.0.0.1", ours.addresses[0].port)) as client:
        client.sendall(lines + b"\r\nbody")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")
        peer = client.getsockname()
    recording = Recording(app)
    recording.addr = peer
    recording.server.server_name, recording.server.effective_port = "127.0.0.1", ours.addresses[0].port
    request = parsed(lines + b"\r\n")
    request.received(b"body")
    WSGITask(recording, request).service()
    mine, theirs = seen
    differ = {"waitress.client_disconnected", "flaskd.draining"}
    assert {key: mine[key] for key in mine.keys() - differ} == {key: theirs[key] for key in theirs.keys() - differ}
    assert callable(mine["waitress.client_disconnected"])
    assert isinstance(mine["flaskd.draining"], threading.Event)
