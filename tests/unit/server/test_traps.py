"""The traps of waitress, one scenario each, run twice: stock waitress falls into it, flaskd does not.

A scenario returns what happened to its clients; the line above it has the expected value for each server. So each
``trap(...)`` is a claim about waitress, which fails here when a new version fixes it, and a promise of flaskd, which
fails without the code that keeps it. ``tests/live/test_stock.py`` has the traps that need a process.
"""

import contextlib
import fcntl
import functools
import os
import resource
import select
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
from server_kit import PATIENCE, get, no_thread_left, until
from stock_waitress import Ours, Rig, Stock, busy, fate, later, results, turn
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import ThreadedTaskDispatcher

from flaskd.errors import CannotCreateError
from flaskd.sockets import Address, Listener, unread
from flaskd.stacks import stack_of

pytestmark = pytest.mark.usefixtures("no_thread_left")

TRAPS = []
WATERMARK = 1 << 20
"""Bytes of output at which waitress makes a thread wait for its client; it takes longer to fill the default, 16 MiB."""


def trap(*, stock, flaskd):
    def keep(scenario):
        TRAPS.append(pytest.param(scenario, stock, flaskd, id=scenario.__name__))
        return scenario

    return keep


# --- what a stop loses -------------------------------------------------------------------------------------------------


@trap(stock=["nothing"] * 3, flaskd=[200] * 3)
def queued_requests(rig):
    """Threads look at `stop_count` before the queue, so queued requests are dropped without an answer."""
    server = rig.serve(threads=1)
    rig.connect(server).send("/gate")
    rig.app.entered(1)
    clients = [rig.connect(server).send("/") for _ in range(3)]
    until(server, lambda: server.queued == 3)
    with server.stopping():
        rig.app.released.set()
        fates = rig.fates(*clients)
    return results(fates)


@trap(stock=["nothing"], flaskd=[200])
def a_request_longer_than_five_seconds(rig):
    """The dispatcher waits 5 s for its threads (less here); then atexit ends them in the middle of a request."""
    server = rig.serve()
    client = rig.connect(server).send("/gate")
    rig.app.entered(1)
    with server.stopping():
        if rig.kind is Ours:  # waits for the request; waitress has ended after this block
            rig.app.released.set()
        fates = rig.fates(client)
    return results(fates)


@trap(stock=["broken off"], flaskd=[200])
def unsent_output(rig):
    """A response that does not fit into the socket's buffer is cut there."""
    server = rig.serve()
    client = rig.connect(server, receive_buffer=65536).send("/big")
    until(server, lambda: any(not each.requests and each.total_outbufs_len for each in server.channels()))
    with server.stopping():
        fates = rig.fates(client)
    return results(fates)


@trap(stock=["reset"], flaskd=[200])
def a_partial_upload(rig):
    """A request whose body is coming is reset."""
    server = rig.serve()
    client = rig.connect(server).send(get("/echo", "Content-Length: 10", method="POST"), b"01234")
    turn(server)
    with server.stopping():
        client.send(b"56789")
        fates = rig.fates(client)
    return results(fates)


@trap(stock={"reset"}, flaskd={200})
def the_backlog(rig):
    """Clients in the backlog are reset when the listener is closed."""
    server = rig.serve()
    with busy(server) as release:
        clients = [rig.connect(server).send("/") for _ in range(10)]
        with server.stopping(begun=release):
            fates = rig.fates(*clients)
        return set(results(fates))


@trap(stock=["reset"], flaskd=[200])
def the_next_request_of_a_busy_client(rig):
    """A kept connection is closed, even if its client is about to send a request."""
    server = rig.serve(grace=PATIENCE)
    client = rig.connect(server)
    assert fate(client.send("/")) == 200
    with server.stopping():
        client.send("/")
        fates = rig.fates(client)
    return results(fates)


@trap(stock="parked for ever", flaskd="ended")
def a_worker_that_waits_for_its_reader(rig):
    """A stop does not wake a thread in `outbuf_lock.wait()`, which stays."""
    server = rig.serve(threads=1, outbuf_high_watermark=WATERMARK)
    worker = stuck_on_its_reader(rig, server)
    with server.stopping(0):
        pass
    return "parked for ever" if worker.is_alive() else "ended"


def stuck_on_its_reader(rig, server):
    """Let a client ask for more than it reads, until the only thread waits for it; returns that thread."""
    rig.connect(server).send("/flood")

    def waits(lock):  # flaskd makes the Condition when a thread waits for the first time
        condition = getattr(lock, "_condition", lock)
        return condition is not None and condition._waiters

    until(server, lambda: any(waits(each.outbuf_lock) for each in server.channels()))
    return thread_in("_flush_outbufs_below_high_watermark" if isinstance(server, Stock) else "for_client")


