"""`ControlClient`: talks to a daemon over its control socket. It imports nothing large, so client verbs start fast."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from flaskd.errors import FlaskdError, ForbiddenError, NoDaemonError
from flaskd.protocol import EXIT_CODES

_ROOM = 60.0
_AGAIN = 0.01
"""Seconds between two tries to connect while the backlog is full, and for a client without a timeout the first wait."""
_NOBODY = 65534
"""Owns the directories of a ``DynamicUser=`` service from systemd 257 on; the service itself sees its own uid."""
_LONGEST = 16 << 20
"""The longest answer in bytes; ten thousand requests in flight take a quarter of it."""
_SHOWN = 200
"""How many characters of an unusable answer are shown."""


class CommandError(FlaskdError):
    """The daemon answered ERR; `code` is the code of the reply, from which the exit code follows."""

    def __init__(self, code: str, message: str, for_programs: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code, self.for_programs = code, for_programs or {}
        self.exit_code = EXIT_CODES.get(code, 1)


def user(number: int) -> str:
    """A user as text for people: the name, or the number if there is no name."""
    import pwd  # noqa: PLC0415 - only for a refusal

    with contextlib.suppress(KeyError):
        return f"the user {pwd.getpwuid(number).pw_name}"
    return f"uid {number}"


def whose(path: Path) -> str:
    """Which user and group a node or directory is for, as advice to another user."""
    import grp  # noqa: PLC0415 - only for this refusal

    try:
        found = path.stat()
    except OSError:  # the directory above is closed, too
        return "ask as a user who may look there"
    group = str(found.st_gid)
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(found.st_gid).gr_name
    return f"it is for {user(found.st_uid)}" + (f" and the group {group}" if found.st_mode & stat.S_IRWXG else "")


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
                f"cannot talk to the daemon at {self._path}: Permission denied; {whose(self._path)}"
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
        return f"it runs as {user(uid)}, and the directory belongs to {user(owner)}"

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
