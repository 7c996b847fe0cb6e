"""The record of the last stop: written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from flaskd.cleanup.attempt import StepResult

LARGEST_RECORD = 4 * 1024 * 1024
"""Bytes of a record that are read; a larger one is damaged."""
_NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0)
_NOT_WAITED_FOR = getattr(os, "O_NONBLOCK", 0)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` as JSON to `path`, mode 0600; a reader sees the old file or the new one.

    Raises OSError; the old file and nothing else is there then. What JSON has no word for is written as its
    text. The writer must be the only one (flaskd holds its runtime directory's lock): the temporary file has
    a fixed name, so that a crash leaves one at most.
    """
    content = json.dumps(record, indent=2, default=str).encode() + b"\n"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        _write(temporary, content)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOT_FOLLOWED, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make the new name last (fsync(2)). Some file systems cannot; the file is there all the same."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_record(path: Path) -> dict[str, Any] | None:
    """Read what `write_record` wrote; None when there is no such file.

    A file that cannot be read, or is no JSON object, gives ``{"damaged": "<why>"}``: for who asks about the
    last stop that is an answer like any other, never an error.
    """
    try:
        content = _read(path)
        record = json.loads(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        return {"damaged": f"cannot read {path}: {error.strerror}"}
    except (ValueError, RecursionError) as error:
        return {"damaged": f"{path} is not a record: {error}"}
    if not isinstance(record, dict):
        return {"damaged": f"{path} is not a record: expected a JSON object"}
    return record


def _read(path: Path) -> bytes:
    # Without waiting: a FIFO in its place would hold up the start for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | _NOT_WAITED_FOR), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(LARGEST_RECORD + 1)
    if len(content) > LARGEST_RECORD:
        raise ValueError(f"it is larger than {LARGEST_RECORD} bytes")
    return content


def results_as_json(results: Iterable[StepResult]) -> dict[str, dict[str, Any]]:
    """Name → what became of the step.

    The keys are stable; `started` and `took` are float seconds; `why`, `detail` and `trace` are empty for
    none.
    """
    return {
        each.name: {
            "phase": each.phase,
            "use": each.use,
            "fate": str(each.fate),
            "why": each.why,
            "started": round(each.started, 3),
            "took": round(each.took, 3),
            "attempts": each.attempts,
            "detail": each.detail,
            "trace": each.trace,
        }
        for each in results
    }
