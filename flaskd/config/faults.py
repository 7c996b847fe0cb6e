"""Faults of a configuration, with their places, in plain words, all at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flaskd.errors import EX_USAGE, ConfigError
from flaskd.text import quoted
from flaskd.values import value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

COMMAND_LINE = "command line"
MAX_FAULTS = 50
"""More faults than this are only counted, because wording each one takes time."""
_MAX_SHOWN = 3
"""If there are more faults than this, the lines that they are about are not shown."""


@value
class Place:
    """A place in a source: line and column from 1, or 0 if the source has no lines."""

    source: str
    line: int = 0
    column: int = 0

    @property
    def order(self) -> tuple[bool, int, int]:
        """The key by which faults are sorted: the file from top to bottom, then the command line."""
        return (self.source == COMMAND_LINE, self.line, self.column)


@value
class Fault:
    """One fault of a configuration.

    ``path`` is the file as it was named, or ``<mapping>`` or ``command line``. ``line`` and ``column`` count from 1,
    and are 0 if there are none. ``key`` is dotted, and empty for a fault of the whole file.
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
    """The configuration has faults: ``faults`` are sorted by place, and the text has one line for each.

    ``details`` are the lines of the file that are no YAML, with a caret under the place. If all faults are on the
    command line, the exit code is that of a wrong command line.
    """

    def __init__(self, faults: tuple[Fault, ...], omitted: int = 0, details: str = "") -> None:
        lines = [str(fault) for fault in faults]
        if omitted:
            lines.append(f"... and {omitted} more")
        super().__init__("\n".join(lines))
        self.faults, self.details = faults, details
        self.for_programs = {"faults": [fault.as_json() for fault in faults], "omitted": omitted}
        if all(fault.path == COMMAND_LINE for fault in faults):
            self.exit_code = EX_USAGE
        self.omitted = omitted


@dataclass(slots=True)
class Faults:
    """Collects faults. A message may be a function, which is called only if the fault is shown.

    `elsewhere` gives the places at which the configuration has keys of a name, for a key in a wrong place.
    """

    elsewhere: Callable[[str], Sequence[str]] = lambda _name: ()
    _found: list[tuple[Place, str, str | Callable[[], str], Callable[[], str]]] = field(default_factory=list)

    def add(
        self, place: Place, key: str, message: str | Callable[[], str], details: Callable[[], str] = lambda: ""
    ) -> None:
        """Note one fault; `details` returns the line that it is about, and is called if there are few faults."""
        self._found.append((place, key, message, details))

    def check(self) -> None:
        """Raise InvalidConfigError if there is any fault."""
        if not self._found:
            return
        self._found.sort(key=lambda found: found[0].order)
        faults = tuple(
            Fault(place.source, place.line, place.column, key, message if isinstance(message, str) else message())
            for place, key, message, _ in self._found[:MAX_FAULTS]
        )
        details = [show() for *_, show in self._found] if len(self._found) <= _MAX_SHOWN else []
        raise InvalidConfigError(faults, len(self._found) - len(faults), "\n".join(filter(None, details)))


def dotted(path: Iterable[str | int]) -> str:
    """A path for people: ``server.listen[1]``; names that could garble a line are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            odd = not part or not all(character.isalnum() or character in "._-/" for character in part)
            text += ("." if text else "") + (quoted(part) if odd else part)
    return text
