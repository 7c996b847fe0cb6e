"""What the daemon and its clients share: where the socket is, replies, error codes, the fields of a record."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from flaskd import errors

SOCKET = "control.sock"
FIFO = "control"
RECORD = "last-stop.json"
"""The default file name of the record of the last stop, in the state directory."""
MARK = "running.json"
"""The file name of the mark of a run, in the state directory; it exists from the run's start to its complete end."""
MAX_LINE = 4096
"""The longest command in bytes: what is written to a FIFO in one piece (PIPE_BUF, pipe(7))."""

Fields = Mapping[str, Any]
"""Named values of an answer."""

_ERRORS: list[type[errors.FlaskdError]] = [
    errors.FlaskdError,
    errors.UnknownCommandError,
    *errors.FlaskdError.__subclasses__(),
]
EXIT_CODES: dict[str, int] = {
    **{kind.code: kind.exit_code for kind in _ERRORS},
    "not-ready": errors.EX_TEMPFAIL,
    "unhealthy": errors.EX_TEMPFAIL,
    "no-record": errors.EX_TEMPFAIL,
    "restart-needed": errors.EX_CONFIG,
}
"""Error code of a reply → exit code of the client that got it."""


def runtime_directories(name: str, environ: Mapping[str, str], *, client: bool = True) -> Iterator[Path]:
    """The possible runtime directories of a daemon with this name, the most likely first.

    A daemon takes the first; a client tries all of them, and those of root.
    """
    if first := environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]:
        yield Path(first)
    user_id = _user_id()
    if user_id == 0:
        yield Path("/run") / name
    if user := environ.get("XDG_RUNTIME_DIR"):
        yield Path(user) / name
    if client and user_id != 0:
        yield Path("/run") / name
    yield temporary_directory(environ) / f"{name}-{user_id}"


def temporary_directory(environ: Mapping[str, str]) -> Path:
    """Where temporary files go: ``tempfile.tempdir`` if the program has set it, else $TMPDIR, $TEMP, $TMP, else /tmp.

    tempfile.gettempdir() is not used, because it depends on what can be written at the moment: while /tmp is full it
    gives another directory or raises, and a daemon and its clients would not find each other.
    """
    if chosen := getattr(sys.modules.get("tempfile"), "tempdir", None):
        return Path(os.fsdecode(chosen))
    places = (environ.get(variable, "") for variable in ("TMPDIR", "TEMP", "TMP"))
    return next((Path(each) for each in places if each and os.path.isdir(each)), Path("/tmp"))  # noqa: PTH112, S108


def state_directory(name: str, environ: Mapping[str, str]) -> Path:
    """``$STATE_DIRECTORY`` (its first entry), else ``/var/lib/NAME`` for root, else ``$XDG_STATE_HOME/NAME``."""
    if first := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(first)
    if _user_id() == 0:
        return Path("/var/lib") / name
    home = Path("~").expanduser() if environ.get("HOME") or _has_home() else Path("/")
    return Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state") / name


def _user_id() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else -1  # Windows has no user ids, and no daemon runs there


def _has_home() -> bool:
    try:
        Path.home()
    except RuntimeError:  # a user without an entry in passwd, as in containers
        return False
    return True


class Reply(Protocol):
    """Receives the outcome of a command; any thread may call every method."""

    def progress(self, fields: Fields) -> None:
        """Report progress."""

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        """Report success: a word and values; `detail` is for programs, `lines` and `hint` are for people."""

    def error(self, code: str, message: str, *, detail: Mapping[str, Any] | None = None) -> None:
        """Report failure; `detail` is for programs."""


def reason_of(status: int, otherwise: str) -> str:
    """The reason phrase of an HTTP status (RFC 9110 §15), or `otherwise` if it has none."""
    return HTTPStatus(status).phrase if status in _STATUSES else otherwise


class Discard:
    """The reply for commands whose outcome no client waits for; it drops everything."""

    def progress(self, fields: Fields) -> None:
        """Drop it."""

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        """Drop it."""

    def error(self, code: str, message: str, *, detail: Mapping[str, Any] | None = None) -> None:
        """Drop it."""


_STATUSES = {status.value for status in HTTPStatus}
_NUMBER = (int, float)
_RECORD = {
    "reason": str, "started": str, "took": _NUMBER, "completed": int, "rejected": int, "unaccepted": int,
    "cut": list, "background": list, "unfinished": list, "policies": dict, "omitted": dict, "workers": list,
}  # fmt: skip
_REQUEST = {"method": str, "path": str, "phase": str, "age": _NUMBER, "reason": str}
_WORK = {"name": str, "age": _NUMBER, "thread": str}
_LEFT = {"name": str}
_STEP = {"fate": str, "took": _NUMBER, "why": str}
_SUMMARY = ("reason", "started", "took", "completed", "rejected", "cut", "failed")


def damage(record: object) -> str:
    """Why something that was read is no valid record of a stop; empty if it is one.

    A state directory outlives versions of flaskd, and other programs may write to it.
    """
    if fault := _misfit(record, _RECORD, "", needed=("reason",)):
        return fault
    assert isinstance(record, dict)
    faults = [
        _misfit(each, {**_REQUEST, "request_id": str}, "cut: ", needed=_REQUEST) for each in record.get("cut", ())
    ]
    faults += [_misfit(each, _WORK, "background: ", needed=_WORK) for each in record.get("background", ())]
    faults += [_misfit(each, _LEFT, "unfinished: ", needed=_LEFT) for each in record.get("unfinished", ())]
    faults += [_misfit(each, _STEP, "policies: ", needed=("fate",)) for each in record.get("policies", {}).values()]
    return next(filter(None, faults), "")


def _misfit(entry: object, kinds: Mapping[str, Any], where: str, *, needed: Iterable[str]) -> str:
    if not isinstance(entry, dict):
        return f"{where}expected a JSON object"
    for key, kind in kinds.items():
        if not isinstance(entry[key], kind) if key in entry else key in needed:
            return f'{where}"{key}" is not what a stop writes there' if key in entry else f'{where}no "{key}"'
    return ""


def summary(record: Fields | None) -> Fields | None:
    """The record of a stop in short: for its requests and steps only how many there are.

    A record that cannot be read gives only the key `damaged`.
    """
    if record is None:
        return None
    if "damaged" in record:
        return {**dict.fromkeys(_SUMMARY), "damaged": record["damaged"]}
    fates = [entry.get("fate") for entry in record.get("policies", {}).values()]
    return {
        **{key: record.get(key) for key in _SUMMARY[:-2]},
        "cut": how_many(record, "cut"),
        **({"unfinished": how_many(record, "unfinished")} if record.get("unfinished") else {}),
        "failed": sum(fate in {"failed", "timed_out"} for fate in fates),
    }


def how_many(record: Fields, key: str) -> int:
    """The number of entries under `key` in a record, including those that were left out for size."""
    return len(record.get(key, ())) + int(record.get("omitted", {}).get(key, 0))
