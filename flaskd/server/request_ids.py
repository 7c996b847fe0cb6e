"""The ids of a request that proxies, flaskd and the app share: X-Request-ID, and traceparent (W3C Trace Context).

Both are printable ASCII, so they can be written to a log, a header or a terminal unchanged.
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
"""W3C Trace Context §3.2; versions after 00 may have more after the flags, which is left out."""


class Ids(NamedTuple):
    """The ids of one request; each is empty if there is none."""

    request_id: str = ""
    traceparent: str = ""

    def fields(self) -> dict[str, str]:
        """The ids that are not empty, by name: for logs, and for answers to programs."""
        return {name: value for name, value in zip(self._fields, self, strict=True) if value}

    def __str__(self) -> str:
        return "".join(f" {name}={value}" for name, value in self.fields().items())


NO_IDS = Ids()


def read_ids(headers: Mapping[str, str]) -> Ids:
    """Read the ids from headers, given by their names in an environ; one that is malformed or repeated is left out."""
    request_id = headers.get("HTTP_X_REQUEST_ID", "")
    traceparent = _TRACEPARENT.fullmatch(headers.get("HTTP_TRACEPARENT", ""))
    return Ids(request_id if _REQUEST_ID.fullmatch(request_id) else "", traceparent[1] if traceparent else "")


class IdSource:
    """Makes ids of requests: 128 random bits in hexadecimal digits, as nginx does.

    Each serving process makes its own source after it was forked, so two sources do not repeat each other's ids. A
    source gets random bits from the kernel once: doing so for each id would release the GIL once more in each request.
    """

    def __init__(self) -> None:
        self._bytes = random.Random().randbytes  # noqa: S311 - an id is no secret

    def __call__(self) -> str:
        """Make a new id of 32 digits."""
        return self._bytes(16).hex()
