"""What flaskd writes to standard error: its own log and the access log, in text, JSON or for the journal.

Only the ``flaskd`` and ``waitress`` loggers are set up; the root logger and the app's own logging are left alone.
Log records may carry ``extra={"fields": {...}}``: named values for JSON and the journal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Self

from flaskd.forks import forgotten_by_children
from flaskd.journal import Journal, encode, field_name
from flaskd.loggers import adopt

_LAST_FLUSH = 1.0
"""Seconds that the last lines may take to be written."""

Format = Literal["auto", "text", "json", "journal"]
Access = Literal["off", "common", "combined", "json"]

_queue_log = logging.getLogger("waitress.queue")
"""Warns at every request that waits for a thread; that is no news to a daemon, and `status` shows how many wait."""
access_log = logging.getLogger("flaskd.access")

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""syslog(3) priorities, as sd-daemon(3) prefixes."""
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
}


def timestamp(moment: float) -> str:
    """A wall-clock moment (seconds since the epoch) as RFC 3339 in UTC, with milliseconds."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Text(logging.Formatter):
    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        level, message = record.levelname.lower(), _whole_message(self, record)
        line = f"{timestamp(record.created)} {level:<7} {message}"
        colour = _COLOURS.get(record.levelno) if self._colour else None
        return f"{colour}{line}\x1b[0m" if colour else line


class _Entry(NamedTuple):
    """An entry for the journal, and what becomes a line on standard error where the journal does not take it."""

    data: bytes
    priority: int
    message: str

    def prefixed(self) -> str:
        """Lines with ``<N>`` prefixes, because what reads them splits at newlines (sd-daemon(3))."""
        return "\n".join(f"<{self.priority}>{line}" for line in self.message.splitlines())


class _Prefixed(logging.Formatter):
    """For what reads standard error and knows the journal's prefixes."""

    def format(self, record: logging.LogRecord) -> str:
        return _Entry(b"", _PRIORITIES.get(record.levelno, 6), _whole_message(self, record)).prefixed()


class _Json(logging.Formatter):
    """One JSON object a line, in ASCII whatever the encoding of standard error; keys are stable."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class _Native(logging.Formatter):
    """Entries of the journal with fields (systemd.journal-fields(7)); the message stays whole, newlines and all."""

    def entry(self, record: logging.LogRecord) -> _Entry:
        """The entry for a record."""
        message, priority = _whole_message(self, record), _PRIORITIES.get(record.levelno, 6)
        fields = {
            "MESSAGE": message,
            "PRIORITY": str(priority),
            "SYSLOG_IDENTIFIER": "flaskd",
            "FLASKD_LOGGER": record.name,
        }
        for key, value in getattr(record, "fields", {}).items():
            if value is not None:
                text = json.dumps(value) if isinstance(value, list | dict) else str(value)
                fields[field_name("request_id" if key == "id" else key)] = text
        return _Entry(encode(fields), priority, message)


class _Bare(logging.Formatter):
    """Just the message: access lines are in formats of their own."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage()


def _whole_message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.name.startswith("waitress"):  # it names paths as they decode, and %0A decodes to a line feed
        message = _safe(message, quotes="")
    if record.exc_info:
        message = f"{message}\n{formatter.formatException(record.exc_info)}"
    return message


class _Writer:
    """Writes lines to standard error in a thread of its own, so that a reader who stalls costs only lines."""

    _MOST = 10_000
    """Lines that may wait."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str | _Entry | threading.Event] = queue.Queue(self._MOST)
        self._journal: Journal | None = None
        self._thread: threading.Thread | None = None
        self._dropped = 0

    def start(self) -> None:
        """Start the thread; where none can be had, lines are written in place."""
        self._thread = threading.Thread(target=self._run, name="flaskd-log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None

    def put(self, line: str | _Entry) -> None:
        """Have a line, or an entry for the journal, written soon; when too many wait, it is dropped and counted."""
        if self._thread is None:
            self._write(line)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self, timeout: float) -> None:
        """Wait at most `timeout` seconds until all lines so far are written."""
        if self._thread is None:
            return
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._lines.put(written, timeout=timeout)
            written.wait(timeout)

    def forget(self) -> None:
        """In a forked child there is no thread: write in place."""
        self._thread = None

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            self._write(line)
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                _write(f"flaskd: {dropped} log lines were dropped, because standard error was not read\n")

    def _write(self, line: str | _Entry) -> None:
        if isinstance(line, str):
            _write(line)
            return
        if self._journal is None:
            self._journal = Journal()
        try:
            self._journal.send(line.data)
        except OSError:  # standard error leads there, too, by a way that the service manager keeps open
            _write(line.prefixed() + "\n")

    def close(self) -> None:
        """Close the way to the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a terminal or pipe that went away costs the line
        sys.stderr.write(text)
        sys.stderr.flush()


