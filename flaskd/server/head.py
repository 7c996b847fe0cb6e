"""Reading the head of a common request in one pass, with two regular expressions of `flaskd.server.lines`' grammar.

A common request has come complete and alone: HTTP/1.1, a path as its target, well-formed fields, each of them once, no
body or one that came with the head. All other requests, and all faulty ones, are read by `flaskd.server.parser` from
the same bytes.

A client often repeats the same fields in all its requests, and asks for few paths, so both are cached.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from flaskd.server.lines import LENGTH, TOKEN, is_host

_LINE = re.compile(r"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[!\"$-~]*+) HTTP/1\.1")
_FIELDS = re.compile(rf"((?>(?:\r\n{TOKEN}: [!-~\x80-\xff][\t -~\x80-\xff]*+(?<![ \t]))+))\r\n\r\n")
"""The field lines and the blank line; each field has one blank after its colon, and none at its end."""
_UNCOMMON = frozenset({"HTTP_TRANSFER_ENCODING", "HTTP_EXPECT", "_"})
_MOST_LINES = 256
"""How many request lines are cached."""

_is_host = functools.lru_cache(maxsize=1024)(is_host)


class Line(NamedTuple):
    """A request line, as an environ has it, and the kind of the request (`kind_of`)."""

    method: str
    target: str
    path: str
    query: str
    kind: str
    environ: dict[str, str]
    """What an environ has of it. All requests with this line share the dictionary, so it must not be changed."""
    wants_body: bool
    """Whether the answer may have a body: false for HEAD."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a head: their bytes, from the end of the request line to the blank line, and their meaning."""

    block: bytes
    headers: dict[str, str]
    """By their names in an environ. Requests with the same fields share this dictionary, so it must not be changed."""
    length: int
    """The length of the body in bytes."""
    keeps: bool
    """Whether the client does not ask for the connection to be closed."""


def read(data: bytes, before: Fields | None) -> tuple[Line, Fields, int] | None:
    """Read the head of a common request at the beginning of `data`; None if the request is not common.

    Returns the request line, the fields, and the offset at which the body begins. `before` are the fields of the last
    common request on the connection.
    """
    end = data.find(b"\r\n")
    if end < 0 or (line := _line(data[:end])) is None:
        return None
    if before is not None and data.startswith(before.block, end):
        return line, before, end + len(before.block)
    fields = _fields(data[end:].decode("latin-1"))
    return None if fields is None else (line, fields, end + len(fields.block))


@functools.lru_cache(maxsize=_MOST_LINES)
def _line(line: bytes) -> Line | None:
    if (match := _LINE.fullmatch(line.decode("latin-1"))) is None:
        return None
    method, target = match.groups()
    path, _, query = target.partition("?")
    if "%" in path:
        path = unquote_to_bytes(path).decode("latin-1")
        if "\0" in path:
            return None
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "REQUEST_URI": target, "QUERY_STRING": query}
    return Line(method, target, path, query, kind_of(method, path), environ, method != "HEAD")


def _fields(text: str) -> Fields | None:
    if (match := _FIELDS.match(text)) is None:
        return None
    lines = match[1].split("\r\n")
    del lines[0]  # the empty text before the first line end
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        headers[environ_key(name)] = value
    if len(headers) != len(lines) or not _UNCOMMON.isdisjoint(headers):
        return None
    if not (host := headers.get("HTTP_HOST")) or not _is_host(host):
        return None
    length = headers.get("CONTENT_LENGTH", "0")
    if LENGTH.fullmatch(length) is None:
        return None
    keeps = "close" not in connection_options(headers.get("HTTP_CONNECTION", ""))
    return Fields(match[0].encode("latin-1"), headers, int(length), keeps)


@functools.lru_cache(maxsize=64)
def connection_options(value: str) -> frozenset[str]:
    """The options in a Connection header, in small letters (RFC 9110 §7.6.1)."""
    return frozenset(option.strip().lower() for option in value.split(","))


def kind_of(method: str, path: str) -> str:
    """The method and the first segment of the path: requests of one kind often take equally long."""
    end = path.find("/", 1)
    return f"{method} {path if end < 0 else path[:end]}"


@functools.lru_cache(maxsize=1000)
def environ_key(name: str) -> str:
    """A field's name in an environ (PEP 3333); "_" for a field with an underscore, which must be left out.

    In the environ it could not be told from the field with a hyphen, which a proxy in front may have checked.
    """
    key = "_" if "_" in name else name.upper().replace("-", "_")
    return key if key in {"_", "CONTENT_LENGTH", "CONTENT_TYPE"} else "HTTP_" + key
