"""Reads YAML into nodes with their places, and refuses what a configuration does not need.

Only the events of PyYAML's pure Python parser are used. PyYAML's constructors read ``no`` as false and ``22:22`` as
1342, let the last of two equal keys win and expand aliases without a limit; its C parser crashes on deep nesting.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from flaskd.config.excerpt import excerpt
from flaskd.config.faults import Faults, Place, dotted
from flaskd.config.nodes import MAX_DEPTH, Items, Node, Path, Scalar, Table, broken, core, unfit
from flaskd.text import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 256 * 1024

_AS_TEXT = "write text that begins so in quotes"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class _Refused(Exception):  # noqa: N818 - leads out of the recursion; never leaves this file
    """A fault that ends the reading is noted; this exception leaves the recursion and never leaves this file."""


def parse(data: bytes, source: str, faults: Faults) -> Table:
    """Turn the bytes of a file into a tree (an empty file into an empty tree); ``source`` is the file's name.

    Duplicate keys are noted in ``faults`` and reading goes on; all other faults raise InvalidConfigError. Each fault
    shows its line.
    """
    text = _decode(data, source, faults)
    loader = _Loader(text)
    reader = _Reader(text, source, faults, loader)
    try:
        return reader.document()
    except _Refused:
        pass
    except yaml.MarkedYAMLError as error:
        from flaskd.config.yaml_faults import YamlFault  # noqa: PLC0415 - only for mistakes

        line, column, message = YamlFault(error, text, opened=loader.opened, quote=loader.quote).said()
        reader.note(Place(source, line + 1, column + 1), (), message)
    except (ValueError, OverflowError):  # of chr(), for an escape
        mark = loader.get_mark()
        reader.note(
            reader.place(mark), (), "expected an escape of a character that there is, got a number above 10FFFF"
        )
    faults.check()
    raise AssertionError  # pragma: no cover - every way here noted a fault


def _decode(data: bytes, source: str, faults: Faults) -> str:
    top = Place(source)
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
        readable = data.decode("utf-8-sig", "backslashreplace")
        message = f"expected UTF-8, got the byte 0x{data[error.start]:02x}"
        faults.add(place, "", message, partial(excerpt, readable, place.line, column))
        text = ""
    for number, line in enumerate(text.split("\n"), 1):
        if found := yaml.reader.Reader.NON_PRINTABLE.search(line):
            what = "a NUL character" if found[0] == "\0" else f"the control character U+{ord(found[0]):04X}"
            place = Place(source, number, found.start() + 1)
            faults.add(place, "", f"expected text, got {what}", partial(excerpt, text, number, place.column))
    faults.check()
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML that allows tabs where YAML does: as separators and in text, but not as indentation (YAML 1.2.2, §6.1)."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.opened: list[yaml.Mark] = []
        """Where brackets were opened that are not closed yet."""
        self.quote: tuple[yaml.Mark, yaml.Mark] | None = None
        """The last quoted text of several lines, from its first character to behind its last one."""

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

    def fetch_flow_collection_start(self, kind: type[yaml.Token]) -> None:
        self.opened.append(self.get_mark())
        super().fetch_flow_collection_start(kind)

    def fetch_flow_collection_end(self, kind: type[yaml.Token]) -> None:
        del self.opened[-1:]
        super().fetch_flow_collection_end(kind)

    def scan_flow_scalar(self, style: str) -> yaml.ScalarToken:
        token: yaml.ScalarToken = super().scan_flow_scalar(style)
        if token.start_mark.line != token.end_mark.line:
            self.quote = (token.start_mark, token.end_mark)
        return token

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

    def __init__(self, text: str, source: str, faults: Faults, loader: _Loader) -> None:
        self._text, self._source, self._faults, self._loader = text, source, faults, loader
        self._events: Iterator[yaml.Event] = iter(())

    def place(self, mark: Any) -> Place:
        return Place(self._source, mark.line + 1, mark.column + 1)

    def note(self, place: Place, path: Path, message: str) -> None:
        """Note a fault, with the line that it is about."""
        self._faults.add(place, dotted(path), message, partial(excerpt, self._text, place.line, place.column))

    def document(self) -> Table:
        self._events = iter(self._loader.get_event, None)
        top = Place(self._source, 1, 1)
        tree: Node = Table(top, top, {})
        next(self._events)  # the start of the stream
        event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            first = next(self._events)
            nothing = isinstance(first, yaml.ScalarEvent) and first.implicit[0] and not first.value
            node = self._node(first, top, ())
            next(self._events)  # the document's end
            if isinstance(node, Table):
                tree = node
            elif not nothing:
                what = "a list" if isinstance(node, Items) else "a single value"
                self._refuse(top, (), f"expected a mapping at the top, such as version: 1, got {what}")
            event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            self._refuse(self.place(event.start_mark), (), "expected one document, got a second")
        assert isinstance(tree, Table)
        return tree

    def _refuse(self, place: Place, path: Path, message: str) -> None:
        self.note(place, path, message)
        raise _Refused

    def _node(self, event: yaml.Event, key: Place | None, path: Path) -> Node:
        place = self.place(event.start_mark)
        key = key or place
        if isinstance(event, yaml.AliasEvent):
            self._refuse(place, path, f"expected a value, got the alias *{quoted(str(event.anchor))[1:-1]}; {_AS_TEXT}")
        assert isinstance(event, yaml.NodeEvent)
        if event.anchor is not None:
            self._refuse(
                place, path, f"expected a value, got the anchor &{quoted(str(event.anchor))[1:-1]}; {_AS_TEXT}"
            )
        assert isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent))
        if event.tag is not None:
            self._refuse(place, path, f"expected a value, got the tag {quoted(event.tag)}; {_AS_TEXT}")
        if isinstance(event, yaml.ScalarEvent):
            if wrong := unfit(event.value):
                self.note(place, path, f"expected text, got {wrong}")
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
                self.note(name.place, (*path, name.text), message)
            else:
                entries[name.text] = value
        return entries
