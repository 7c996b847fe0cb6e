"""The tree of errors. Each class has the exit code of a process that ends with it, and the code of a control reply.

Exit codes follow ``sysexits.h`` (FreeBSD ``sysexits(3)``) where that has a fitting one.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

EX_OK = 0
EX_LOST = 1
"""The exit code for a drain or stop that lost work, and for an unexpected failure."""
EX_USAGE = 64
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_CANTCREAT = 73
EX_TEMPFAIL = 75
EX_NOPERM = 77
EX_CONFIG = 78


class FlaskdError(Exception):
    """Base of all errors that flaskd raises on purpose; its text is one line, or several lines that are faults."""

    exit_code = EX_LOST
    code = "failed"
    details: str = ""
    """What follows its text in a log and in an answer, but not in a status: a traceback, or the line of a file."""

    for_programs: Mapping[str, Any] = MappingProxyType({})
    """What answers to programs have beside its code and its text."""

    @property
    def whole(self) -> str:
        """Its text and its details."""
        return f"{self}\n{self.details}".rstrip()


class UsageError(FlaskdError):
    """A command line or control command is malformed (exit 64)."""

    exit_code = EX_USAGE
    code = "usage"


class UnknownCommandError(UsageError):
    """A control verb does not exist (exit 64)."""

    code = "unknown-command"


class NoDaemonError(FlaskdError):
    """No daemon answers at the places that were tried (exit 69)."""

    exit_code = EX_UNAVAILABLE
    code = "no-daemon"


class UnsupportedError(FlaskdError):
    """This system lacks something that the daemon needs (exit 69)."""

    exit_code = EX_UNAVAILABLE
    code = "unsupported"


class AppError(FlaskdError):
    """The app's code raised while it was loaded, or its probe failed (exit 70).

    ``details`` is the app's traceback, from the app's first frame on; empty if there is none.
    """

    exit_code = EX_SOFTWARE
    code = "app-failed"

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class CannotCreateError(FlaskdError):
    """A listener cannot be bound, or a file cannot be made (exit 73)."""

    exit_code = EX_CANTCREAT
    code = "cannot-bind"


class NotNowError(FlaskdError):
    """The command is right, but the present state does not allow it, or another flaskd runs there (exit 75)."""

    exit_code = EX_TEMPFAIL
    code = "not-now"


class ForbiddenError(FlaskdError):
    """The client has no permission for that (exit 77)."""

    exit_code = EX_NOPERM
    code = "forbidden"


class ConfigError(FlaskdError):
    """The configuration has faults: one line for each of them (exit 78)."""

    exit_code = EX_CONFIG
    code = "config-invalid"


_SHORT_OF = {
    errno.EMFILE: "more open files than this process may have; raise LimitNOFILE= of its unit, or ulimit -n",
    errno.ENFILE: "more open files than this machine may have; see fs.file-max, sysctl(8)",
    errno.ENOMEM: "no memory can be had; see MemoryMax= of its unit, or the limit of its container",
}


def shortage(error: BaseException) -> CannotCreateError | None:
    """A clear error if `error` shows a lack of threads, files or memory, else None."""
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return CannotCreateError(
            "no thread can be had; raise TasksMax= of its unit, pids.max of its container, or ulimit -u"
        )
    number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno if isinstance(error, OSError) else None
    return CannotCreateError(_SHORT_OF[number]) if number in _SHORT_OF else None


def described(error: BaseException) -> str:
    """An exception in a few words; its text is made by code of its class, which may raise."""
    try:
        return repr(error)
    except BaseException:  # noqa: BLE001 - see above
        return type(error).__name__
