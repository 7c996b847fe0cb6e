"""Reads lines from the FIFO and carries out the commands in them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from flaskd.control.commands import from_words
from flaskd.control.connection import Execute
from flaskd.control.peer import FIFO_PEER
from flaskd.control.replies import BROKEN_OFF, LogReply
from flaskd.errors import FlaskdError
from flaskd.log.setup import bounded_by
from flaskd.protocol import MAX_LINE

log = logging.getLogger("flaskd.control")

_AT_ONCE = 65536
"""How many bytes are read at a time: the size of a FIFO, unless it was enlarged (F_SETPIPE_SZ, fcntl(2))."""
_JUNK = bounded_by("pieces of no command in the FIFO")
_TURNS = 4
"""How many reads are made before the control thread serves other clients."""


class Lines:
    """Reads lines from a descriptor and calls `take` with each; a line that is too long is dropped up to its newline.

    A line that its writer left unfinished is dropped; it is not joined with the next writer's.
    """

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._rest = bytearray()
        self._dropping = False

    def read(self, fd: int) -> bool:
        """Read what has come; False if the FIFO has no writer and is empty.

        Only newlines separate the lines of writers that write at the same time.
        """
        with contextlib.suppress(BlockingIOError):
            for _ in range(_TURNS):
                data = os.read(fd, _AT_ONCE)
                if not data:
                    self._end()
                    return False
                self._feed(data)
        return True

    def _feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._dropping:
                self._dropping = False
            elif len(line) > MAX_LINE:
                log.warning(f"the FIFO got a line of {len(line)} bytes; a command has at most {MAX_LINE}", extra=_JUNK)
            elif line.strip():
                self._take(line.decode("utf-8", "replace"))
        if self._dropping:
            self._rest.clear()
        elif len(self._rest) > MAX_LINE:
            log.warning(f"the FIFO got {len(self._rest)} bytes without a newline; they are dropped", extra=_JUNK)
            self._rest.clear()
            self._dropping = True

    def _end(self) -> None:
        if self._rest:
            log.warning(
                f"the FIFO got {len(self._rest)} bytes without a newline, and their writer left; they are dropped",
                extra=_JUNK,
            )
        self._rest.clear()
        self._dropping = False


class FifoCommands:
    """Carries out the commands from the FIFO; their outcomes go to the log.

    `reopen` is called with the descriptor when the FIFO has no writer any more.
    """

    def __init__(self, execute: Execute, reopen: Callable[[int], None]) -> None:
        self._execute, self._reopen = execute, reopen
        self._lines = Lines(self._take)

    def read(self, fd: int) -> None:
        """Carry out the commands that have come."""
        if not self._lines.read(fd):
            self._reopen(fd)

    def _take(self, line: str) -> None:
        reply = LogReply(line[:80])
        try:
            self._execute(from_words(line.split(), FIFO_PEER), reply)
        except FlaskdError as error:
            reply.error(error.code, str(error))
        except Exception as error:  # as in Connection._run; the next lines go on
            log.exception("cannot carry out a control command", extra=BROKEN_OFF)
            reply.error(FlaskdError.code, f"cannot carry out the command: {type(error).__name__}")
