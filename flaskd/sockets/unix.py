"""Unix sockets and their nodes in the file system."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Self

from flaskd.errors import CannotCreateError
from flaskd.sockets.address import MAX_UNIX_PATH
from flaskd.values import value

log = logging.getLogger("flaskd.sockets")


@value
class Node:
    """A file system node that this process made, recognized by device and inode."""

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Remember the node that is at `path` now."""
        found = path.lstat()
        return cls(path, found.st_dev, found.st_ino)

    def is_ours(self) -> bool:
        """Whether the node at the path is still the one that was made."""
        try:
            found = self.path.lstat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)

    def remove(self) -> None:
        """Remove the node if it is still ours; if that fails, it is only stale, and a warning is logged."""
        if self.is_ours():
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:  # another owner, or a read-only file system
                log.warning(f"cannot remove {self.path}: {error.strerror}; remove it by hand")


def let_in(path: Path, *, mode: int, gid: int = -1) -> None:
    """Set the group and the mode of a node that clients cannot see yet; `gid` -1 keeps the group. Raises OSError.

    If this process may not set that group (chown(2)), it logs a warning, and the mode is `without_group`.
    """
    if gid != -1:
        try:
            os.chown(path, -1, gid)
        except (OSError, OverflowError) as error:  # OverflowError: the number is no gid
            mode = without_group(mode)
            why = error.strerror if isinstance(error, OSError) else error
            log.warning(f"cannot give a node in {path.parent} to group {gid}: {why}; it keeps its own, mode {mode:04o}")
    path.chmod(mode)


def without_group(mode: int) -> int:
    """The mode without the rights that only the group has, because they were meant for another group."""
    return mode & ~0o070 | mode & (mode & 0o007) << 3


def bind_unix(path: Path, *, mode: int, gid: int = -1) -> tuple[socket.socket, Node]:
    """Bind a listening Unix stream socket at `path` with its mode and group.

    A stale socket is replaced; a live one, or a file that is no socket, is refused with CannotCreateError. A group that
    cannot be set costs a warning; see `let_in`. The socket is bound under a temporary name and renamed, so that clients
    never see it with a wrong mode or not listening.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:  # no client could connect to it
        raise CannotCreateError(f"cannot listen on unix:{path}: AF_UNIX path too long")
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            if _answers(path):
                raise CannotCreateError(f"cannot listen on unix:{path}: another process listens there")
        else:
            raise CannotCreateError(f"cannot listen on unix:{path}: a file that is not a socket stands there")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CannotCreateError(f"cannot listen on unix:{path}: {error.strerror}") from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    hidden = path.with_name(f".{os.getpid()}")  # short, because the path may have nearly the longest length
    try:
        with contextlib.suppress(FileNotFoundError):
            hidden.unlink()
        sock.bind(str(hidden))
        let_in(hidden, mode=mode, gid=gid)
        sock.listen(128)
        hidden.rename(path)
        return sock, Node.of(path)
    except OSError as error:
        sock.close()
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise CannotCreateError(f"cannot listen on unix:{path}: {error.strerror or error}") from error


def _answers(path: Path) -> bool:
    """Whether a process listens at the path of a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # the backlog is full or connecting is denied: a process listens
        return True
