"""What goes over the control socket: places, replies and error codes. Shared by the daemon and its clients."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flaskd import errors
from flaskd.units import format_duration

SOCKET = "control.sock"
FIFO = "control"
RECORD = "last-stop.json"
"""Default name of the record of the last stop, in the state directory."""
MARK = "running.json"
"""Name of the mark of a run, in the state directory: there from its start to its complete end."""
MAX_LINE = 4096
"""Bytes of one command; what a FIFO takes whole (PIPE_BUF, pipe(7))."""

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
    """Where a daemon of this name may have its runtime directory, most likely first.

    A daemon takes the first; a client tries them all, and root's as well.
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

    tempfile.gettempdir() raises where none of its places can be written to, and goes to another one, at last to the
    working directory, while the usual one is full: there a daemon and its clients would not find each other.
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
    return os.geteuid() if hasattr(os, "geteuid") else -1  # Windows has no numbers for users, and no daemon to find


def _has_home() -> bool:
    try:
        Path.home()
    except RuntimeError:  # a user that the system does not know, as in containers
        return False
    return True


class Reply(Protocol):
    """Where the outcome of a command goes; every method may be called from any thread."""

    def progress(self, fields: Fields) -> None:
        """Tell how far it is."""

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        """It was done: a word for the outcome, values; `detail` is for programs, `lines` and `hint` for people."""

    def error(self, code: str, message: str) -> None:
        """It was not done."""


