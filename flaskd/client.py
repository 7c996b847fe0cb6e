"""`ControlClient`: talks to a daemon over its control socket. It imports nothing heavy; the client verbs use it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from flaskd.errors import FlaskdError, ForbiddenError, NoDaemonError
from flaskd.protocol import EXIT_CODES, SOCKET, runtime_directories

_ROOM = 60.0
_AGAIN = 0.01
"""Seconds in which a client that has no timeout waits for room in the backlog, and between two tries."""


class CommandError(FlaskdError):
    """The daemon answered ERR; `code` is the reply's, the exit code follows from it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.exit_code = EXIT_CODES.get(code, 1)


def find_socket(explicit: str | None, name: str, environ: Mapping[str, str]) -> Path:
    """The control socket to talk to: the one named, else ``$FLASKD_CONTROL``, else the first that is there.

    One that a killed daemon left behind is passed over, unless there is no other: connecting to it tells what is wrong.
    Raises NoDaemonError listing what was tried; ForbiddenError when there may be one where this user must not look.
    """
    if chosen := explicit or environ.get("FLASKD_CONTROL"):
        return _meant_by(Path(chosen))
    tried: list[str] = []
    closed: list[Path] = []
    stale: list[Path] = []
    for directory in runtime_directories(name, environ):
        path = directory / SOCKET
        if str(path) in tried:
            continue
        tried.append(str(path))
        try:
            path.stat()
        except PermissionError:
            closed.append(directory)
        except OSError:  # nothing there, a name too long
            continue
        else:
            if not _is_stale(path):
                return path
            stale.append(path)
    if stale:
        return stale[0]
    if closed:
        tried.remove(str(closed[0] / SOCKET))
        none = f"; there is no {', no '.join(tried)}" if tried else ""
        raise ForbiddenError(f"cannot look for a daemon in {closed[0]}: Permission denied; {_whose(closed[0])}{none}")
    raise NoDaemonError(f"cannot find a daemon: there is no {', no '.join(tried)}; start one, or name its --socket")


def _meant_by(path: Path) -> Path:
    """The socket; the FIFO and the directory are what people have at hand, and it is beside the one, in the other."""
    mode = 0
    with contextlib.suppress(OSError):  # connecting to it will tell what is wrong
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return path / SOCKET
    return path.with_name(SOCKET) if stat.S_ISFIFO(mode) else path


def _is_stale(path: Path) -> bool:
    """Whether it is a socket that its daemon, killed, left behind: nobody listens there (ECONNREFUSED, connect(2))."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            return probe.connect_ex(str(path)) == errno.ECONNREFUSED
    except (AttributeError, OSError):  # no Unix sockets on this system; a path too long for one
        return False


def _whose(path: Path) -> str:
    """Whom a node or directory is for, said to somebody else."""
    import grp  # noqa: PLC0415 - for this refusal alone
    import pwd  # noqa: PLC0415

    try:
        found = path.stat()
    except OSError:  # the directory above is closed, too
        return "ask as a user who may look there"
    user, group = str(found.st_uid), str(found.st_gid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(found.st_uid).pw_name
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(found.st_gid).gr_name
    return f"it is for the user {user}" + (f" and the group {group}" if found.st_mode & stat.S_IRWXG else "")


class ControlClient:
    """A connection to a daemon; a context manager. `timeout` bounds each silence, in seconds; None waits for ever."""

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
        self._lines = self._socket.makefile("rb")
        return self

    def _connect(self) -> None:
        # With a timeout, connect(2) does not wait for room in a Unix socket's backlog: it fails with EAGAIN at once.
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
        self._lines.close()
        self._socket.close()

    def _understood(self, line: bytes) -> dict[str, Any]:
        """One line of an answer; raises NoDaemonError."""
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not {"ok", "event"} & set(answer):
            raise NoDaemonError(f"cannot talk to {self._path}: who answers there is not flaskd")
        answer.pop("id", None)
        return answer

    def request(
        self, verb: str, *, progress: Callable[[dict[str, Any]], None] | None = None, **words: bool | str
    ) -> dict[str, Any]:
        """Send a command with its flags and argument, and return the fields of its answer.

        Raises CommandError for ERR, NoDaemonError if it dies.
        """
        command = json.dumps({"id": 1, "cmd": verb, **words}) + "\n"
        try:
            self._socket.sendall(command.encode())
            while line := self._lines.readline():
                answer = self._understood(line)
                if answer.get("event") == "progress":
                    if progress is not None:
                        progress(answer)
                elif answer.pop("ok"):
                    return answer
                else:
                    raise CommandError(answer["error"]["code"], answer["error"]["message"])
        except OSError as error:
            why = "it does not answer" if isinstance(error, TimeoutError) else error.strerror
            raise NoDaemonError(f'no answer to "{verb}": lost the daemon at {self._path}: {why}') from error
        raise NoDaemonError(f'no answer to "{verb}": the daemon at {self._path} went away')

    def wait_closed(self) -> None:
        """Wait until the daemon has closed the connection, which it does when it exits."""
        while self._socket.recv(4096):
            pass
