"""The lines of the access log."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

from flaskd.text import escaped, shortened
from flaskd.units import timestamp

Access = Literal["off", "common", "combined", "json"]
access_log = logging.getLogger("flaskd.access")
_QUOTES = '"\\'
"""Characters that could end a quoted field of a line."""


def log_access(access: Access, fields: Mapping[str, Any]) -> None:
    """Log one line of `Request.access_fields`; texts from the client are cut to a maximum length."""
    fields = _shortened(fields)
    access_log.info("%s", _line(access, fields), extra={"fields": fields})


def access_line(access: Access, fields: Mapping[str, Any]) -> str:
    """The line as text."""
    return _line(access, _shortened(fields))


def _shortened(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: shortened(value) if isinstance(value, str) else value for key, value in fields.items()}


def _line(access: Access, fields: Mapping[str, Any]) -> str:
    if access == "json":
        return json.dumps({"time": timestamp(fields["time"]), **{key: fields[key] for key in fields if key != "time"}})
    request = escaped(f"{fields['method']} {fields['target']} {fields['protocol']}", _QUOTES)
    line = f'{escaped(fields["client"], _QUOTES)} - - [{_date(int(fields["time"]))}] "{request}"'
    line += f" {fields['status']} {fields['bytes']}"
    if access == "combined":
        line += f' "{escaped(fields["referer"] or "-", _QUOTES)}" "{escaped(fields["agent"] or "-", _QUOTES)}"'
    for name in ("request_id", "traceparent"):
        if name in fields:  # after the standard fields, so that parsers of these formats still work
            line += f" {name}={fields[name]}"
    return line


@functools.lru_cache(maxsize=2)
def _date(second: int) -> str:
    return time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(second))
