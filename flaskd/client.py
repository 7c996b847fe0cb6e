"""`ControlClient`: talks to a daemon over its control socket. It imports nothing large, so client verbs start fast."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from flaskd.errors import FlaskdError, ForbiddenError, NoDaemonError
from flaskd.protocol import EXIT_CODES, FIFO, SOCKET, runtime_directories

_OF_ALL_USERS = Path("/run/user/*/*")
"""The runtime directories of all users, where root looks for daemons."""
_BRIEFLY = 2.0
"""How many seconds each daemon has to answer when several are asked."""
_ROOM = 60.0
_AGAIN = 0.01
"""Seconds between two tries to connect while the backlog is full, and for a client without a timeout the first wait."""
_NOBODY = 65534
"""Owns the directories of a ``DynamicUser=`` service from systemd 257 on; the service itself sees its own uid."""
_LONGEST = 16 << 20
"""The longest answer in bytes; ten thousand requests in flight take a quarter of it."""
_SHOWN = 200
"""How many characters of an unusable answer are shown."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CommandError(FlaskdError):
    """The daemon answered ERR; `code` is the code of the reply, from which the exit code follows."""

    def __init__(self, code: str, message: str, for_programs: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code, self.for_programs = code, for_programs or {}
        self.exit_code = EXIT_CODES.get(code, 1)


def find_socket(explicit: str | None, name: str, environ: Mapping[str, str]) -> Path:
    """The control socket to talk to: `explicit`, else ``$FLASKD_CONTROL``, else the first that exists.

    A socket that a killed daemon left is used only if there is no other: connecting to it then tells what is wrong.
    Raises NoDaemonError, which lists the places that were tried, or the daemons of other names. Raises ForbiddenError
    if a daemon may be in a directory that this user must not read, or in one that another user made in a public place.
    """
    if chosen := explicit or environ.get("FLASKD_CONTROL"):
        return _meant_by(Path(chosen))
    tried: list[str] = []
    closed: list[Path] = []
    stale: list[Path] = []
    foreign: list[str] = []
    for directory in runtime_directories(name, environ):
        path = directory / SOCKET
        if str(path) in tried:
            continue
        tried.append(str(path))
        try:
            path.stat()
        except PermissionError:
            closed.append(directory)
            continue
        except OSError:  # no such file, or the name is too long
            continue
        if why := _not_ours(directory):
            foreign.append(f"cannot trust {path}: {why}; if it is meant, name it with --socket")
        elif _is_stale(path):
            stale.append(path)
        else:
            return path
    if foreign or closed:
        return stale[0] if stale else _refused(tried, closed, foreign)
    return _left_behind(name, environ, tried, stale)


def _left_behind(name: str, environ: Mapping[str, str], tried: list[str], stale: list[Path]) -> Path:
    """The socket that a killed daemon left; raises NoDaemonError if there is none, or if other daemons run."""
    if others := _others(environ):
        why = f"{stale[0]} was left behind by one that was killed" if stale else f"there is no {', no '.join(tried)}"
        raise NoDaemonError(f"cannot find a daemon named {name}: {why}; running here: {others}")
    if stale:
        return stale[0]
    raise NoDaemonError(f"cannot find a daemon: there is no {', no '.join(tried)}; start one, or name its --socket")


def _others(environ: Mapping[str, str]) -> str:
    """The daemons that run under any name, each as the option that leads to it; empty if there is none."""
    return ", ".join(
        way_to(path, environ, told) for path, told in running(environ) if not isinstance(told, NoDaemonError)
    )


def running(environ: Mapping[str, str]) -> Iterator[tuple[Path, dict[str, Any] | FlaskdError]]:
    """The control socket of each flaskd on this machine that this user can see, and its status or an error.

    The usual places of runtime directories are searched for any name; root searches those of all users.
    """
    import glob  # noqa: PLC0415 - for a list, or if nothing was found

    places = [f"{glob.escape(str(each.parent))}/{each.name}" for each in runtime_directories("*", environ)]
    found = [path for each in [*places, _OF_ALL_USERS] for path in glob.glob(f"{each}/{SOCKET}")]  # noqa: PTH207 - whole
    for path in map(Path, dict.fromkeys(found)):
        if _not_ours(path.parent) or _is_stale(path):
            continue
        try:
            with ControlClient(path, timeout=_BRIEFLY) as client, reading(path):
                told: dict[str, Any] | FlaskdError = _in_short(client.request("status"))
        except FlaskdError as error:
            if isinstance(error, NoDaemonError) and not (path.parent / FIFO).exists():
                continue  # it may belong to any program
            told = error
        yield path, told


def _in_short(status: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: str(status[key] or "") for key in ("name", "state", "app")},
        "pid": int(status["pid"]),
        "uptime": float(status["uptime"]),
        "listen": [str(each) for each in status["listen"]],
    }