def thread_in(function):
    """The thread that runs a function of this name."""
    [found] = [each for each in threading.enumerate() if f"in {function}\n" in stack_of(each)]
    return found


# --- what a drain of stock waitress would stumble over ------------------------------------------------------------------


def busy_threads(server):
    return server.dispatcher.active_count if isinstance(server, Stock) else server.dispatcher.busy


@trap(stock="its channel is never free again", flaskd=500)
def an_app_that_raises_system_exit(rig):
    """`service()` catches Exception only: the request is never removed, so the client and a drain wait."""
    server = rig.serve()
    client = rig.connect(server).send("/exit")
    rig.app.entered(1)
    until(server, lambda: not server.queued and not busy_threads(server))
    if any(each.requests for each in server.channels()):
        return "its channel is never free again"
    return fate(client)


@trap(stock=[200, 200, "nothing"], flaskd=[200, 200, 200])
def pipelined_requests_behind_a_last_response(rig):
    """`Connection: close` on the next response drops the requests that were pipelined behind it."""
    server = rig.serve()
    client = rig.connect(server).send("/gate", "/", "/")
    rig.app.entered(1)
    server.announce()
    rig.app.released.set()
    return [fate(client) for _ in range(3)]


@trap(stock=[200, "nothing"], flaskd=[200, 200])
def a_pipelined_request_behind_a_chunked_answer(rig):
    """Waitress ends the connection after each answer without a Content-Length, although chunks end by themselves."""
    client = rig.connect(rig.serve()).send("/stream", "/")
    rig.app.released.set()
    return [fate(client) for _ in range(2)]


@trap(stock="nothing", flaskd=200)
def a_half_closing_client(rig):
    """With `channel_request_lookahead`, by which it notices that clients left, a half-close ends the connection."""
    server = rig.serve(**({"channel_request_lookahead": 1} if rig.kind is Stock else {}))
    client = rig.connect(server).send("/gate")
    rig.app.entered(1)
    client.socket.shutdown(1)
    turn(server)
    rig.app.released.set()
    return fate(client)


@trap(stock="waited for", flaskd="let go")
def a_client_that_is_gone(rig):
    """Without lookahead a connection with a request is not polled at all, so its end is not noticed."""
    server = rig.serve()
    client = rig.connect(server).send("/gate")
    rig.app.entered(1)
    server.take_no_more()
    client.reset()
    turn(server)
    return "waited for" if server.channels() else "let go"


@trap(stock=100, flaskd=503)
def an_expectation_in_a_drain(rig):
    """A client gets 100 although its request will not be served."""
    server = rig.serve(grace=30)
    client, _ = rig.connect(server), rig.connect(server).send("/gate")
    assert fate(client.send("/")) == 200
    rig.app.entered(2)
    until(server, lambda: sum(len(each.requests) for each in server.channels()) == 1)  # the end of the answer is noted
    server.take_no_more()
    with busy(server) as go_on, later(60, "monotonic"):  # long after the last answer on this connection
        client.send(get("/echo", "Content-Length: 4", "Expect: 100-continue", method="POST"))
        go_on()  # not earlier: flaskd would close the connection, whose grace is over
        return fate(client)


@trap(stock="open", flaskd="closed")
def an_idle_connection_while_not_accepting(rig):
    """`maintenance()` runs when the listener is asked whether it is readable, so not without listeners."""
    server = rig.serve(cleanup_interval=0, grace=3600)
    rig.connect(server)
    rig.connect(server).send("/gate")
    rig.app.entered(1)
    until(server, lambda: len(server.channels()) == 2)
    server.take_no_more()
    with later(1800, "time", "monotonic"):
        turn(server)
    return "open" if len(server.channels()) == 2 else "closed"


@trap(stock="reset", flaskd=200)
def a_clock_that_is_set_forward(rig):
    """Idle time is counted by the wall clock: after a change, a client in the middle of a request counts as idle."""
    server = rig.serve(cleanup_interval=0)
    client = rig.connect(server).send(get("/echo", "Content-Length: 10", method="POST"), b"01234")
    turn(server)
    with later(3600, "time"):
        turn(server)
    with contextlib.suppress(OSError):
        client.send(b"56789")
    turn(server)
    return "reset" if not server.channels() else fate(client)


@trap(stock="pinned", flaskd="free")
def a_reader_that_stalls(rig):
    """There is no send timeout: a client that stops reading a large response keeps a thread for ever."""
    server = rig.serve(threads=1, outbuf_high_watermark=WATERMARK, cleanup_interval=0)
    stuck_on_its_reader(rig, server)
    with later(1800, "time", "monotonic"):
        turn(server)
    return "pinned" if server.channels() else "free"


