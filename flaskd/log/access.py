"""The lines of the access log."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flaskd.text import LONGEST_TEXT, escaped, shortened
from flaskd.units import timestamp

Access = Literal["off", "common", "combined", "json"]
access_log = logging.getLogger("flaskd.access")
_QUOTES = '"\\'
"""Characters that could end a quoted field of a line."""


def log_access(access: Access, fields: Mapping[str, Any]) -> None:
    """Log one line of `Request.access_fields`; texts from the client are cut to a maximum length."""
    fields = _shortened(fields)
    access_log.info("%s", _line(access, fields), extra={"fields": fields})


def access_line(access: Access, fields: Mapping[str, Any]) -> Callable[[], str]:
    """What makes the same line as text; called in the thread that writes it, which makes many of them together."""
    if len(fields["target"]) + len(fields["referer"]) + len(fields["agent"]) > LONGEST_TEXT:  # it may have to wait
        fields = _shortened(fields)
    return functools.partial(_line, access, fields)


def _shortened(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: shortened(value) if isinstance(value, str) else value for key, value in fields.items()}


def _line(access: Access, fields: Mapping[str, Any]) -> str:
    if access == "json":
        return json.dumps({"time": timestamp(fields["time"]), **{key: fields[key] for key in fields if key != "time"}})
    client, request = fields["client"], f"{fields['method']} {fields['target']} {fields['protocol']}"
    referer, agent = fields["referer"] or "-", fields["agent"] or "-"
    text = client + request + referer + agent
    if not text.isprintable() or '"' in text or "\\" in text:
        client, request, referer, agent = (escaped(each, _QUOTES) for each in (client, request, referer, agent))
    line = f'{client} - - [{_date(int(fields["time"]))}] "{request}" {fields["status"]} {fields["bytes"]}'
    if access == "combined":
        line += f' "{referer}" "{agent}"'
    for name in ("request_id", "traceparent"):
        if name in fields:  # after the standard fields, so that parsers of these formats still work
            line += f" {name}={fields[name]}"
    return line


@functools.lru_cache(maxsize=2)
def _date(second: int) -> str:
    return time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(second))
