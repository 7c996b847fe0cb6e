"""The record of the last stop: a JSON file that is written completely or not at all."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from flaskd.files import read_whole, temporary_name, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


LARGEST_RECORD = 4 * 1024 * 1024
"""Most bytes of a record; a larger file counts as damaged."""


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` as JSON to `path`, as `flaskd.files.write_whole` does; raises OSError.

    Values that JSON cannot express are written as text. A record that is too large loses its stacks first, then the
    ends of its longest lists; `omitted` says how many entries of which key are missing.
    """
    write_whole(path, encoded(record))


def encoded(record: Mapping[str, Any]) -> bytes:
    """The bytes that `write_record` writes."""
    content = _dumped(record)
    if len(content) > LARGEST_RECORD:
        record = _without_stacks(record)
        content = _dumped(record)
    while len(content) > LARGEST_RECORD:
        lists = {key: value for key, value in record.items() if isinstance(value, list) and value}
        if not lists:
            return _dumped({key: record[key] for key in record if key not in {"policies", "omitted"}})
        key = max(lists, key=lambda each: len(_dumped({each: lists[each]})))
        kept = lists[key][: len(lists[key]) // 2]
        omitted = dict(record.get("omitted", {}))
        omitted[key] = omitted.get(key, 0) + len(lists[key]) - len(kept)
        record = {**record, key: kept, "omitted": omitted}
        content = _dumped(record)
    return content


def _dumped(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2, default=str).encode() + b"\n"


def _without_stacks(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: "" if key in {"stack", "trace"} else _without_stacks(record[key]) for key in record}
    return [_without_stacks(each) for each in record] if isinstance(record, list) else record


def read_record(path: Path) -> dict[str, Any] | None:
    """Read what `write_record` wrote; None if there is no such file.

    For a file that cannot be read or is not a JSON object, returns ``{"damaged": "<why>"}``: a question for the last
    stop is answered, and does not fail.
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


def prepare_record(path: Path, record: Mapping[str, Any]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Write a record to a temporary file beside `path`; raises OSError.

    Returns two functions, both built-in ones: the first renames the file to `path`, the second removes it.
    """
    prepared = temporary_name(path)
    prepared.unlink(missing_ok=True)
    descriptor = os.open(prepared, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(encoded(record))
    return partial(os.rename, str(prepared), str(path)), partial(os.unlink, str(prepared))