class Discard:
    """A reply that nobody waits for."""

    def progress(self, fields: Fields) -> None:
        """Tell nobody."""

    def ok(
        self,
        word: str,
        fields: Fields | None = None,
        *,
        detail: Fields | None = None,
        lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        """Tell nobody."""

    def error(self, code: str, message: str) -> None:
        """Tell nobody."""


_NUMBER = (int, float)
_RECORD = {
    "reason": str, "started": str, "took": _NUMBER, "completed": int, "rejected": int, "unaccepted": int,
    "cut": list, "background": list, "unfinished": list, "policies": dict, "omitted": dict,
}  # fmt: skip
_REQUEST = {"method": str, "path": str, "phase": str, "age": _NUMBER, "reason": str}
_WORK = {"name": str, "age": _NUMBER, "thread": str}
_LEFT = {"name": str}
_STEP = {"fate": str, "took": _NUMBER, "why": str}
_SUMMARY = ("reason", "started", "took", "completed", "rejected", "cut", "failed")


def damage(record: object) -> str:
    """Why what was read is no record of a stop that can be shown; empty when it is one.

    A state directory outlives versions of flaskd, and others may write there.
    """
    if fault := _misfit(record, _RECORD, "", needed=("reason",)):
        return fault
    assert isinstance(record, dict)
    faults = [_misfit(each, _REQUEST, "cut: ", needed=_REQUEST) for each in record.get("cut", ())]
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
    """The record of a stop in a few words: nothing of its single requests and steps, only how many.

    One that cannot be read says so as `damaged`, and nothing else.
    """
    if record is None:
        return None
    if "damaged" in record:
        return {**dict.fromkeys(_SUMMARY), "damaged": record["damaged"]}
    fates = [entry.get("fate") for entry in record.get("policies", {}).values()]
    return {
        **{key: record.get(key) for key in _SUMMARY[:-2]},
        "cut": _count(record, "cut"),
        **({"unfinished": _count(record, "unfinished")} if record.get("unfinished") else {}),
        "failed": sum(fate in {"failed", "timed_out"} for fate in fates),
    }


def _count(record: Fields, key: str) -> int:
    """How many a record has of something, with those for which there was no room in it."""
    return len(record.get(key, ())) + int(record.get("omitted", {}).get(key, 0))


def died(mark: Fields) -> str:
    """How a run ended that left its mark behind, for people.

    A mark that is there but cannot be read tells nothing: its run may have ended in any way.
    """
    if "unreadable" in mark:
        return f"left a mark that cannot be read, and nobody knows how it ended: {mark['unreadable']}"
    if "unrecorded" in mark:
        pid, started, why = (mark.get(key, "unknown") for key in ("pid", "started", "unrecorded"))
        return f"came to its end, but its stop could not be recorded: {why} (pid {pid}, started {started})"
    stopping = f", in the middle of its stop ({mark['stopping']})" if "stopping" in mark else ""
    pid, started = mark.get("pid", "unknown"), mark.get("started", "unknown")
    return f"died without a complete stop{stopping} (pid {pid}, started {started})"


def record_lines(record: Fields) -> list[str]:
    """The record of a stop, for people; before it `previous`, the run that died since without one."""
    lines = []
    if previous := record.get("previous"):
        lines.append(f"previous run: {previous}")
    if "damaged" in record:
        return [*lines, f"the record of the last stop cannot be read: {record['damaged']}"]
    if previous:
        if "reason" not in record:
            return [*lines, "no stop has been recorded"]
        lines.append("the last stop that was recorded:")
    lines += [
        f"reason: {record.get('reason', 'unknown')}",
        f"started: {record.get('started', 'unknown')}, took {format_duration(float(record.get('took') or 0))}",
        (
            f"requests: completed={record.get('completed', 0)} rejected={record.get('rejected', 0)} "
            f"cut={_count(record, 'cut')}"
        ),
    ]
    lines += [
        f"cut: {each['method']} {each['path']} ({each['phase']} for {each['age']:.1f}s): {each['reason']}"
        for each in record.get("cut", ())
    ]
    lines += [background_line(each) for each in record.get("background", ())]
    lines += [unfinished_line(each) for each in record.get("unfinished", ())]
    if record.get("unaccepted"):
        lines.append(f"reset in the backlog: {record['unaccepted']} connections")
    lines += [f"policy {step_line(name, entry)}" for name, entry in record.get("policies", {}).items()]
    return lines


def account_lines(fields: Fields) -> list[str]:
    """What a drain or stop lost, and each cleanup step that is not ok, for people: a line each."""
    background, unfinished, policies = (fields.get(key) for key in ("background", "unfinished", "policies"))
    lines = [
        f"cut {each['method']} {each['path']} ({each['phase']} for {each['age']:.1f}s): {each['reason']}"
        for each in fields.get("cut") or ()
    ]
    lines += map(background_line, background) if isinstance(background, list) else ()
    lines += map(unfinished_line, unfinished) if isinstance(unfinished, list) else ()
    if isinstance(policies, dict):
        lines += [step_line(name, entry) for name, entry in policies.items() if entry["fate"] != "ok"]
    return lines


def step_line(name: str, entry: Fields) -> str:
    """What became of a cleanup step, for people."""
    why = "".join(each if each.isprintable() else "?" for each in entry.get("why") or "")
    why = f", {why}" if why else ""
    return f"{name}: {entry['fate']} in {format_duration(float(entry.get('took') or 0))}{why}"


def background_line(entry: Fields) -> str:
    """What was left running in the background, for people."""
    return f"background: {entry['name']} (for {entry['age']:.1f}s in {entry['thread']})"


def unfinished_line(entry: Fields) -> str:
    """What was accepted, or left to the end of the process, and cut, for people."""
    return f"not finished: {''.join(each if each.isprintable() else '?' for each in entry['name'])}"


def thread_line(entry: Fields) -> str:
    """A thread, for people: what it serves, or that it could."""
    idle = "idle" if entry["name"].startswith("flaskd-thread") else ""
    return f"{entry['name']} ({entry['id']}) {entry['request'] or idle}".rstrip()


def request_line(entry: Fields) -> str:
    """A request in flight, for people."""
    where = f" in {entry['thread']}" if entry.get("thread") else ""
    return (
        f"{entry['id']}: {entry['method']} {entry['path']} from {entry['client']}, {entry['phase']} for "
        f"{format_duration(entry['age'])}{where}, {entry['sent']} bytes sent"
        + (", its client has gone" if entry.get("gone") else "")
    )


def status_lines(fields: Fields) -> list[str]:
    """The status as ``key: value`` lines; what only programs want is left to JSON."""
    return [
        f"{key}: {_shown(value)}" for key, value in fields.items() if key != "tally" and value not in (None, "", [])
    ]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return format_duration(value)
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return as_text(value) if isinstance(value, Mapping) else str(value)


def as_text(fields: Fields) -> str:
    """``key=value`` pairs for a text reply: seconds as durations, lists of what is no text as their length.

    What is nothing is left out, and nested values are left to JSON.
    """
    pairs = []
    for key, value in fields.items():
        if isinstance(value, list | tuple):
            shown = ",".join(value) if value and all(isinstance(each, str) for each in value) else str(len(value))
        elif isinstance(value, float):
            shown = format_duration(value)
        elif value is None or isinstance(value, dict):
            continue
        elif isinstance(value, bool):
            shown = "true" if value else "false"
        else:
            shown = str(value)
        pairs.append(f"{key}={shown}")
    return " ".join(pairs)
