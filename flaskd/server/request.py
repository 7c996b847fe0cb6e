"""A request, from its first byte until the kernel has taken its answer, and what it needs of its connection."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from flaskd.config.fields import write_size
from flaskd.ledger import Cut, InFlight, visible
from flaskd.log.setup import bounded_by
from flaskd.server.buffers import FREE_SPACE
from flaskd.server.head import Fields, kind_of
from flaskd.server.head import read as read_head
from flaskd.server.parser import Parser
from flaskd.server.request_ids import NO_IDS, Ids
from flaskd.sockets import closed_by_peer
from flaskd.stacks import stack_of

log = logging.getLogger("flaskd.server")

Outcome = Literal["completed", "rejected", "cut", "gone"]


# The properties are described in the channel, which implements them.
# ruff: noqa: D102


class CountsRequests(Protocol):
    """The part of the account that requests use."""

    make_id: Callable[[], str] | None
    """Makes the X-Request-ID of a request that has none; None: requests are given no id."""

    def accepted(self, request: Request) -> None:
        """Count a request as in flight: all of it has been received."""

    def retire(self, request: Request, outcome: Outcome) -> bool:
        """Take a request out of flight; False if it was no longer in flight."""


class Connection(Protocol):
    """The part of a connection that its requests, and the account of requests, use."""

    account: CountsRequests
    socket: Any
    connected: bool
    flushed: int
    """Bytes that the kernel has taken on this connection."""
    total_outbufs_len: int
    """Bytes that wait to be sent."""
    internal: bool
    most_head_bytes: int
    """Most bytes that a request's head may have."""
    fields: Fields | None
    """The fields of the last common request on this connection."""

    @property
    def client(self) -> str: ...

    @property
    def last_activity(self) -> float: ...

    @property
    def too_late(self) -> bool: ...

    @property
    def names_limits(self) -> bool: ...

    @property
    def serving_was_refused(self) -> bool: ...

    def client_told_by(self, headers: Mapping[str, str]) -> str:
        """The client's address from a trusted proxy's headers; empty without such a proxy."""

    def ids_told_by(self, headers: Mapping[str, str]) -> Ids:
        """The ids that a trusted proxy gave a request in its headers."""

    def end_stream(self) -> None:
        """End the stream that is being sent."""

    def give_up(self, request: Request, why: str, sent: int) -> None:
        """Give up waiting for the app to answer a request, unless more than `sent` bytes were written by now."""


_SLOTS = (
    "_client", "adj", "answered", "at_once", "began", "channel", "ends_at", "header_length", "headers", "id", "over",
    "starts_at", "status", "thread", "whole",
)  # fmt: skip
"""Attributes that each request has; for the reason see `flaskd.server.output`."""


