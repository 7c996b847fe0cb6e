"""The two nodes in the runtime directory: made, watched, put back when somebody took them away, and removed."""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from flaskd.errors import CannotCreateError
from flaskd.places.runtime import RuntimeDirectory
from flaskd.protocol import FIFO, SOCKET
from flaskd.sockets import Node, bind_unix, let_in, without_group

if TYPE_CHECKING:
    from flaskd.config import ControlConfig

log = logging.getLogger("flaskd.control")


class Place:
    """One node, and the descriptor behind it; `make` gives both, or raises CannotCreateError or OSError."""

    def __init__(self, what: str, make: Callable[[int, int], tuple[int, Node]]) -> None:
        self.what = what
        self.fd = -1
        self.node: Node | None = None
        self._make = make
        self._told = ""

    def open(self, mode: int, gid: int) -> None:
        """Make it; where that fails, `keep` goes on trying."""
        try:
            self.fd, self.node = self._make(mode, gid)
        except (CannotCreateError, OSError) as error:
            self._told = str(error)
            raise

    def keep(self, mode: int, gid: int) -> int | None:
        """Make it if it is not there, or not ours any more; then returns the descriptor before, -1 for none.

        What stands in its place and is nobody's stale node stays, with one warning, until it is gone.
        """
        if self.node is not None and self.node.is_ours():
            return None
        before, told, missed = self.fd, self._told, self.node is not None
        try:
            self.open(mode, gid)
        except (CannotCreateError, OSError) as error:
            if str(error) != told:
                lost = "was taken away, and cannot be put back" if missed else "still cannot be made"
                log.warning(f"the {self.what} {lost}: {error}; it is tried again")
            return None
        self._told = ""
        log.warning(f"the {self.what} {'had been taken away: it is back' if missed else 'could be made now'}")
        return before

    def anew(self) -> int | None:
        """Open the node once more; returns the descriptor before, None where that fails: `keep` makes another.

        A FIFO whose writers have all gone says POLLHUP for ever (poll(2)), but not to a descriptor opened since then
        (Linux, fs/pipe.c). The one before is still open, so that nobody who writes meanwhile finds no reader.
        """
        before = self.fd
        try:
            self.fd = os.open(f"/proc/self/fd/{before}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            log.warning(f"cannot open the {self.what} once more: {error.strerror}; it is made anew")
            self.node = None
            return None
        return before

    def remove(self) -> None:
        """Remove the node if it is still ours; the descriptor stays open."""
        if self.node is not None:
            with contextlib.suppress(OSError):
                self.node.remove()

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def socket_place(directory: RuntimeDirectory) -> Place:
    """The control socket, listening."""

    def make(mode: int, gid: int) -> tuple[int, Node]:
        sock, node = bind_unix(directory.path / SOCKET, mode=mode, gid=gid)
        sock.setblocking(False)
        return sock.detach(), node

    return Place("control socket", make)


def fifo_place(directory: RuntimeDirectory) -> Place:
    """The FIFO, open for reading."""

    def make(mode: int, gid: int) -> tuple[int, Node]:
        path = directory.path / FIFO
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISFIFO(path.lstat().st_mode):
                raise CannotCreateError(f"cannot make the FIFO {path}: a file that is not a FIFO stands there")
        hidden = path.with_name(f".{FIFO}.{os.getpid()}")
        fd = -1
        try:
            with contextlib.suppress(FileNotFoundError):
                hidden.unlink()
            os.mkfifo(hidden, 0o600)
            let_in(hidden, mode=mode, gid=gid)
            fd = os.open(hidden, os.O_RDONLY | os.O_NONBLOCK)
            hidden.rename(path)
            return fd, Node.of(path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            with contextlib.suppress(OSError):
                hidden.unlink()
            raise CannotCreateError(f"cannot make the FIFO {path}: {error.strerror}") from error

    return Place("FIFO", make)


def mode_and_group(control: ControlConfig) -> tuple[int, int]:
    """What the nodes get: `control.mode`, and the number of `control.group`, -1 for the process' own.

    A group that this machine does not know costs a warning, and what the mode gives a group.
    """
    mode, group = control.mode_bits, control.group
    if group is None:
        return mode, -1
    try:
        return mode, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        mode = without_group(mode)
        log.warning(f'control.group: there is no group "{group}"; the nodes keep the process\'s own, mode {mode:04o}')
        return mode, -1


def accept(fd: int) -> socket.socket:
    """Accept a client from a listening descriptor that does not block. Raises OSError.

    An app may have called socket.setdefaulttimeout(), and Python would wait so long, for a client and for its words.
    """
    listening = socket.socket(fileno=fd)
    try:
        if listening.gettimeout():
            listening.settimeout(0)
        sock, _ = listening.accept()
        if sock.gettimeout():
            sock.settimeout(None)
        return sock
    finally:
        listening.detach()
