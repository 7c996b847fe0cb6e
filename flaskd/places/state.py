"""The state directory: its lock, the record of the last stop, the mark of the present run, and repairs after a crash.

The mark is a file that exists while flaskd runs: if the next start finds it, the run before ended without a record.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flaskd.config import MARK_FILE
from flaskd.files import read_whole, remove_leftovers, remove_matching, temporary_name
from flaskd.places.record import prepare_record, read_record, write_record
from flaskd.present import died
from flaskd.protocol import damage, state_directory
from flaskd.text import shortened
from flaskd.units import timestamp

log = logging.getLogger("flaskd.state")

_LARGEST_MARK = 16 * 1024
"""Most bytes of a mark that are read."""
_PATIENCE = 0.5
"""Most seconds for which a write waits for another one that may hang on a disk."""


Prepared = tuple[Callable[[], object], Callable[[], object]]


class StateDirectory:
    """The directory of the record. If it cannot be written, the stop is not recorded, but flaskd serves all the same.

    `previous` says how the run before this one ended without a record; None if it has one, or nothing is known of it.
    """

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.path = state_directory(name, environ)
        self.previous: str | None = None
        self._in_use = self._unrecorded = False
        self._environ = environ
        self._mark: Path | None = None
        self._record: Path | None = None
        self._kept: Path | None = None  # the file that is read, even if it cannot be written
        self._lock = -1
        self._mark_file = -1
        self._writing = threading.Lock()

    @property
    def writable(self) -> Path | None:
        """The directory; None while another running flaskd uses it."""
        return None if self._in_use else self.path

    def open(self, *, record: str | None) -> None:
        """Lock the directory and write this run's mark; if the run before left one, log that and repair.

        `record` is the file for the record; None: the stop is not recorded, but the mark is written all the same.
        """
        self._record = self._kept = self.path / record if record is not None else None
        mark = self.path / MARK_FILE
        cost = "the last stop will not be recorded" if self._record else "a crash will not be noticed"
        try:
            for directory in self._directories:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (before := _read_mark(mark)) is not None:
                self._tell_of(before)
            if self._record is not None:  # laid ready by a stop whose finalizers were cut: another one is in its place
                temporary_name(self._record).unlink(missing_ok=True)
            write_record(mark, {"pid": os.getpid(), "started": timestamp(time.time())})
            self._mark = mark
            self._mark_file = os.open(mark, os.O_RDWR)
        except BlockingIOError:
            self._in_use = True
            log.warning(f"another flaskd uses {self.path}; {cost}")
            self._record = self._kept = None
        except OSError as error:
            log.warning(f"cannot write to {self.path}: {error.strerror}; {cost}")
            self._record = None

    @property
    def _directories(self) -> list[Path]:
        """The directory, and that of the record, which may be a directory below."""
        return list(dict.fromkeys([self.path, *([self._record.parent] if self._record else [])]))

    def _tell_of(self, before: Mapping[str, Any]) -> None:
        if "unreadable" in before or "unrecorded" in before:  # it is not known whether there is anything to repair
            self.previous = died(before)
            log.warning(f"the flaskd before this one {self.previous}")
            return
        stopping = f", in the middle of its stop ({before['stopping']})" if "stopping" in before else ""
        removed = self._repair()
        tidied = f"; removed what it left: {', '.join(removed)}" if removed else ""
        pid = before.get("pid", "unknown")
        log.warning(f"the flaskd before this one (pid {pid}) died without a complete stop{stopping}{tidied}")
        self.previous = died(before) + tidied

    def _repair(self) -> list[str]:
        """Remove half-written files of flaskd, and metric files of processes that have ended; returns their names."""
        removed = []
        for directory in self._directories:
            try:
                removed += remove_leftovers(directory)
            except OSError as error:
                log.warning(f"cannot tidy up {directory}: {error.strerror}")
        if metrics := self._environ.get("PROMETHEUS_MULTIPROC_DIR"):
            try:
                removed += remove_matching(Path(metrics), _METRICS, which=_of_the_dead)
            except OSError as error:
                log.warning(f"cannot tidy up PROMETHEUS_MULTIPROC_DIR {metrics}: {error.strerror}")
        return removed

    def stopping(self, reason: str) -> None:
        """Note in the mark that the stop has begun; not synced to the disk, which may be slow."""
        self._note({"stopping": shortened(reason)})

    def _note(self, news: Mapping[str, str]) -> None:
        """Add `news` to the mark by writing into the file: the disk may have no room for a new one."""
        if not self._writing.acquire(timeout=_PATIENCE):
            return
        try:
            if self._mark_file >= 0:
                entry: dict[str, Any] = {"pid": os.getpid(), "started": timestamp(time.time())}
                with contextlib.suppress(OSError, ValueError):  # the next start only knows less
                    entry |= json.loads(os.pread(self._mark_file, _LARGEST_MARK, 0))
                    os.pwrite(self._mark_file, json.dumps({**entry, **news}).encode() + b"\n", 0)
        finally:
            self._writing.release()

    def record(self, entry: Mapping[str, Any]) -> None:
        """Write the record of this stop; if that fails, note it in the mark, which then stays."""
        if self._record is None:
            return
        try:
            write_record(self._record, entry)
        except OSError as error:
            log.warning(f"cannot record this stop in {self._record}: {error.strerror}")
            self._unrecorded = True
            self._note({"unrecorded": str(error.strerror)})

    def prepare(self, entry: Mapping[str, Any], *, unless: Mapping[str, Any]) -> Prepared | None:
        """Write the record `unless`, and prepare `entry`, which replaces it if nothing is cut any more.

        Returns a function that replaces it, and one that drops `entry`; None if there is nothing to replace.
        """
        self.record(unless)
        if self._record is not None and not self._unrecorded:
            try:
                return prepare_record(self._record, entry)
            except OSError:  # no room for two files
                self.record(entry)
        return None

    def last_stop(self) -> dict[str, Any] | None:
        """The record of the last stop; None if there is none, ``{"damaged": "<why>"}`` if it cannot be shown."""
        record = read_record(self._kept) if self._kept is not None else None
        if record is None or "damaged" in record or not (why := damage(record)):
            return record
        return {"damaged": f"{self._kept} is not a record: {why}"}

    def close(self) -> None:
        """At the end of this run, remove the mark, unless the record could not be written, and unlock the directory."""
        if self._mark is not None and not self._unrecorded:
            with contextlib.suppress(OSError):
                self._mark.unlink()
        self._mark = None
        if self._writing.acquire(timeout=_PATIENCE):  # else a write hangs, and uses the descriptor
            if self._mark_file >= 0:
                os.close(self._mark_file)
                self._mark_file = -1
            self._writing.release()
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # also if a forked child holds a copy of the descriptor
        self.forget()

    def forget(self) -> None:
        """In a forked child, close its copy of the lock, and leave the mark and the record alone."""
        self._mark = self._record = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _read_mark(path: Path) -> dict[str, Any] | None:
    """The mark of the run before; None if there is none, ``{"unreadable": "<why>"}`` if it cannot be read.

    A damaged mark is returned as an empty one: it shows that the run before died, and nothing else.
    """
    try:
        mark = json.loads(read_whole(path, _LARGEST_MARK))
    except FileNotFoundError:
        return None
    except OSError as error:
        return {"unreadable": f"{path}: {error.strerror}"}
    except json.JSONDecodeError:
        return {}
    except (ValueError, RecursionError) as error:
        return {"unreadable": f"{path}: {error}"}
    return mark if isinstance(mark, dict) else {}


_METRICS = re.compile(r"[a-z_]+_([0-9]+)\.db")
"""The names of prometheus_client's files, with the pid of the process (prometheus_client.values.MultiProcessValue)."""


def _of_the_dead(name: str) -> bool:
    """Whether a metric file's process has ended; a file with this process' own pid is from an earlier process."""
    found = _METRICS.fullmatch(name)
    pid = int(found[1]) if found else 0
    return pid == os.getpid() or (pid > 0 and not Path(f"/proc/{pid}").exists())
