"""The runtime directory: flaskd finds it, makes it if needed, locks it, and leaves it as it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from flaskd.errors import CannotCreateError, NotNowError
from flaskd.files import open_directory, remove_matching
from flaskd.protocol import runtime_directories, temporary_directory
from flaskd.sockets import let_in

_HIDDEN = re.compile(r"\.(control\.)?[0-9]+")
"""Temporary names of control nodes, from `flaskd.sockets.bind_unix` and, for the FIFO, in the same way."""


class RuntimeDirectory:
    """The locked directory with the control nodes; it is removed at the end if it was made here."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.path = next(runtime_directories(name, environ, client=False))
        self._private = self.path.parent == temporary_directory(environ)
        self._fd = -1
        self._made = False

    def acquire(self, gid: int = -1) -> None:
        """Make the directory if needed, and lock it with flock(2); a new one may be entered by the group `gid`.

        `gid` -1 is the process' own group. Raises NotNowError if another flaskd has the lock, CannotCreateError if the
        directory cannot be made or used.
        """
        try:
            while True:
                with contextlib.suppress(FileExistsError):
                    self.path.mkdir(mode=0o700 if self._private else 0o750)
                    self._made = True
                    if gid != -1:
                        let_in(self.path, mode=0o750, gid=gid)
                self._fd = open_directory(self.path)
                if why := self._not_to_be_used():  # before the lock, which its owner may hold
                    self.release()
                    raise CannotCreateError(f"cannot use {self.path}: {why}")
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = _lock_holder(self._fd)
                    self.release()
                    raise NotNowError(
                        f"cannot start: flaskd is already running in {self.path}, pid {holder or 'unknown'}; "
                        "stop it first, or choose another --name"
                    ) from None
                if _same_file(self._fd, self.path):
                    break
                os.close(self._fd)  # it was removed, and perhaps made anew, before it was locked
            if not os.access(self.path, os.W_OK | os.X_OK):
                self.release()
                raise CannotCreateError(f"cannot use {self.path}: it is not writable")
        except OSError as error:
            self.release()
            raise CannotCreateError(f"cannot use {self.path}: {error.strerror}") from error

    def _not_to_be_used(self) -> str:
        """Why the open directory is not safe to use; empty if it is."""
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid():
            return f"it belongs to uid {found.st_uid}, not {os.geteuid()}"
        if self._private and found.st_mode & 0o022:  # inside of the temporary directory it is for its owner alone
            return "other users may write to it"
        return "all users may write to it" if found.st_mode & 0o002 else ""

    def tidy(self) -> list[str]:
        """Remove nodes with temporary names, left by a flaskd that was killed; returns their names. Needs the lock."""
        with contextlib.suppress(OSError):
            return remove_matching(self.path, _HIDDEN, kinds=(stat.S_IFSOCK, stat.S_IFIFO))
        return []

    @property
    def stands(self) -> bool:
        """Whether the locked directory is still the one at its path."""
        return self._fd >= 0 and _same_file(self._fd, self.path)

    def release(self) -> None:
        """Remove the directory if it was made here and is empty, and unlock it."""
        if self._fd >= 0:
            if self._made:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # also if a forked child holds a copy of the descriptor
            self.forget()

    def forget(self) -> None:
        """In a forked child, close its copy of the lock, and nothing else."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock_holder(fd: int) -> int | None:
    """The pid that holds the flock on an open file, from /proc/locks (proc(5)); None if it is not known."""
    found = os.fstat(fd)
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            if words[1:2] == ["FLOCK"] and words[5] == wanted:
                return int(words[4])
    return None
