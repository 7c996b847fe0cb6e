"""Reading a request strictly (RFC 9112), in the place of waitress' parser.

What could be read in two ways is refused, so that a proxy in front and this server never see different requests in the
same bytes. After a refusal the connection closes, and nothing behind the request is read. A request is refused at its
first wrong line; bytes that can never become a request, such as a TLS handshake, are answered at once.
"""

from __future__ import annotations

import io
import logging
import re
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

from waitress.parser import HTTPRequestParser
from waitress.receiver import FixedStreamReceiver
from waitress.utilities import Error

from flaskd.server.buffers import BodyBuffer
from flaskd.server.chunked import ChunkedBody
from flaskd.server.head import environ_key
from flaskd.server.lines import LENGTH, Lines, RefusedError, field, is_host

log = logging.getLogger("flaskd.server")

_LONGEST_METHOD = 64
_METHOD = rf"[!#$%&'*+\-.^_`|~0-9A-Z]{{1,{_LONGEST_METHOD}}}+"
"""A token without small letters: methods are case-sensitive, so "get" is not GET."""
_BEGINNING = re.compile(rf"\r?\Z|{_METHOD}(?: |\Z)".encode())
"""The first bytes of an unfinished request line or blank line."""
_TARGET = re.compile(r"[!\"$-~]++")
"""Visible ASCII characters without ``#``: a target has no fragment (RFC 9112 §3.2)."""
_VERSION = re.compile(r"HTTP/([0-9])\.([0-9])")
_ABSOLUTE = re.compile(r"https?://([^/?]*+)(.*)", re.IGNORECASE)
_MOST_BLANK_LINES = 10
"""Most blank lines before a request, as in Apache; RFC 9112 §2.2 asks for at least one."""
_SINGLE = {"HTTP_HOST": "Host", "CONTENT_LENGTH": "Content-Length", "CONTENT_TYPE": "Content-Type"}
"""Headers that may come once only: of two, it would not be clear which one is meant."""


