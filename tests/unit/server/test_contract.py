"""What flaskd.server takes for granted in waitress; each test says what of flaskd breaks with it."""

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
    """As much of a waitress server as a channel needs; tasks run when the test says so."""

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
    """A server built as flaskd builds its acceptors, on a listener of ours."""
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
    """Acceptors are built on listeners of our own: these parameters make waitress neither bind nor start anything."""
    parameters = inspect.signature(kind).bind(
        hello, {}, False, None, dispatcher=None, adj=None, sockinfo=None, bind_socket=False
    )
    names = ["application", "map", "_start", "_sock", "dispatcher", "adj", "sockinfo"]
    assert [name for name in parameters.arguments if name not in {"kw", "bind_socket"}] == names


def test_a_server_takes_the_listener_as_it_is(listener, server):
    """An acceptor serves the very socket it was given, and does nothing with it until it is told to accept."""
    assert server.socket is listener
    assert server.accepting is False
    assert not server.readable()
    server.accepting = True
    assert server.readable()
    assert (listener.getblocking(), server.active_channels) == (False, {})
    assert server._map == {listener.fileno(): server, server.trigger._fileno: server.trigger}


def test_handle_accept_accepts_one_and_never_raises(listener, server):
    """A backlog is emptied by calling `handle_accept` until nothing comes: it takes one, with `channel_class`, or none."""
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
    """Clients of a Unix socket are shown as "unix": their address must come without a port."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "s"))
        made = acceptor(UnixWSGIServer, sock)
        assert made.fix_addr("")[1] is None
        made.close()


def test_closing_the_dispatcher_closes_the_listener_only(listener, server):
    """A drain closes listeners with `dispatcher.close`: the trigger and the channels must stay, `accepting` must end."""
    server.accepting = True
    wasyncore.dispatcher.close(server)
    assert listener.fileno() == -1
    assert server.accepting is False
    assert server._map == {server.trigger._fileno: server.trigger}
    server.pull_trigger()


def test_set_socket_gives_a_closed_server_a_new_listener(listener, server):
    """A resume puts a new listener into the old acceptor: `set_socket` must register it in the map."""
    wasyncore.dispatcher.close(server)
    with socket.create_server(("127.0.0.1", 0)) as another:
        another.setblocking(False)
        server.set_socket(another, server._map)
        server.accepting = True
        assert server._map[another.fileno()] is server
        assert server.readable()


def test_poll2_waits_in_seconds_and_is_woken_by_the_trigger(listener, server):
    """The loop sleeps in `poll2(seconds, map)` and every other thread wakes it with `pull_trigger`."""
    wasyncore.poll2(0.0, server._map)
    wasyncore.poll2(0.001, server._map)
    waker = threading.Thread(target=server.pull_trigger)
    waker.start()
    wasyncore.poll2(PATIENCE, server._map)  # returns at once, and not only after its patience
    waker.join(PATIENCE)
    assert inspect.signature(wasyncore.poll2).parameters.keys() == {"timeout", "map"}


def test_poll2_takes_handles_above_1023():
    """Connections are limited by RLIMIT_NOFILE alone: `poll2` must be the one that polls, not the one that selects."""
    assert "select.poll()" in inspect.getsource(wasyncore.poll2)


def test_close_all_closes_everything_in_the_map(listener, server):
    """A stop ends with `close_all`, which must reach listeners, triggers and channels."""
    wasyncore.close_all(server._map)
    assert server._map == {}
    assert listener.fileno() == -1
    assert server.trigger._closed
    server.trigger.close()  # a second close does no harm


def test_the_trigger_may_be_pulled_without_a_thunk():
    """Waking is all that is asked of a trigger: with a thunk it takes a lock that deadlocks in the loop's thread."""
    map_ = {}
    pulled = trigger.trigger(map_)
    pulled.pull_trigger()
    wasyncore.poll2(0, map_)
    pulled.close()
    assert map_ == {}


def test_the_connection_limit_counts_the_whole_map(server):
    """The limit is raised by the triggers and listeners: it must be compared with the size of the map."""
    server.accepting = True
    server.adj.connection_limit = len(server._map) + 1
    assert server.readable()
    server.adj.connection_limit = len(server._map)
    assert not server.readable()


def test_idle_connections_are_reaped_by_the_acceptor(server):
    """`channel_timeout` is kept by `maintenance`, which marks channels with `will_close` unless they have requests."""
    idle, busy = (SimpleNamespace(requests=requests, last_activity=0, will_close=False) for requests in ([], [1]))
    server.active_channels = {1: idle, 2: busy}
    server.maintenance(server.adj.channel_timeout + 1)
    assert (idle.will_close, busy.will_close) == (True, False)


