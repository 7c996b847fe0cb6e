"""Writes the lines of the log to standard error or the journal, and counts those that cannot be written.

Standard error is the app's as much as flaskd's: an object that raises may stand for it, who shares it may make it
non-blocking, and who reads it may stall. None of that ends the log.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from flaskd.log.journal import Journal
from flaskd.log.throttle import Throttle

_MOST = 10_000
"""Lines that may wait."""
_BATCH = 500
"""Lines that are written at once."""
_GATHER = 0.01
"""Seconds between two writes of access lines: to wake the thread for each under load would cost more than the lines."""
_LOOK = 1.0
"""Seconds between two looks at what was only counted."""
_PATIENCE = 1.0
"""Seconds that a line written in place waits for a standard error that takes no more now; in the thread it waits on."""


class Entry(NamedTuple):
    """An entry for the journal, and what becomes a line on standard error where the journal does not take it."""

    data: bytes
    priority: int
    message: str

    def prefixed(self) -> str:
        """Lines with ``<N>`` prefixes, because what reads them splits at newlines (sd-daemon(3))."""
        return "\n".join(f"<{self.priority}>{line}" for line in self.message.split("\n"))


Line = str | Entry


class Writer:
    """Writes lines in a thread of its own, so that a reader who stalls costs only lines.

    `as_line` makes a line, in the format of the log, of what the writer itself has to say.
    """

    def __init__(self, as_line: Callable[[str], Line]) -> None:
        self.throttle = Throttle()
        self._as_line = as_line
        self._lines: queue.SimpleQueue[Line | threading.Event | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        """Is set when what waits is to be written at once."""
        self._written_at = 0.0
        self._journal: Journal | None = None
        self._thread: threading.Thread | None = None
        self._lost = 0
        self._asleep = False
        self._standard: tuple[int, int] | None = None

    def start(self) -> None:
        """Start the thread; where none can be had, lines are written in place."""
        self._standard = _identity(2)
        self._thread = threading.Thread(target=self._run, name="flaskd-log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None

    def put(self, line: Line, *, hurry: bool = True) -> None:
        """Have a line, or an entry for the journal, written soon; when too many wait, it is dropped and counted.

        Without `hurry` it may wait `_GATHER` seconds for others.
        """
        if self._thread is None:
            self._write([line])
        elif self._lines.qsize() < _MOST:
            self._lines.put(line)
            if hurry:
                self._hurry.set()
        else:
            self._lost += 1

    def admits(self, kind: str) -> bool:
        """Whether one more line of a kind that is bounded is written; see `Throttle`."""
        if self.throttle.admits(kind, time.monotonic()):
            return True
        if self._asleep:  # the thread has to look again when the window is over
            self._asleep = False
            self._lines.put(None)
        return False

    def flush(self, timeout: float) -> None:
        """Wait at most `timeout` seconds until all lines so far are written."""
        if self._thread is None:
            return
        written = threading.Event()
        self._lines.put(written)
        self._hurry.set()
        written.wait(timeout)

    def tell_all(self) -> None:
        """Have written what was only counted, though its time is not over."""
        for words in self.throttle.take_over(time.monotonic(), all_of_them=True):
            self.put(self._as_line(words))

    def forget(self) -> None:
        """In a forked child there is no thread: write in place."""
        self._thread = None
        self.throttle.forget()

    def close(self) -> None:
        """Close the way to the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                self._turn()
            except BaseException:  # noqa: BLE001 - whatever the app's standard error raises, the log goes on
                self._lost += 1

    def _turn(self) -> None:
        self._asleep = True  # before the look at what is counted: what is counted after it wakes this thread
        if self.throttle.counting:
            self._asleep = False
        batch = self._next_batch(None if self._asleep else _LOOK)
        try:
            self._write([each for each in batch if isinstance(each, str | Entry)])
            self._write([self._as_line(words) for words in self.throttle.take_over(time.monotonic())])
        finally:
            self._written_at = time.monotonic()
            for each in batch:
                if isinstance(each, threading.Event):
                    each.set()

    def _next_batch(self, timeout: float | None) -> list[Line | threading.Event | None]:
        """What waits, some time after the last write; empty when nothing comes within `timeout` seconds."""
        batch: list[Line | threading.Event | None] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._lines.get(timeout=timeout))
            if (left := self._written_at + _GATHER - time.monotonic()) > 0:
                self._hurry.wait(left)
            self._hurry.clear()
            while len(batch) < _BATCH:
                batch.append(self._lines.get_nowait())
        return batch

    def _write(self, lines: list[Line]) -> None:
        texts: list[str] = []
        for line in lines:
            if isinstance(line, str):
                texts.append(line)
            elif not self._is_sent(line):
                texts.append(line.prefixed())
        # An object of the app's gets one line at a time: it may raise at one and take the next.
        at_once = len(texts) if type(sys.stderr) is io.TextIOWrapper else 1
        lost = 0
        while texts:
            some, texts = texts[:at_once], texts[at_once:]
            if not self._to_standard_error("\n".join([*some, ""])):
                lost += len(some)
        if lost:
            self._lost += lost
        elif lines and self._lost:
            lost, self._lost = self._lost, 0
            why = "standard error was not read, or could not be written"
            if not self._is_written(self._as_line(f"{lost} log lines were lost, because {why}")):
                self._lost += lost

    def _is_written(self, line: Line) -> bool:
        if isinstance(line, str):
            return self._to_standard_error(line + "\n")
        return self._is_sent(line) or self._to_standard_error(line.prefixed() + "\n")

    def _is_sent(self, entry: Entry) -> bool:
        """Send an entry to the journal; where that fails, standard error leads there, too."""
        try:
            if self._journal is None:
                self._journal = Journal()
            self._journal.send(entry.data)
        except Exception:  # noqa: BLE001 - the manager keeps the other way open
            return False
        return True

    def _to_standard_error(self, text: str) -> bool:
        """Write to what stands for standard error now; where that fails, to the descriptor that was so at the start."""
        stream, fd = sys.stderr, -1
        try:
            if type(stream) is io.TextIOWrapper:
                with contextlib.suppress(io.UnsupportedOperation):  # in memory
                    fd = stream.fileno()
            if fd < 0:
                stream.write(text)
                stream.flush()
            else:
                with contextlib.suppress(OSError):  # what the app has left there is the app's
                    stream.flush()
                self._to_descriptor(fd, text.encode(stream.encoding, _never_strict(stream.errors)))
        except BaseException as error:  # the app's own object, or None
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is not self._thread:
                raise  # that is Ctrl-C, in the main thread
            return fd != 2 and self._past_the_app(text)  # noqa: PLR2004 - standard error's descriptor
        return True

    def _past_the_app(self, text: str) -> bool:
        if self._standard is None or _identity(2) != self._standard:  # something else has that number now
            return False
        try:
            self._to_descriptor(2, text.encode("utf-8", "backslashreplace"))
        except OSError:
            return False
        return True

    def _to_descriptor(self, fd: int, data: bytes) -> None:
        """Write all of it, though the description may be non-blocking (O_NONBLOCK, open(2)): others share it."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                room = select.poll()
                room.register(fd, select.POLLOUT)
                if not room.poll(None if threading.current_thread() is self._thread else _PATIENCE * 1000):
                    raise


def _never_strict(errors: str | None) -> str:
    """How what an encoding lacks is written (codecs): as the stream was told, but never by an exception."""
    return "backslashreplace" if errors in {None, "strict"} else str(errors)


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino
