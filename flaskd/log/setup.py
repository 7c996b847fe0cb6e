"""What flaskd writes to standard error: its own log and the access log, as text, as JSON or for the journal.

Only the loggers ``flaskd`` and ``waitress`` are set up; the root logger and the app's own logging stay as they are.
Log records may carry ``extra={"fields": {...}}``: named values for JSON and the journal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

from flaskd.log.access import Access, access_line, access_log, log_access
from flaskd.log.journal import encode, field_name
from flaskd.log.writer import Entry, Line, Writer
from flaskd.process.forks import forgotten_by_children
from flaskd.text import bounded, entry, escaped, lines, traceback_of
from flaskd.units import timestamp

_OURS = {"flaskd", "waitress"}
"""The loggers that flaskd sets up, together with all loggers below them."""
_LAST_FLUSH = 1.0
"""How many seconds the last lines may take to be written."""

Format = Literal["auto", "text", "json", "journal"]

_queue_log = logging.getLogger("waitress.queue")
"""Waitress warns here about each request that waits for a thread. flaskd drops this: `status` shows how many wait."""

_IN_JOURNAL = {"id": "request_id", "request_id": "x_request_id"}
"""Keys that have another name in the journal, because its fields are shared by all programs."""
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""syslog(3) priorities, used as prefixes (sd-daemon(3))."""
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
}


_CALL_HANDLERS = logging.Logger.callHandlers

Hide = Callable[[str], str]
"""Masks secrets in a text; see `flaskd.text.Redactor`."""


class _ForPeople(logging.Formatter):
    """Formats a record as text that is one entry: no text in it can begin another entry or control a terminal."""

    def __init__(self, hide: Hide, always: Mapping[str, Any]) -> None:
        super().__init__()
        self._hide, self._always = hide, always

    @property
    def _who(self) -> str:
        """A prefix that names the worker, if all workers write to one log."""
        return f"worker {self._always['worker']}: " if "worker" in self._always else ""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """The traceback; the text of each exception in it is one line."""
        _, error, trace = ei
        return traceback_of(error, trace) if isinstance(error, BaseException) else ""

    def whole(self, record: logging.LogRecord, *, indented: bool = True) -> str:
        """The message with its traceback; further lines of the message are `indented`."""
        message = bounded(self._hide(record.getMessage()))
        if record.name.startswith("waitress"):  # it logs decoded paths, and %0A decodes to a line feed
            message = escaped(message)
        else:
            message = entry(message) if indented else "\n".join(lines(message))
        trace = bounded(self._hide(self.formatException(record.exc_info))) if record.exc_info else ""
        return f"{message}\n{trace}" if trace else message


class _Text(_ForPeople):
    def __init__(self, hide: Hide, always: Mapping[str, Any], *, colour: bool) -> None:
        super().__init__(hide, always)
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        line = f"{timestamp(record.created)} {record.levelname.lower():<7} {self._who}{self.whole(record)}"
        colour = _COLOURS.get(record.levelno) if self._colour else None
        return f"{colour}{line}\x1b[0m" if colour else line


class _Prefixed(_ForPeople):
    """For a reader of standard error that knows the journal's prefixes."""

    def format(self, record: logging.LogRecord) -> str:
        return Entry(b"", _PRIORITIES.get(record.levelno, 6), f"{self._who}{self.whole(record)}").prefixed()


class _Json(logging.Formatter):
    """One JSON object on each line, in ASCII whatever the encoding of standard error is; the keys are stable."""

    def __init__(self, hide: Hide, always: Mapping[str, Any]) -> None:
        super().__init__()
        self._hide, self._always = hide, always

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": bounded(self._hide(record.getMessage())),
        }
        found.update({**self._always, **getattr(record, "fields", {})})
        if record.exc_info:
            found["exception"] = bounded(self._hide(self.formatException(record.exc_info)))
        return json.dumps(found, default=str)


class _Native(_ForPeople):
    """Journal entries with fields (systemd.journal-fields(7)); the message keeps its newlines."""

    def entry(self, record: logging.LogRecord) -> Entry:
        """The journal entry for a record."""
        priority = _PRIORITIES.get(record.levelno, 6)
        fields = {
            "MESSAGE": self.whole(record, indented=False),
            "PRIORITY": str(priority),
            "SYSLOG_IDENTIFIER": "flaskd",
            "FLASKD_LOGGER": record.name,
        }
        for key, value in {**self._always, **getattr(record, "fields", {})}.items():
            if value is not None:
                text = json.dumps(value) if isinstance(value, list | dict) else str(value)
                fields[field_name(_IN_JOURNAL.get(key, key))] = text
        return Entry(encode(fields), priority, self.whole(record))


