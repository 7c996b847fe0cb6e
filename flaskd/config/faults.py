"""Faults of a configuration: where each stands, in plain words, all of them at once."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flaskd.errors import ConfigError
from flaskd.text import MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

COMMAND_LINE = "command line"
_USERINFO = re.compile(r"(?<=://)([^/?#@\s:]*):[^/?#\s]*@")
MAX_FAULTS = 50
"""More than this nobody reads, and wording each one costs time."""

_SHOWN = 60
"""Characters of a value that a fault quotes."""
_MAX_LISTED = 20
_MAX_COMPARED = 200
"""Names that a wrong one is compared with; enough for any file that somebody wrote by hand."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands: line and column from 1, or 0 where the source has no lines."""

    source: str
    line: int = 0
    column: int = 0

    @property
    def order(self) -> tuple[bool, int, int]:
        """What faults are sorted by: the file from top to bottom, then the command line."""
        return (self.source == COMMAND_LINE, self.line, self.column)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a configuration.

    ``path`` is the file as it was named (or ``<mapping>``, or ``command line``). ``line`` and ``column``
    count from 1, and are 0 where there are none. ``key`` is dotted, and empty for a fault of the whole file.
    """

    path: str
    line: int
    column: int
    key: str
    message: str

    def as_json(self) -> dict[str, str | int]:
        """Stable keys for programs."""
        return {
            "path": self.path, "line": self.line, "column": self.column, "key": self.key, "message": self.message,
        }  # fmt: skip

    def __str__(self) -> str:
        at = f"{self.path}:{self.line}:{self.column}" if self.line else self.path
        return f"{at} {self.key}: {self.message}" if self.key else f"{at}: {self.message}"


class InvalidConfigError(ConfigError):
    """The configuration has faults: ``faults`` holds them sorted by place, the text is one line for each."""

    def __init__(self, faults: tuple[Fault, ...], omitted: int = 0) -> None:
        lines = [str(fault) for fault in faults]
        if omitted:
            lines.append(f"... and {omitted} more")
        super().__init__("\n".join(lines))
        self.faults = faults
        self.omitted = omitted


@dataclass(slots=True)
class Faults:
    """Collects faults; a message may be a function, called only for a fault that is going to be shown."""

    _found: list[tuple[Place, str, str | Callable[[], str]]] = field(default_factory=list)

    def add(self, place: Place, key: str, message: str | Callable[[], str]) -> None:
        """Note one fault."""
        self._found.append((place, key, message))

    def check(self) -> None:
        """Raise InvalidConfigError if there is any fault."""
        if not self._found:
            return
        self._found.sort(key=lambda found: found[0].order)
        faults = tuple(
            Fault(place.source, place.line, place.column, key, message if isinstance(message, str) else message())
            for place, key, message in self._found[:MAX_FAULTS]
        )
        raise InvalidConfigError(faults, omitted=len(self._found) - len(faults))


def dotted(path: Iterable[str | int]) -> str:
    """Write a path for people: ``server.listen[1]``; names that could garble a line are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            odd = not part or not all(character.isalnum() or character in "._-/" for character in part)
            text += ("." if text else "") + (quoted(part) if odd else part)
    return text


def without_password(text: str) -> str:
    """Text without the passwords of the URLs in it (RFC 3986 §3.2.1)."""
    return _USERINFO.sub(rf"\1:{MASK}@", text)


def quoted(text: str, limit: int = _SHOWN) -> str:
    """Quote a value on one line: shortened, and with nothing in it that a terminal would act upon, and no password."""
    text = without_password(text)
    short = text if len(text) <= limit else text[:limit] + "..."
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short.replace("\\", "\\\\"))
    return f'"{shown}"'


def did_you_mean(wrong: str, names: Sequence[str]) -> str:
    """``; did you mean "threads"?`` or nothing."""
    near = difflib.get_close_matches(wrong[:_SHOWN], names[:_MAX_COMPARED], n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def nearest_first(wrong: str, names: Sequence[str]) -> str:
    """List names, those most like the wrong one first."""
    ratio = difflib.SequenceMatcher(b=wrong[:_SHOWN])

    def unlikeness(name: str) -> float:
        ratio.set_seq1(name)
        return -ratio.ratio()

    nearest = sorted(names[:_MAX_COMPARED], key=unlikeness)
    return ", ".join([*nearest[:_MAX_LISTED], *(["..."] if len(names) > _MAX_LISTED else [])])
