"""Loggers that never raise: what an app puts into logging costs no line of flaskd's, and never the thread that logs.

``logging.setLogRecordFactory`` holds for every logger of the process, and anyone may add a filter or a handler to
flaskd's. Where one of them raises, it would raise in the middle of a drain, of a stop, or of the loop that serves.
"""

from __future__ import annotations

import logging
from typing import Any

OURS = ("flaskd", "waitress")
"""The first parts of the names of the loggers that are flaskd's."""

_told: set[str] = set()
"""What was said to raise already: once is enough, since it may do so at every line."""


class UnfailingLogger(logging.Logger):
    """A logger whose calls return, whatever a record factory, a filter or a handler raises; its lines go on."""

    def makeRecord(self, *args: Any, **kwargs: Any) -> logging.LogRecord:  # noqa: N802 - logging's name
        """Make the record as the app has it made, else as Python does by itself."""
        try:
            record: object = super().makeRecord(*args, **kwargs)
            if isinstance(record, logging.LogRecord):
                return record
            fault = f"gave {type(record).__name__} where a LogRecord was expected"
        except BaseException as error:  # noqa: BLE001 - the app's code; SystemExit would end the thread that logs
            fault = f"raised {type(error).__name__}"
        plain = _plain_record(*args, **kwargs)
        self._tell("the log record factory", fault)
        return plain

    def filter(self, record: logging.LogRecord) -> Any:
        """Ask the filters; one that raises lets the record pass."""
        try:
            return super().filter(record)
        except BaseException as error:  # noqa: BLE001 - see makeRecord
            self._tell(f"a log filter of {self.name}", f"raised {type(error).__name__}")
            return True

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Give the record to the handlers here and above; one that raises keeps it from no other."""
        logger: logging.Logger | None = self
        while logger is not None:
            for each in logger.handlers.copy():
                try:
                    if record.levelno >= each.level:
                        each.handle(record)
                except BaseException as error:  # noqa: BLE001 - see makeRecord
                    self._tell(f"a log handler of {logger.name}", f"raised {type(error).__name__}")
            logger = logger.parent if logger.propagate else None

    def _tell(self, what: str, fault: str) -> None:
        if what not in _told:
            _told.add(what)
            self.warning("%s %s; flaskd's lines go on without it", what, fault)


def _plain_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """The record that Python makes by itself, of what `logging.Logger.makeRecord` is given."""
    name, level, file, line, message, arguments, exc_info, *rest = args
    given = dict(zip(("func", "extra", "sinfo"), rest, strict=False)) | kwargs
    record = logging.LogRecord(
        name, level, file, line, message, arguments, exc_info, given.get("func"), given.get("sinfo")
    )
    record.__dict__.update(given.get("extra") or {})
    return record


def adopt() -> None:
    """Make all of flaskd's and Waitress' loggers that there are by now unfailing ones."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in OURS and type(logger) is logging.Logger:
            logger.__class__ = UnfailingLogger