class Request(Parser):
    """One request, from its first byte until the kernel has taken its answer."""

    __slots__ = _SLOTS
    error: Any
    expect_continue: bool
    id: int
    at_once: bool
    """Whether the thread that read it answers it: then nothing else is to be found out about it."""
    thread: threading.Thread | None
    _client: str | None
    answered: bool
    over: bool
    """`answered`: the app has finished, or the answer was ended; `over`: its thread has finished, too."""
    whole: bool
    """Whether all of the answer was written."""
    # Other initial values are on the class, because that is quicker than setting them for each request.
    first_byte = complete = 0.0
    """When its first and its last byte came (time.monotonic()), 0 before; `began`: when its answer was begun."""
    kind = ""
    line: dict[str, str] | None = None
    """What an environ has of its request line; None unless it is a common request."""
    plain = False
    """Whether it is a common request after whose answer the connection stays open, and which is not HEAD."""
    row = 0
    """The number of its row on the worker's board (`flaskd.server.board`); 0 without a board, -1 without a row."""
    its_turn = 0.0
    """When the last answer before it on its connection had been given; 0 if there was none."""
    more_until = 0.0
    """The time.monotonic() moment until which the app has asked for time (`flaskd.more_time`)."""
    refused_by = ""
    """The limit because of which it is refused before it began; empty if none."""
    rejected = here = waits = False
    """`here`: the loop itself answers it. `waits`: its thread waits for the client to read on."""
    fault = ""
    """How a client that stays connected can see that the answer is incomplete; empty if it is complete."""
    given_id = ""
    """The id that the app and the client are told (`log.request_id`); empty if they are told none."""
    _ids: Ids | None = None

    def __init__(self, channel: Connection, adj: Any) -> None:
        self.adj, self.headers, self.channel = adj, {}, channel  # instead of the base classes' slower __init__
        self.id = self.header_length = self.starts_at = self.ends_at = 0
        self.began, self.status, self.thread, self._client = 0.0, "", None, None
        self.answered = self.over = self.whole = self.at_once = False

    def take_common(self, data: bytes, now: float) -> bool:
        """If `data`, received at `now`, is exactly one common request (`flaskd.server.head`), read and count it.

        `now` is a time.monotonic() moment. Returns False, and does nothing, if it is anything else.
        """
        channel, before = self.channel, self.channel.fields
        if (head := read_head(data, before)) is None:
            return False
        line, fields, at = head
        length = fields.length
        if (
            at + length != len(data)  # a part of it has not come yet, or more has come
            or at > channel.most_head_bytes
            or (length and length > self.adj.max_request_body_size)
        ):
            return False
        if fields is not before:
            channel.fields = fields
        self.command, self.request_uri, self.path, self.query, self.kind, self.line, wants_body = line
        self.version, self.headers = "1.1", fields.headers
        self.content_length, self.short_body = length, data[at:]
        self.begun = self.headers_finished = self.completed = True
        self.first_byte = self.complete = now
        account = channel.account
        if account.make_id is not None:
            self._take_id(account.make_id)
        else:
            self.plain = wants_body and fields.keeps
        if not channel.internal:
            account.accepted(self)
        return True

    def received(self, data: bytes) -> int:
        """Parse on; returns how many bytes belong to this request. Once it is complete it is in flight."""
        if not self.begun:
            self.first_byte = time.monotonic()
        try:
            consumed = super().received(data)
        except OSError as error:  # from the body's temporary file
            consumed = len(data)
            log.error(f"cannot keep the body of {self.snapshot()}: {error}; answered with 507: {FREE_SPACE}")  # noqa: TRY400
            self.refuse(507, "there is no room for the body of the request")
        if self.exceeded and self.channel.names_limits:
            self._name_limit()
        if self.headers_finished and self.expect_continue and not self.completed and self.channel.too_late:
            # Refused before the client sends the body for nothing (RFC 9110 §10.1.1).
            self.rejected = self.completed = True
            self.headers["HTTP_CONNECTION"] = "close"  # the client may send the body all the same
        if self.completed:
            self._complete()
        return consumed

    def _complete(self) -> None:
        # The client must not be told to continue: waitress would wait for ever for the body of a request that has none,
        # or ask for a body that was refused already.
        self.expect_continue = False
        self.kind = kind_of(self.command, self.path)
        account = self.channel.account
        if account.make_id is not None and not self.given_id:
            self._take_id(account.make_id)
        if not self.id and not self.channel.internal:
            account.accepted(self)

    def time_out(self, why: str) -> None:
        """Refuse it with 408, because it comes too slowly (RFC 9110 §15.5.9)."""
        self.refuse(408, why)
        self._complete()

    def _take_id(self, make: Callable[[], str]) -> None:
        """Set the request's id: the one from a trusted proxy, or else a new one from `make`."""
        ids = self.ids
        if not ids.request_id:
            self._ids = ids = Ids(make(), ids.traceparent)
        self.given_id = ids.request_id

    def _name_limit(self) -> None:
        """Write to the log which setting's limit the request exceeds."""
        what = f"{self.command} {visible(self.target.partition('?')[0])}" if self.command else "a request line"
        setting = f"server.{self.exceeded} ({write_size(getattr(self.adj, self.exceeded))})"
        log.warning(
            f"refused {what} of {self.client} with {self.error.code}: more than {setting} allows",
            extra=bounded_by("requests that are larger than a limit"),
        )

    def close(self) -> None:
        """Free the body. If no thread has run the request, it is over: the one before it has ended the connection."""
        super().close()
        if self.thread is None:
            self.channel.account.retire(self, "gone")

    @property
    def age(self) -> float:
        """Seconds since its first byte came."""
        return time.monotonic() - self.first_byte

    @property
    def client(self) -> str:
        """The client's address: from a trusted proxy's headers, or else the peer's."""
        if self._client is None and self.headers_finished:
            channel = self.channel
            self._client = channel.client_told_by(self.headers) or channel.client
        return self._client or self.channel.client

    @property
    def ids(self) -> Ids:
        """Its ids: from a trusted proxy, or made by flaskd."""
        if self._ids is not None:
            return self._ids
        headers = self.headers
        if "HTTP_X_REQUEST_ID" in headers or "HTTP_TRACEPARENT" in headers:
            self._ids = ids = self.channel.ids_told_by(headers)
            return ids
        return NO_IDS

    @property
    def sent(self) -> int:
        """Bytes of its answer that the kernel has taken, including the header."""
        flushed = self.channel.flushed
        return max(0, (min(flushed, self.ends_at) if self.answered else flushed) - self.starts_at) if self.began else 0

    @property
    def phase(self) -> str:
        """``receiving``, ``queued``, ``running`` or ``sending``."""
        if self.answered or self.waits:
            return "sending"
        if self.thread is not None:
            return "running"
        return "queued" if self.completed else "receiving"

    @property
    def target(self) -> str:
        """The request target as the client wrote it; empty while it is not known."""
        return self.request_uri

    def snapshot(self, *, stack: bool = False, gone: bool | None = None) -> InFlight:
        """A description of the request at this moment (any thread); with `stack`, with the stack of its thread.

        `gone` says whether the client has left; None: look now.
        """
        thread = None if self.answered or self.waits else self.thread
        return InFlight(
            id=self.id,
            client=self.client,
            method=self.command or "?",  # the parser accepts a token only
            path=visible(self.target.partition("?")[0]),
            age=self.age,
            phase=self.phase,
            thread=thread.name if thread else "",
            stack=stack_of(thread) if stack and thread else "",
            gone=closed_by_peer(self.channel.socket) if gone is None else gone,
            sent=self.sent,
            request_id=self.ids.request_id,
            traceparent=self.ids.traceparent,
        )

    def cut(self, reason: str) -> Cut:
        """The ledger's entry for cutting the request now."""
        gone = None if self.channel.connected else False
        return Cut(**vars(self.snapshot(stack=True, gone=gone)), reason=reason)

    def access_fields(self) -> dict[str, Any]:
        """The fields of its line in the access log; `took` in seconds, `bytes` without the header."""
        headers, code, age = self.headers, self.status[:3], time.monotonic() - self.first_byte
        fields: dict[str, Any] = {
            "id": self.id,
            "client": self.client,
            "time": time.time() - age,
            "method": self.command or "-",
            "target": self.request_uri or "-",
            "protocol": f"HTTP/{self.version}",
            "status": int(code) if code.isdecimal() else 0,
            "bytes": max(0, self.sent - self.header_length),
            "referer": headers.get("HTTP_REFERER", ""),
            "agent": headers.get("HTTP_USER_AGENT", ""),
            "took": round(age, 6),
        }
        if (ids := self.ids) is not NO_IDS:
            fields |= ids.fields()
        return fields
