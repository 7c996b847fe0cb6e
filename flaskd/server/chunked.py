"""Reading a chunked body (RFC 9112 §7.1), strictly: a proxy that frames it otherwise would see other requests."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from flaskd.server.lines import TOKEN, Lines, RefusedError, field

_EXTENSION = rf'[ \t]*+;[ \t]*+{TOKEN}(?>(?:[ \t]*+=[ \t]*+(?:{TOKEN}|"(?>(?:[^"\\]|\\.)*)"))?)'
_SIZE = re.compile(rf"([0-9A-Fa-f]{{1,16}}+)((?>(?:{_EXTENSION})*))".encode())
_MOST_EXTENSIONS = 16 * 1024
"""Most bytes of chunk extensions in one body. Clients do not use them in practice, and without a limit they could be
thousands for each byte of the body."""
_LONGEST_LINE = 16 + _MOST_EXTENSIONS


class ChunkedBody:
    """Reads chunks and appends their contents to `buffer`, at most `most` bytes; trailers are checked and dropped.

    It replaces waitress' ChunkedReceiver. Framing does not count towards `most`.
    """

    completed = False

    def __init__(self, buffer: Any, most: int, most_trailers: int) -> None:
        self._buffer = buffer
        self._most, self._most_trailers = most, most_trailers
        self._lines = Lines()
        self._take_line: Callable[[bytes], None] = self._take_size
        self._longest = _LONGEST_LINE
        self._left = 0
        """Bytes of the current chunk that have not come yet."""
        self._size = self._extensions = 0

    def __len__(self) -> int:
        return self._size

    def received(self, data: bytes) -> int:
        """Read a piece of data; returns how many of its bytes belong to this body. Raises RefusedError."""
        at, pieces = 0, []
        while at < len(data) and not self.completed:
            if self._left:
                pieces.append(data[at : at + self._left])
                at += len(pieces[-1])
                self._left -= len(pieces[-1])
                continue
            line, at = self._lines.take(data, at)
            if len(self._lines.begun if line is None else line) > self._longest + (line is None):  # + its CR
                raise self._too_long()
            if line is not None:
                self._take_line(line)
        if pieces:
            self._buffer.append(b"".join(pieces))
        return at

    def _take_size(self, line: bytes) -> None:
        match = _SIZE.fullmatch(line)
        if match is None:
            raise RefusedError(400, "expected the size of a chunk in hexadecimal digits")
        self._left = int(match[1], 16)
        self._size += self._left
        self._extensions += len(match[2])
        if self._extensions > _MOST_EXTENSIONS:
            raise RefusedError(400, f"expected at most {_MOST_EXTENSIONS} bytes of chunk extensions")
        if self._size > self._most:
            raise RefusedError(413, f"expected a body of at most {self._most} bytes", "max_request_body_size")
        if self._left:
            self._take_line, self._longest = self._take_end, 0
        else:
            self._take_line, self._longest = self._take_trailer, self._most_trailers

    def _take_end(self, _line: bytes) -> None:  # always empty: `_longest` is 0
        self._take_line, self._longest = self._take_size, _LONGEST_LINE

    def _take_trailer(self, line: bytes) -> None:
        if not line:
            self.completed = True
            return
        field(line)
        self._longest -= len(line) + 2
        if self._longest < 0:
            raise self._too_long()

    def _too_long(self) -> RefusedError:
        if self._take_line == self._take_trailer:
            why = f"expected trailers of at most {self._most_trailers} bytes"
            return RefusedError(431, why, "max_request_header_size")
        return RefusedError(400, "expected shorter lines between the chunks of the body")

    def getfile(self) -> Any:
        """The file that the app reads the body from (called by waitress.parser)."""
        return self._buffer.getfile()

    def getbuf(self) -> Any:
        """The buffer, which waitress.parser closes when the request is over."""
        return self._buffer
