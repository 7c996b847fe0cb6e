"""The line of a file with a caret under a place in it."""

from __future__ import annotations

import re

from flaskd.text import escaped

_LONGEST = 72
"""How many columns of a line are shown; of a longer line those around the place."""
_CUT = "..."
_TAB = "    "

_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")
"""The line breaks that PyYAML knows."""
_SECTION = re.compile(r"(app|profile|server|pool|log|health|control|admin|shutdown|systemd|version|watch)\s*:")
"""Sections without secrets; in `cleanup`, and outside of known sections, any value may be a secret."""
_OPEN_KEY = re.compile(r"[\s-]*(use|phase|scope|timeout|on_failure|retries|after|enabled|discovery)\s*:(?!.*\bwith\b)")
"""Keys of a policy whose values are no secrets."""
_KEY = re.compile(r"[\s{[-]*[\w.-]+\s*:(\s|$)")


def lines_of(text: str) -> list[str]:
    """The lines of a text, as PyYAML counts them."""
    return _BREAK.split(text)


def excerpt(text: str, line: int, column: int) -> str:
    """Show a place of a text, line and column from 1: the line, a caret below it; empty where there is no such line.

    Values that may be secrets are shown as asterisks, because a file that cannot be parsed does not tell which are.
    """
    lines = lines_of(text)
    if not 1 <= line <= len(lines):
        return ""
    shown, at = _cut(_veiled(lines, line - 1), column - 1)
    number = f"{line:>5}"
    before = "".join(map(_shown, shown[:at]))
    return f"{number} | {''.join(map(_shown, shown))}".rstrip() + f"\n{'':>5} | {' ' * _width(before)}^"


def has_no_secret(lines: list[str], index: int) -> bool:
    """Whether a line surely has no secret, judged without parsing the file."""
    line = lines[index]
    section = next((each for each in reversed(lines[: index + 1]) if each[:1].strip() and each[0] not in "#}]-"), "")
    known = _SECTION.match(section) or _OPEN_KEY.match(line)
    return bool(known or line[:1] == "%" or re.fullmatch(r"[\w.-]+:?\s*", line))


def _veiled(lines: list[str], index: int) -> str:
    line = lines[index]
    if has_no_secret(lines, index):
        return line
    key = _KEY.match(line)
    start = key.end() if key else 0
    return line[:start] + re.sub(r"\w", "*", line[start:])


def _cut(line: str, at: int) -> tuple[str, int]:
    """The part of a line around a place, and where that is in it."""
    at = min(at, len(line))
    start = max(0, min(at - _LONGEST // 2, len(line) - _LONGEST))
    part = line[start : start + _LONGEST]
    before, after = _CUT if start else "", _CUT if start + _LONGEST < len(line) else ""
    return before + part + after, at - start + len(before)


def _shown(char: str) -> str:
    return _TAB if char == "\t" else escaped(char)


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    import unicodedata  # noqa: PLC0415 - only for a mistake

    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)
