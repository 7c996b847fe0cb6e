"""The state directory: the record of the last stop, and the mark of a run that has not ended yet."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaskd.cleanup import read_record, write_record
from flaskd.logs import timestamp
from flaskd.protocol import state_directory

log = logging.getLogger("flaskd.state")


class StateDirectory:
    """Where the record goes; one that cannot be written costs the record, never the service."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.path = state_directory(name, environ)
        self._mark: Path | None = None
        self._record: Path | None = None

    def open(self, *, record: str | None) -> None:
        """Mark this run as begun; tell if the one before never came to its end. `record` None: nothing is kept."""
        if record is None:
            return
        self._record = self.path / record
        mark = self.path / "running.json"
        try:
            self._record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (before := read_record(mark)) is not None:
                log.warning(
                    f"the flaskd before this one (pid {before.get('pid', 'unknown')}) died without a complete stop"
                )
            write_record(mark, {"pid": os.getpid(), "started": timestamp(time.time())})
            self._mark = mark
        except OSError as error:
            log.warning(f"cannot write to {self.path}: {error.strerror}; the last stop will not be recorded")
            self._record = None

    def record(self, entry: Mapping[str, Any]) -> None:
        """Write the record of this stop."""
        if self._record is None:
            return
        try:
            write_record(self._record, entry)
        except OSError as error:
            log.warning(f"cannot record this stop in {self._record}: {error.strerror}")

    def last_stop(self) -> dict[str, Any] | None:
        """The record of the last stop; None when there is none."""
        return read_record(self._record) if self._record is not None else None

    def close(self) -> None:
        """Take the mark away: this run came to its end."""
        if self._mark is not None:
            with contextlib.suppress(OSError):
                self._mark.unlink()
            self._mark = None
