"""A connection to the control socket: reads bytes and commands, sends bytes."""

from __future__ import annotations

import json
import logging
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from flaskd.control.commands import Command, MethodError, from_fields, from_http, from_words
from flaskd.control.peer import Peer
from flaskd.control.replies import BROKEN_OFF, HttpReply, JsonReply, Send, TextReply
from flaskd.errors import FlaskdError, UsageError
from flaskd.protocol import MAX_LINE, Reply
from flaskd.server.lines import RefusedError, field, is_host

log = logging.getLogger("flaskd.control")

MAX_OUTPUT = 1 << 20
"""How many bytes of unread answers a client may have before it is dropped."""
MAX_PENDING = 32
"""How many commands of one client may wait for their outcome."""
_MAX_HEAD = 16 * 1024
_MAX_FIELDS = 100
_HTTP = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.([0-9])\r?\n")
_END_OF_HEAD = re.compile(rb"\n\r?\n")

Execute = Callable[[Command, Reply], None]


class Connection:
    """One client; `execute` gets its commands. Any thread may queue output; only the control thread does the rest."""

    def __init__(self, sock: socket.socket, execute: Execute, wake: Callable[[], None]) -> None:
        self.sock = sock
        """Calls on it do not block because of MSG_DONTWAIT; making it non-blocking would take another system call."""
        self.peer = Peer.of(sock)
        self.pending = 0
        """How many commands have no outcome yet."""
        self.ended = False
        """Whether the client sends no more commands."""
        self.closing = False
        """Whether nothing more is read from it."""
        self.last_heard = time.monotonic()
        self._execute, self._wake = execute, wake
        self._inbox = bytearray()
        self._out = bytearray()
        self._lock = threading.Lock()
        self._overflowed = False
        self._json = False
        self._head: tuple[str, str, int, int] | None = None
        """Of an HTTP request whose head has come: method, target, length of the body, and where the body begins."""
        self._looked = 0
        """How many bytes were searched for the end of the head."""

    # --- in ---

    def read(self) -> None:
        """Read what has come."""
        try:
            data = self.sock.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            self.ended = self.closing = True
            return
        self.last_heard = time.monotonic()
        self._inbox += data
        self.ended = not data

    def work(self) -> bool:
        """Carry out some of the complete commands; True if there may be more, and other clients come first."""
        for _ in range(MAX_PENDING):
            if not self._inbox or self.closing or self.has_output or self.pending >= MAX_PENDING or not self._take():
                return False
        return True

    @property
    def wants_to_read(self) -> bool:
        """Whether more commands may be read."""
        full = len(self._inbox) > _MAX_HEAD + MAX_LINE  # first carry out what has come
        return not (full or self.ended or self.closing or self.pending >= MAX_PENDING or self.has_output)

    def _take(self) -> bool:
        """Carry out the next command if it is complete; False if there is none."""
        if not self._json and self._inbox[:1].isupper() and not self._is_a_line():
            return self._take_http()
        if self.ended and self._inbox and not self._inbox.endswith(b"\n"):  # the last line needs no newline
            self._inbox += b"\n"
        newline = self._inbox.find(b"\n")
        if (len(self._inbox) if newline < 0 else newline) > MAX_LINE:
            self._begin()
            reply = JsonReply(self._one_answer(), None) if self._json else TextReply(self._one_answer())
            reply.error("usage", f"a command has at most {MAX_LINE} bytes")
            self.closing = True
        elif newline >= 0:
            line = bytes(self._inbox[:newline])
            del self._inbox[: newline + 1]
            self._take_line(line.strip())
        return newline >= 0

    def _is_a_line(self) -> bool:
        """Whether it is a command line that only looks like HTTP at first, such as ``STATUS``."""
        line, newline, _ = bytes(self._inbox[: MAX_LINE * 2]).partition(b"\n")
        return (bool(newline) or self.ended) and not _HTTP.match(line + b"\n")

    def _take_line(self, line: bytes) -> None:
        self._json = self._json or line.startswith(b"{")
        if self._json and not line:
            return
        self._begin()
        if self._json:
            reply = JsonReply(self._one_answer(), None)
            self._run(reply, lambda: self._from_json(line, reply))
        else:
            self._say_no_more()
            self._run(
                TextReply(self._one_answer()), lambda: from_words(line.decode("utf-8", "replace").split(), self.peer)
            )

    def _begin(self) -> None:
        with self._lock:  # other threads give outcomes
            self.pending += 1

    def _say_no_more(self) -> None:
        """Read no more: text and HTTP have one command per connection, which stays open until the outcome is sent."""
        self.ended = True
        self._inbox.clear()

    def _from_json(self, line: bytes, reply: JsonReply) -> Command:
        try:
            request: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"expected a JSON object on one line: {error}") from error
        if not isinstance(request, dict):
            raise UsageError("expected a JSON object on one line")
        request_id = request.pop("id", None)
        if isinstance(request_id, bool) or not isinstance(request_id, int | str | None):  # NaN is not JSON
            raise UsageError('expected "id" to be text, a whole number or null')
        reply.id = request_id
        return from_fields(request.pop("cmd", None), request, self.peer)

    def _take_http(self) -> bool:
        """Answer one HTTP request once its head and body have come; then the connection closes."""
        reply = HttpReply(self._one_answer(), head=self._inbox.startswith(b"HEAD "))
        try:
            command = self._http_command()
        except UsageError as error:
            self._begin()
            self._say_no_more()
            if isinstance(error, MethodError):
                reply.allow = error.allowed
            reply.error(error.code, str(error))
        else:
            if command is not None:
                self._begin()
                self._say_no_more()
                self._run(reply, lambda: command)
        return False

    def _http_command(self) -> Command | None:
        """The command of the HTTP request; None until it is complete. Raises UsageError."""
        if self._head is None:
            end = _END_OF_HEAD.search(self._inbox, max(0, self._looked - 3))  # a part of it may have come before
            self._looked = len(self._inbox)
            if end is None and not self.ended and len(self._inbox) <= _MAX_HEAD:
                return None
            if end is None or end.end() > _MAX_HEAD:
                raise UsageError(f"expected a whole request head of at most {_MAX_HEAD} bytes")
            self._head = *_read_head(bytes(self._inbox[: end.end()])), end.end()
        method, target, length, begin = self._head
        body = bytes(self._inbox[begin : begin + length])
        if len(body) == length:
            return from_http(method, target, body, self.peer)
        if not self.ended:
            return None
        raise UsageError(f"expected a body of {length} bytes, got {len(body)}")

    def _run(self, reply: Reply, read: Callable[[], Command]) -> None:
        try:
            self._execute(read(), reply)
        except FlaskdError as error:
            reply.error(error.code, str(error))
        except BaseException as error:  # whatever failed, the client gets an answer
            log.exception("cannot carry out a control command", extra=BROKEN_OFF)
            reply.error(FlaskdError.code, f"cannot carry out the command: {type(error).__name__}; the log says more")

    # --- out ---

    def _one_answer(self) -> Send:
        """A function that sends one answer; what is given to it after the answer's end is dropped."""
        over = False

        def send(data: bytes, *, last: bool) -> None:
            nonlocal over
            if not over:
                over = last
                self._send(data, last=last)

        return send

    def _send(self, data: bytes, *, last: bool) -> None:
        """Queue output; any thread may call it. A client that does not read is dropped, so the queue has a limit."""
        with self._lock:
            if len(self._out) <= MAX_OUTPUT:
                self._out += data
            else:
                self._overflowed = True
            if last:
                self.pending -= 1
                self.closing = self.closing or not self._json
        self._wake()

    @property
    def has_output(self) -> bool:
        """Whether there is output that is not sent."""
        return bool(self._out)

    @property
    def overflowed(self) -> bool:
        """Whether output was dropped because the client left too much unread."""
        return self._overflowed

    def flush(self) -> None:
        """Send what the kernel accepts now."""
        with self._lock:
            if self._out:
                try:
                    sent = self.sock.send(self._out, socket.MSG_DONTWAIT)
                    del self._out[:sent]
                except BlockingIOError:
                    pass
                except OSError:
                    self._out.clear()
                    self.ended = self.closing = True

    @property
    def gone(self) -> bool:
        """Whether the client has closed its connection (POLLHUP, poll(2)), and not only its sending side."""
        poll = select.poll()
        poll.register(self.sock, 0)
        return bool(poll.poll(0))

    @property
    def done(self) -> bool:
        """Whether neither side has anything more to send."""
        return not self._out and (self.closing or (self.ended and not self.pending and not self._inbox))


