"""Stock waitress and flaskd with one interface, so that a scenario can be run against either.

``Stock`` is waitress as ``waitress.serve`` runs it, with its own server, loop, dispatcher and shutdown. It stops as at a
SIGTERM whose handler raises SystemExit: ``run()`` shuts the dispatcher down and ends, then the process ends, which
closes all descriptors.
"""

import functools
import http.client
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from unittest import mock

from patience import PATIENCE
from server_kit import App, Client
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import WSGITask

from flaskd.server import WaitressThread
from flaskd.sockets import Address

_STOCK_PATIENCE = 0.2
"""Seconds for which the dispatcher waits for its threads; waitress' own 5 would take too long in a test."""


class _Interruption(wasyncore.dispatcher):
    """Raises SystemExit in waitress' loop, as a signal handler would."""

    def writable(self):
        return False

    def handle_read(self):
        raise SystemExit


class _LastTask(WSGITask):
    """The simplest drain: each response ends its connection."""

    def build_response_header(self):
        self.set_close_on_finish()
        return super().build_response_header()


class Stock:
    """Waitress in a thread; `settings` are waitress' own."""

    def __init__(self, app, *, threads=4, grace=None, **settings):
        if not {"sockets", "unix_socket"} & set(settings):
            settings["listen"] = "127.0.0.1:0"
        self.map = {}
        before = set(threading.enumerate())
        self.acceptor = create_server(app, map=self.map, threads=threads, **settings)
        self._workers = set(threading.enumerate()) - before
        self.dispatcher = self.acceptor.task_dispatcher
        self.dispatcher.shutdown = functools.partial(self.dispatcher.shutdown, timeout=_STOCK_PATIENCE)
        self._count = self.dispatcher.set_thread_count
        self.dispatcher.set_thread_count = self._told_to_end
        unix = settings.get("unix_socket")
        where = self.acceptor.socket.getsockname()
        self.addresses = [Address(path=unix) if unix else Address(where[0], where[1])]
        self.in_flight = 0  # waitress counts nothing
        self.error = None
        self._pull, self._pulled = socket.socketpair()
        _Interruption(self._pulled, self.map)
        self._stopping = threading.Event()
        self._channels = []
        self.thread = threading.Thread(target=self._run, name="stock")
        self.thread.start()

    def _run(self):
        try:
            self.acceptor.run()
        except ValueError as error:  # what select() raises
            self.error = error

    def _told_to_end(self, count):
        self._count(count)
        self._stopping.set()

    def call(self, function):
        self.acceptor.trigger.pull_trigger(function)

    def turns(self, timeout):
        if not self.thread.is_alive():
            return False
        turned = threading.Event()
        self.call(turned.set)
        return turned.wait(timeout)

    def channels(self):
        return list(self.acceptor.active_channels.values())

    @property
    def queued(self):
        return len(self.dispatcher.queue)

    def announce(self):
        self.acceptor.channel_class = type("LastChannel", (HTTPChannel,), {"task_class": _LastTask})
        for channel in self.channels():
            channel.task_class = _LastTask

    def take_no_more(self):
        """Close the listener, which is all that can be done from outside."""
        self.call(lambda: wasyncore.dispatcher.close(self.acceptor))
        assert self.turns(PATIENCE)

    @contextmanager
    def stopping(self, timeout=None, *, begun=lambda: None, closing=None):
        """A stop under way; it is over at the end of the block, when the process would end (or `closing` is called)."""
        self._pull.sendall(b"x")
        begun()
        assert self._stopping.wait(PATIENCE)
        yield
        self.thread.join(PATIENCE)
        self._channels = self.channels()
        (closing or functools.partial(wasyncore.close_all, self.map))()

    def close(self):
        """Close what waitress leaves open."""
        if self.thread.is_alive():
            with self.stopping():
                pass
        for channel in [*self._channels, *self.channels()]:
            channel.handle_close()
        self.acceptor.trigger.close()
        self._count(0)
        wasyncore.close_all(self.map)
        for worker in self._workers:
            worker.join(PATIENCE)
        self._pull.close()
        self._pulled.close()


class Ours(WaitressThread):
    """flaskd's server with the same interface; `settings` are those of waitress that flaskd allows."""

    def __init__(self, app, *, threads=4, grace=0.2, listeners=None, **settings):
        super().__init__(app, threads=threads, listeners=listeners, keepalive_grace=grace, adjustments=settings)
        self.start()

    @property
    def acceptor(self):
        return self.loop.context.acceptors[0]

    @property
    def dispatcher(self):
        return self.loop.context.pool

    @property
    def map(self):
        return self.loop.context.poller

    def call(self, function):
        self.loop.call(function)

    def channels(self):
        return list(self.loop.connections.channels())

    def announce(self):
        super().announce()
        assert self.turns(PATIENCE)

    def take_no_more(self):
        self.begin_drain(3600, lambda _: None)  # longer than any scenario sets the clock forward
        assert self.turns(PATIENCE)

    @contextmanager
    def stopping(self, timeout=PATIENCE, *, begun=lambda: None):
        posted, post = threading.Event(), self.loop.call

        def posts(function):
            post(function)
            posted.set()

        self.loop.call = posts
        with ThreadPoolExecutor(1) as pool:
            stop = pool.submit(self.stop, timeout)
            assert posted.wait(PATIENCE)
            begun()
            assert self.loop.context.draining.wait(PATIENCE)
            yield
            stop.result(PATIENCE)

    def close(self):
        self.stop(PATIENCE)


class Rig:
    """Servers of one kind (`Stock` or `Ours`), with their app and clients."""

    def __init__(self, kind):
        self.kind = kind
        self.app = App()
        self._ended = ExitStack()
        self._readers = self._ended.enter_context(ThreadPoolExecutor(16))

    def serve(self, app=None, **options):
        server = self.kind(app or self.app, **options)
        self._ended.callback(server.close)
        self._ended.callback(self.app.released.set)
        return server

    def connect(self, server, **options):
        client = Client(server.addresses[0], **options)
        self._ended.callback(client.close)
        return client

    def fates(self, *clients):
        """Read from all clients at once; returns a future with the `fate` of each, in their order."""
        return [self._readers.submit(fate, client) for client in clients]

    def close(self):
        self._ended.close()


def fate(client):
    """The status of a client's next response, or how it was broken off."""
    try:
        return client.response().status
    except http.client.RemoteDisconnected:
        return "nothing"
    except http.client.IncompleteRead:
        return "broken off"
    except (ConnectionResetError, BrokenPipeError):
        return "reset"


def results(futures):
    return [each.result(PATIENCE) for each in futures]


def turn(server, times=3):
    for _ in range(times):
        assert server.turns(PATIENCE)


@contextmanager
def busy(server):
    """Keep the server's loop busy; yields a function that lets the loop go on."""
    holds, release = threading.Event(), threading.Event()
    server.call(lambda: (holds.set(), release.wait(PATIENCE)))
    assert holds.wait(PATIENCE)
    try:
        yield release.set
    finally:
        release.set()


@contextmanager
def later(seconds, *clocks):
    """Set these clocks of the time module ahead by so many seconds."""
    with ExitStack() as stack:
        for clock in clocks:
            before = getattr(time, clock)
            stack.enter_context(mock.patch.object(time, clock, lambda before=before: before() + seconds))
        yield
