"""Bodies and answers that wait: in memory at first, in a temporary file when they are long.

Waitress' own buffers lose count where a temporary file cannot be made or written (a full /tmp, none at all).
"""

from __future__ import annotations

import io
import logging
import math
import tempfile
from typing import Any

from waitress.buffers import OverflowableBuffer, TempfileBasedBuffer

log = logging.getLogger("flaskd.server")

FREE_SPACE = "make room in the directory for temporary files, or name another one in $TMPDIR"
"""What to do where a temporary file cannot be had."""


class _TemporaryFile(TempfileBasedBuffer):  # type: ignore[misc]  # waitress is untyped
    """A buffer in a temporary file. Unbuffered: what there is no room for is known at once, and nothing of it stays."""

    def __init__(self, before: Any) -> None:
        self.file = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - it lives as long as the buffer
        if before is not None:
            try:
                self.append(before.get())
            except OSError:
                self.file.close()
                raise

    def append(self, data: bytes) -> None:
        """Add all of `data`, or raise OSError and add nothing."""
        file = self.file
        at, end, rest = file.tell(), file.seek(0, io.SEEK_END), memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise
        finally:
            file.seek(at)
        self.remain += len(data)


class BodyBuffer(OverflowableBuffer):  # type: ignore[misc]
    """A request's body; raises OSError where it cannot be kept."""

    buf: Any

    def _set_large_buffer(self) -> None:
        self.buf, before, self.overflowed = _TemporaryFile(self.buf), self.buf, True
        if before is not None:
            before.close()

    def getfile(self) -> Any:
        """What the app reads from; lines of a file come out of a buffer."""
        file = super().getfile()
        if not isinstance(file, io.RawIOBase):
            return file
        self._reader = io.BufferedReader(file)  # kept: it closes the file when it goes
        return self._reader


class AnswerBuffer(BodyBuffer):
    """A part of an answer, which has begun by then: where it cannot be kept in a file, it stays in memory.

    How much that may be is waitress' ``outbuf_high_watermark``, above which the app waits for its client.
    """

    def append(self, data: bytes) -> None:
        """Add `data`."""
        try:
            super().append(data)
        except OSError as error:  # nothing of it was added
            self._stay_in_memory(error)
            super().append(data)

    def _set_large_buffer(self) -> None:
        try:
            super()._set_large_buffer()
        except OSError as error:
            self._stay_in_memory(error)

    def _stay_in_memory(self, error: OSError) -> None:
        log.warning(f"cannot keep an answer in a temporary file: {error}; it stays in memory: {FREE_SPACE}")
        self.overflow = math.inf
        self._set_small_buffer()