@trap(stock="destroyed", flaskd="whole")
def the_tail_of_a_response(rig):
    """Closing with unread input makes the kernel send RST, and drop output that it has not sent yet."""
    server = rig.serve()
    client = rig.connect(server, receive_buffer=65536).send(get("/late", "Connection: close"), b"y" * 20_000)
    rig.app.entered(1)
    until(server, lambda: unread(server.channels()[0].socket) > 0)
    rig.app.released.set()
    until(server, lambda: all(getattr(each, "half_closed", False) for each in server.channels()))
    turn(server, 1)  # it is removed from the list a moment before it is closed
    return "whole" if fate(client) == 200 else "destroyed"


# --- the loop ----------------------------------------------------------------------------------------------------------


@trap(stock="deadlock", flaskd="runs")
def a_call_from_within_a_call(rig):
    """`pull_trigger(thunk)` takes the lock under which thunks are run, so a thunk cannot call it."""
    server = rig.serve()
    ran = threading.Event()
    if rig.kind is Stock:
        server.acceptor.trigger.lock = lock = TellingLock()
    server.call(lambda: server.call(ran.set))
    if rig.kind is Stock:
        return "deadlock" if lock.would_block.wait(PATIENCE) else "runs"
    return "runs" if ran.wait(PATIENCE) else "deadlock"