class _StderrHandler(logging.Handler):
    """Formats, and leaves the writing to the writer."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self._writer = writer

    def handle(self, record: logging.LogRecord) -> Any:
        """Without the handler's lock, which is not needed here: who hangs with it must not keep us."""
        passed: Any = self.filter(record)  # a bool, or from 3.12 on a record that comes instead
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            form = self.formatter
            self._writer.put(form.entry(record) if isinstance(form, _Native) else self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - logging's own way to tell of a bad log call
            self.handleError(record)


def _stderr_is_gone() -> bool:
    return bool(getattr(sys.stderr, "closed", sys.stderr is None))


def in_journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error is the journal: $JOURNAL_STREAM names its device and inode (systemd.exec(5))."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except Exception:  # noqa: BLE001 - the app may have put any object there
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class Logs:
    """The set-up of flaskd's loggers, as a context manager that puts everything back."""

    def __init__(self) -> None:
        self._writer = _Writer()
        self._daemon, self._access = _StderrHandler(self._writer), _StderrHandler(self._writer)
        self._loggers = [logging.getLogger("flaskd"), logging.getLogger("waitress"), access_log]
        self._before: list[tuple[int, bool]] = []
        self.access: Access = "off"

    def __enter__(self) -> Self:
        self._before = [(logger.level, logger.propagate) for logger in self._loggers]
        self._queue_level = _queue_log.level
        _queue_log.setLevel(logging.ERROR)
        adopt()
        for logger in self._loggers:
            logger.addHandler(self._access if logger is access_log else self._daemon)
            logger.propagate = False
        self._writer.start()
        self._forgotten = forgotten_by_children(self._writer.forget)
        self._forgotten.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        _queue_log.setLevel(self._queue_level)
        for logger, (level, propagate) in zip(self._loggers, self._before, strict=True):
            logger.removeHandler(self._access if logger is access_log else self._daemon)
            logger.setLevel(level)
            logger.propagate = propagate
        self.flush(_LAST_FLUSH)
        self._writer.close()
        self._forgotten.__exit__(None, None, None)

    def flush(self, timeout: float) -> None:
        """Wait at most `timeout` seconds until all is written."""
        self._writer.flush(timeout)

    @staticmethod
    def reclaim() -> None:
        """Switch our loggers on again after the app's own set-up: logging.config disables all that it does not name."""
        adopt()
        for name, logger in logging.root.manager.loggerDict.items():
            if name.partition(".")[0] in {"flaskd", "waitress"} and isinstance(logger, logging.Logger):
                logger.disabled = False

    def set_level(self, level: str) -> None:
        """Choose the least severity that is logged, until the next `apply`."""
        number = logging.getLevelNamesMapping()[level.upper()]
        for logger in self._loggers:
            if logger is not access_log:
                logger.setLevel(number)

    @property
    def level(self) -> str:
        """The least severity that is logged."""
        return logging.getLevelName(self._loggers[0].level).lower()

    def apply(self, *, level: str, log_format: Format, access: Access) -> None:
        """Choose level and formats; at the start, and again at each reload."""
        number = logging.getLevelNamesMapping()[level.upper()]
        for logger in self._loggers:
            logger.setLevel(number)
        access_log.setLevel(logging.CRITICAL + 1 if access == "off" else logging.INFO)
        self.access = access
        self._daemon.setFormatter(_formatter(log_format))
        chosen = _formatter(log_format)
        # A JSON access line is already whole; a text one has its own date. Only containers around it differ.
        bare = isinstance(chosen, _Text) or (access == "json" and not isinstance(chosen, _Native))
        self._access.setFormatter(_Bare() if bare else chosen)


def _formatter(log_format: Format) -> logging.Formatter:
    if log_format in {"auto", "journal"} and in_journal(os.environ):
        return _Native()
    if log_format == "json":
        return _Json()
    if log_format == "journal":
        return _Prefixed()
    return _Text(colour=_on_terminal() and "NO_COLOR" not in os.environ)


def _on_terminal() -> bool:
    """Whether standard error is a terminal; the app may have put any object there, also one that cannot say."""
    try:
        return not _stderr_is_gone() and bool(sys.stderr.isatty())
    except Exception:  # noqa: BLE001 - see above
        return False


def log_access(access: Access, fields: Mapping[str, Any]) -> None:
    """Write one access line; for `fields` see `Request.access_fields`."""
    if access == "json":
        entry = {"time": timestamp(fields["time"]), **{key: fields[key] for key in fields if key != "time"}}
        message = json.dumps(entry)
    else:
        date = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(fields["time"]))
        request = f"{fields['method']} {fields['target']} {fields['protocol']}"
        message = f'{fields["client"]} - - [{date}] "{_safe(request)}" {fields["status"]} {fields["bytes"]}'
        if access == "combined":
            message += f' "{_safe(fields["referer"] or "-")}" "{_safe(fields["agent"] or "-")}"'
    access_log.info("%s", message, extra={"fields": dict(fields)})


def _safe(text: str, quotes: str = '"\\') -> str:
    """Escape what could forge a line or a field, as nginx does: quotes, backslashes and control characters."""
    return "".join(char if char.isprintable() and char not in quotes else f"\\x{ord(char):02X}" for char in text)
