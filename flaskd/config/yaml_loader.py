"""Reads YAML into nodes with their places, and refuses what a configuration does not need.

Only the events of PyYAML's pure Python parser are used. PyYAML's constructors read ``no`` as false and ``22:22`` as
1342, let the last of two equal keys win and expand aliases without a limit; its C parser crashes on deep nesting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from flaskd.config.faults import Faults, Place, dotted
from flaskd.config.nodes import MAX_DEPTH, Items, Node, Path, Scalar, Table, broken, core, unfit
from flaskd.text import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 256 * 1024

_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class _Refused(Exception):  # noqa: N818 - leads out of the recursion; never leaves this file
    """A fault that ends the reading is noted; this exception leaves the recursion and never leaves this file."""


def parse(data: bytes, source: str, faults: Faults) -> Table:
    """Turn the bytes of a file into a tree (an empty file into an empty tree); ``source`` is the file's name.

    Duplicate keys are noted in ``faults`` and reading goes on; all other faults raise InvalidConfigError.
    """
    text = _decode(data, source, faults)
    top = Place(source, 1, 1)
    reader = _Reader(source, faults)
    try:
        return reader.document(text)
    except _Refused:
        pass
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark and text[mark.index : mark.index + 1] == "\t":
            faults.add(reader.place(mark), "", 'expected spaces, got a tab (in quotes: "\\t")')
            faults.check()
        words = " ".join(part for part in (error.context, error.problem) if part)
        place = reader.place(mark) if mark else top
        faults.add(place, "", f"expected YAML, got something else: {' '.join(words.split())}")
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Place(source, before.count("\n") + 1, error.position - before.rfind("\n"))
        faults.add(place, "", f"expected text, got the control character U+{ord(text[error.position]):04X}")
    except yaml.YAMLError as error:
        faults.add(top, "", f"expected YAML, got something else: {' '.join(str(error).split())}")
    faults.check()
    raise AssertionError  # pragma: no cover - every way here noted a fault


def _decode(data: bytes, source: str, faults: Faults) -> str:
    top = Place(source, 1, 1)
    if len(data) > MAX_BYTES:
        faults.add(top, "", f"expected a file of at most {MAX_BYTES // 1024} KiB, got a larger one")
    elif data.startswith(_UTF16_BOMS):
        faults.add(top, "", "expected UTF-8, got UTF-16")
    faults.check()
    try:
        # Some editors always write a UTF-8 byte order mark, which does no harm.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        column = len(data[line_start : error.start].decode("utf-8-sig", "replace")) + 1
        place = Place(source, data.count(b"\n", 0, error.start) + 1, column)
        faults.add(place, "", f"expected UTF-8, got the byte 0x{data[error.start]:02x}")
        text = ""
    for number, line in enumerate(text.split("\n"), 1):
        if "\0" in line:
            faults.add(Place(source, number, line.index("\0") + 1), "", "expected text, got a NUL character")
    faults.check()
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML that allows tabs where YAML does: as separators and in text, but not as indentation (YAML 1.2.2, §6.1)."""

    def scan_to_next_token(self) -> None:
        super().scan_to_next_token()
        # Before a key or an entry of a block, a tab would be indentation; libyaml has the same rule.
        while self.peek() == "\t" and (self.flow_level or not self.allow_simple_key or self._rest_is_blank()):
            self.forward(self._blanks())
            super().scan_to_next_token()

    def scan_plain_spaces(self, indent: int, start_mark: yaml.Mark) -> list[str] | None:
        length = self._blanks()
        if "\t" in self.prefix(length) and not self._rest_is_blank():
            within: str = self.prefix(length)
            self.forward(length)
            return [within]
        self.forward(length if self._rest_is_blank() else 0)
        found: list[str] | None = super().scan_plain_spaces(indent, start_mark)
        return found

    def _blanks(self) -> int:
        length = 0
        while self.peek(length) in " \t":
            length += 1
        return length

    def _rest_is_blank(self) -> bool:
        """Whether only blanks and maybe a comment follow on the line."""
        return self.peek(self._blanks()) in "\0#\r\n\x85\u2028\u2029"


class _Reader:
    """Builds the tree from the parser's events, each of which is read once."""

    def __init__(self, source: str, faults: Faults) -> None:
        self._source = source
        self._faults = faults
        self._events: Iterator[yaml.Event] = iter(())

    def place(self, mark: Any) -> Place:
        return Place(self._source, mark.line + 1, mark.column + 1)

    def document(self, text: str) -> Table:
        self._events = iter(yaml.parse(text, Loader=_Loader))
        top = Place(self._source, 1, 1)
        tree: Node = Table(top, top, {})
        next(self._events)  # the start of the stream
        event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            first = next(self._events)
            nothing = isinstance(first, yaml.ScalarEvent) and first.implicit[0] and not first.value
            node = self._node(first, top, ())
            if isinstance(node, Table):
                tree = node
            elif not nothing:
                what = "a list" if isinstance(node, Items) else "a single value"
                self._refuse(top, (), f"expected a mapping at the top, got {what}")
            next(self._events)  # the end of the document
            event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            self._refuse(self.place(event.start_mark), (), "expected one document, got a second")
        assert isinstance(tree, Table)
        return tree

    def _refuse(self, place: Place, path: Path, message: str) -> None:
        self._faults.add(place, dotted(path), message)
        raise _Refused

    def _node(self, event: yaml.Event, key: Place | None, path: Path) -> Node:
        place = self.place(event.start_mark)
        key = key or place
        if isinstance(event, yaml.AliasEvent):
            self._refuse(place, path, f"expected a value, got the alias *{quoted(str(event.anchor))[1:-1]}")
        assert isinstance(event, yaml.NodeEvent)
        if event.anchor is not None:
            self._refuse(place, path, f"expected a value, got the anchor &{quoted(str(event.anchor))[1:-1]}")
        assert isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent))
        if event.tag is not None:
            self._refuse(place, path, f"expected a value, got the tag {quoted(event.tag)}")
        if isinstance(event, yaml.ScalarEvent):
            if wrong := unfit(event.value):
                self._faults.add(place, dotted(path), f"expected text, got {wrong}")
                return broken(key, place)
            return Scalar(key, place, event.value, event.value if event.style else core(event.value))
        if len(path) >= MAX_DEPTH:
            self._refuse(place, path[:3], f"expected at most {MAX_DEPTH} levels, got more")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
                items.append(self._node(inner, None, (*path, len(items))))
            return Items(key, place, tuple(items))
        return Table(key, place, self._entries(path))

    def _entries(self, path: Path) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                self._refuse(self.place(event.start_mark), path, "expected a key of text, got a list or mapping")
            name = self._node(event, None, path)
            assert isinstance(name, Scalar)
            value = self._node(next(self._events), name.place, (*path, name.text))
            if name.broken:
                continue
            if name.text in entries:
                first = entries[name.text].key.line
                message = f"expected each key once, got {quoted(name.text)} again (first in line {first})"
                self._faults.add(name.place, dotted((*path, name.text)), message)
            else:
                entries[name.text] = value
        return entries
