"""Watches a configuration file; it notices an edit however it is made.

It polls where the path leads, and the modification time, inode and size of the file. When these have changed and then
stay the same, it compares the content. That notices an edit in place, an editor's rename, and the exchange of the link
``..data`` of a mounted Kubernetes ConfigMap; a notification for the file itself (inotify(7)) misses the second
exchange.
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
"""The digest of a file that cannot be read."""


class FileWatch:
    """Watches `path` in a thread of its own, and calls `changed` with the digest of new content.

    The owner sets `known` to the digest that it has processed; `changed` is called until then. While `wanted()` is
    false nothing is reported; changes that happen meanwhile are reported afterwards.
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
        """Start watching, unless it has started."""
        if self._thread is None:
            self._ended = threading.Event()  # the old thread ends at the old event, whenever it wakes up
            self._thread = threading.Thread(target=self._run, name="flaskd-watch", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._thread = None
                log.warning(f"cannot watch {self._path}: {error}; reload by hand after an edit")

    def stop(self) -> None:
        """Stop watching, without waiting for the thread, because a file system may hang."""
        self._ended.set()
        self._thread = None

    def _run(self) -> None:
        ended = self._ended
        while not ended.wait(_INTERVAL):
            if self._wanted():
                self.look()

    def look(self) -> None:
        """Look once; a change is reported when two looks in a row find the same, not while the file is written."""
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
    """What changes when the file does; empty if there is no file, None if it cannot be read twice, such as a pipe."""
    try:
        real = os.path.realpath(path)
        found = os.stat(real)  # noqa: PTH116 - `real`, because the path may lead elsewhere by now
    except (OSError, ValueError):
        return ()
    return (real, found.st_mtime_ns, found.st_ino, found.st_size) if stat.S_ISREG(found.st_mode) else None
