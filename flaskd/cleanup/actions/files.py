"""``files.remove``: removes files that match patterns, never directories.

Each directory of a path is opened relative to the one before, without following symbolic links (openat(2),
O_NOFOLLOW), so that a user who may write in one of them cannot redirect the removal to another place.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from flaskd.cleanup.context import StepContext, StepFailedError, StepTimedOutError
from flaskd.cleanup.model import ANYWHERE, Action
from flaskd.config import OneOrMany, Phase, Settings
from flaskd.config.kind import checked
from flaskd.config.settings import field

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN = 5
_GLOB = re.compile(r"[*?\[]")


def _pattern(text: str) -> str:
    parts = text.split("/")
    if not parts[-1] or any(part in {".", ".."} for part in parts):
        raise ValueError("expected a path of files without . and .., such as /run/shop/*.pid")
    if "**" in text:
        raise ValueError("expected * once for each directory level, not **")
    return text


class RemoveFields(Settings):
    """Fields of ``files.remove``."""

    paths: OneOrMany[Annotated[str, checked(_pattern)]] = field(
        min_length=1,
        description="Files to remove, may contain * ? [a-z]; relative to the working directory. Never directories.",
    )


def remove_files(context: StepContext, fields: RemoveFields) -> str:
    """Remove the files that match, if any; raises StepFailedError naming what could not be removed, and why."""
    removal = _Removal(context)
    for path in fields.paths:
        removal.take(path)
    if removal.faults:
        shown, more = removal.faults[:_SHOWN], len(removal.faults) - _SHOWN
        raise StepFailedError("; ".join([*shown, *([f"and {more} more"] if more > 0 else [])]))
    return f"{removal.count} file{'' if removal.count == 1 else 's'} removed"


class _Removal:
    """One run of the action: counts the removed files and collects faults."""

    def __init__(self, context: StepContext) -> None:
        self.count = 0
        self.faults: list[str] = []
        self._context = context

    def take(self, path: str) -> None:
        """Remove the files that match one pattern."""
        path = _without_managers_links(path)
        parts = [part for part in path.split("/") if part]
        top = "/" if path.startswith("/") else "."
        try:
            with _opened(top, None) as directory:
                self._descend(directory, "/" if top == "/" else "", parts, certain=True)
        except OSError as error:
            self._fault(top, error)

    def _descend(self, directory: int, shown: str, parts: list[str], *, certain: bool) -> None:
        """Continue in an open directory; `certain` until a part with a star: a directory named exactly must exist."""
        first, *rest = parts
        pattern = bool(_GLOB.search(first))
        for name in _matching(directory, first) if pattern else [first]:
            if self._context.remaining() <= 0:
                raise StepTimedOutError(f"{self._context.overrun()}; {self.count} files removed")
            if not rest:
                self._remove(directory, name, shown + name, named=not pattern)
                continue
            try:
                with _opened(name, directory) as deeper:
                    self._descend(deeper, f"{shown}{name}/", rest, certain=certain and not pattern)
            except OSError as error:
                # A pattern may match files and links, which are skipped, and directories that disappear meanwhile.
                if (certain and not pattern) or error.errno not in {errno.ENOTDIR, errno.ELOOP, errno.ENOENT}:
                    self._fault(shown + name, error)

    def _remove(self, directory: int, name: str, shown: str, *, named: bool) -> None:
        try:
            if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                if named:
                    self.faults.append(f'cannot remove "{shown}": it is a directory')
                return
            os.unlink(name, dir_fd=directory)
            self.count += 1
        except FileNotFoundError:
            return  # it was removed before, or by another process
        except OSError as error:
            self._fault(shown, error)

    def _fault(self, shown: str, error: OSError) -> None:
        # O_DIRECTORY | O_NOFOLLOW on a link fails with ELOOP or ENOTDIR, depending on the kernel (open(2)).
        linked = error.errno in {errno.ELOOP, errno.ENOTDIR} and os.path.islink(shown)  # noqa: PTH114 - for words
        why = "a symbolic link, and those are not followed" if linked else error.strerror
        self.faults.append(f'cannot remove "{shown}": {why}')


_MANAGED = ("RUNTIME", "STATE", "CACHE", "LOGS", "CONFIGURATION")


def _without_managers_links(path: str) -> str:
    """The path with the service manager's own link resolved: with DynamicUser= each of its directories is a link.

    The manager names them in ``$STATE_DIRECTORY`` and the like (systemd.exec(5)); no other user can write there.
    """
    for kind in _MANAGED:
        for directory in filter(None, os.environ.get(f"{kind}_DIRECTORY", "").split(":")):
            if path.startswith(directory.rstrip("/") + "/"):
                return os.path.realpath(directory) + path[len(directory.rstrip("/")) :]
    return path


@contextmanager
def _opened(name: str, directory: int | None) -> Iterator[int]:
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _matching(directory: int, pattern: str) -> list[str]:
    """The names that match; as in a shell, names with a dot in front match only patterns with a dot in front."""
    hidden = pattern.startswith(".")
    names = os.listdir(directory)
    return sorted(each for each in names if fnmatch.fnmatchcase(each, pattern) and (hidden or not each.startswith(".")))


ACTIONS = (
    Action(
        "files.remove",
        RemoveFields,
        Phase.FINAL,
        remove_files,
        scopes=ANYWHERE,
        summary=("Removes files by name or pattern. It removes no directories and follows no symbolic links."),
    ),
)
