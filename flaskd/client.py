"""`ControlClient`: talks to a daemon over its control socket. It imports nothing heavy; the client verbs use it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from flaskd.errors import FlaskdError, NoDaemonError
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
    """The control socket to talk to: the one named, else ``$FLASKD_CONTROL``, else the first that exists.

    Raises NoDaemonError listing what was tried.
    """
    if chosen := explicit or environ.get("FLASKD_CONTROL"):
        path = Path(chosen)
        # The FIFO and the directory are what people have at hand; the socket is beside, or in it.
        if path.is_dir():
            return path / SOCKET
        return path.with_name(SOCKET) if path.is_fifo() else path
    tried = []
    for directory in runtime_directories(name, environ):
        path = directory / SOCKET
        with contextlib.suppress(OSError):  # a name too long, a directory that may not be searched
            if path.exists():
                return path
        tried.append(str(path))
    raise NoDaemonError(f"cannot find a daemon: there is no {', no '.join(tried)}; start one, or name its --socket")


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
                answer: dict[str, Any] = json.loads(line)
                answer.pop("id", None)
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
