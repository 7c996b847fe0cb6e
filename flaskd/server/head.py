"""The head of a common request, read in one pass by two expressions of the same grammar as `flaskd.server.lines`.

Common is what has come whole and alone: HTTP/1.1, a path as its target, well-formed fields, each of them once, no body
or one that came with the head. Whatever is not common, and whatever is wrong, goes to `flaskd.server.parser` with the
same bytes.

A client says the same in the fields of one request after another, and asks for few paths: neither is read twice.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from flaskd.server.lines import LENGTH, TOKEN, is_host

_LINE = re.compile(r"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[!\"$-~]*+) HTTP/1\.1")
_FIELDS = re.compile(rf"((?>(?:\r\n{TOKEN}: [!-~\x80-\xff][\t -~\x80-\xff]*+(?<![ \t]))+))\r\n\r\n")
"""Each field has one blank behind its colon, and none at its end."""
_UNCOMMON = frozenset({"HTTP_TRANSFER_ENCODING", "HTTP_EXPECT", "_"})
_MOST_LINES = 256
"""Request lines that are remembered."""

_is_host = functools.lru_cache(maxsize=1024)(is_host)


class Line(NamedTuple):
    """A request line: what an environ has of it, and the kind of request that it asks for."""

    method: str
    target: str
    path: str
    query: str
    kind: str


class Fields(NamedTuple):
    """The fields of a head: from the end of the request line to the blank line, and what they say."""

    block: bytes
    headers: dict[str, str]
    """By their names in an environ; nobody changes them, because the requests that have the same fields share them."""
    length: int
    """That of the body."""


def read(data: bytes, before: Fields | None) -> tuple[Line, Fields, int] | None:
    """The head of a common request at the beginning of `data`; None where the request is not common.

    Gives where the body begins, too. `before` are the fields of the last request on the connection.
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
    return Line(method, target, path, query, kind_of(method, path))


def _fields(text: str) -> Fields | None:
    if (match := _FIELDS.match(text)) is None:
        return None
    lines = match[1].split("\r\n")
    del lines[0]  # what is before the first line end
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
    return Fields(match[0].encode("latin-1"), headers, int(length))


def kind_of(method: str, path: str) -> str:
    """The method, and the beginning of the path: requests that have both in common often take as long."""
    end = path.find("/", 1)
    return f"{method} {path if end < 0 else path[:end]}"


@functools.lru_cache(maxsize=1000)
def environ_key(name: str) -> str:
    """The name in an environ of a field (PEP 3333); "_" for one with an underscore in it, which is left out.

    It would be the name with a hyphen, which a proxy in front has checked.
    """
    key = "_" if "_" in name else name.upper().replace("-", "_")
    return key if key in {"_", "CONTENT_LENGTH", "CONTENT_TYPE"} else "HTTP_" + key
