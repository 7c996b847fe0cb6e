"""One tree of errors; each knows the exit code a process ends with and the code a control reply carries.

Exit codes follow ``sysexits.h`` (FreeBSD ``sysexits(3)``) where it has a word for the case.
"""

from __future__ import annotations

import errno

EX_OK = 0
EX_LOST = 1
"""A drain or stop that lost work, or an unexpected failure."""
EX_USAGE = 64
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_CANTCREAT = 73
EX_TEMPFAIL = 75
EX_NOPERM = 77
EX_CONFIG = 78


class FlaskdError(Exception):
    """Base of everything flaskd raises on purpose; its text is one clear line, or several of equal rank."""

    exit_code = EX_LOST
    code = "failed"
    details: str = ""
    """What follows its text in a log and in an answer, but not in a status: a traceback, or the line of a file."""

    @property
    def whole(self) -> str:
        """Its text and its details."""
        return f"{self}\n{self.details}".rstrip()


class UsageError(FlaskdError):
    """A command line or control command that cannot be understood (exit 64)."""

    exit_code = EX_USAGE
    code = "usage"


class UnknownCommandError(UsageError):
    """A control verb that does not exist (exit 64)."""

    code = "unknown-command"


class NoDaemonError(FlaskdError):
    """No daemon answers at the places that were tried (exit 69)."""

    exit_code = EX_UNAVAILABLE
    code = "no-daemon"


class UnsupportedError(FlaskdError):
    """This system has not got what the daemon needs (exit 69)."""

    exit_code = EX_UNAVAILABLE
    code = "unsupported"


class AppError(FlaskdError):
    """The app's own code raised while it was loaded, or its probe failed (exit 70).

    ``details`` is the app's own traceback, from the app's first frame on; empty when there is none.
    """

    exit_code = EX_SOFTWARE
    code = "app-failed"

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class CannotCreateError(FlaskdError):
    """A listener cannot be bound, or a node cannot be made (exit 73)."""

    exit_code = EX_CANTCREAT
    code = "cannot-bind"


class NotNowError(FlaskdError):
    """Right command, wrong moment: the state refuses it, or another flaskd is alive there (exit 75)."""

    exit_code = EX_TEMPFAIL
    code = "not-now"


class ForbiddenError(FlaskdError):
    """The peer may not do that (exit 77)."""

    exit_code = EX_NOPERM
    code = "forbidden"


class ConfigError(FlaskdError):
    """The configuration is at fault; one line per fault, all faults at once (exit 78)."""

    exit_code = EX_CONFIG
    code = "config-invalid"


_SHORT_OF = {
    errno.EMFILE: "more open files than this process may have; raise LimitNOFILE= of its unit, or ulimit -n",
    errno.ENFILE: "more open files than this machine may have; see fs.file-max, sysctl(8)",
    errno.ENOMEM: "no memory can be had; see MemoryMax= of its unit, or the limit of its container",
}


def shortage(error: BaseException) -> CannotCreateError | None:
    """The clear word for an error that tells of a lack of threads, files or memory; None for all others."""
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return CannotCreateError(
            "no thread can be had; raise TasksMax= of its unit, pids.max of its container, or ulimit -u"
        )
    number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno if isinstance(error, OSError) else None
    return CannotCreateError(_SHORT_OF[number]) if number in _SHORT_OF else None


def described(error: BaseException) -> str:
    """An exception in one word or a few; its own text is code of who made it, and may raise."""
    try:
        return repr(error)
    except BaseException:  # noqa: BLE001 - see above
        return type(error).__name__