class Parser(HTTPRequestParser):  # type: ignore[misc]  # waitress is untyped
    """One request, read piece by piece; its attributes are those of waitress' parser, which tasks use.

    `received` raises OSError if the body cannot be stored.
    """

    command = path = query = request_uri = proxy_netloc = ""
    exceeded = ""
    """The setting whose limit the request exceeds; empty if none."""
    begun = False
    """Whether more has come than the blank lines that may stand before a request."""
    _lines: Lines | None = None
    _fields: dict[str, list[str]]
    _blank_lines = 0
    short_body = b""
    """The body of a common request; used where `body_rcv` is None."""

    headers: dict[str, str]
    """By their names in an environ (PEP 3333); waitress' own parser leaves out ``HTTP_``."""

    def get_body_stream(self) -> Any:
        """The file that the app reads the body from."""
        body: Any = self.body_rcv
        return io.BytesIO(self.short_body) if body is None else body.getfile()

    def received(self, data: bytes) -> int:
        """Read on; returns how many bytes of the data belong to this request.

        Afterwards `completed` says whether the request is complete, and `error` whether it is refused.
        """
        if self.completed:
            return 0
        try:
            return self._take_body(data) if self.headers_finished else self._take_head(data)
        except RefusedError as refused:
            self.exceeded = refused.limit
            self.refuse(refused.status, refused.why)
        except OSError:  # from the body's temporary file
            raise
        except Exception:
            log.exception("cannot read a request: it is refused")
            self.refuse(400, "cannot read this request")
        return len(data)  # after a refusal it is not known where another request would begin

    def refuse(self, status: int, why: str) -> None:
        """Have the request answered with this status and reason; the connection then closes."""
        self.error = Error(why)
        self.error.code, self.error.reason = status, HTTPStatus(status).phrase
        self.completed = True

    # --- head ---

    def _take_head(self, data: bytes) -> int:
        at, most = 0, self.adj.max_request_header_size
        if (lines := self._lines) is None:
            lines, self._fields = Lines(), {}
            self._lines = lines
        while at < len(data) and not self.headers_finished:
            line, at = lines.take(data, at)
            if line is None:
                beginning = bytes(lines.begun[: _LONGEST_METHOD + 1])
                if not self.command and not _BEGINNING.match(beginning):
                    raise RefusedError(400, "expected a request such as GET /path HTTP/1.1")
                self.begun = self.begun or beginning not in {b"", b"\r"}
            else:
                self.header_bytes_received += len(line) + 2
            if self.header_bytes_received + len(lines.begun) > most:
                long_target = line is None and not self.command  # RFC 9112 §3
                why = f"expected {'a request line' if long_target else 'headers'} of at most {most} bytes"
                raise RefusedError(414 if long_target else 431, why, "max_request_header_size")
            if line is not None:
                self._take_line(line)
        return at

    def _take_line(self, line: bytes) -> None:
        if self.command:
            if line:
                self._take_field(line)
            else:
                self._end_head()
        elif line:
            self.begun = True
            self._take_request_line(line.decode("latin-1"))
        else:
            self._blank_lines += 1
            if self._blank_lines > _MOST_BLANK_LINES:
                raise RefusedError(400, f"expected at most {_MOST_BLANK_LINES} blank lines before a request")

    def _take_request_line(self, line: str) -> None:
        method, _, rest = line.partition(" ")
        if not re.fullmatch(_METHOD, method):
            raise RefusedError(400, "expected a request such as GET /path HTTP/1.1")
        self.command = method
        target, _, protocol = rest.partition(" ")
        if not _TARGET.fullmatch(target):
            raise RefusedError(400, "expected a request target of visible ASCII characters, without a fragment")
        self.request_uri = target
        version = _VERSION.fullmatch(protocol)
        if version is None:
            raise RefusedError(400, "expected a request line that ends with HTTP/1.1 or HTTP/1.0")
        if version[1] != "1":
            raise RefusedError(505, "expected HTTP/1.1 or HTTP/1.0")
        self.version = "1.0" if version[2] == "0" else "1.1"  # RFC 9110 §2.5: a higher minor version is read as 1.1
        self._take_target(target)

    def _take_target(self, target: str) -> None:
        """Read the request target in any of its forms (RFC 9112 §3.2); the path always begins with a slash."""
        if self.command == "OPTIONS" and target == "*":
            target = "/"  # means the server as a whole, which a WSGI environ cannot say
        elif absolute := _ABSOLUTE.fullmatch(target):
            if not is_host(absolute[1]):
                raise RefusedError(400, "expected a valid host in the request target")
            self.proxy_netloc = absolute[1]
            target = absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]
        if not target.startswith("/") or self.command == "CONNECT":  # CONNECT is for proxies
            raise RefusedError(400, "expected a request target that begins with a slash, or an http URL")
        path, _, self.query = target.partition("?")
        self.path = unquote_to_bytes(path).decode("latin-1")
        if "\0" in self.path:  # RFC 3986 §7.3
            raise RefusedError(400, "expected a path without NUL")

    def _take_field(self, line: bytes) -> None:
        name, value = field(line)
        if b"_" not in name:  # the environ could not tell it from the name with a hyphen
            key = environ_key(name.decode("latin-1"))
            self._fields.setdefault(key, []).append(value.decode("latin-1"))

    # --- what the head says ---

    def _end_head(self) -> None:
        fields = self._fields
        for key, name in _SINGLE.items():
            if len(fields.get(key, ())) > 1:
                raise RefusedError(400, f"expected one {name} header, got several")
        self.headers.update({key: ", ".join(values) for key, values in fields.items()})
        self.headers_finished = True
        self._check_host()
        self._begin_body()
        self.completed = self.body_rcv is None
        if self.version == "1.1":
            self.expect_continue = "100-continue" in _members(self.headers.get("HTTP_EXPECT", ""))

    def _check_host(self) -> None:
        host = self.headers.get("HTTP_HOST")
        if host is None and self.version == "1.1":  # RFC 9112 §3.2
            raise RefusedError(400, "HTTP/1.1 requests need a Host header")
        if host and not is_host(host):
            raise RefusedError(400, "expected a valid host in the Host header")
        if self.proxy_netloc:
            self.headers["HTTP_HOST"] = self.proxy_netloc  # RFC 9112 §3.2.2

    def _begin_body(self) -> None:
        """Find out where the body ends (RFC 9112 §6.3); refuse a request in which that is ambiguous."""
        adj, length = self.adj, self.headers.get("CONTENT_LENGTH")
        coding = self.headers.pop("HTTP_TRANSFER_ENCODING", None)
        if coding is not None:
            if self.version == "1.0" or length is not None:
                raise RefusedError(400, "expected Transfer-Encoding in HTTP/1.1 and without Content-Length")
            codings = [each.strip(" \t").lower() for each in coding.split(",")]
            if codings[-1] != "chunked" or "chunked" in codings[:-1]:
                raise RefusedError(400, "expected a Transfer-Encoding that ends with chunked, once")
            if len(codings) > 1:
                raise RefusedError(501, "expected no other Transfer-Encoding than chunked")
            self.chunked = True
            self.body_rcv = ChunkedBody(
                BodyBuffer(adj.inbuf_overflow), adj.max_request_body_size, adj.max_request_header_size
            )
        elif length is not None:
            if not LENGTH.fullmatch(length):
                raise RefusedError(400, "expected a Content-Length of at most 18 digits")
            self.content_length = int(length)
            if self.content_length > adj.max_request_body_size:
                why = f"expected a body of at most {adj.max_request_body_size} bytes"
                raise RefusedError(413, why, "max_request_body_size")
            if self.content_length:
                self.body_rcv = FixedStreamReceiver(self.content_length, BodyBuffer(adj.inbuf_overflow))

    # --- body ---

    def _take_body(self, data: bytes) -> int:
        body: Any = self.body_rcv
        consumed: int = body.received(data)
        self.body_bytes_received += consumed
        if body.completed:
            self.completed = True
            if self.chunked:
                self.headers["CONTENT_LENGTH"] = str(len(body))  # for an app that does not know chunked bodies
        return consumed


def _members(value: str) -> set[str]:
    """The members of a comma-separated list, without their parameters (RFC 9110 §5.6.1)."""
    return {member.partition(";")[0].strip(" \t").lower() for member in value.split(",")}
