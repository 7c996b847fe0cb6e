"""What flaskd.server takes for granted in waitress; each test says what of flaskd breaks with it."""

import inspect
import io
import logging
import socket
import threading
from collections import deque
from types import SimpleNamespace

import pytest
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
from flaskd.server import adjustments
from flaskd.server.threads import ThreadPool

PATIENCE = 10.0
"""Seconds until a test gives up on something that should long have happened."""
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


class Task:
    """A dispatcher's task that says where it ran."""

    def __init__(self, error=None):
        self.ran = threading.Event()
        self.error = error

    def service(self):
        self.thread = threading.current_thread()
        self.ran.set()
        if self.error:
            raise self.error

    def cancel(self):
        pass


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


@pytest.fixture
def dispatcher():
    made = ThreadedTaskDispatcher()
    yield made
    made.shutdown(timeout=PATIENCE)


def parsed(data):
    parser = HTTPRequestParser(Adjustments())
    assert parser.received(data) == len(data)
    return parser


# --- the dispatcher ----------------------------------------------------------------------------------------------------


def test_the_dispatchers_queue(dispatcher):
    """`queued` counts what waits for a thread: `queue` must be what `add_task` fills."""
    assert isinstance(dispatcher.queue, deque)
    assert inspect.signature(dispatcher.add_task).bind("a task")
    dispatcher.set_thread_count(0)
    dispatcher.add_task(Task())
    assert len(dispatcher.queue) == 1


def test_threads_that_have_only_been_started_are_free(caplog):
    """The first request of a life is no reason to warn; one for which no thread is left is."""
    may_go_on = threading.Event()

    class Late(ThreadPool):
        def handler_thread(self, thread_no):
            may_go_on.wait(PATIENCE)
            super().handler_thread(thread_no)

    pool = Late(2)
    pool.resize(2)
    tasks = [Task(), Task(), Task()]
    for task in tasks[:2]:
        pool.add_task(task)
    assert caplog.messages == []
    pool.add_task(tasks[2])
    assert caplog.messages == ["Task queue depth is 1"]
    may_go_on.set()
    for task in tasks:
        assert task.ran.wait(PATIENCE)
    assert pool.join(PATIENCE) == []
    assert pool.queue_cv.not_there_yet == set()


def test_threads_come_from_start_new_thread(monkeypatch):
    """Workers are joined at a stop: every thread must come from `start_new_thread(target, thread_no)`, target(thread_no)."""
    started = []

    class ThreadPool(ThreadedTaskDispatcher):
        def start_new_thread(self, target, thread_no):
            started.append(threading.Thread(target=target, args=(thread_no,), daemon=True))
            started[-1].start()

    pool = ThreadPool()
    pool.set_thread_count(2)
    task = Task()
    pool.add_task(task)
    assert task.ran.wait(PATIENCE)
    assert task.thread in started
    pool.set_thread_count(3)
    assert len(started) == 3
    pool.set_thread_count(0)
    for thread in started:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_the_dispatcher_knows_its_busy_threads(dispatcher):
    """By their number, which is that of all threads when nobody waits for a task."""
    started, finish = threading.Barrier(3), threading.Event()

    class Held(Task):
        def service(self):
            started.wait(PATIENCE)
            finish.wait(PATIENCE)
            super().service()

    dispatcher.set_thread_count(2)
    tasks = [Held(), Held()]
    for task in tasks:
        dispatcher.add_task(task)
    started.wait(PATIENCE)
    assert (dispatcher.active_count, len(dispatcher.threads), dispatcher.stop_count) == (2, 2, 0)
    finish.set()
    assert all(task.ran.wait(PATIENCE) for task in tasks)


def test_set_thread_count_counts_threads_that_are_to_end(dispatcher):
    """`set_threads` and `resume` rely on `set_thread_count` to mean the number that stays, called as often as need be."""
    gate = threading.Event()
    busy = [SimpleNamespace(service=gate.wait, cancel=lambda: None) for _ in range(2)]
    dispatcher.set_thread_count(2)
    for task in busy:
        dispatcher.add_task(task)
    dispatcher.set_thread_count(0)
    dispatcher.set_thread_count(1)
    task = Task()
    dispatcher.add_task(task)
    gate.set()
    assert task.ran.wait(PATIENCE)


