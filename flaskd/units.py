"""Durations (float seconds) and sizes (int bytes) as people write them in YAML and on a command line."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS = {
    "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3,
}  # fmt: skip
_TERM = r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)"
_DURATION = re.compile(rf"(?:{_TERM}\s*)+")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|kB|MB|GB|KiB|MiB|GiB)?")


def parse_duration(text: str) -> float:
    """Turn ``"250ms"``, ``"1.5s"``, ``"2m"`` or ``"1h30m"`` into seconds; only ``"0"`` is allowed without a unit.

    Raises ValueError with a message that starts "expected a duration such as 5s".
    """
    stripped = text.strip()
    if stripped == "0":
        return 0.0
    if not _DURATION.fullmatch(stripped):
        hint = " (a unit is missing)" if re.fullmatch(r"\d+(\.\d+)?", stripped) else ""
        raise ValueError(f'expected a duration such as 5s, 1.5s or 2m{hint}, got "{text}"')
    seconds = sum(float(number) * _DURATION_UNITS[unit] for number, unit in re.findall(_TERM, stripped))
    if not math.isfinite(seconds):
        raise ValueError(f'expected a duration such as 5s, got "{text}"')
    return seconds


def format_duration(seconds: float) -> str:
    """Write seconds for people: ``250ms``, ``4.1s``, ``2m``, ``1h30m``."""
    if seconds < 1 and seconds > 0:
        return f"{round(seconds * 1000)}ms"
    if seconds < 60:  # noqa: PLR2004 - seconds in a minute
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    total = round(seconds)
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, total = divmod(total, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def parse_size(text: str) -> int:
    """Turn ``"64MiB"``, ``"10kB"`` or a number of bytes without a unit into bytes.

    Raises ValueError with a message that starts "expected a size such as 64MiB".
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f'expected a size such as 64MiB, got "{text}"')
    number, unit = found.groups()
    return int(float(number) * _SIZE_UNITS[unit or "B"])


def timestamp(moment: float) -> str:
    """A wall-clock moment (seconds since the epoch) as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
