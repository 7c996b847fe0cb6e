"""What stands before the body of an answer: status and headers, checked as the app gives them, and written.

Most answers of an app have their status and headers in common, so what was checked and written once is kept.
"""

from __future__ import annotations

import functools
import operator
import re
from dataclasses import dataclass
from typing import Any

from waitress.task import hop_by_hop
from waitress.utilities import build_http_date

from flaskd.server.lines import TOKEN

ID_HEADER = "X-Request-ID"
"""An app that sets this header itself gives X-Request-Id."""
WITHOUT_BODY = ("1", "204", "304")
"""How the statuses begin of answers that have no body (RFC 9110 §6.4.1)."""
SENT_TOGETHER = 1 << 16
"""Most bytes of a body that are copied behind the header, to be sent with it in one piece."""

_STATUS = re.compile(r"[1-9][0-9]{2} [^\x00-\x08\x0a-\x1f\x7f]*")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NAME = re.compile(TOKEN)
_LENGTH = re.compile(r" *[0-9]{1,18} *")
_DATE = "\r\nDate: %(date)s\r\n"
"""The line of the date in a template; no header of an app's reads so there, because its percent signs are doubled."""
_DATE_LENGTH = len(build_http_date(0))
_by_name = operator.itemgetter(0)


@dataclass(frozen=True, slots=True)
class Given:
    """What an app said of its answer, checked; and the header of the answer, if that needs nothing but its date."""

    status: str
    headers: tuple[tuple[str, str], ...]
    """Without Content-Length, and with their names as they are usually written."""
    length: int | None
    """Content-Length; None if the app gave none."""
    plain: bool
    """Whether `before`, the date, `after` and the body are the whole answer to a plain request, on HTTP/1.1, after
    which the connection stays open."""
    before: bytes
    after: bytes
    header_length: int
    """Bytes of the header, with its date."""


@functools.lru_cache(maxsize=512)
def checked(status: Any, headers: tuple[Any, ...], ident: str | None, served_by: str) -> Given:
    """Check what an app gave to `start_response` (PEP 3333); raises TypeError or ValueError.

    `ident` and `served_by` are what the server says of itself in each answer, or empty.
    """
    status, given, length = _status(status), list[tuple[str, str]](), None
    for name, value in headers:
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(f"cannot answer with the header {(name, value)!r}: an app gives strings (PEP 3333)")
        if not value.isprintable() and _CONTROL.search(value):
            raise ValueError(f"cannot answer with the header {name}: {value!r} has a control character")
        if (written := _written(name)) == "Content-Length":
            length = _length(value)
        else:
            given.append((written, value))
    headers, before, date, after = tuple(given), "", "", ""
    if length is not None and length <= SENT_TOGETHER and not status.startswith(WITHOUT_BODY):
        text = template(f"HTTP/1.1 {status}", headers, "Content-Length", "", ident, served_by, "")
        before, date, after = text.partition(_DATE)
        before, after = before % {"length": length} + "\r\nDate: ", "\r\n" + after % {"length": length}
    size = len(before) + _DATE_LENGTH + len(after)
    return Given(status, headers, length, bool(date), before.encode("latin-1"), after.encode("latin-1"), size)


@functools.lru_cache(maxsize=256)
def template(  # noqa: PLR0917 - a cache is slower with keyword arguments
    start: str,
    given: tuple[tuple[str, str], ...],
    framing: str,
    connection: str,
    ident: str | None,
    served_by: str,
    names_it: str,
) -> str:
    """Status line and headers, sorted by name, with placeholders for `length`, `date` and `id`.

    `framing` is the name of the header that frames the body, or empty; `names_it` is the name of the header with the
    request's id; it is empty if the client is told none.
    """
    headers = [(name.replace("%", "%%"), value.replace("%", "%%")) for name, value in given]
    names = dict(headers)
    if framing:
        headers.append((framing, "%(length)d" if framing == "Content-Length" else "chunked"))
    own = {"Server": (ident or "").replace("%", "%%"), "X-Served-By": served_by.replace("%", "%%")}
    for name, value in (("Connection", connection), *own.items(), ("Date", "%(date)s")):
        if value and name not in names:
            headers.append((name, value))
    if names_it and "X-Request-Id" not in names:
        headers.append((names_it, "%(id)s"))
    headers.sort(key=_by_name)
    return "\r\n".join([start.replace("%", "%%"), *map(": ".join, headers), "", ""])


@functools.lru_cache(maxsize=1024)
def _written(name: str) -> str:
    """A header's name in its usual spelling; raises ValueError for one that an app may not set."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"cannot answer with a header of the name {name!r} (RFC 9110 §5.1)")
    if name.lower() in hop_by_hop:
        raise ValueError(f"cannot answer with the header {name}: it is the server's to give (PEP 3333)")
    return "-".join(map(str.capitalize, name.split("-")))


@functools.lru_cache(maxsize=1024)
def _length(value: str) -> int:
    """The number of bytes in a Content-Length; raises ValueError."""
    if not _LENGTH.fullmatch(value):
        raise ValueError(f"cannot answer with the Content-Length {value!r}: expected a number of bytes")
    return int(value)


@functools.lru_cache(maxsize=256)
def _status(status: str) -> str:
    """A status line's code and reason; the app may leave out the reason and the blank before it (RFC 9112 §4)."""
    if not isinstance(status, str):
        raise TypeError(f"cannot answer with the status {status!r}: an app gives a string (PEP 3333)")
    written = status + " " if re.fullmatch("[1-9][0-9]{2}", status) else status
    if not _STATUS.fullmatch(written):
        raise ValueError(f"cannot answer with the status {status!r}: expected one such as 200 OK")
    return written
