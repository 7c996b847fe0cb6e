"""Files: written whole or not at all, read up to a size, and removed when a crash left them."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path

_NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0)
_NOT_WAITED_FOR = getattr(os, "O_NONBLOCK", 0)
_MADE_BY_US = re.compile(r"\..+\.flaskd-tmp")


def temporary_name(path: Path) -> Path:
    """Where `write_whole` writes before it renames; a fixed name, so that crashes leave at most one file."""
    return path.with_name(f".{path.name}.flaskd-tmp")


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, mode 0600; a reader sees the old file or the new one, even after a power cut.

    Raises OSError; then the old file is unchanged and no other is left. Only one process may write: flaskd holds the
    lock of the directory.
    """
    _write(temporary_name(path), content, lambda temporary: temporary.replace(path))
    _sync_directory(path.parent)


def write_once(path: Path, content: bytes) -> None:
    """Write a file as `write_whole` does, unless it exists; several processes may do this at the same time.

    Raises OSError. To know whose content is in the file, read it.
    """

    def take(temporary: Path) -> None:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.replace(path)
        temporary.unlink(missing_ok=True)

    mine = f"{path.name}.{os.getpid()}-{threading.get_ident()}"
    _write(temporary_name(path.with_name(mine)), content, take)
    _sync_directory(path.parent)


def _write(temporary: Path, content: bytes, take: Callable[[Path], object]) -> None:
    """Write a temporary file, and let `take` give it its name; if either fails, the file is removed."""
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOT_FOLLOWED, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        take(temporary)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    """Make the new name permanent (fsync(2)); some file systems cannot, and that is no error."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_whole(path: Path, largest: int) -> bytes:
    """Read a regular file of at most `largest` bytes; raises OSError, or ValueError if it is not such a file."""
    # O_NONBLOCK, because opening a FIFO would wait for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | _NOT_WAITED_FOR), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest} bytes")
    return content


def open_directory(path: Path) -> int:
    """Open a directory, also through a symbolic link of root or of this user; raises OSError.

    The directories of a service with ``DynamicUser=yes`` are such links (systemd.exec(5), StateDirectory=). A link of
    another user is not followed.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | _NOT_FOLLOWED
    try:
        return os.open(path, flags)
    except OSError:
        if not path.is_symlink() or path.lstat().st_uid not in {0, os.geteuid()}:
            raise
    return os.open(path.resolve(), flags)


def remove_leftovers(directory: Path) -> list[str]:
    """Remove the files that a killed `write_whole` left in `directory`; returns their names. Raises OSError."""
    return remove_matching(directory, _MADE_BY_US)


def remove_matching(
    directory: Path,
    pattern: re.Pattern[str],
    *,
    kinds: tuple[int, ...] = (stat.S_IFREG,),
    which: Callable[[str], bool] = lambda _: True,
) -> list[str]:
    """Remove files of the given kinds (stat.S_IFREG, S_IFSOCK, …) whose whole name matches; returns the names.

    Symbolic links are not removed, and files that disappear meanwhile are skipped. Raises OSError.
    """
    removed = []
    descriptor = open_directory(directory)
    try:
        for name in sorted(os.listdir(descriptor)):  # noqa: PTH208 - by descriptor, so that it stays the same directory
            if not pattern.fullmatch(name) or not which(name):
                continue
            with contextlib.suppress(FileNotFoundError):
                if stat.S_IFMT(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode) in kinds:
                    os.unlink(name, dir_fd=descriptor)
                    removed.append(name)
    finally:
        os.close(descriptor)
    return removed