def test_waitress_takes_every_setting():
    """Each setting that flaskd passes on must have a name that waitress knows, and arrive."""
    config = ServerConfig(url_prefix="/shop", url_scheme="https", ident="shop")
    settings = adjustments(config, 1000)
    made = Adjustments(threads=3, asyncore_use_poll=True, **settings)
    assert made.threads == 3
    assert {name: getattr(made, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("limit", "open_files", "expected"), [(None, 1000, 872), (100, 1000, 100), (5000, 1000, 872), (None, 64, 16)]
)
def test_connections_are_limited_by_open_files(limit, open_files, expected):
    """Whatever is asked for, some open files are kept for the rest of the daemon."""
    config = ServerConfig(connection_limit=limit)
    assert adjustments(config, open_files)["connection_limit"] == expected


# --- the parser --------------------------------------------------------------------------------------------------------


class Scripted(HTTPRequestParser):
    """A parser that says what the test wants, as flaskd's own does: its `received` is the only one that is called."""

    steps = ()

    def received(self, data):
        step, *self.steps = self.steps
        for name, value in step.items():
            setattr(self, name, value)
        return len(data)


def test_what_a_parser_starts_with(pair):
    """Flaskd's parser sets what it has read, and leaves the rest as it is here."""
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
    """The body is what `body_rcv` has: `getfile` is read by the app, and `getbuf` closed with the request."""
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
    """A buffer takes pieces one by one, of any size, and overflows into a file."""
    buffer = OverflowableBuffer(10)
    for _ in range(3):
        buffer.append(b"xxxxx")
    assert (len(buffer), buffer.getfile().read()) == (15, b"x" * 15)
    buffer.close()


def test_a_refusal_is_an_error_with_its_own_status():
    """Every status can be refused with: `Error` answers with the `code` and `reason` that it is given."""
    error = Error("why")
    error.code, error.reason = 505, "Sorry"
    status, headers, body = error.to_response("ident")
    assert (status, headers) == ("505 Sorry", [("Content-Type", "text/plain; charset=utf-8")])
    assert b"why" in body


def test_an_expectation_is_met_by_the_channel(channel):
    """Who sets `expect_continue` on a finished head, and is not completed, gets one 100; then the body is read on."""
    channel.parser_class = Scripted
    Scripted.steps = [{"headers_finished": True, "expect_continue": True}, {"completed": True}]
    channel.received(b"head")
    assert channel.client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert (channel.requests, channel.request.expect_continue) == ([], False)
    channel.received(b"body")
    assert [each.completed for each in channel.requests] == [True]


def test_an_expectation_on_a_completed_request_would_be_met_all_the_same(channel):
    """Why flaskd clears `expect_continue` on a request that is completed: waitress would wait for ever for its body."""
    channel.parser_class = Scripted
    Scripted.steps = [{"headers_finished": True, "completed": True, "expect_continue": True}]
    channel.received(b"head")
    assert (channel.requests, channel.request.completed) == ([], False)


def test_a_refused_request_stands_in_line(channel):
    """What cannot be parsed is answered all the same: it must be completed, with its `error`, and takes all data."""
    channel.parser_class = Scripted
    Scripted.steps = [{"completed": True, "error": Error("why")}]
    channel.received(b"GARBAGE" + GET)
    assert [each.error.body for each in channel.requests] == ["why"]
    channel.service()
    assert channel.client.recv(1000).startswith(b"HTTP/1.0 500 ")
    assert channel.close_when_flushed


# --- tasks -------------------------------------------------------------------------------------------------------------


class Recording(SimpleNamespace):
    """As much of a channel as a task needs."""

    def __init__(self, application=hello):
        super().__init__(server=Server(application), adj=Adjustments(), addr=("192.0.2.7", 1), written=b"")

    def write_soon(self, data):
        self.written += data

    def check_client_disconnected(self):
        return False


@pytest.mark.parametrize("chunked", [True, False])
def test_a_task_may_build_its_own_header(chunked):
    """Where an answer ends is told by flaskd's own: it is sent as it is, and its decisions hold to the last chunk."""

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
    """The client's address for the log comes from the same function as the app's REMOTE_ADDR."""
    request = parsed(GET[:-2] + b"X-Forwarded-For: 192.0.2.9\r\n\r\n")
    assert request.headers.keys() & PROXY_HEADERS == {"X_FORWARDED_FOR"}
    environ = {"REMOTE_ADDR": "", "wsgi.url_scheme": "http", "HTTP_X_FORWARDED_FOR": "192.0.2.9"}
    parse_proxy_headers(environ, 1, {"x-forwarded-for"}, logger=logging.getLogger())
    assert environ["REMOTE_ADDR"] == "192.0.2.9"
    with pytest.raises(MalformedProxyHeader):
        parse_proxy_headers(environ | {"HTTP_FORWARDED": "x"}, 1, {"forwarded"}, logger=logging.getLogger())


# --- the channel -------------------------------------------------------------------------------------------------------


def test_a_new_channel(channel):
    """Whether a connection is idle is read from these attributes; the server knows it by its descriptor."""
    assert (channel.requests, channel.request, channel.total_outbufs_len) == ([], None, 0)
    assert (channel.connected, channel.will_close, channel.close_when_flushed) == (True, False, False)
    assert channel.addr == ("192.0.2.7", 1)
    assert channel.server.active_channels == {channel.socket.fileno(): channel}


def test_received_requests_stand_in_line(channel):
    """Complete requests are in `requests`, the partial one in `request`, and one task at a time serves a channel."""
    channel.received(GET + GET + GET[:-9])
    assert [each.completed for each in channel.requests] == [True, True]
    assert not channel.request.completed
    assert channel.server.tasks == [channel]
    channel.service()
    assert len(channel.requests) == 1
    assert channel.server.tasks == [channel, channel]


def test_the_locks_can_be_taken_again(channel):
    """Output is measured and settled under `outbuf_lock`, which its owner must be able to take again."""
    with channel.outbuf_lock, channel.outbuf_lock, channel.requests_lock:
        pass


def test_all_output_passes_through_send(channel):
    """What the kernel took is counted in `send`: every byte must go that way, and `total_outbufs_len` tell the rest."""
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
    """A send that fails counts for nothing: it must give 0, and leave the close to the loop when asked."""
    channel.client.close()
    assert channel.send(b"x", do_close=False) == 0
    assert channel.connected
    assert not channel.send(b"x")
    assert not channel.connected


def test_what_is_sent_is_activity(channel):
    """Connections whose client stalls are told by `last_activity`, which must be set whenever something could be sent."""
    channel.last_activity = 0
    channel.write_soon(b"x")
    assert channel.last_activity > 0
    channel.write_soon(b"x" * 8_000_000)
    channel.last_activity = 0
    channel.handle_write()
    assert channel.last_activity == 0  # the kernel took nothing


def test_tasks_are_added_under_the_requests_lock(channel):
    """Who has the connection is decided there, in one step with what stands in line."""
    held = []

    def add_task(_):
        thread = threading.Thread(target=lambda: held.append(not channel.requests_lock.acquire(blocking=False)))
        thread.start()
        thread.join()

    channel.server.add_task = add_task
    channel.received(GET + GET)
    assert held == [True]


def test_a_body_arrives_where_its_head_is_finished(channel):
    """Bodies are read in larger bites than heads: a request in part must say which of both it is in."""
    channel.received(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n")
    assert not channel.request.headers_finished
    channel.received(b"\r\n1234")
    assert channel.request.headers_finished
    channel.received(b"56789")
    assert channel.request is None


def test_will_close_and_close_when_flushed(channel):
    """A drain ends idle connections with `will_close`; a failed one is flushed first with `close_when_flushed`."""
    channel.write_soon(b"x" * 8_000_000)
    channel.close_when_flushed = True
    channel.handle_write()
    assert channel.connected
    while channel.total_outbufs_len:
        channel.client.recv(1_000_000)
        channel.handle_write()
    assert not channel.connected


def test_handle_close_empties_the_output(channel):
    """A close is final: nothing is connected, pending or registered, and a blocked worker is let go."""
    descriptor = channel.socket.fileno()
    channel.write_soon(b"x" * 8_000_000)
    channel.handle_close()
    assert (channel.connected, channel.total_outbufs_len, channel.server.active_channels) == (False, 0, {})
    assert descriptor not in channel._map
    channel.handle_close()


def test_nothing_is_read_while_a_request_is_in_line(channel):
    """Requests do not come while others are served: without lookahead `readable` must say no, so that none is lost."""
    assert channel.readable()
    channel.received(GET)
    assert not channel.readable()
    assert channel.adj.channel_request_lookahead == 0


def test_a_hundred_continue_is_asked_for_once_the_headers_are_there(channel):
    """An expectation is met by waitress itself, and flaskd only keeps it from being met without a body."""
    channel.received(b"POST / HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert channel.client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert channel.request.headers_finished
    channel.received(b"12345")
    assert len(channel.requests) == 1


def test_a_body_is_kept_in_the_receivers_buffer():
    """One of flaskd's own is put there once the head is parsed, when nothing of the body has come."""
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
    """One of flaskd's own is put there; waitress begins another at the high watermark, and behind a file."""
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
    """By an empty `send`, which never happens otherwise, flaskd knows it."""
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
    """`_flush_exception` is where flaskd learns what cannot be sent; its second result ends a worker's wait."""
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
    """Apps find what waitress gives them, value by value, and beside it what tells them of a drain."""
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
