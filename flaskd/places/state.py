"""The state directory: its lock, the record of the last stop, the mark of a run that has not ended yet, and repairs."""

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
"""Bytes of a mark that are read."""
_PATIENCE = 0.5
"""Seconds that the end waits for a disk that does not answer."""


Prepared = tuple[Callable[[], object], Callable[[], object]]


class StateDirectory:
    """Where the record goes; one that cannot be written costs the record, never the service.

    `previous` is how the run before this one ended without a record; None when it has one, or nothing is known of it.
    """

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.path = state_directory(name, environ)
        self.previous: str | None = None
        self._in_use = self._unrecorded = False
        self._environ = environ
        self._mark: Path | None = None
        self._record: Path | None = None
        self._kept: Path | None = None  # where the last record is read, also where none can be written
        self._lock = -1
        self._mark_file = -1
        self._writing = threading.Lock()

    @property
    def writable(self) -> Path | None:
        """The directory; None while another flaskd, alive, works with it."""
        return None if self._in_use else self.path

    def open(self, *, record: str | None) -> None:
        """Lock the directory and mark this run as begun; if the one before never came to its end, say so and tidy up.

        `record` None: the stop is not recorded; the mark is made all the same.
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
            log.warning(f"another flaskd works with {self.path}; {cost}")
            self._record = self._kept = None
        except OSError as error:
            log.warning(f"cannot write to {self.path}: {error.strerror}; {cost}")
            self._record = None

    @property
    def _directories(self) -> list[Path]:
        """The directory, and that of the record, which may be one below."""
        return list(dict.fromkeys([self.path, *([self._record.parent] if self._record else [])]))

    def _tell_of(self, before: Mapping[str, Any]) -> None:
        if "unreadable" in before or "unrecorded" in before:  # whether anything is left to tidy up, nobody knows
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
        """Remove half-written files of ours, and metric files of processes that are gone; returns their names."""
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
        """Note in the mark that the stop has begun, for who finds it; not flushed to the disk, which may be slow."""
        self._note({"stopping": shortened(reason)})

    def _note(self, news: Mapping[str, str]) -> None:
        """Add something to the mark, in its place: there may be no room for a new one."""
        if not self._writing.acquire(timeout=_PATIENCE):
            return
        try:
            if self._mark_file >= 0:
                entry: dict[str, Any] = {"pid": os.getpid(), "started": timestamp(time.time())}
                with contextlib.suppress(OSError, ValueError):  # then the next start knows less
                    entry |= json.loads(os.pread(self._mark_file, _LARGEST_MARK, 0))
                    os.pwrite(self._mark_file, json.dumps({**entry, **news}).encode() + b"\n", 0)
        finally:
            self._writing.release()

    def record(self, entry: Mapping[str, Any]) -> None:
        """Write the record of this stop; where that cannot be done, the mark says so, and stays."""
        if self._record is None:
            return
        try:
            write_record(self._record, entry)
        except OSError as error:
            log.warning(f"cannot record this stop in {self._record}: {error.strerror}")
            self._unrecorded = True
            self._note({"unrecorded": str(error.strerror)})

    def prepare(self, entry: Mapping[str, Any], *, unless: Mapping[str, Any]) -> Prepared | None:
        """Record `unless`, and lay the record ready that is to be there in its place unless something is cut.

        Gives what puts it there, and what takes it away; None where nothing is recorded.
        """
        self.record(unless)
        if self._record is not None and not self._unrecorded:
            try:
                return prepare_record(self._record, entry)
            except OSError:  # no room for two
                self.record(entry)
        return None

    def last_stop(self) -> dict[str, Any] | None:
        """The record of the last stop; None when there is none, ``{"damaged": "<why>"}`` when it cannot be shown."""
        record = read_record(self._kept) if self._kept is not None else None
        if record is None or "damaged" in record or not (why := damage(record)):
            return record
        return {"damaged": f"{self._kept} is not a record: {why}"}

    def close(self) -> None:
        """Take the mark away, unless it has something to tell, and unlock the directory: this run came to its end."""
        if self._mark is not None and not self._unrecorded:
            with contextlib.suppress(OSError):
                self._mark.unlink()
        self._mark = None
        if self._writing.acquire(timeout=_PATIENCE):  # else the descriptor is in use, and left to the process' end
            if self._mark_file >= 0:
                os.close(self._mark_file)
                self._mark_file = -1
            self._writing.release()
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # also for a forked child that may hold a copy
        self.forget()

    def forget(self) -> None:
        """Close the lock, and have no more to do with mark and record: in a forked child they are not ours."""
        self._mark = self._record = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _read_mark(path: Path) -> dict[str, Any] | None:
    """What the run before has left there; None: nothing, and ``{"unreadable": "<why>"}`` for what cannot be read.

    One that was read and is damaged was there all the same: it tells of a death, and of nothing else.
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
    """Whether a metric file's process is gone; our own pid was somebody else's when the file was made."""
    found = _METRICS.fullmatch(name)
    pid = int(found[1]) if found else 0
    return pid == os.getpid() or (pid > 0 and not Path(f"/proc/{pid}").exists())
