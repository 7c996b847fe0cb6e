"""Text for people: makes text from others safe for a log, an answer or a terminal; quoting, hints, and tables.

Characters that are not printable (`str.isprintable`: control, bidirectional and other invisible ones) are replaced by
their number or by another character, so that one line stays one line and a terminal acts on nothing.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from types import TracebackType

MASK = "********"
"""Shown in the place of a secret."""
_SHORTEST, _SHORT = 3, 8
"""Secrets shorter than the first number are not masked, because they are parts of too many words; those shorter than
the second are masked only as whole words."""
_LONGEST = 64 * 1024
"""How many characters of one text are shown."""
_CONTINUED = "  "
"""The beginning of each further line of a log entry, so that text from others cannot begin an entry."""
_USERINFO = re.compile(r"(?<=://)([^/?#@\s:]*):[^/?#\s]*@")
LONGEST_TEXT = 1000
"""How many characters of a text from others (a path, a header) are kept and shown."""
LONGEST_QUOTED = 60
"""How many characters of a value a message quotes, and of a wrong name are compared."""
_MAX_LISTED = 20
_MAX_COMPARED = 200
"""With how many names a wrong name is compared; enough for any file written by hand."""


def escaped(text: str, also: str = "") -> str:
    r"""Text on one line, with ``\x0A`` for a line feed, as nginx writes it; `also` are more characters to escape."""
    if text.isprintable():
        for each in also:
            if each in text:
                break
        else:
            return text
    return "".join(char if char.isprintable() and char not in also else f"\\x{ord(char):02X}" for char in text)


def printable(text: str, instead: str) -> str:
    """Text on one line of the same length; the character `instead` replaces each that is not printable."""
    return text if text.isprintable() else "".join(char if char.isprintable() else instead for char in text)


def lines(text: str) -> list[str]:
    """The lines of a text, which only line feeds separate; tabs stay."""
    if text.isprintable():
        return [text]
    return ["\t".join(map(escaped, line.split("\t"))) for line in text.split("\n")]


def bounded(text: str) -> str:
    """The beginning of a long text, and how many characters follow it."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text) - _LONGEST} more characters)"


def shortened(text: str) -> str:
    """Text of at most LONGEST_TEXT characters; one that was longer ends with a note about that."""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}...({len(text)} characters)"


def entry(text: str) -> str:
    """Text as one entry of a log for people: the first line begins the entry, and all others are indented."""
    if text.isprintable():
        return text
    first, *more = lines(text.rstrip("\n"))
    return "\n".join([first, *(f"{_CONTINUED}{line}" if line else "" for line in more)])


def traceback_of(error: BaseException, trace: TracebackType | None, limit: int | None = None) -> str:
    """A traceback of `limit` frames (as in `traceback.format_exception`); the text of each exception is one line.

    The text comes from the app or a client; with line feeds in it, it could look like further log entries.
    """
    whole = traceback.TracebackException(type(error), error, trace, limit=limit, compact=True)
    left: list[traceback.TracebackException | None] = [whole]
    while left:
        each = left.pop()
        if each is not None:
            _make_one_line(each)
            left += [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]
    return "\n".join(lines("".join(whole.format()).rstrip("\n")))


def text_of(error: BaseException) -> str:
    """The text of an exception in one line; the app's code makes it, and may raise."""
    try:
        return escaped(bounded(str(error)))
    except Exception:  # noqa: BLE001 - see above
        return "its text cannot be read"


def _make_one_line(each: traceback.TracebackException) -> None:
    for name in ("_str", "msg", "text"):  # a SyntaxError has the latter two
        found = getattr(each, name, None)
        if isinstance(found, str):
            setattr(each, name, escaped(bounded(found.rstrip("\n"))))
    notes = getattr(each, "__notes__", None)
    if isinstance(notes, list | tuple):  # an exception may have any object there
        each.__notes__ = [escaped(bounded(note)) if isinstance(note, str) else note for note in notes]


# --- quoting, hints, lists, tables ----------------------------------------------------------------------------------


def without_password(text: str) -> str:
    """Text without the passwords of the URLs in it (RFC 3986 §3.2.1)."""
    return _USERINFO.sub(rf"\1:{MASK}@", text)


def quoted(text: str, limit: int = LONGEST_QUOTED) -> str:
    """Quote a value on one line: shortened, escaped, and without passwords."""
    text = without_password(text)
    short = text if len(text) <= limit else text[:limit] + "..."
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short.replace("\\", "\\\\"))
    return f'"{shown}"'


def did_you_mean(wrong: str, names: Iterable[str], *, strict: bool = False) -> str:
    """``; did you mean "threads"?`` or an empty text; `strict`: only for names that differ by one or two letters."""
    from difflib import get_close_matches  # noqa: PLC0415 - only for mistakes

    near = get_close_matches(wrong[:LONGEST_QUOTED], [*names][:_MAX_COMPARED], n=1, cutoff=0.8 if strict else 0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def nearest_first(wrong: str, names: Sequence[str]) -> str:
    """A list of names, those most similar to the wrong one first."""
    from difflib import SequenceMatcher  # noqa: PLC0415 - only for mistakes

    ratio = SequenceMatcher(b=wrong[:LONGEST_QUOTED])

    def unlikeness(name: str) -> float:
        ratio.set_seq1(name)
        return -ratio.ratio()

    nearest = sorted(names[:_MAX_COMPARED], key=unlikeness)
    return ", ".join([*nearest[:_MAX_LISTED], *(["..."] if len(names) > _MAX_LISTED else [])])


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def table(rows: Sequence[Sequence[str]], *, indent: int = 0, gap: int = 2, least: int = 0) -> list[str]:
    """Rows in columns that are as wide as their longest cell; the first is at least `least` characters wide.

    Each line begins with `indent` blanks, and `gap` blanks separate columns; no line ends with blanks.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[:1] = [max(least, width) for width in widths[:1]]
    return [
        " " * indent + (" " * gap).join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


# --- secrets ----------------------------------------------------------------------------------------------------------


class Redactor:
    """Masks secrets wherever they are in a text: `Redactor(secrets)(text)`.

    If a secret is a path, its parent directories are masked as well; if it has several lines or parts
    (``module:name``), each of them is.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        found = {part for secret in secrets for part in _parts(secret) if len(part) >= _SHORTEST}
        longest_first = sorted(found, key=len, reverse=True)
        words = [
            rf"(?<!\w){re.escape(each)}(?!\w)" if len(each) < _SHORT else re.escape(each) for each in longest_first
        ]
        self._pattern = re.compile("|".join(words)) if words else None

    def __call__(self, text: str) -> str:
        """The text with the secrets masked."""
        return self._pattern.sub(MASK, text) if self._pattern else text


def _parts(secret: str) -> Iterable[str]:
    yield secret
    yield from (line.strip() for line in secret.splitlines())
    if "/" in secret:
        path = PurePath(secret)
        yield str(path)  # without doubled slashes
        yield from (str(each) for each in path.parents if len(each.parts) > 2)  # noqa: PLR2004 - not / and its children
    yield from secret.split(":")