def way_to(path: Path, environ: Mapping[str, str], told: object = None) -> str:
    """The option with which a client verb finds the daemon at a control socket; `told` is its value from `running`."""
    directory = path.parent
    own = str(told["name"]) if isinstance(told, dict) else ""
    for name in (own, directory.name, directory.name.rpartition("-")[0]):
        if name and directory in runtime_directories(name, environ):
            return f"--name {name}"
    return f"--socket {path}"


def _refused(tried: list[str], closed: list[Path], foreign: list[str]) -> NoReturn:
    """Raise ForbiddenError, because a daemon may be where this user must not look."""
    if foreign:
        raise ForbiddenError(foreign[0])
    tried.remove(str(closed[0] / SOCKET))
    none = f"; there is no {', no '.join(tried)}" if tried else ""
    raise ForbiddenError(f"cannot look for a daemon in {closed[0]}: Permission denied; {_whose(closed[0])}{none}")


def _not_ours(directory: Path) -> str:
    """Why a directory in a public place such as /tmp is not this user's; empty if it is."""
    if not hasattr(os, "geteuid"):
        return ""
    try:
        if not directory.parent.stat().st_mode & stat.S_IWOTH:
            return ""  # made by root, the service manager, or this user
        found = directory.lstat()
    except OSError as error:
        return error.strerror or "it cannot be looked at"
    if not stat.S_ISDIR(found.st_mode):
        return f"{directory} is no directory, but may lead to one"
    if found.st_uid not in {0, os.geteuid()}:
        return f"{directory} belongs to {_user(found.st_uid)}"
    return f"others may write to {directory}" if found.st_mode & _OTHERS_WRITE else ""


def _user(number: int) -> str:
    import pwd  # noqa: PLC0415 - only for a refusal

    with contextlib.suppress(KeyError):
        return f"the user {pwd.getpwuid(number).pw_name}"
    return f"uid {number}"


def _meant_by(path: Path) -> Path:
    """The socket that is meant by its own path, by that of the FIFO beside it, or by that of its directory."""
    mode = 0
    with contextlib.suppress(OSError):  # connecting to it then tells what is wrong
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return path / SOCKET
    return path.with_name(SOCKET) if stat.S_ISFIFO(mode) else path


