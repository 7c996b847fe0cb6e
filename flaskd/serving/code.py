"""The app's source files, and a watch on them for ``flaskd serve --reload``: new code when a file is saved."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from flaskd.objects import contents_of
from flaskd.text import printable

log = logging.getLogger("flaskd.daemon")

_INTERVAL = 0.25
"""Seconds between two looks."""
_TOLD = 3
"""Most saved files that the log names."""
_PYTHON, _FLASKD = f"{Path(os.__file__).parent}/", f"{Path(__file__).parents[1]}/"
_INSTALLED = re.compile(r"/(?:site|dist)-packages/")
_FRAME = re.compile(r'^ *File "(.+?)", line \d+', re.MULTILINE)

_Signature = tuple[int, int, int] | None


def source_files() -> set[str]:
    """The files of all modules that this process has imported, except Python's, installed packages and flaskd."""
    found = (contents_of(name).get("__file__") for name in list(sys.modules))
    return {each for each in found if isinstance(each, str) and _is_apps(each)}


def _is_apps(file: str) -> bool:
    return file.startswith("/") and not file.startswith((_PYTHON, _FLASKD)) and not _INSTALLED.search(file)


class CodeWatch:
    """Watches files in a thread of its own, and calls `changed` once for all files that were saved together.

    `files` returns the files that the app has imported so far; it may wait. While `wanted` is false the watch rests; it
    sees afterwards what was saved meanwhile. `since` is the time.time() before the app was imported: a file that was
    saved later counts as changed.
    """

    def __init__(
        self,
        files: Callable[[], Iterable[str]],
        *,
        changed: Callable[[], None],
        wanted: Callable[[], bool],
        since: float,
    ) -> None:
        self.since = since
        self._files, self._changed, self._wanted = files, changed, wanted
        self._known: dict[str, _Signature] = {}
        self._settling: dict[str, _Signature] = {}
        self._told: dict[str, _Signature] = {}
        """The saved files of the last call of `changed`."""
        self._ended = threading.Event()

    def start(self) -> None:
        """Start watching."""
        try:
            threading.Thread(target=self._run, name="flaskd-code", daemon=True).start()
        except RuntimeError as error:
            log.warning(f"cannot watch the app's files: {error}; reload by hand after an edit")

    def stop(self) -> None:
        """Stop watching, without waiting for the thread, because a file system may hang."""
        self._ended.set()

    def _run(self) -> None:
        while True:
            if self._wanted():
                self.look()
            if self._ended.wait(_INTERVAL):
                return

    def add(self, files: Iterable[str]) -> None:
        """Also watch these files from now on (any thread)."""
        for each in files:
            if each not in self._known:
                there = _signature(each)
                self._known[each] = None if there and there[0] > self.since * 1e9 else there

    def add_those_of(self, trace: str) -> None:
        """Watch the app's files in a traceback, and the modules next to them: no living worker has imported them."""
        named = set(filter(_is_apps, _FRAME.findall(trace)))
        self.add(named)
        with contextlib.suppress(OSError):
            self.add(str(each) for place in {Path(file).parent for file in named} for each in place.glob("*.py"))

    def again(self) -> None:
        """Count the files of the last call of `changed` as saved again, because no reload followed (any thread)."""
        self._known.update(dict.fromkeys(self._told))

    def look(self) -> None:
        """Look once. A change counts when two looks in a row see the same, so that no half-written file is imported."""
        self.add(self._files())
        now = {each: _signature(each) for each in list(self._known)}
        saved = {each: there for each, there in now.items() if there != self._known[each]}
        if saved and saved == self._settling:
            self._known.update(saved)
            self._told = saved
            more = f" and {len(saved) - _TOLD} more" if len(saved) > _TOLD else ""
            log.info(f"saved: {', '.join(printable(each, '?') for each in sorted(saved)[:_TOLD])}{more}")
            self._changed()
        self._settling = saved


def _signature(file: str) -> _Signature:
    """Values that change when the file does; None if there is no file."""
    try:
        found = os.stat(file)  # noqa: PTH116 - quicker than Path.stat, and called often
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
