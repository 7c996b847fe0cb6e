"""What a request is called all along its way: its X-Request-ID, and its traceparent (W3C Trace Context).

Both are ASCII that may stand in a log, a header or a terminal as it is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(
    r"(?!ff|00.{54})([0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(?:-[A-Za-z0-9._-]{0,72})?"
)
"""W3C Trace Context §3.2; versions after 00 may have more behind the flags, which is left out."""


class Ids(NamedTuple):
    """Each is empty where there is none."""

    request_id: str = ""
    traceparent: str = ""

    def fields(self) -> dict[str, str]:
        """Those that there are, by name: for logs, and for answers to programs."""
        return {name: value for name, value in zip(self._fields, self, strict=True) if value}

    def __str__(self) -> str:
        return "".join(f" {name}={value}" for name, value in self.fields().items())


NO_IDS = Ids()


def read_ids(headers: Mapping[str, str]) -> Ids:
    """What headers say, by their names in an environ; what is malformed, or comes several times, is none."""
    request_id = headers.get("HTTP_X_REQUEST_ID", "")
    traceparent = _TRACEPARENT.fullmatch(headers.get("HTTP_TRACEPARENT", ""))
    return Ids(request_id if _REQUEST_ID.fullmatch(request_id) else "", traceparent[1] if traceparent else "")


class IdSource:
    """Makes ids of requests: 128 random bits in hex, as nginx does.

    Each process that serves makes a source of its own, after it was forked: two sources have no id in common. A source
    asks the kernel once. To ask it for each id would give up the interpreter's lock once more in each request.
    """

    def __init__(self) -> None:
        self._bytes = random.Random().randbytes  # noqa: S311 - an id is no secret

    def __call__(self) -> str:
        """A new one."""
        return self._bytes(16).hex()