def _is_stale(path: Path) -> bool:
    """Whether a killed daemon left the socket: no process listens there (ECONNREFUSED, connect(2))."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            return probe.connect_ex(str(path)) == errno.ECONNREFUSED
    except (AttributeError, OSError):  # no Unix sockets on this system; a path too long for one
        return False


def _whose(path: Path) -> str:
    """Which user and group a node or directory is for, as advice to another user."""
    import grp  # noqa: PLC0415 - only for this refusal

    try:
        found = path.stat()
    except OSError:  # the directory above is closed, too
        return "ask as a user who may look there"
    group = str(found.st_gid)
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(found.st_gid).gr_name
    return f"it is for {_user(found.st_uid)}" + (f" and the group {group}" if found.st_mode & stat.S_IRWXG else "")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Wraps code that reads an answer's fields: missing or wrong ones mean that it is no flaskd (NoDaemonError)."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        why = f"its answer cannot be read ({type(error).__name__}: {error})"
        raise _not_flaskd(path, why[:_SHOWN]) from error


def _not_flaskd(path: Path, why: str) -> NoDaemonError:
    return NoDaemonError(f"cannot talk to {path}: what answers there is not flaskd: {why}")


def _finite(number: str) -> float:
    """A JSON number; rejects NaN and infinity, which JSON does not have (RFC 8259 §6), though Python reads them."""
    if math.isinf(found := float(number)) or math.isnan(found):
        raise ValueError(number)
    return found


def _only_root_makes(directory: Path) -> bool:
    """Whether only root can have made the directory, and only its owner can put files into it."""
    real = directory.resolve()
    above = real.parent.stat()
    return above.st_uid == 0 and not (above.st_mode | real.stat().st_mode) & 0o022


class ControlClient:
    """A connection to a daemon; a context manager. An answer may take `timeout` seconds; None: for ever."""

    def __init__(self, path: str | os.PathLike[str], timeout: float | None = 10.0) -> None:
        self._path = Path(path)
        self._timeout = timeout

    def __enter__(self) -> Self:
        if not hasattr(socket, "AF_UNIX"):
            raise NoDaemonError(f"cannot reach a daemon at {self._path}: Python has no Unix sockets on this system")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(self._timeout)
        try:
            self._connect()
        except PermissionError as error:
            self._socket.close()
            raise ForbiddenError(
                f"cannot talk to the daemon at {self._path}: Permission denied; {_whose(self._path)}"
            ) from error
        except OSError as error:
            self._socket.close()
            raise NoDaemonError(
                f"cannot reach a daemon at {self._path}: {error.strerror or error}; is flaskd running there?"
            ) from error
        if why := self._not_trusted():
            self._socket.close()
            raise ForbiddenError(f"cannot trust the process that listens at {self._path}: {why}")
        self._inbox = bytearray()
        return self

    def _not_trusted(self) -> str:
        """Why the listening process belongs neither to root, this user, nor the directory's owner; empty if it does."""
        if not hasattr(socket, "SO_PEERCRED"):
            return ""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        try:
            owner = self._path.parent.stat().st_uid
            if owner == _NOBODY and _only_root_makes(self._path.parent):
                owner = uid
        except OSError:  # it was removed in the meantime
            owner = 0
        if uid in {0, os.geteuid(), owner}:
            return ""
        return f"it runs as {_user(uid)}, and the directory belongs to {_user(owner)}"

    def _connect(self) -> None:
        # With a timeout, connect(2) fails with EAGAIN at once if a Unix socket's backlog is full, instead of waiting.
        until = time.monotonic() + (self._timeout or _ROOM)
        while True:
            try:
                self._socket.connect(str(self._path))
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(_AGAIN)
            else:
                return

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _line(self, until: float | None) -> bytes:
        """The next line until the moment `until`; it has no newline if the daemon went away. Raises OSError."""
        begin = 0
        while (end := self._inbox.find(b"\n", begin)) < 0:
            begin = len(self._inbox)
            if begin > _LONGEST:
                raise _not_flaskd(self._path, f"it says more than {_LONGEST >> 20} MiB at a time")
            if not (data := self._receive(until)):
                break
            self._inbox += data
        size = end + 1 if end >= 0 else len(self._inbox)
        line = bytes(self._inbox[:size])
        del self._inbox[:size]
        return line

    def _receive(self, until: float | None) -> bytes:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket.recv(1 << 16)

    def _until(self) -> float | None:
        return None if self._timeout is None else time.monotonic() + self._timeout

    def _understood(self, line: bytes) -> dict[str, Any]:
        """A line of an answer as fields; raises NoDaemonError if it is none."""
        try:
            answer = json.loads(line, parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError):
            raise _not_flaskd(self._path, "expected a line of JSON") from None
        if not isinstance(answer, dict):
            raise _not_flaskd(self._path, "expected a JSON object")
        error, fine = answer.get("error"), answer.get("ok")
        if fine is False and isinstance(error, dict) and all(isinstance(error.get(key), str) for key in _FAULT):
            return answer
        if not (fine is True or (fine is None and answer.get("event") == "progress")):
            raise _not_flaskd(self._path, "expected an outcome or progress")
        answer.pop("id", None)
        return answer

    def request(
        self, verb: str, *, progress: Callable[[dict[str, Any]], None] | None = None, **words: bool | str
    ) -> dict[str, Any]:
        """Send a command with its flags and argument, and return the fields of its answer.

        Raises CommandError for ERR, and NoDaemonError if the daemon dies or is no flaskd.
        """
        self._tell(verb, json.dumps({"id": 1, "cmd": verb, **words}).encode() + b"\n")
        until = self._until()
        while line := self._heard(verb, until):
            answer = self._understood(line)
            if "ok" not in answer:
                if progress is not None:
                    with reading(self._path):
                        progress(answer)
                until = self._until() if words.get("wait") else until  # else one limit for all
            elif answer.pop("ok"):
                return answer
            else:
                error = answer["error"]
                more = {key: value for key, value in error.items() if key not in _FAULT}
                raise CommandError(error["code"], error["message"], more)
        raise NoDaemonError(f'no answer to "{verb}": the daemon at {self._path} went away')

    def _tell(self, verb: str, command: bytes) -> None:
        with self._connected(verb):
            self._socket.settimeout(self._timeout)
            self._socket.sendall(command)

    def _heard(self, verb: str, until: float | None) -> bytes:
        with self._connected(verb):
            return self._line(until)

    @contextlib.contextmanager
    def _connected(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = "it does not answer" if isinstance(error, TimeoutError) else error.strerror
            raise NoDaemonError(f'no answer to "{verb}": lost the daemon at {self._path}: {why}') from error

    def wait_closed(self) -> None:
        """Wait until the daemon closes the connection, which it does when it exits; raises NoDaemonError."""
        until = self._until()
        try:
            while self._receive(until):
                pass
        except ConnectionError:
            pass
        except OSError as error:
            raise NoDaemonError(f"the daemon at {self._path} has stopped, and does not close the connection") from error


_FAULT = ("code", "message")
"""The fields of an ERR answer in JSON."""
