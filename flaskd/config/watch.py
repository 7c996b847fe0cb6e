"""A configuration file that is watched: an edit is noticed however it is made.

Polled are where the path leads, and the modification time, inode and size of what is there; when they have changed and
keep still, the content is compared. That sees an edit in place, an editor's rename, and the ``..data`` link that
Kubernetes exchanges beside a mounted ConfigMap; a notification for the file itself (inotify(7)) misses the second swap.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from typing import TYPE_CHECKING

from flaskd.config.loading import digest, read_source
from flaskd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("flaskd.config")

_INTERVAL = 0.5
"""Seconds between two looks."""
_GONE = ""
"""Stands for the digest of a file that cannot be read."""


class FileWatch:
    """Watches `path` in a thread of its own, and calls `changed` with the digest of what is new.

    `known` is the digest of what its owner has dealt with, to be set by the owner: `changed` is called until it is.
    While `wanted` is false the watch rests, and what it then missed it sees afterwards.
    """

    def __init__(self, path: Path, *, changed: Callable[[str], None], wanted: Callable[[], bool]) -> None:
        self.known = ""
        self._path = path
        self._changed = changed
        self._wanted = wanted
        self._seen: object = None
        self._settling: object = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start watching, if it is not done already."""
        if self._thread is None:
            self._ended = threading.Event()  # the old one ends the old thread, whenever that wakes up
            self._thread = threading.Thread(target=self._run, name="flaskd-watch", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._thread = None
                log.warning(f"cannot watch {self._path}: {error}; reload by hand after an edit")

    def stop(self) -> None:
        """Stop watching; the thread is not waited for, because a file system may hang."""
        self._ended.set()
        self._thread = None

    def _run(self) -> None:
        ended = self._ended
        while not ended.wait(_INTERVAL):
            if self._wanted():
                self.look()

    def look(self) -> None:
        """Look once; a change is told when two looks in a row see the same, so that no half of an edit is read."""
        found = _signature(self._path)
        if found is None or found == self._seen:
            return
        if found != self._settling:
            self._settling = found
            return
        try:
            there = digest(read_source(self._path)) if found else _GONE
        except ConfigError:
            there = _GONE
        if there == self.known:
            self._seen = found
        else:
            self._changed(there)


def _signature(path: Path) -> tuple[object, ...] | None:
    """What changes when the file does; empty when there is none, None for what cannot be read twice, such as a pipe."""
    try:
        real = os.path.realpath(path)
        found = os.stat(real)  # noqa: PTH116 - what `real` names, and not what the path may name by now
    except (OSError, ValueError):
        return ()
    return (real, found.st_mtime_ns, found.st_ino, found.st_size) if stat.S_ISREG(found.st_mode) else None
