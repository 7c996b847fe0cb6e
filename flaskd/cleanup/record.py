"""The record of the last stop: written whole or not at all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flaskd.files import read_whole, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from flaskd.cleanup.attempt import StepResult

LARGEST_RECORD = 4 * 1024 * 1024
"""Bytes of a record that are read; a larger one is damaged."""


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` as JSON to `path`, as `flaskd.files.write_whole` does; raises OSError.

    What JSON has no word for is written as its text.
    """
    write_whole(path, json.dumps(record, indent=2, default=str).encode() + b"\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """Read what `write_record` wrote; None when there is no such file.

    A file that cannot be read, or is no JSON object, gives ``{"damaged": "<why>"}``: for who asks about the
    last stop that is an answer like any other, never an error.
    """
    try:
        record = json.loads(read_whole(path, LARGEST_RECORD))
    except FileNotFoundError:
        return None
    except OSError as error:
        return {"damaged": f"cannot read {path}: {error.strerror}"}
    except (ValueError, RecursionError) as error:
        return {"damaged": f"{path} is not a record: {error}"}
    if not isinstance(record, dict):
        return {"damaged": f"{path} is not a record: expected a JSON object"}
    return record


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
