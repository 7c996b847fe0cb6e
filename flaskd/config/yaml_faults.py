"""Says in plain words why a file is no valid YAML, and shows the place that has to be corrected.

PyYAML reports where its scanner or parser stopped; the mistake is often before that place: a bracket that is not
closed, or a missing colon. A message quotes only keys and punctuation, because values may be secrets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flaskd.config.excerpt import has_no_secret, lines_of
from flaskd.text import quoted

if TYPE_CHECKING:
    import yaml

Span = tuple["yaml.Mark", "yaml.Mark"]
Said = tuple[int, int, str]
"""A line and a column, from 0, and what is wrong there."""

_BEGINS = "[^\\S\n]*(?:- +)*"
_IN_QUOTES = 'write text that begins with "{0}" in quotes'
_ESCAPES = {"2": "x41", "4": "u0041", "8": "U00000041"}


def _start(line: str) -> int:
    """The column at which the first key of a line begins, after the dashes of list entries."""
    return len(line) - len(re.sub(_BEGINS, "", line, count=1))


class YamlFault:
    """What PyYAML refuses in a text.

    `opened` are the brackets that are not closed, `quote` is the last quoted text of several lines.
    """

    def __init__(
        self, error: yaml.MarkedYAMLError, text: str, *, opened: Sequence[yaml.Mark], quote: Span | None
    ) -> None:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        self._mark: Any = mark
        self._begin: Any = error.context_mark or mark
        self._context, self._problem = error.context or "", error.problem or ""
        self._text, self._opened, self._quote = text, opened, quote
        self._lines = lines_of(text)

    def said(self) -> Said:
        """The place, and the message."""
        if self._char(self._mark) == "\t":
            return self._at(self._mark, 'expected spaces, got a tab (in quotes: "\\t")')
        if self._quote and self._quote[1].line == self._mark.line and self._quote[1].index <= self._mark.index:
            return self._at(
                self._quote[0], f"expected a closing quote in this line, got none before line {self._mark.line + 1}"
            )
        for context, problem, say in self.WORDS:
            if (context is None or context in self._context) and (found := re.search(problem, self._problem)):
                return say(self, found)
        words = " ".join(part for part in (self._context, self._problem) if part)
        return self._at(self._mark, f"expected YAML, got something else: {' '.join(words.split())}")

    # --- the text ---

    def _char(self, mark: Any) -> str:
        return self._text[mark.index : mark.index + 1].strip("\0")

    def _at(self, mark: Any, message: str) -> Said:
        return mark.line, mark.column, message

    def _line(self, number: int) -> str:
        return self._lines[number] if number < len(self._lines) else ""

    def _got(self) -> str:
        """What is at the place: punctuation, or the kind of a thing."""
        char = self._char(self._mark)
        if not self._text[self._mark.index :].strip("\0 \n"):
            return "the end of the file"
        return "more text" if char.isalnum() or char in "\"'_" else quoted(char)

    def _is_first(self) -> bool:
        """Whether the place is the begin of its line."""
        return not self._line(self._mark.line)[: self._mark.column].strip(" -")

    def _before(self, number: int) -> int:
        """The last line before it that is not empty and no comment, -1 if there is none."""
        return next(
            (i for i in range(number - 1, -1, -1) if self._line(i).strip() and self._line(i).strip()[0] != "#"), -1
        )

    def _indents(self, number: int) -> list[int]:
        """The columns, from 0, at which such a line, a key or a list entry, may begin below the lines above it."""
        is_entry = self._line(number).lstrip().startswith("- ")
        keys: set[int] = set()
        entries: set[int] = set()
        least = len(self._text)
        for line in map(self._line, range(number - 1, -1, -1)):
            own = len(line) - len(line.lstrip(" "))
            if line.strip() and line.strip()[0] != "#" and own < least:
                least, start = own, _start(line)
                if start > own:
                    entries.add(own)
                if re.search(r":(\s|$)", line):
                    keys.add(start)
        return sorted(entries if is_entry and entries else keys)

    # --- what is wrong ---

    def _second_colon(self, _: re.Match[str]) -> Said:
        number, column = self._mark.line, self._mark.column
        line = self._line(number)
        first = _start(line)
        if re.search(r":\s", line[first:column]) or first >= column:
            return self._at(
                self._mark,
                'expected one key in a line, got a second ":"; write the inner key in a line of its own, further in, '
                'or text that has ": " in it in quotes',
            )
        before = self._before(number)
        above = self._line(before) if before >= 0 else ""
        if not re.search(r":(\s|$)", above):
            return self._no_colon(before)
        if first > _start(above):
            as_above = f"expected a line that begins at column {_start(above) + 1}, as line {before + 1} does"
            return number, first, f"{as_above}, got one at column {first + 1}"
        return self._at(self._mark, 'expected a value, got a second ":"; write text that has ": " in it in quotes')

    def _no_colon(self, number: int) -> Said:
        """A line that should begin with a key and a colon."""
        line = self._line(number).split(" #")[0].rstrip()
        first = _start(line)
        found = re.match(r"([\w.-]{1,60})(:\S|$|[ =])", line[first:])
        if found is None:
            return number, first, 'expected a key and a colon, got a line without ": "'
        key, behind = found.groups()
        such = f'"{key}:{" ..." if behind else ""}"' if has_no_secret(self._lines, number) else '"KEY: VALUE"'
        if behind.startswith(":"):
            return number, first + len(key) + 1, f"expected a blank behind the colon: {such}"
        return number, first + len(key), f"expected a colon behind the key: {such}"

    def _missing_colon(self, _: re.Match[str]) -> Said:
        return self._no_colon(self._begin.line)

    def _entry_in_line(self, _: re.Match[str]) -> Said:
        return self._at(
            self._mark, "expected a value behind the colon, got a list entry; write it in the next line, or [a, b]"
        )

    def _key_in_line(self, _: re.Match[str]) -> Said:
        return self._at(self._mark, f'expected a value, got "?"; {_IN_QUOTES.format("?")}')

    def _begins_oddly(self, _: re.Match[str]) -> Said:
        mark = self._begin if self._context.startswith(("while scanning a", "while parsing a")) else self._mark
        char = self._char(mark)
        return self._at(mark, f"expected a value, got {quoted(char)}; {_IN_QUOTES.format(char)}")

    def _directive(self, _: re.Match[str]) -> Said:
        return self._at(self._mark, 'expected %YAML 1.2 once at most, and each %TAG once, got another line with a "%"')

    def _block_text(self, _: re.Match[str]) -> Said:
        char = self._char(self._begin)
        return self._at(
            self._mark, f'expected the end of the line behind "{char}", got more; {_IN_QUOTES.format(char)}'
        )

    def _block_number(self, _: re.Match[str]) -> Said:
        return self._at(self._mark, f'expected a number from 1 to 9 behind "{self._char(self._begin)}", got 0')

    def _open_quote(self, found: re.Match[str]) -> Said:
        what = "the end of the file" if "stream" in found[0] else "the end of the document"
        return self._at(self._begin, f"expected a closing quote ({self._char(self._begin)}), got {what}")

    def _escape(self, _: re.Match[str]) -> Said:
        char = self._char(self._mark)
        return self._at(
            self._mark, f'expected a known escape, got "\\{char}"; write the text in single quotes, or \\\\ for each \\'
        )

    def _hexadecimal(self, found: re.Match[str]) -> Said:
        example = _ESCAPES.get(found[1], "x41")
        return self._at(self._mark, f'expected {found[1]} hexadecimal digits, as in "\\{example}", got something else')

    def _block_end(self, _: re.Match[str]) -> Said:
        number, column = self._mark.line, self._mark.column
        if not self._is_first():
            return self._not_at_the_end()
        line = self._line(number)
        first = len(line) - len(line.lstrip(" "))
        indents = self._indents(number)
        if indents and first not in indents and column == first:
            places = " or ".join(str(each + 1) for each in indents)
            return number, first, f"expected a line that begins at column {places}, got one at column {first + 1}"
        if self._char(self._mark) == "-":
            return self._at(
                self._mark, 'expected a key, got a list entry ("-"); the entries of a list stand under its key'
            )
        if self._context.endswith("block collection"):
            return self._at(self._mark, 'expected another entry of the list ("- ..."), got something else')
        return self._not_at_the_end()

    def _not_at_the_end(self) -> Said:
        if self._char(self._mark) == ",":
            return self._at(self._mark, 'expected the end of the line, got ","; write a list in brackets: [a, b]')
        if self._char(self._mark) in {"]", "}"}:
            return self._at(self._mark, f"expected the end of the line, got {self._got()}, which closes nothing")
        if self._char(self._mark) == ":":
            return self._at(self._mark, 'expected a key before the ":", got none')
        return self._at(
            self._mark, f"expected the end of the line behind the value, got {self._got()}; write all of it in quotes"
        )

    def _flow(self, found: re.Match[str]) -> Said:
        close, start, mark = found[1], self._begin, self._mark
        this = self._char(start)
        line, opening = self._line(mark.line), self._line(start.line)
        further_in = len(line) - len(line.lstrip()) > len(opening) - len(opening.lstrip())
        if self._got() == "the end of the file":
            return self._not_closed(start, "the end of the file")
        if mark.line > start.line and not further_in and self._char(mark) not in "]}":
            return self._not_closed(start, f"none before line {mark.line + 1}")
        where = f"line {start.line + 1}, column {start.column + 1}"
        if self._char(mark) in "]}":
            return self._at(mark, f'expected "{close}" for the "{this}" in {where}, got {self._got()}')
        colon = '; write text that has ": " in it in quotes' if self._char(mark) == ":" else ""
        return self._at(mark, f'expected a comma, or "{close}" for the "{this}" in {where}, got {self._got()}{colon}')

    def _not_closed(self, start: Any, got: str) -> Said:
        this = self._char(start)
        close = "]" if this == "[" else "}"
        return self._at(start, f'expected a closing "{close}" for this "{this}", got {got}')

    def _no_value(self, _: re.Match[str]) -> Said:
        if self._got() == "the end of the file" and self._opened:
            return self._not_closed(self._opened[-1], "the end of the file")
        return self._at(self._mark, f"expected a value, got {self._got()}")

    def _after_the_end(self, _: re.Match[str]) -> Said:
        if self._line(self._before(self._mark.line)).startswith("..."):
            return self._at(self._mark, 'expected the end of the file behind "...", got more')
        indents = self._indents(self._mark.line)
        if self._is_first() and indents and self._mark.column not in indents:
            places = " or ".join(str(each + 1) for each in indents)
            return self._at(
                self._mark, f"expected a line that begins at column {places}, got one at column {self._mark.column + 1}"
            )
        return self._not_at_the_end()

    WORDS: tuple[tuple[str | None, str, Callable[[YamlFault, re.Match[str]], Said]], ...] = (
        (None, "mapping values are not allowed here", _second_colon),
        (None, "could not find expected ':'", _missing_colon),
        (None, "sequence entries are not allowed here", _entry_in_line),
        (None, "mapping keys are not allowed here", _key_in_line),
        (None, "that cannot start any token", _begins_oddly),
        (None, "duplicate YAML directive|incompatible YAML document|duplicate tag handle", _directive),
        ("directive", "", _begins_oddly),
        ("anchor", "", _begins_oddly),
        ("alias", "", _begins_oddly),
        ("a tag", "", _begins_oddly),
        (None, "undefined tag handle", _begins_oddly),
        ("block scalar", "range 1-9", _block_number),
        ("block scalar", "", _block_text),
        ("quoted scalar", "unexpected end of stream|unexpected document separator", _open_quote),
        ("quoted scalar", "unknown escape", _escape),
        ("quoted scalar", r"escape sequence of (\d)", _hexadecimal),
        ("while parsing a flow", r"expected ',' or '(.)'", _flow),
        (None, "expected the node content", _no_value),
        ("while parsing a block", "expected <block end>", _block_end),
        (None, "expected '<document start>'", _after_the_end),
    )  # fmt: skip
    """Parts of PyYAML's messages: what it was doing, a pattern of what it found, and the method with the words."""