class _Bare(logging.Formatter):
    """Only the message: access lines have formats of their own."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage()


class _StderrHandler(logging.Handler):
    """Formats records and passes the lines to the writer."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer
        self.adopted: set[str] = set()
        """The names of adopted loggers: their records are written directly, so those that arrive here are dropped."""

    def handle(self, record: logging.LogRecord) -> Any:
        """Write the record of a logger that was made after the last `reclaim`, unless it is adopted."""
        if record.name not in self.adopted:
            self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record without taking the handler's lock, because a thread may hang while it holds the lock."""
        try:
            kind = getattr(record, "bounded", "")
            if not kind or self._writer.admits(kind):
                self._writer.put(self.line(record))
        except Exception:  # noqa: BLE001 - logging reports a bad log call with handleError
            with contextlib.suppress(Exception):  # it writes to the app's standard error, which may raise
                self.handleError(record)

    def line(self, record: logging.LogRecord) -> Line:
        """The line for a record."""
        form = self.formatter
        return form.entry(record) if isinstance(form, _Native) else self.format(record)


def bounded_by(kind: str) -> dict[str, str]:
    """The `extra` of a line that clients can cause at will: of each `kind` a number is written, the rest is counted.

    The kind is a plural that the count is shown with, such as "commands of uid=7". See `flaskd.log.throttle`.
    """
    return {"bounded": kind}