def test_a_task_that_raises_kills_no_worker(dispatcher):
    """A fault in a channel must cost the connection at most: else the pool would shrink unnoticed."""
    dispatcher.set_thread_count(1)
    dispatcher.logger = logging.getLogger("quiet")
    first, second = Task(SystemExit(1)), Task()
    dispatcher.add_task(first)
    dispatcher.add_task(second)
    assert second.ran.wait(PATIENCE)
    assert first.thread is second.thread


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


@pytest.mark.parametrize("kind", [WSGITask, ErrorTask])
def test_every_answer_builds_its_header_once_and_first(kind, monkeypatch):
    """Status and size of each answer are taken in `build_response_header`, which must run once, before any output."""
    channel, built = Recording(), []

    class Watched(kind):
        def build_response_header(self):
            header = super().build_response_header()
            built.append((self.status, header, self.channel.written))
            return header

    request = parsed(GET)
    request.error = Error("why")
    Watched(channel, request).service()
    ((status, header, written),) = built
    assert status in {"200 OK", "500 Internal Server Error"}
    assert written == b""
    assert channel.written.startswith(header)


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


def test_a_file_is_put_out_whole():
    """A file that the app hands over is one output, which knows its length; flaskd keeps it from HEAD by its class."""
    put_out = []

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "9")])
        assert environ["wsgi.file_wrapper"] is ReadOnlyFileBasedBuffer
        return environ["wsgi.file_wrapper"](io.BytesIO(b"hello"))

    channel = Recording(app)
    channel.write_soon = put_out.append
    task = WSGITask(channel, parsed(GET))
    task.service()
    assert isinstance(put_out[-1], ReadOnlyFileBasedBuffer)
    assert (len(put_out[-1]), task.content_length) == (5, 5)
    assert ReadOnlyFileBasedBuffer(io.BytesIO(b"hello")).prepare(3) == 3


def test_an_error_of_the_app_comes_out_of_service():
    """A response that broke off is not "completed": the task's `service` must let the error through."""

    def fail(environ, start_response):
        raise LookupError("on purpose")

    task = WSGITask(Recording(fail), parsed(GET))
    with pytest.raises(LookupError):
        task.service()
    assert not task.wrote_header


def test_waitress_takes_slashes_from_a_path():
    """Why flaskd sets PATH_INFO again, from the request's `path`: //admin would be /admin."""
    request = parsed(GET.replace(b"/path", b"//admin"))
    assert request.path == "//admin"
    assert WSGITask(Recording(hello), request).get_environment()["PATH_INFO"] == "/admin"


def test_the_environ_is_made_by_get_environment():
    """Apps see the drain in their environ: `get_environment` must make the dict that the app is called with."""
    seen = []

    class Marked(WSGITask):
        def get_environment(self):
            return super().get_environment() | {"flaskd.test": 1}

    Marked(Recording(lambda environ, start: seen.append(environ) or hello(environ, start)), parsed(GET)).service()
    assert seen[0]["flaskd.test"] == 1
    assert (seen[0]["REMOTE_ADDR"], seen[0]["PATH_INFO"]) == ("192.0.2.7", "/path")


