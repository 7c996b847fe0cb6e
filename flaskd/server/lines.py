"""Putting the lines of HTTP together from pieces, and the grammar of lines.

A client must not be able to make reading slow. So each byte is looked at a fixed number of times, however the pieces
are cut, and the patterns use possessive quantifiers, which never go back over what they have matched.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import unquote_to_bytes

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # noqa: S105 - of a grammar
"""A token (RFC 9110 §5.6.2)."""

_TEXT = re.compile(rb"[\t\x20-\x7e\x80-\xff]*+\r?")
"""The characters that a line may have, and the CR of its end."""
_FIELD = re.compile(rf"({TOKEN}):[ \t]*+([\t -~\x80-\xff]*+)".encode("latin-1"))
"""A field line (RFC 9112 §5): no blank before the colon, no line folding."""
_HOST = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]++)\]|(?>(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+))(?::[0-9]{0,5}+)?"
)
"""A host and perhaps a port (RFC 3986 §3.2.2 and §3.2.3)."""
LENGTH = re.compile(r"[0-9]{1,18}")
"""A Content-Length (RFC 9110 §8.6); longer numbers cannot be meant."""
_CR = 0x0D


class RefusedError(Exception):
    """The request is malformed or too large, and is answered with `status` and the reason `why`.

    `limit` names the setting whose limit it exceeds; empty if it is malformed.
    """

    def __init__(self, status: int, why: str, limit: str = "") -> None:
        super().__init__(why)
        self.status, self.why, self.limit = status, why, limit


class Lines:
    """Puts lines together from pieces; `begun` is the part of the next line that has come."""

    def __init__(self) -> None:
        self.begun = bytearray()

    def take(self, data: bytes, at: int) -> tuple[bytes | None, int]:
        """Read a line from `data` at offset `at`; returns it and the offset of the one after it.

        The line comes without its CRLF; it is None while it is incomplete. Raises RefusedError for a control character,
        and for a CR or an LF that stands alone, as soon as it has come.
        """
        end = data.find(b"\n", at)
        part = data[at:] if end < 0 else data[at:end]
        begun = self.begun
        if _TEXT.fullmatch(part) is None or (part and begun and begun[-1] == _CR):
            raise RefusedError(400, "expected lines of printable characters, each ended by CR and LF")
        if end < 0:
            begun += part
            return None, len(data)
        if begun:
            part = bytes(begun + part)
            begun.clear()
        if not part.endswith(b"\r"):
            raise RefusedError(400, "expected lines that end with CR and LF, got an LF alone")
        return part[:-1], end + 1


def field(line: bytes) -> tuple[bytes, bytes]:
    """Split a field line into its name and its value; raises RefusedError."""
    match = _FIELD.fullmatch(line)
    if match is None:
        raise RefusedError(400, "expected header lines such as Name: value, each on a line of its own")
    name, value = match.groups()
    return name, value.rstrip(b" \t")


def path_pattern(written: str) -> tuple[bool, str]:
    """Read a path of the configuration: whether it ends with ``*``, and the path before that as an environ has it."""
    return written.endswith("*"), unquote_to_bytes(written.removesuffix("*")).decode("latin-1")


def is_host(host: str) -> bool:
    """Whether the text is a host, perhaps with a port, as an http URL has them (RFC 9110 §4.2.1)."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    if match["ipv6"] is None:
        return True
    try:
        ipaddress.IPv6Address(match["ipv6"])
    except ValueError:
        return False
    return True