def _read_head(head: bytes) -> tuple[str, str, int]:
    """The method, the target and the length of the body; raises UsageError."""
    first = _HTTP.match(head)
    if first is None:
        raise UsageError("expected a request line such as GET /status HTTP/1.1")
    fields: dict[bytes, list[str]] = {}
    lines = head[first.end() :].replace(b"\r\n", b"\n").removesuffix(b"\n\n").split(b"\n")
    if len(lines) > _MAX_FIELDS:
        raise UsageError(f"expected at most {_MAX_FIELDS} header lines")
    for line in filter(None, lines):
        try:
            name, value = field(line)
        except RefusedError as error:
            raise UsageError(error.why) from error
        fields.setdefault(name.lower(), []).append(value.decode("latin-1"))
    for key, shown in ((b"host", "Host"), (b"content-length", "Content-Length")):
        if len(fields.get(key, ())) > 1:  # it is not clear which one is meant: RFC 9112 §3.2, RFC 9110 §8.6
            raise UsageError(f"expected one {shown} header, got several")
    (host,) = fields.get(b"host", [""])
    if (first[3] != b"0" and b"host" not in fields) or (host and not is_host(host)):  # RFC 9112 §3.2
        raise UsageError("HTTP/1.1 requests need a Host header, and a valid one")
    if b"transfer-encoding" in fields:
        raise UsageError("expected a body with a Content-Length, or none")
    (length,) = fields.get(b"content-length", ["0"])
    if not re.fullmatch("[0-9]{1,6}", length) or int(length) > MAX_LINE:
        raise UsageError(f"expected a body of at most {MAX_LINE} bytes")
    return first[1].decode(), first[2].decode("latin-1"), int(length)
