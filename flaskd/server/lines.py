"""Lines of HTTP out of the pieces in which they come, and what may stand in them.

Every byte is looked at a fixed number of times, however the pieces are cut: no pattern here can go back over what it
has matched (possessive quantifiers), because what a client sends must not decide how long it takes to be read.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import unquote_to_bytes

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # noqa: S105 - of a grammar
"""RFC 9110 §5.6.2."""

_TEXT = re.compile(rb"[\t\x20-\x7e\x80-\xff]*+\r?")
"""What may stand in a line, and the CR of its end."""
_FIELD = re.compile(rf"({TOKEN}):[ \t]*+([\t -~\x80-\xff]*+)".encode("latin-1"))
"""A field line (RFC 9112 §5): no blank before the colon, no line folding."""
_HOST = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]++)\]|(?>(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+))(?::[0-9]{0,5}+)?"
)
"""RFC 3986 §3.2.2 and §3.2.3."""
LENGTH = re.compile(r"[0-9]{1,18}")
"""A Content-Length (RFC 9110 §8.6), as far as a number of bytes can be meant."""
_CR = 0x0D


class RefusedError(Exception):
    """What was read is no request that can be answered otherwise than with this status and reason.

    `limit` names the setting that it goes beyond.
    """

    def __init__(self, status: int, why: str, limit: str = "") -> None:
        super().__init__(why)
        self.status, self.why, self.limit = status, why, limit


class Lines:
    """Puts lines together; `begun` is what has come of the next one."""

    def __init__(self) -> None:
        self.begun = bytearray()

    def take(self, data: bytes, at: int) -> tuple[bytes | None, int]:
        """The next line without its CRLF, or None while it is not whole; and where in the data the next one begins.

        Raises RefusedError for a control character, and for a CR or an LF that stands alone, as soon as it has come.
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
    """Name and value of a field line; raises RefusedError."""
    match = _FIELD.fullmatch(line)
    if match is None:
        raise RefusedError(400, "expected header lines such as Name: value, each on a line of its own")
    name, value = match.groups()
    return name, value.rstrip(b" \t")


def path_pattern(written: str) -> tuple[bool, str]:
    """Whether a pattern of the configuration stands for all paths that begin so, and the path as an environ has it."""
    return written.endswith("*"), unquote_to_bytes(written.removesuffix("*")).decode("latin-1")


def is_host(host: str) -> bool:
    """Whether it is a host and perhaps a port, as an http URL has them (RFC 9110 §4.2.1)."""
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
