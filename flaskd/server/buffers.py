"""Buffers for request bodies and answers: in memory at first, in a temporary file once they are long.

Waitress' own buffers count wrongly when a temporary file cannot be made or written (/tmp is full or missing).
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
"""The advice in the log when a temporary file cannot be made or written."""


class _TemporaryFile(TempfileBasedBuffer):  # type: ignore[misc]  # waitress is untyped
    """A buffer in a temporary file. The file is unbuffered, so that a full disk is noticed at once, and undone."""

    def __init__(self, before: Any) -> None:
        self.file = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - open as long as the buffer lives
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
    """A request's body; raises OSError when it cannot be stored."""

    buf: Any

    def _set_large_buffer(self) -> None:
        self.buf, before, self.overflowed = _TemporaryFile(self.buf), self.buf, True
        if before is not None:
            before.close()

    def getfile(self) -> Any:
        """The file that the app reads the body from; with a read buffer, so that reading lines is quick."""
        file = super().getfile()
        if not isinstance(file, io.RawIOBase):
            return file
        self._reader = io.BufferedReader(file)  # kept here, because it closes the file when it is collected
        return self._reader


class AnswerBuffer(BodyBuffer):
    """A part of an answer. When it cannot be stored in a file it stays in memory, because the answer has begun.

    It grows up to waitress' ``outbuf_high_watermark`` in bytes; above that the app waits for its client.
    """

    def append(self, data: bytes) -> None:
        """Add `data`; where the temporary file cannot take it, go on in memory."""
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
