"""Text for people: text of others as it can stand in a log, an answer or a terminal; quoting, hints, and tables.

What is not printable (`str.isprintable`: control, bidirectional and other invisible characters) is shown by its number,
or another character stands for it: one line stays one, and a terminal acts upon nothing.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from types import TracebackType

MASK = "********"
"""What stands where a secret is not shown."""
_SHORTEST, _SHORT = 3, 8
"""Characters of a secret below which it is in too many words by chance, and below which it is one as a whole word."""
_LONGEST = 64 * 1024
"""Characters of one text that are shown."""
_CONTINUED = "  "
"""What a line begins with that goes on with an entry of the log: no text of others begins an entry."""
_USERINFO = re.compile(r"(?<=://)([^/?#@\s:]*):[^/?#\s]*@")
LONGEST_TEXT = 1000
"""Characters of what others wrote (a path, a header) that are kept and shown."""
LONGEST_QUOTED = 60
"""Characters of a value that a message quotes, and of a wrong name that is compared."""
_MAX_LISTED = 20
_MAX_COMPARED = 200
"""Names that a wrong one is compared with; enough for any file that was written by hand."""


def escaped(text: str, also: str = "") -> str:
    r"""Text on one line, with ``\x0A`` for a line feed, as nginx writes it; the characters in `also` likewise."""
    if text.isprintable():
        for each in also:
            if each in text:
                break
        else:
            return text
    return "".join(char if char.isprintable() and char not in also else f"\\x{ord(char):02X}" for char in text)


def printable(text: str, instead: str) -> str:
    """Text on one line, as long as it was: `instead`, one character, stands for each that is not printable."""
    return text if text.isprintable() else "".join(char if char.isprintable() else instead for char in text)


def lines(text: str) -> list[str]:
    """Text in lines, which only line feeds part; tabs stay."""
    if text.isprintable():
        return [text]
    return ["\t".join(map(escaped, line.split("\t"))) for line in text.split("\n")]


def bounded(text: str) -> str:
    """Text as far as it is shown, with how much more there is."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text) - _LONGEST} more characters)"


def shortened(text: str) -> str:
    """Text of at most LONGEST_TEXT characters, which says so where it was longer."""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}...({len(text)} characters)"


def entry(text: str) -> str:
    """Text as one entry of a log for people: a line of its own begins it, and all others are indented."""
    if text.isprintable():
        return text
    first, *more = lines(text.rstrip("\n"))
    return "\n".join([first, *(f"{_CONTINUED}{line}" if line else "" for line in more)])


def traceback_of(error: BaseException, trace: TracebackType | None, limit: int | None = None) -> str:
    """A traceback, of `limit` frames as in `traceback.format_exception`, in which each exception's text is one line.

    The text is the app's, or what a client sent; with line feeds of its own it could pass for more of the log.
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
    """The text of an exception, in one line; that is code of the app's, which may raise itself."""
    try:
        return escaped(bounded(str(error)))
    except Exception:  # noqa: BLE001 - see above
        return "its text cannot be had"


def _make_one_line(each: traceback.TracebackException) -> None:
    for name in ("_str", "msg", "text"):  # the latter two are a SyntaxError's
        found = getattr(each, name, None)
        if isinstance(found, str):
            setattr(each, name, escaped(bounded(found.rstrip("\n"))))
    notes = getattr(each, "__notes__", None)
    if isinstance(notes, list | tuple):  # an exception may have anything there
        each.__notes__ = [escaped(bounded(note)) if isinstance(note, str) else note for note in notes]


# --- quoting, hints, lists, tables ----------------------------------------------------------------------------------


def without_password(text: str) -> str:
    """Text without the passwords of the URLs in it (RFC 3986 §3.2.1)."""
    return _USERINFO.sub(rf"\1:{MASK}@", text)


def quoted(text: str, limit: int = LONGEST_QUOTED) -> str:
    """Quote a value on one line: shortened, and with nothing in it that a terminal would act upon, and no password."""
    text = without_password(text)
    short = text if len(text) <= limit else text[:limit] + "..."
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short.replace("\\", "\\\\"))
    return f'"{shown}"'


def did_you_mean(wrong: str, names: Iterable[str], *, strict: bool = False) -> str:
    """``; did you mean "threads"?`` or nothing; `strict`: only what differs by a letter or two."""
    from difflib import get_close_matches  # noqa: PLC0415 - for a mistake alone

    near = get_close_matches(wrong[:LONGEST_QUOTED], [*names][:_MAX_COMPARED], n=1, cutoff=0.8 if strict else 0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def nearest_first(wrong: str, names: Sequence[str]) -> str:
    """List names, those most like the wrong one first."""
    from difflib import SequenceMatcher  # noqa: PLC0415 - for a mistake alone

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
    """Rows in columns as wide as what stands in them, the first one `least` characters or more.

    `indent` blanks are before each line, `gap` between two columns, none at its end.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[:1] = [max(least, width) for width in widths[:1]]
    return [
        " " * indent + (" " * gap).join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


# --- secrets ----------------------------------------------------------------------------------------------------------


class Redactor:
    """Puts the mask over secrets, wherever one stands in a text: `Redactor(secrets)(text)`.

    Of a path each directory above it is one, too; of a value of several lines or parts (``module:name``) each of these.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        found = {part for secret in secrets for part in _parts(secret) if len(part) >= _SHORTEST}
        longest_first = sorted(found, key=len, reverse=True)
        words = [
            rf"(?<!\w){re.escape(each)}(?!\w)" if len(each) < _SHORT else re.escape(each) for each in longest_first
        ]
        self._pattern = re.compile("|".join(words)) if words else None

    def __call__(self, text: str) -> str:
        """The text without the secrets."""
        return self._pattern.sub(MASK, text) if self._pattern else text


def _parts(secret: str) -> Iterable[str]:
    yield secret
    yield from (line.strip() for line in secret.splitlines())
    if "/" in secret:
        path = PurePath(secret)
        yield str(path)  # without what it has twice
        yield from (str(each) for each in path.parents if len(each.parts) > 2)  # noqa: PLR2004 - the root, and one below
    yield from secret.split(":")
