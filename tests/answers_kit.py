"""One observed server: what its app, its client, its ledger and its logs see of a conversation.

So two servers can be compared. What the WSGI app does is a value, `Answer`, which a test may choose at random; it is
chosen before the request is sent, and does not depend on the request.
"""

import io
import itertools
import logging
import math
import re
import socket
import struct
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from server_kit import PATIENCE

from flaskd.server import WaitressThread, tasks
from flaskd.server.output import OutputChannel
from flaskd.server.request import Request
from flaskd.sockets import unread

HEAD_LIMIT, BODY_LIMIT, IN_MEMORY = 2000, 3000, 1000
"""Bytes: the most of a head and of a body, and of a body in memory. Small, so that tests exceed them."""
LAST_PATH = "/the-last-request"
LAST = f"GET {LAST_PATH} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode()
"""A request behind all others: its answer comes if the connection was kept."""
FILLER = b"\r\n" * (BODY_LIMIT // 2 + 100)
"""More than any body and more blank lines than a request may have: ends an unfinished last request."""


_slow: set[Any] = set()
"""The servers whose requests go the slow way, by their contexts."""
_fast: Counter[Any] = Counter()


@contextmanager
def both_ways():
    """Let servers go the slow way that are told to, and count the requests that went the fast way."""
    take_common, write_soon = Request.take_common, OutputChannel.write_soon

    def counted(request, data, now):
        context = request.channel.context
        taken = context not in _slow and take_common(request, data, now)
        _fast[context] += taken
        return taken

    def buffered(channel, data):  # waitress' buffers take what is not bytes
        return write_soon(channel, bytearray(data) if channel.context in _slow and isinstance(data, bytes) else data)

    with mock.patch.object(Request, "take_common", counted), mock.patch.object(OutputChannel, "write_soon", buffered):
        yield


def slow_way(server: WaitressThread) -> None:
    """Let this server read every request with the parser for all requests, and send through waitress' buffers."""
    _slow.add(server.loop.context)


def went_fast(server: WaitressThread) -> int:
    """How many requests this server has read in one pass since its start."""
    return _fast[server.loop.context]


@contextmanager
def frozen_date():
    """Let every answer have the same Date."""
    with mock.patch.object(tasks, "http_date", return_value="Thu, 01 Jan 2026 00:00:00 GMT"):
        yield


# --- the app --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Xs:
    """A part of so many bytes, of which a failed test prints only the number."""

    size: int


@dataclass(frozen=True)
class Answer:
    """What the app does with one request; the defaults are those of most apps."""

    status: Any = "200 OK"
    headers: Any = (("Content-Type", "text/plain"), ("Content-Length", "5"))
    """A tuple is given to start_response as a list, all else unchanged."""
    parts: tuple[Any, ...] = (b"hello",)
    shape: str = "list"
    """The name of a method of `App`, which makes the body."""
    start: str = "once"
    """How often start_response is called: ``never``, ``once``, ``twice``, ``twice and caught``, ``again`` (with exc_info,
    before the first part), ``again and late`` (behind it), ``with exc_info`` (once, at first)."""
    reads: str = "nothing"
    """The way to read the body; see `read`."""
    fails: str = ""
    """Where `error` is raised: ``before`` or ``after`` start_response, behind the first ``part``, at the ``end``, in
    ``close``."""
    error: type[BaseException] = LookupError


def read(how, body):
    """Read a request's body in one of the ways of apps, and then the rest of it; returns both."""
    if how == "nothing":
        return None
    got = {
        "whole": body.read,
        "part": lambda: body.read(3),
        "in bits": lambda: list(iter(lambda: body.read(2), b"")),
        "a line": body.readline,
        "lines": lambda: list(iter(body.readline, b"")),
        "all lines": body.readlines,
        "by iteration": lambda: list(body),
        "too much": lambda: body.read(10 * BODY_LIMIT),
    }[how]()
    return got, None if how == "part" else body.read()


class App:
    """Gives one answer, and notes by `tell` what it sees."""

    def __init__(self, answer, environ, start_response, tell):
        self.answer, self.environ, self.start_response, self.tell = answer, environ, start_response, tell
        self.given = [b"x" * part.size if isinstance(part, Xs) else part for part in answer.parts]

    def run(self):
        self.tell("read", read(self.answer.reads, self.environ["wsgi.input"]))
        self.fail("before")
        return getattr(self, self.answer.shape.replace(" ", "_"))()

    def fail(self, where):
        if self.answer.fails == where:
            raise self.answer.error("on purpose")

    def begin(self):
        """Call start_response as often as the answer says; returns its last result."""
        answer, write = self.answer, None
        headers = list(answer.headers) if isinstance(answer.headers, tuple) else answer.headers
        if answer.start == "with exc_info":
            write = self.call(answer.status, headers, _exc_info())
        elif answer.start != "never":
            write = self.call(answer.status, headers)
        if answer.start == "again":
            write = self.call("500 Again", [("Content-Type", "text/html"), ("X-Again", "1")], _exc_info())
        elif answer.start == "twice":
            write = self.call(answer.status, headers)
        elif answer.start == "twice and caught":
            with suppress(Exception):  # `call` has noted it
                self.call("201 Twice", [("X-Twice", "1")])
        self.fail("after")
        return write

    def call(self, *args):
        try:
            return self.start_response(*args)
        except BaseException as error:
            self.tell("start_response", _described(error))
            raise

    def each(self):
        """The parts, with what happens between them."""
        for number, part in enumerate(self.given):
            yield part
            if number == 0:
                if self.answer.start == "again and late":
                    self.call("500 Late", [], _exc_info())
                self.fail("part")
        self.fail("end")
        self.tell("ended")

    def close(self):
        self.tell("closed")
        self.fail("close")

    def close_file(self):
        self.tell("file closed")
        self.fail("close")

    # --- the shapes of what it returns ---

    def list(self):
        self.begin()
        return self.given

    def tuple(self):
        self.begin()
        return tuple(self.given)

    def list_with_close(self):
        self.begin()
        kind = type("ListWithClose", (list,), {"close": lambda _: self.close()})
        return kind(self.given)

    def one_with_close(self):
        """An iterable whose length is 1, whatever it has."""
        self.begin()
        made = {"__iter__": lambda _: self.each(), "__len__": lambda _: 1, "close": lambda _: self.close()}
        return type("OneWithClose", (), made)()

    def generator(self):
        self.begin()
        return self.each()

    def late_generator(self):
        """Calls start_response when its first part is asked for."""
        try:
            self.begin()
            yield from self.each()
        finally:
            self.close()

    def iterator(self):
        self.begin()
        parts = self.each()
        made = {"__iter__": lambda it: it, "__next__": lambda _: next(parts), "close": lambda _: self.close()}
        return type("Iterator", (), made)()

    def write(self):
        write = self.begin()
        for part in self.each():
            self.tell("wrote", write(part))
        return []

    def write_and_list(self):
        write = self.begin()
        for part in self.given[:1]:
            self.tell("wrote", write(part))
        return self.given[1:]

    def file(self):
        self.begin()
        return self.environ["wsgi.file_wrapper"](_File(self.joined(), self.close_file))

    def file_from_middle(self):
        self.begin()
        file = _File(self.joined(), self.close_file)
        file.seek(2)
        return self.environ["wsgi.file_wrapper"](file, 7)

    def pipe(self):
        """A file that cannot seek."""
        self.begin()
        file = io.BytesIO(self.joined())
        made = {"read": lambda _, size=-1: file.read(size), "close": lambda _: self.close()}
        return self.environ["wsgi.file_wrapper"](type("Pipe", (), made)())

    def joined(self):
        return b"".join(bytes(part) for part in self.given if isinstance(part, bytes | bytearray))

    def bytes(self):
        self.begin()
        return self.joined()

    def text(self):
        self.begin()
        return "text"

    def none(self):
        self.begin()


class _File(io.BytesIO):
    """A file that notes once that it was closed."""

    def __init__(self, data, closed):
        super().__init__(data)
        self._told = closed

    def close(self):
        told, self._told = self._told, None
        super().close()
        if told is not None:
            told()


def _exc_info():
    try:
        raise LookupError("for start_response")
    except LookupError:
        return sys.exc_info()


def _described(error):
    """An exception and its causes, without tracebacks."""
    found = []
    while error is not None:
        found.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return re.sub("0x[0-9a-f]+", "0x", " < ".join(found))


# --- what is told of it ---------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What can be observed of one conversation; it is equal for servers that behave alike."""

    app: list[Any] = field(default_factory=list)
    """The environs, and all else that the app saw, in order."""
    wire: bytes = b""
    kept: bool = False
    """Whether the connection was still open for the last request."""
    ledger: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """The access log's records, without times."""
    log: list[Any] = field(default_factory=list)
    """Log lines of level warning and above."""


class _Log(logging.Handler):
    """Keeps what does not vary: no times, no numbers of threads."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        text = re.sub(r"\d+\.\d+s", "?s", record.getMessage().partition("\n")[0])
        error = record.exc_info and _described(record.exc_info[1])
        self.said.append((record.name, record.levelname, re.sub(r"thread-\d+", "thread-?", text), error))


class Side:
    """One of two servers that are compared; serves while its block runs."""

    def __init__(
        self,
        middleware=lambda app: app,
        on_line=dict,
        *,
        listeners=None,
        threads=4,
        health="",
        ids=False,
        served_by="",
        **adjustments,
    ):
        self._told, self._lines = Told(), []
        self._answers = iter(())
        self._port = ""
        self._health = health
        sizes = {"max_request_header_size": HEAD_LIMIT, "max_request_body_size": BODY_LIMIT}
        self.server = WaitressThread(
            middleware(self._run),
            listeners=listeners,
            threads=threads,
            ids=ids,
            served_by=served_by,
            adjustments={**sizes, "inbuf_overflow": IN_MEMORY, **adjustments},
            on_answer=lambda line: self._lines.append(on_line(line)),
        )

    def __enter__(self):
        self.server.start(lambda: self.server.answer_health(self._health, lambda: ("200 OK", "ready")))
        return self

    def __exit__(self, *_):
        self.server.stop(PATIENCE)

    def converse(self, pieces, answers):
        """Send the pieces, each after the one before was read, and let the app give the answers in turn."""
        told = self._told = Told()
        self._answers, self._lines, log = itertools.cycle(answers), [], _Log()
        account = self.server.loop.account
        if account.make_id is not None:  # random values would differ between the two
            account.make_id = map("made-{}".format, itertools.count()).__next__
        before = self.server.tally()
        with ExitStack() as stack:
            for name in ("flaskd", "waitress"):  # not in the test's own log, which would show every try
                logger = logging.getLogger(name)
                stack.enter_context(mock.patch.multiple(logger, handlers=[log], propagate=False))
            told.wire = self._talk([*pieces, LAST, FILLER])
            self._until(lambda: not self.server.connections and not self.server.in_flight)
            after = self.server.tally()
            answered = sum(after.statuses[1:]) - sum(before.statuses[1:])
            self._until(lambda: len(self._lines) >= answered)
            assert self.server.turns(PATIENCE)  # the serving thread has finished with it
        told.app.sort(key=lambda each: each[0] == "file closed")  # the server decides when that is done
        told.kept = any(what == "asked" and seen["PATH_INFO"] == LAST_PATH for what, seen in told.app)
        told.log = sorted(log.said, key=repr)  # one thread reads a request while another one answers the one before
        told.ledger = {name: after.outcomes[name] - before.outcomes[name] for name in after.outcomes}
        told.ledger["statuses"] = [now - then for now, then in zip(after.statuses, before.statuses, strict=True)]
        told.ledger["took"] = sum(after.took.counts) - sum(before.took.counts)
        told.ledger["waited"] = sum(after.waited.counts) - sum(before.waited.counts)
        ids = sum(before.outcomes.values())
        told.lines = [{**line, "id": line["id"] - ids, "time": "", "took": ""} for line in self._lines]
        told.lines.sort(key=lambda line: line["id"])  # pipelined requests may be logged in any order
        return told

    def _talk(self, pieces):
        """Send the pieces until the server closes; returns what was sent."""
        client = _Connection(self.server.addresses[0])
        with client.socket:
            self._port = client.port
            self._until(lambda: self.server.connections == 1)
            for piece in pieces:
                client.send(piece)
                self._until(lambda: client.read() or self._at_rest(client.sent))
                if client.ended:
                    break
            while not client.ended:
                client.read(PATIENCE)
            return client.got

    def _at_rest(self, sent):
        """Whether the server has read all bytes that were sent, and has answered all complete requests."""
        sockets = [each.socket for each in self.server.loop.connections.channels()]
        return not self.server.in_flight and all(_come(each) >= sent and not unread(each) for each in sockets)

    def _until(self, condition):
        patience = time.monotonic() + PATIENCE
        while not condition():
            assert self.server.turns(PATIENCE)
            assert time.monotonic() < patience

    # --- the app's side ---

    def _run(self, environ, start_response):
        told = self._told.app
        told.append(("asked", self._shown(environ)))
        last = environ["PATH_INFO"].endswith(LAST_PATH)
        answer = Answer() if last else next(self._answers)
        app = App(answer, environ, start_response, lambda *what: told.append((what[0], what[1:])))
        # What an app does to its environ must not affect others, not even its next request.
        for key in list(environ):
            if not key.startswith("wsgi."):
                del environ[key]
        environ["left.behind"] = "by the request before"
        return app.run()

    def _shown(self, environ):
        """An environ as a value: objects are described by what can be read of them."""
        body = environ["wsgi.input"]
        server = self.server
        objects = {
            "wsgi.input": [name for name in ("read", "readline", "readlines", "__iter__") if hasattr(body, name)],
            "wsgi.errors": environ["wsgi.errors"] is sys.stderr,
            "flaskd.draining": environ["flaskd.draining"] is server.loop.context.draining,
            "waitress.client_disconnected": environ["waitress.client_disconnected"](),
        }
        shown = {key: _typed(value) for key, value in environ.items()} | objects
        if environ.get("REMOTE_PORT") == self._port:
            shown["REMOTE_PORT"] = "the client's"
        address = server.addresses[0]
        if environ.get("SERVER_PORT") == (address.path or str(address.port)):
            shown["SERVER_PORT"] = "the server's"
        return {**shown, "": type(environ)}


def _typed(value):
    """The value, with its type if that is not a usual one (PEP 3333: strings are str and no subclass)."""
    return value if type(value) in {str, bool, type} else (type(value), value)


def _come(sock):
    """How many bytes have reached a server's socket; even on loopback they do so some time after the send."""
    if sock is None or sock.family == socket.AF_UNIX:  # a closed one has all
        return math.inf
    try:
        return struct.unpack_from("Q", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 128)[0]
    except OSError:  # it was closed just now
        return math.inf


class _Connection:
    """A client that sends and reads in turns, so that neither side waits for the other."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET)
        self.socket.settimeout(PATIENCE)
        try:
            self.socket.connect(address.path or (address.host, address.port))
        except OSError:
            self.socket.close()
            raise
        self.port = "" if address.path else str(self.socket.getsockname()[1])
        self.got, self.sent, self.ended = b"", 0, False

    def send(self, piece):
        self.sent += len(piece)
        self.socket.settimeout(PATIENCE)
        with suppress(BrokenPipeError, ConnectionResetError):  # what the server sent before can still be read
            self.socket.sendall(piece)

    def read(self, patience=0.0):
        """Read what is there, or wait for some bytes; returns whether the end came."""
        self.socket.settimeout(patience)
        while not self.ended:
            try:
                data = self.socket.recv(1 << 20)
            except BlockingIOError:
                break
            except ConnectionResetError:  # the server closed the connection while more was sent to it
                data = b""
            self.got += data
            self.ended = not data
            self.socket.settimeout(0)
        return self.ended
