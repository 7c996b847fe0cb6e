"""Sockets that the service manager has passed (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from flaskd.errors import CannotCreateError
from flaskd.sockets.address import Address
from flaskd.sockets.listener import Listener


def inherited(environ: Mapping[str, str]) -> dict[str, list[Listener]]:
    """The listeners that the service manager passed, by name (sd_listen_fds(3)); none if they are for another process.

    They are marked close-on-exec, and as shared, because the manager holds them, too. One without a name is
    ``unknown``. Raises CannotCreateError for a descriptor that is not a listening stream socket.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = _passed(environ)
    if count < 0:
        raise CannotCreateError(f"cannot use the sockets passed: LISTEN_FDS is {environ['LISTEN_FDS']!r}, not a number")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[Listener]] = {}
    for index in range(count):
        name = names[index] if index < len(names) and names[index] else "unknown"
        fd = 3 + index
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise CannotCreateError(f"cannot use the inherited descriptor {fd} ({name}): {error.strerror}") from error
        if not listening or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise CannotCreateError(
                f"cannot use the inherited descriptor {fd} ({name}): it does not listen for streams"
            )
        where = sock.getsockname()
        unix = sock.family == socket.AF_UNIX
        address = Address(path=os.fsdecode(where)) if unix else Address(host=where[0], port=where[1])
        found.setdefault(name, []).append(Listener(address, sock, shared=True))
    return found


def close_passed(environ: Mapping[str, str], pid: int) -> None:
    """In a forked child of the process `pid`, close the copies of the descriptors that were passed to that process."""
    if environ.get("LISTEN_PID") == str(pid):
        os.closerange(3, 3 + _passed(environ))


def _passed(environ: Mapping[str, str]) -> int:
    """How many descriptors were passed; -1 if LISTEN_FDS is no number."""
    text = environ.get("LISTEN_FDS", "0")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1


def passed_to_another(environ: Mapping[str, str]) -> str:
    """A message about sockets that were passed to another process (sd_listen_fds(3)); empty if none were.

    This happens if a shell starts flaskd and stays: the sockets were passed to the shell.
    """
    count, pid = _passed(environ), environ.get("LISTEN_PID", "")
    if count <= 0 or pid == str(os.getpid()):
        return ""
    sockets = f"{count} sockets were" if count > 1 else "1 socket was"
    whom = "to no process (LISTEN_PID says none)"
    if re.fullmatch(r"[0-9]{1,9}", pid):
        name = "which is gone"
        with contextlib.suppress(OSError):
            name = Path("/proc", pid, "comm").read_text(errors="replace").strip()
        whom = f"to pid {pid} ({name})"
    return (
        f"{sockets} passed {whom}, and this is pid {os.getpid()}: start flaskd without a shell around it, "
        "or with exec in it"
    )
