"""The state directory: its lock, the record of the last stop, the mark of a running flaskd, and repairs."""

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
from flaskd.files import read_whole, remove_leftovers, remove_matching
from flaskd.places.record import prepare_record, read_record, write_record
from flaskd.present import died
from flaskd.protocol import damage, state_directory
from flaskd.text import shortened
from flaskd.units import timestamp

log = logging.getLogger("flaskd.state")

_LARGEST_MARK = 16 * 1024
"""How many bytes of a mark are read."""
_PATIENCE = 0.5
"""How many seconds the end waits for a disk that does not answer."""


Prepared = tuple[Callable[[], object], Callable[[], object]]


class StateDirectory:
    """The directory of the record; if it cannot be written, there is no record, and flaskd serves all the same.

    `previous` says how the run before this one ended without a record; None if it has one, or left nothing.
    """

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.path = state_directory(name, environ)
        self.previous: str | None = None
        self._in_use = self._unrecorded = False
        self._environ = environ
        self._mark: Path | None = None
        self._record: Path | None = None
        self._kept: Path | None = None  # where the last record is read, even if none can be written
        self._lock = -1
        self._mark_file = -1
        self._writing = threading.Lock()

    @property
    def writable(self) -> Path | None:
        """The directory; None while another running flaskd uses it."""
        return None if self._in_use else self.path

    def open(self, *, record: str | None) -> None:
        """Lock the directory and write the mark of this run; if the last run died, log that and tidy up.

        With `record` None the stop is not recorded; the mark is written all the same.
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
            write_record(mark, {"pid": os.getpid(), "started": timestamp(time.time())})
            self._mark = mark
            self._mark_file = os.open(mark, os.O_RDWR)
        except BlockingIOError:
            self._in_use = True
            log.warning(f"another flaskd works with {self.path}; {cost}")
            self._record = self._kept = None
        except OSError as error:
            log.warning(f"cannot write to {self.path}: {error.strerror}; {cost}")
            self._record = None

    @property
    def _directories(self) -> list[Path]:
        """The directory, and that of the record, which may be a subdirectory."""
        return list(dict.fromkeys([self.path, *([self._record.parent] if self._record else [])]))

    def _tell_of(self, before: Mapping[str, Any]) -> None:
        if "unreadable" in before or "unrecorded" in before:  # it is not known whether there is anything to tidy up
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
        """Remove flaskd's half-written files, and metric files of processes that have ended; returns their names."""
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
        """Note in the mark that the stop has begun; not flushed to the disk, which may be slow."""
        self._note({"stopping": shortened(reason)})

    def _note(self, news: Mapping[str, str]) -> None:
        """Add fields to the mark in place, because the disk may have no room for a new file."""
        if not self._writing.acquire(timeout=_PATIENCE):
            return
        try:
            if self._mark_file >= 0:
                entry: dict[str, Any] = {"pid": os.getpid(), "started": timestamp(time.time())}
                with contextlib.suppress(OSError, ValueError):  # then the next start learns less
                    entry |= json.loads(os.pread(self._mark_file, _LARGEST_MARK, 0))
                    os.pwrite(self._mark_file, json.dumps({**entry, **news}).encode() + b"\n", 0)
        finally:
            self._writing.release()

    def record(self, entry: Mapping[str, Any]) -> None:
        """Write the record of this stop; if that fails, the mark says so and is kept."""
        if self._record is None:
            return
        try:
            write_record(self._record, entry)
        except OSError as error:
            log.warning(f"cannot record this stop in {self._record}: {error.strerror}")
            self._unrecorded = True
            self._note({"unrecorded": str(error.strerror)})

    def prepare(self, entry: Mapping[str, Any], *, unless: Mapping[str, Any]) -> Prepared | None:
        """Write the record `unless`, and prepare the record `entry`, which takes its place unless something is cut.

        Gives the functions that put it in place and that remove it; None if nothing is recorded.
        """
        self.record(unless)
        if self._record is not None and not self._unrecorded:
            try:
                return prepare_record(self._record, entry)
            except OSError:  # no room for two records
                self.record(entry)
        return None

    def last_stop(self) -> dict[str, Any] | None:
        """The record of the last stop; None if there is none, ``{"damaged": "<why>"}`` if it cannot be shown."""
        record = read_record(self._kept) if self._kept is not None else None
        if record is None or "damaged" in record or not (why := damage(record)):
            return record
        return {"damaged": f"{self._kept} is not a record: {why}"}

    def close(self) -> None:
        """Remove the mark, unless it has something to report, and unlock the directory: this run has ended properly."""
        if self._mark is not None and not self._unrecorded:
            with contextlib.suppress(OSError):
                self._mark.unlink()
        self._mark = None
        if self._writing.acquire(timeout=_PATIENCE):  # otherwise a thread uses the descriptor, which stays open
            if self._mark_file >= 0:
                os.close(self._mark_file)
                self._mark_file = -1
            self._writing.release()
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # also if a forked child holds a copy of the descriptor
        self.forget()

    def forget(self) -> None:
        """Close the lock and never touch mark and record again: in a forked child they belong to the parent."""
        self._mark = self._record = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _read_mark(path: Path) -> dict[str, Any] | None:
    """The mark that the run before has left; None: no mark. ``{"unreadable": "<why>"}``: it cannot be read.

    A mark that can be read but is damaged is an empty mapping: the run died, and nothing more is known.
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
"""How prometheus_client names the files of a process (prometheus_client.values.MultiProcessValue)."""


def _of_the_dead(name: str) -> bool:
    """Whether the process of a metric file has ended; a file with our own pid is from an earlier process."""
    found = _METRICS.fullmatch(name)
    pid = int(found[1]) if found else 0
    return pid == os.getpid() or (pid > 0 and not Path(f"/proc/{pid}").exists())
