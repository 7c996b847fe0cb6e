"""The head of a common request, read in one pass by one expression of the same grammar as `flaskd.server.lines`.

Common is what has come whole and alone: HTTP/1.1, a path as its target, well-formed fields, each of them once, no body
or one that came with the head. Whatever is not common, and whatever is wrong, goes to `flaskd.server.parser` with the
same bytes.
"""

from __future__ import annotations

import functools
import re

from flaskd.server.lines import LENGTH, TOKEN, is_host

_HEAD = re.compile(
    r"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[!\"$-~]*+) HTTP/1\.1"
    rf"((?:\r\n{TOKEN}: [!-~\x80-\xff][\t -~\x80-\xff]*+(?<![ \t]))++)\r\n\r\n"
)
"""Each field has one blank behind its colon, and none at its end."""
_UNCOMMON = frozenset({"HTTP_TRANSFER_ENCODING", "HTTP_EXPECT", "_"})

_is_host = functools.lru_cache(maxsize=1024)(is_host)


def read(data: bytes) -> tuple[str, str, dict[str, str], int, int] | None:
    """The head of a common request at the beginning of `data`; None where the request is not common.

    Gives method, target, fields by their names in an environ, where the body begins, and how long it is.
    """
    text = data.decode("latin-1")
    if (match := _HEAD.match(text)) is None:
        return None
    method, target, block = match.groups()
    lines = block.split("\r\n")
    del lines[0]  # what is before the first line end
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        fields[environ_key(name)] = value
    if len(fields) != len(lines) or not _UNCOMMON.isdisjoint(fields):
        return None
    if not (host := fields.get("HTTP_HOST")) or not _is_host(host):
        return None
    length = fields.get("CONTENT_LENGTH")
    if length is None:
        return method, target, fields, match.end(), 0
    if LENGTH.fullmatch(length) is None:
        return None
    return method, target, fields, match.end(), int(length)


@functools.lru_cache(maxsize=1000)
def environ_key(name: str) -> str:
    """The name in an environ of a field (PEP 3333); "_" for one with an underscore in it, which is left out.

    It would be the name with a hyphen, which a proxy in front has checked.
    """
    key = "_" if "_" in name else name.upper().replace("-", "_")
    return key if key in {"_", "CONTENT_LENGTH", "CONTENT_TYPE"} else "HTTP_" + key