class TellingLock:
    """A lock that raises when its own thread would wait for it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._owner = None
        self.would_block = threading.Event()

    def __enter__(self):
        if self._owner == threading.get_ident():
            self.would_block.set()
            raise RuntimeError("deadlock")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_):
        self._owner = None
        self._lock.release()


@trap(stock="spins", flaskd="waits")
def a_loop_timeout_of_half_a_second(rig):
    """`asyncore_loop_timeout` becomes an int, so 0.5 makes a busy loop."""
    server = rig.serve(asyncore_loop_timeout=0.5)
    waits = []
    waited = threading.Event()

    def told(wait, *arguments):
        waits.append(arguments[-1] if rig.kind is Stock else arguments[0])
        waited.set()
        return wait(*arguments)

    place = (select, "select") if rig.kind is Stock else (server.map, "wait")
    with mock.patch.object(*place, functools.partial(told, getattr(*place))):
        turn(server, 1)
        assert waited.wait(PATIENCE)
    return "waits" if any(waits) else "spins"


@trap(stock="the loop is dead", flaskd=200)
def a_descriptor_above_1023(rig):
    """The default loop calls `select()`, which raises for a descriptor above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1100:
        pytest.skip(f"only {hard} open files are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1100), hard))
    low = Listener.bind(Address("127.0.0.1", 0))
    high = type(low.socket)(fileno=fcntl.fcntl(low.socket, fcntl.F_DUPFD_CLOEXEC, 1024))
    low.close()
    if rig.kind is Ours:
        return fate(rig.connect(rig.serve(listeners=[Listener(low.address, high)])).send("/"))
    server = rig.serve(sockets=[high])
    server.thread.join(PATIENCE)
    assert "out of range in select()" in str(server.error)
    return "the loop is dead"


@trap(stock=1, flaskd=64)
def connections_accepted_in_a_turn(rig):
    """Each turn of the loop accepts one connection, and asks all others what they wait for."""
    server = rig.serve()
    with busy(server) as release:
        for _ in range(100):
            rig.connect(server)
        once, accepted = threading.Event(), []
        before = server.acceptor.handle_accept

        def handle_accept():
            before()
            accepted.append(len(server.channels()))
            once.set()

        server.acceptor.handle_accept = handle_accept
        release()
        assert once.wait(PATIENCE)
    return accepted[0]


@trap(stock=20, flaskd=0)
def idle_connections_asked_for_each_request(rig):
    """The poll set is built anew in each turn, which takes all the time if there are thousands of connections."""
    server = rig.serve()
    for _ in range(20):
        rig.connect(server)
    client = rig.connect(server)
    assert fate(client.send("/")) == 200
    until(server, lambda: len(server.channels()) == 21)
    turn(server)
    asked, before = [], HTTPChannel.readable
    with mock.patch.object(HTTPChannel, "readable", lambda self: asked.append(self) or before(self)):
        assert fate(client.send("/")) == 200
    return len({each for each in asked if each.addr[1] != client.socket.getsockname()[1]})


@trap(stock="too few", flaskd="all")
def the_connection_limit(rig):
    """The limit counts all of the map, including listeners and triggers."""
    server = rig.serve(connection_limit=5)
    for _ in range(5):
        rig.connect(server)
    turn(server, 10)
    return "all" if len(server.channels()) == 5 else "too few"


@trap(stock="changed size during iteration", flaskd="all")
def connections_looked_at_from_outside(rig):
    """The loop's thread changes `active_channels` while another thread iterates over it."""
    server = rig.serve()
    rig.connect(server)
    until(server, lambda: len(server.channels()) == 1)
    looking = (
        server.acceptor.active_channels.values().__iter__() if rig.kind is Stock else server.loop.connections.channels()
    )
    next(looking)
    rig.connect(server)
    until(server, lambda: len(server.channels()) == 2)
    try:
        list(looking)
    except RuntimeError as error:
        return str(error).removeprefix("dictionary ")
    return "all"


@trap(stock=b"x", flaskd=b"")
def a_close_while_a_worker_lives(rig):
    """The thread uses the trigger, whose descriptor may belong to another file by then, and writes a byte into it."""
    server = rig.serve(threads=1)
    trigger = server.acceptor.trigger.trigger
    rig.connect(server).send("/gate")
    rig.app.entered(1)
    worker = thread_in("gate")
    if rig.kind is Stock:
        with server.stopping(closing=server.acceptor.close):
            pass
    else:
        server.stop(0)
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        try:
            os.fstat(trigger)
        except OSError:  # the number is free, and the next file that is opened may get it
            os.dup2(writer, trigger)
            os.close(writer)
            writer = trigger
        rig.app.released.set()
        worker.join(PATIENCE)
        os.write(writer, b"end")
        return os.read(reader, 10).removesuffix(b"end")
    finally:
        os.close(reader)
        os.close(writer)


# --- listeners ---------------------------------------------------------------------------------------------------------


@trap(stock="taken from a live server", flaskd="refused")
def a_unix_socket_in_use(rig):
    """`cleanup_unix_socket` removes a socket that another server uses."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "http.sock")
        options = (
            {"unix_socket": str(path)} if rig.kind is Stock else {"listeners": [Listener.bind(Address(path=str(path)))]}
        )
        first = rig.serve(**options)
        node = path.stat().st_ino
        try:
            if rig.kind is Stock:
                rig.serve(**options)
            else:
                Listener.bind(Address(path=str(path)))
        except CannotCreateError:
            assert fate(rig.connect(first).send("/")) == 200
            return "refused"
        return "taken from a live server" if path.stat().st_ino != node else "shared"


@trap(stock=True, flaskd=False)
def a_unix_socket_seen_with_the_wrong_mode(rig):
    """The node is bound first, and gets its mode after that; meanwhile the umask decides which users may connect."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "http.sock")
        seen, chmod = [], os.chmod

        def told(*arguments, **options):
            seen.append(path.exists())
            return chmod(*arguments, **options)

        with mock.patch("os.chmod", told):
            if rig.kind is Stock:
                rig.serve(unix_socket=str(path))
            else:
                rig.serve(listeners=[Listener.bind(Address(path=str(path)))])
        return any(seen)


@trap(stock=2, flaskd=1)
def ports_of_one_address(rig):
    """`*:0` becomes one address with two ports, and the second one is not shown."""
    if rig.kind is Ours:
        return len({each.port for each in rig.serve(listeners=[Listener.bind(Address.parse(":0"))]).addresses})
    sockets = {}
    server = create_server(rig.app, map=sockets, _start=False, _dispatcher=ThreadedTaskDispatcher(), listen="*:0")
    if not hasattr(server, "effective_listen"):
        pytest.skip("this machine has one family of addresses only")
    try:
        return len({port for _, port in server.effective_listen})
    finally:
        wasyncore.close_all(sockets)


# --- requests ----------------------------------------------------------------------------------------------------------


@trap(stock="waits for ever", flaskd=200)
def an_expectation_without_a_body(rig):
    """The client gets 100, and then the server waits for a body of no bytes."""
    server = rig.serve()
    client = rig.connect(server).send(get("/", "Content-Length: 0", "Expect: 100-continue", method="POST"))
    answer = fate(client)
    turn(server)
    [channel] = server.channels()
    waits = channel.request is not None and channel.request.headers_finished and not channel.requests
    return "waits for ever" if answer == 100 and waits else answer


@trap(stock=200, flaskd=400)
def http_1_1_without_a_host(rig):
    """RFC 9112 §3.2 demands a refusal, and waitress serves the request."""
    server = rig.serve()
    return fate(rig.connect(server).send(b"GET / HTTP/1.1\r\n\r\n"))


# --- the table, twice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scenario", "stock", "flaskd"), TRAPS)
def test_stock_waitress_falls_into_it(scenario, stock, flaskd):
    """The trap is real: stock waitress does what the scenario says."""
    with contextlib.closing(Rig(Stock)) as rig:
        assert scenario(rig) == stock


@pytest.mark.parametrize(("scenario", "stock", "flaskd"), TRAPS)
def test_flaskd_does_not(scenario, stock, flaskd):
    """In the same scenario, flaskd does what it promises."""
    with contextlib.closing(Rig(Ours)) as rig:
        assert scenario(rig) == flaskd


def test_no_end_is_claimed_for_both():
    """Each scenario claims different outcomes for the two servers."""
    assert [each.id for each in TRAPS if each.values[1] == each.values[2]] == []
