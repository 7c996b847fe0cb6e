"""Writes the lines of the log to standard error or the journal, and counts those that cannot be written.

Standard error belongs to the app as well: the app may replace it with an object that raises, a process that shares it
may make it non-blocking, and its reader may stall. None of that stops the log.
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
"""How many lines may wait."""
_BATCH = 500
"""How many lines are written at once."""
_GATHER = 0.01
"""Seconds between two writes of access lines: under load, waking the thread costs more than writing the lines."""
_LOOK = 1.0
"""Seconds between two checks for counted lines that are to be reported."""
_PATIENCE = 1.0
"""How long, in seconds, a thread other than the writer's waits while standard error is full."""


class Entry(NamedTuple):
    """A journal entry, and the text and priority for standard error if the journal does not accept it."""

    data: bytes
    priority: int
    message: str

    def prefixed(self) -> str:
        """The text with a prefix ``<N>`` on each line, because its reader splits it at newlines (sd-daemon(3))."""
        return "\n".join(f"<{self.priority}>{line}" for line in self.message.split("\n"))


Line = str | Entry
Later = Callable[[], Line]
"""A line that the writing thread makes, when it is written."""


class Writer:
    """Writes lines in a thread of its own, so that a stalled reader costs lines, and does not block the program.

    `as_line` puts a message of the writer itself into the format of the log.
    """

    def __init__(self, as_line: Callable[[str], Line]) -> None:
        self.throttle = Throttle()
        self._as_line = as_line
        self._lines: queue.SimpleQueue[Line | Later | threading.Event | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        """Set if the waiting lines are to be written at once."""
        self._written_at = 0.0
        self._journal: Journal | None = None
        self._thread: threading.Thread | None = None
        self._lost = 0
        self._asleep = False
        self._over = False
        self._standard: tuple[int, int] | None = None

    def start(self) -> None:
        """Start the thread; if no thread can be had, `put` writes the lines itself."""
        self._standard = _identity(2)
        self._over = False
        self._thread = threading.Thread(target=self._run, name="flaskd-log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None

    def put(self, line: Line | Later, *, hurry: bool = True) -> None:
        """Have a line or a journal entry written soon; if too many wait, it is dropped and counted.

        Without `hurry` it may wait `_GATHER` seconds, to be written together with others.
        """
        if self._thread is None:
            self._write([_made(line)])
        elif self._lines.qsize() < _MOST:
            self._lines.put(line)
            if hurry:
                self._hurry.set()
        else:
            self._lost += 1

    def admits(self, kind: str) -> bool:
        """Whether one more line of a limited kind is to be written; see `Throttle`."""
        if self.throttle.admits(kind, time.monotonic()):
            return True
        if self._asleep:  # the thread must report the count when the window ends
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
        """Report all counted lines now, before their windows end."""
        for words in self.throttle.take_over(time.monotonic(), all_of_them=True):
            self.put(self._as_line(words))

    def forget(self) -> None:
        """To be called in a forked child, which has no writing thread: from now on `put` writes the lines itself."""
        self._thread = None
        self.throttle.forget()

    def close(self, timeout: float) -> None:
        """End the thread and close the socket to the journal; from now on `put` writes the lines itself.

        If the thread does not end within `timeout` seconds, because nothing reads what it writes, it goes on.
        """
        if self._thread is not None:
            self._over = True
            self._lines.put(None)
            self._hurry.set()
            self._thread.join(timeout)
            if self._thread.is_alive():
                return
            self._thread = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not (self._over and self._lines.empty()):
            try:
                self._turn()
            except BaseException:  # noqa: BLE001 - the app's standard error may raise anything; the log goes on
                self._lost += 1

    def _turn(self) -> None:
        self._asleep = True  # set first: what is counted from now on wakes this thread
        if self.throttle.counting:
            self._asleep = False
        batch = self._next_batch(None if self._asleep else _LOOK)
        try:
            self._write([_made(each) for each in batch if each is not None and not isinstance(each, threading.Event)])
            self._write([self._as_line(words) for words in self.throttle.take_over(time.monotonic())])
        finally:
            self._written_at = time.monotonic()
            for each in batch:
                if isinstance(each, threading.Event):
                    each.set()

    def _next_batch(self, timeout: float | None) -> list[Line | Later | threading.Event | None]:
        """The waiting lines, `_GATHER` seconds after the last write; empty if none comes within `timeout` seconds."""
        batch: list[Line | Later | threading.Event | None] = []
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
        # An object of the app gets one line at a time, because it may raise at one and accept the next.
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
        """Send an entry to the journal; if that fails, write it to standard error, which leads there, too."""
        try:
            if self._journal is None:
                self._journal = Journal()
            self._journal.send(entry.data)
        except Exception:  # noqa: BLE001 - the manager reads standard error
            return False
        return True

    def _to_standard_error(self, text: str) -> bool:
        """Write to the present standard error; if that fails, to the descriptor that was it at the start."""
        stream, fd = sys.stderr, -1
        try:
            if type(stream) is io.TextIOWrapper:
                with contextlib.suppress(io.UnsupportedOperation):  # an in-memory stream has no descriptor
                    fd = stream.fileno()
            if fd < 0:
                stream.write(text)
                stream.flush()
            else:
                with contextlib.suppress(OSError):  # the app's own text may not be writable
                    stream.flush()
                self._to_descriptor(fd, text.encode(stream.encoding, _never_strict(stream.errors)))
        except BaseException as error:  # an object of the app, or None
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is not self._thread:
                raise  # Ctrl-C in the main thread
            return fd != 2 and self._past_the_app(text)  # noqa: PLR2004 - standard error's descriptor
        return True

    def _past_the_app(self, text: str) -> bool:
        if self._standard is None or _identity(2) != self._standard:  # the number now belongs to another file
            return False
        try:
            self._to_descriptor(2, text.encode("utf-8", "backslashreplace"))
        except OSError:
            return False
        return True

    def _to_descriptor(self, fd: int, data: bytes) -> None:
        """Write all data; the descriptor may be non-blocking, because others share it (O_NONBLOCK, open(2))."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                room = select.poll()
                room.register(fd, select.POLLOUT)
                if not room.poll(None if threading.current_thread() is self._thread else _PATIENCE * 1000):
                    raise


def _made(line: Line | Later) -> Line:
    return line() if callable(line) else line


def _never_strict(errors: str | None) -> str:
    """The error policy of a stream (codecs) for characters that its encoding lacks, but never one that raises."""
    return "backslashreplace" if errors in {None, "strict"} else str(errors)


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino
