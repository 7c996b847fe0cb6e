"""How the outcome of a command is told, in each dialect."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence

from flaskd.protocol import Fields, as_text

# What the methods mean is said once, in flaskd.protocol.Reply.
# ruff: noqa: ARG002, D102

log = logging.getLogger("flaskd.control")

Send = Callable[..., None]
"""``send(data, last=…)``: puts bytes on their way to the client; `last` ends the answer."""


class TextReply:
    """Lines for people; the last one starts with OK or ERR, then the connection closes."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def _line(self, text: str, *, last: bool = False) -> None:
        self._send((text + "\n").encode("utf-8", "backslashreplace"), last=last)

    def progress(self, fields: Fields) -> None:
        self._line(f".. {as_text(fields)}")

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        last = " ".join(filter(None, ["OK", word, as_text(fields or {}), f"({hint})" if hint else ""]))
        self._line("\n".join([*lines, last]), last=True)

    def error(self, code: str, message: str) -> None:
        # The last line starts with ERR; further faults go before it.
        first, *more = message.splitlines() or [""]
        self._line("\n".join([*more, f"ERR {code} {first}"]), last=True)


class JsonReply:
    """One JSON object a line; the connection is kept."""

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

    def error(self, code: str, message: str) -> None:
        self._tell({"ok": False, "error": {"code": code, "message": message}}, last=True)


class LogReply:
    """A FIFO gives no reply, so the outcome goes to the log."""

    def __init__(self, command: str) -> None:
        self._command = command.strip()

    def progress(self, fields: Fields) -> None:
        log.debug(f"control: {self._command}: {as_text(fields)}")

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        pairs = as_text(fields or {})
        log.info(" ".join(filter(None, [f"control: {self._command}: OK", word, pairs, f"({hint})" if hint else ""])))
        for line in lines:
            log.info(f"control: {line}")

    def error(self, code: str, message: str) -> None:
        log.warning(f"control: {self._command!r} from the FIFO: ERR {code} {message}")