class _Adopted:
    """One of flaskd's loggers while flaskd runs: only flaskd's configuration decides what it writes.

    An app may reconfigure all loggers: disable them, raise their levels, remove their handlers. That changes what the
    app's handlers get of flaskd's lines, but not what flaskd writes. None of logging's locks is taken.
    """

    _PATCHED = ("isEnabledFor", "handle", "makeRecord")

    def __init__(self, logger: logging.Logger, handler: _StderrHandler, least: int) -> None:
        self.level = self._least = least
        self.logger = logger
        self._handler = handler
        self._told: set[str] = set()
        logger.makeRecord = self._make_record  # type: ignore[method-assign]
        logger.isEnabledFor = self._is_enabled_for  # type: ignore[method-assign]
        logger.handle = self._handle  # type: ignore[method-assign]

    def release(self) -> None:
        """Undo the adoption."""
        for name in self._PATCHED:
            vars(self.logger).pop(name, None)

    def set_level(self, level: int) -> None:
        """Set the lowest level that is written."""
        self.level = max(level, self._least)

    def _is_enabled_for(self, level: int) -> bool:
        return level >= self.level

    def _handle(self, record: logging.LogRecord) -> None:
        self._handler.emit(record)
        if not self.is_ours_alone:
            try:
                if type(self.logger).isEnabledFor(self.logger, record.levelno):
                    type(self.logger).handle(self.logger, record)
            except BaseException as error:  # noqa: BLE001 - code of the app; SystemExit would end the logging thread
                self._tell(f"a log handler or filter of the app's raised {type(error).__name__}")

    @property
    def is_ours_alone(self) -> bool:
        """Whether no handler of the app is to get its records."""
        patched = type(self.logger).callHandlers is not _CALL_HANDLERS  # Sentry's integration does this
        return not patched and all(isinstance(each, _StderrHandler) for each in _handlers_of(self.logger))

    def _make_record(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        """Make the record with the app's factory (logging.setLogRecordFactory); if that fails, with Python's own."""
        try:
            record: object = type(self.logger).makeRecord(self.logger, *args, **kwargs)
            if isinstance(record, logging.LogRecord):
                return record
            fault = f"the log record factory gave {type(record).__name__} where a LogRecord was expected"
        except BaseException as error:  # noqa: BLE001 - see _handle
            fault = f"the log record factory raised {type(error).__name__}"
        plain = _plain_record(*args, **kwargs)
        self._tell(fault)
        return plain

    def _tell(self, fault: str) -> None:
        """Log once that the app's part of logging fails, because it may fail at each line."""
        if fault not in self._told:
            self._told.add(fault)
            self._handler.emit(
                logging.LogRecord(
                    self.logger.name, logging.WARNING, "", 0, f"{fault}; flaskd's lines go on without it", None, None
                )
            )


def _plain_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """Make a record with Python's own factory; the arguments are those of `logging.Logger.makeRecord`."""
    name, level, file, line, message, arguments, exc_info, *rest = args
    given = dict(zip(("func", "extra", "sinfo"), rest, strict=False)) | kwargs
    record = logging.LogRecord(
        name, level, file, line, message, arguments, exc_info, given.get("func"), given.get("sinfo")
    )
    record.__dict__.update(given.get("extra") or {})
    return record


def _handlers_of(logger: logging.Logger | None) -> Iterator[logging.Handler]:
    """The handlers that a record of this logger reaches, as in `logging.Logger.callHandlers`."""
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def _on_terminal() -> bool:
    try:
        return bool(sys.stderr.isatty())
    except BaseException:  # noqa: BLE001 - it may be closed, None, or an object of the app
        return False


def in_journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error is the journal: $JOURNAL_STREAM has its device and inode (systemd.exec(5))."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except BaseException:  # noqa: BLE001 - it may be closed, None, or an object of the app
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class Logs:
    """The set-up of flaskd's loggers; as a context manager, it undoes everything at the end."""

    def __init__(self) -> None:
        self._writer = Writer(self._said)
        self._daemon, self._access = _StderrHandler(self._writer), _StderrHandler(self._writer)
        self._loggers = [logging.getLogger("flaskd"), logging.getLogger("waitress"), access_log]
        self._adopted: dict[str, _Adopted] = {}
        self._before: list[tuple[int, bool]] = []
        self._level = logging.WARNING
        self.access: Access = "off"
        self.always: dict[str, Any] = {}
        """Fields of each line; formats without fields only name the worker. To be set before `apply`."""

    def __enter__(self) -> Self:
        self._before = [(logger.level, logger.propagate) for logger in self._loggers]
        for logger in self._loggers:
            logger.propagate = False
        self.reclaim()
        self._writer.start()
        self._forgotten = forgotten_by_children(self._writer.forget)
        self._forgotten.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.tell_all()
        for adopted in self._adopted.values():
            adopted.release()
        self._adopted.clear()
        for logger, (level, propagate) in zip(self._loggers, self._before, strict=True):
            logger.removeHandler(self._daemon)
            logger.setLevel(level)
            logger.propagate = propagate
        self._writer.close(_LAST_FLUSH)
        self._forgotten.__exit__(None, None, None)

    def flush(self, timeout: float) -> None:
        """Wait at most `timeout` seconds until all lines are written."""
        self._writer.flush(timeout)

    def reclaim(self) -> None:
        """Adopt flaskd's loggers that were made since the last call; importing the app may make some."""
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if name.partition(".")[0] in _OURS and isinstance(logger, logging.Logger) and name not in self._adopted:
                handler = self._access if logger is access_log else self._daemon
                handler.adopted.add(name)
                least = logging.ERROR if logger is _queue_log else logging.NOTSET
                self._adopted[name] = _Adopted(logger, handler, least)
                if logger is not access_log:
                    self._adopted[name].set_level(self._level)
        for logger in self._loggers:
            logger.disabled = False
            if logger is not access_log:
                logger.addHandler(self._daemon)  # for loggers that are made later

    def set_level(self, level: str) -> None:
        """Set the lowest level that is logged, until the next `apply`."""
        self._level = logging.getLevelNamesMapping()[level.upper()]
        for adopted in list(self._adopted.values()):  # any thread sets a level, and another one may adopt
            if adopted.logger is not access_log:
                adopted.set_level(self._level)
        for logger in self._loggers:
            if logger is not access_log:
                logger.setLevel(self._level)  # for loggers made later, and for the app's handlers

    @property
    def level(self) -> str:
        """The lowest level that is logged."""
        return logging.getLevelName(self._level).lower()

    def apply(self, *, level: str, log_format: Format, access: Access, hide: Hide = str) -> None:
        """Set level and formats, at the start and at each reload; `hide` masks secrets in messages."""
        self.set_level(level)
        least = logging.CRITICAL + 1 if access == "off" else logging.INFO
        self._adopted[access_log.name].set_level(least)
        access_log.setLevel(least)
        self.access = access
        self._daemon.setFormatter(_formatter(log_format, hide, self.always))
        chosen = _formatter(log_format, str, self.always)
        # A JSON access line is complete, and a text line has its own date: the log's text and JSON formats add nothing.
        bare = isinstance(chosen, _Text) or (access == "json" and not isinstance(chosen, _Native))
        self._access.setFormatter(_Bare() if bare else chosen)

    def write_access(self, fields: Mapping[str, Any]) -> None:
        """Write one access line of `Request.access_fields`; texts from the client are cut to a maximum length."""
        if self.access == "off":
            return
        if self.access == "json" and (instance := self.always.get("instance")):  # the format adds nothing here
            fields = {**fields, "instance": instance}
        if type(self._access.formatter) is _Bare and self._adopted[access_log.name].is_ours_alone:
            self._writer.put(access_line(self.access, fields), hurry=False)  # without a log record
        else:
            log_access(self.access, fields)

    def _said(self, words: str) -> Line:
        """A message of the writer itself, in the format of the log."""
        return self._daemon.line(logging.LogRecord("flaskd.log.setup", logging.WARNING, "", 0, words, None, None))


def _formatter(log_format: Format, hide: Hide, always: Mapping[str, Any]) -> logging.Formatter:
    if log_format in {"auto", "journal"} and in_journal(os.environ):
        return _Native(hide, always)
    if log_format == "json":
        return _Json(hide, always)
    if log_format == "journal":
        return _Prefixed(hide, always)
    return _Text(hide, always, colour=_on_terminal() and "NO_COLOR" not in os.environ)