@pytest.mark.parametrize("body", [b"hello", b""])
def test_the_header_is_put_out_first_and_alone(body, monkeypatch):
    """What is held to go out with the body is the first thing that a task's first `write` puts out: the header, whole."""
    put_out = []
    monkeypatch.setattr(Recording, "write_soon", lambda _, data: put_out.append(data))

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    WSGITask(Recording(app), parsed(GET)).service()
    assert put_out[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert put_out[0].endswith(b"\r\n\r\n")
    assert put_out[1:] == ([body] if body else [])


def test_an_error_is_an_answer():
    """A 507 is one, of a class of flaskd's own."""

    class FullError(Error):
        code, reason = 507, "Insufficient Storage"

    request = parsed(GET)
    request.error = FullError("no room")
    task = ErrorTask(Recording(), request)
    task.service()
    assert task.channel.written.startswith(b"HTTP/1.1 507 Insufficient Storage\r\n")


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


def test_the_channels_classes(pair):
    """Requests and tasks are flaskd's own: `parser_class` is looked up on the instance and called with `adj` alone."""
    made = []

    class Watched(HTTPChannel):
        def __init__(self, *args, **more):
            self.parser_class = lambda adj: made.append(HTTPRequestParser(adj)) or made[-1]
            super().__init__(*args, **more)

        task_class = staticmethod(lambda *args: made.append(WSGITask(*args)) or made[-1])
        error_task_class = staticmethod(lambda *args: made.append(ErrorTask(*args)) or made[-1])

    channel = Watched(Server(), pair[1], ("192.0.2.7", 1), Adjustments(), map={})
    channel.received(GET)
    channel.service()
    assert [type(each) for each in made] == [HTTPRequestParser, WSGITask]
    channel.received(b"GARBAGE\r\n\r\n")
    channel.service()
    assert [type(each) for each in made[2:]] == [HTTPRequestParser, ErrorTask]
    channel.handle_close()


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


def test_a_served_request_is_closed_and_gone(channel):
    """A request that was answered leaves the line, after its `close`; the loop is woken for its output."""
    channel.received(GET)
    closed = []
    channel.requests[0].close = lambda: closed.append(1)
    channel.service()
    assert (closed, channel.requests) == ([1], [])
    assert channel.server.pulls


def test_the_loop_is_woken_for_the_last_time_when_the_request_is_gone(channel):
    """A worker that is not done with a request leaves it first in line: only the last word to the loop comes after."""
    first_in_line = []
    channel.server.pull_trigger = lambda: first_in_line.append(channel.requests[:1])
    channel.server.application = lambda environ, start: start("200 OK", []) and [b"x" * 8_000_000]
    channel.received(GET)
    request = channel.requests[0]
    channel.service()
    assert first_in_line == [[request], []]


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
    channel.service()
    assert held == [True, True]


def test_the_app_is_asked_for_at_each_request(channel):
    """It is called by way of the server that the channel knows, so that a task can see what comes of it at once."""
    for answer in (b"one", b"two"):
        channel.server.application = lambda environ, start, answer=answer: start("200 OK", []) and [answer]
        channel.received(GET)
        channel.service()
        assert channel.client.recv(65536).endswith(answer)


def test_a_body_arrives_where_its_head_is_finished(channel):
    """Bodies are read in larger bites than heads: a request in part must say which of both it is in."""
    channel.received(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n")
    assert not channel.request.headers_finished
    channel.received(b"\r\n1234")
    assert channel.request.headers_finished
    channel.received(b"56789")
    assert channel.request is None


def test_requests_behind_the_end_are_closed(channel):
    """What will never be answered is taken out of flight in its `close`: it must be called for all that are dropped."""
    channel.received(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + GET + GET)
    closed = []
    for number, request in enumerate(channel.requests):
        request.close = lambda number=number: closed.append(number)
    channel.service()
    assert sorted(closed) == [0, 1, 2]
    assert (channel.requests, channel.close_when_flushed) == ([], True)


def test_a_closed_channel_serves_nothing(channel):
    """A request that was cut while it was queued never reaches the app: `service` must look at `connected`."""
    channel.server.application = pytest.fail
    channel.received(GET)
    channel.handle_close()
    channel.service()
    assert channel.requests == []


def test_a_task_that_raises_is_answered_by_an_error_task(channel, caplog):
    """An app's error is a 500 from `error_task_class`, whose request comes from `parser_class`."""

    def fail(environ, start_response):
        raise LookupError("on purpose")

    channel.server.application = fail
    channel.received(GET)
    channel.service()
    assert channel.client.recv(65536).startswith(b"HTTP/1.1 500 ")
    assert (channel.requests, channel.close_when_flushed) == ([], True)
    assert [each.getMessage() for each in caplog.records] == ["Exception while serving /path"]


def test_system_exit_would_lose_the_channel(channel):
    """Why `Task.execute` turns everything into an Exception: waitress lets the rest out, with the request still in line."""

    def leave(environ, start_response):
        raise SystemExit

    channel.server.application = leave
    channel.received(GET)
    with pytest.raises(SystemExit):
        channel.service()
    assert len(channel.requests) == 1


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


def test_the_server_tells_its_name_and_port():
    """The environ has them as the channel's server has them; a name that was not given is a placeholder."""
    assert Adjustments().server_name == Adjustments.server_name == "waitress.invalid"
    channel = Recording()
    channel.server.server_name, channel.server.effective_port = "shop", "/run/shop/s"
    environ = WSGITask(channel, parsed(GET)).get_environment()
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("shop", "/run/shop/s")
