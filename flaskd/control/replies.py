"""Sends the outcome of a command in each dialect: text, JSON, HTTP, log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flaskd.log.setup import bounded_by
from flaskd.present import as_text, outcome
from flaskd.protocol import Fields, reason_of
from flaskd.text import escaped

# flaskd.protocol.Reply describes the methods.
# ruff: noqa: ARG002, D102

log = logging.getLogger("flaskd.control")

BROKEN_OFF = bounded_by("control commands that broke off")
"""For the log (`extra`): the kind of log lines about commands that failed with a fault of flaskd's own."""

Send = Callable[..., None]
"""``send(data, last=…)`` queues bytes for the client; `last` marks the end of the answer."""


class TextReply:
    """Lines for people. The last one starts with OK or ERR; then the connection closes."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def _line(self, text: str, *, last: bool = False) -> None:
        self._send((text + "\n").encode("utf-8", "backslashreplace"), last=last)

    def progress(self, fields: Fields) -> None:
        self._line(escaped(f".. {as_text(fields)}"))

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        last = outcome("OK", word, fields=fields or {}, hint=hint)
        self._line("\n".join(map(escaped, [*lines, last])), last=True)

    def error(self, code: str, message: str, *, detail: Mapping[str, Any] | None = None) -> None:
        # The last line starts with ERR; all further faults are written before it.
        first, *more = message.split("\n")
        self._line("\n".join(map(escaped, [*more, f"ERR {code} {first}"])), last=True)


class JsonReply:
    """JSON objects, one on each line; the connection stays open."""

    def __init__(self, send: Send, request_id: object) -> None:
        self._send, self.id = send, request_id

    def _tell(self, entry: Fields, *, last: bool) -> None:
        data = json.dumps({"id": self.id, **entry}, default=str) + "\n"
        self._send(data.encode(), last=last)

    def progress(self, fields: Fields) -> None:
        self._tell({"event": "progress", **fields}, last=False)

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        self._tell(
            {"ok": True, "result": word, **(fields or {}), **(detail or {}), **({"hint": hint} if hint else {})},
            last=True,
        )

    def error(self, code: str, message: str, *, detail: Mapping[str, Any] | None = None) -> None:
        self._tell({"ok": False, "error": {"code": code, "message": message, **(detail or {})}}, last=True)


STATUSES = {
    "usage": 400, "forbidden": 403, "unknown-command": 404, "no-record": 404, "method": 405, "not-now": 409,
    "config-invalid": 422, "restart-needed": 422, "not-ready": 503, "unhealthy": 503,
}  # fmt: skip
"""The status of an HTTP answer for an error code (RFC 9110 §15); 500 for all others."""


class HttpReply:
    """One HTTP answer with the JSON object that JSON clients get; then the connection closes.

    Its status tells the outcome, so it is sent when the outcome is known, and there is no progress.
    """

    def __init__(self, send: Send, *, head: bool = False) -> None:
        self.allow: Sequence[str] = ()
        """The methods that are allowed, if the request used another one."""
        self._send, self._head = send, head

    def _answer(self, status: int, entry: Fields, *more: str) -> None:
        body = json.dumps(entry, default=str).encode() + b"\n"
        lines = [
            f"HTTP/1.1 {status} {reason_of(status, 'Error')}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "Connection: close",
            *more,
        ]
        head = "".join(f"{line}\r\n" for line in lines) + "\r\n"
        self._send(head.encode("latin-1") + (b"" if self._head else body), last=True)

    def progress(self, fields: Fields) -> None:
        pass

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        more = {"hint": hint} if hint else {}
        self._answer(200, {"ok": True, "result": word, **(fields or {}), **(detail or {}), **more})

    def error(self, code: str, message: str, *, detail: Mapping[str, Any] | None = None) -> None:
        status = STATUSES.get(code, 500)
        more = (f"Allow: {', '.join(self.allow)}",) if self.allow else ()  # RFC 9110 §15.5.6
        self._answer(status, {"ok": False, "error": {"code": code, "message": message, **(detail or {})}}, *more)


class LogReply:
    """Writes the outcome to the log, because a FIFO cannot reply."""

    def __init__(self, command: str) -> None:
        self._command = " ".join(command.split())  # other blanks, such as newlines, could forge a log line
        self._bounded = bounded_by("outcomes of control commands of the FIFO")

    def progress(self, fields: Fields) -> None:
        log.debug(f"control: {self._command}: {as_text(fields)}", extra=self._bounded)

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        said = outcome(f"control: {self._command}: OK", word, fields=fields or {}, hint=hint)
        # One entry for the whole answer, because the log limits the number of entries.
        log.info("\n".join([said, *(f"control: {line}" for line in lines)]), extra=self._bounded)

    def error(self, code: str, message: str, *, detail: Mapping[str, Any] | None = None) -> None:
        extra = bounded_by("refused control commands of the FIFO")
        log.warning(f"control: {self._command!r} from the FIFO: ERR {code} {message}", extra=extra)
