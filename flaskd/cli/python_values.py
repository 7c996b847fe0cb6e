"""Reads what a Python configuration file sets from its syntax tree; none of its code is run."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

CPUS = "auto"
"""Stands for a number that depends on the number of CPUs."""
_LONGEST = 1 << 20
"""How many bytes of a file are read."""


class Filled(str):
    """Text with interpolations in the form of flaskd's configuration: ``${env:PORT:-8000}``."""

    __slots__ = ()


class Unread(Exception):  # noqa: N818 - why a value is not known
    """A value that is known only if the file is run; the text says why."""


class Setting(NamedTuple):
    """A name that the file sets: the line, and its value, or an `Unread` that says why it is not known.

    `changed` says where the file may set it to another value, under a condition; empty if it does not.
    """

    line: int
    value: Any
    changed: str = ""


class Found(NamedTuple):
    """What a file sets, for each name the last value; and its functions, which may be hooks, with their lines."""

    settings: dict[str, Setting]
    functions: dict[str, int]


def read(source: str) -> Found:
    """What the source sets at its top level; raises SyntaxError, which has the line, and ValueError."""
    found = Found({}, {})
    _read_block(ast.parse(source[:_LONGEST]).body, found, "")
    return found


def _read_block(block: list[ast.stmt], found: Found, condition: str) -> None:
    for node in block:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.functions[node.name] = node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for name, value in _assigned(node):
                before = found.settings.get(name)
                if condition and before is not None and not isinstance(before.value, Unread):
                    found.settings[name] = before._replace(changed=condition)
                else:
                    found.settings[name] = Setting(node.lineno, _value(value, found, condition))
        elif isinstance(node, ast.If | ast.Try | ast.For | ast.While | ast.With):
            kind = type(node).__name__.lower()
            for inner in _inner_blocks(node):
                _read_block(inner, found, f'it is set under "{kind}", line {node.lineno}')


def _inner_blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        yield getattr(node, name, [])
    for each in getattr(node, "handlers", []):
        yield each.body


def _assigned(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> Iterator[tuple[str, ast.expr | None]]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        if isinstance(target, ast.Name):
            yield target.id, None if isinstance(node, ast.AugAssign) else node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=False)
            yield from ((each.id, value) for each, value in pairs if isinstance(each, ast.Name))


def _value(node: ast.expr | None, found: Found, condition: str) -> Any:
    if condition:
        return Unread(condition)
    if node is None:
        return Unread("it is changed in place")
    try:
        return _Reader(found.settings).value_of(node)
    except Unread as why:
        return why
    except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        return Unread(f"it cannot be worked out ({error})")


class _Reader:
    """Computes an expression from constants, names set before, the environment and the number of CPUs."""

    def __init__(self, names: dict[str, Setting]) -> None:
        self._names = names

    def value_of(self, node: ast.expr) -> Any:
        """The value; raises Unread, or what the same operation raises in Python."""
        kind = type(node).__name__
        read: Callable[[Any], Any] | None = getattr(self, f"_of_{kind.lower()}", None)
        if read is None:
            raise Unread(f"it is worked out when the file is run ({ast.unparse(node)[:60]})")
        return read(node)

    def _of_constant(self, node: ast.Constant) -> Any:
        return node.value

    def _of_name(self, node: ast.Name) -> Any:
        if node.id not in self._names:
            raise Unread(f"it depends on {node.id}, which is not set here")
        found = self._names[node.id].value
        if isinstance(found, Unread):
            raise found
        return found

    def _of_list(self, node: ast.List) -> list[Any]:
        return [self.value_of(each) for each in node.elts]

    _of_tuple = _of_list
    _of_set = _of_list

    def _of_dict(self, node: ast.Dict) -> dict[Any, Any]:
        pairs = zip(node.keys, node.values, strict=True)
        return {self.value_of(key) if key else None: self.value_of(value) for key, value in pairs}

    def _of_joinedstr(self, node: ast.JoinedStr) -> str:
        return _joined([self.value_of(each) for each in node.values])

    def _of_formattedvalue(self, node: ast.FormattedValue) -> Any:
        if node.format_spec is not None:
            raise Unread("it is formatted")
        return self.value_of(node.value)

    def _of_unaryop(self, node: ast.UnaryOp) -> Any:
        value = self.value_of(node.operand)
        if isinstance(node.op, ast.USub) and isinstance(value, int | float):
            return -value
        if isinstance(node.op, ast.Not) and not isinstance(value, Filled):
            return not value
        raise Unread("it is worked out when the file is run")

    def _of_binop(self, node: ast.BinOp) -> Any:
        left, right = self.value_of(node.left), self.value_of(node.right)
        if isinstance(node.op, ast.Mod) and isinstance(left, str):
            pieces = left.split("%s")
            values = right if isinstance(right, list) else [right]
            return _interleaved(pieces, values)
        if (
            isinstance(node.op, ast.Add)
            and isinstance(left, str)
            and isinstance(right, str)
            and CPUS not in {left, right}
        ):
            return _joined([left, right])
        if CPUS in (left, right):
            return CPUS
        operations: dict[type, Callable[[Any, Any], Any]] = {
            ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
            ast.Div: lambda a, b: a / b, ast.FloorDiv: lambda a, b: a // b,
        }  # fmt: skip
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if not numbers or type(node.op) not in operations:
            raise Unread("it is worked out when the file is run")
        return operations[type(node.op)](left, right)

    def _of_boolop(self, node: ast.BoolOp) -> Any:
        first, second = node.values[0], node.values[-1]
        if isinstance(node.op, ast.Or) and len(node.values) == 2:  # noqa: PLR2004 - one on each side
            if isinstance(first, ast.Call) and ast.unparse(first.func) in _ENVIRONMENT and len(first.args) == 1:
                return _from_environment(str(self.value_of(first.args[0])), self.value_of(second))
            if not isinstance(value := self.value_of(first), Filled):
                return value or self.value_of(second)
        raise Unread("it is worked out when the file is run")

    def _of_subscript(self, node: ast.Subscript) -> Any:
        if ast.unparse(node.value) in {"os.environ", "environ"}:
            return _from_environment(str(self.value_of(node.slice)))
        raise Unread(f"it is worked out when the file is run ({ast.unparse(node)[:60]})")

    def _of_call(self, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        if name.endswith("cpu_count") or (name == "len" and "sched_getaffinity" in ast.unparse(node)):
            return CPUS
        given = [self.value_of(each) for each in [*node.args, *(each.value for each in node.keywords)]]
        if name in _ENVIRONMENT:
            return _from_environment(str(given[0]), *given[1:])
        if name in _CONVERSIONS and len(given) == 1:
            return given[0] if isinstance(given[0], Filled) or given[0] == CPUS else _CONVERSIONS[name](given[0])
        if name in {"min", "max"}:
            return CPUS if CPUS in given else (min if name == "min" else max)(given)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            return _interleaved(str(self.value_of(node.func.value)).split("{}"), given)
        raise Unread(f"it is worked out when the file is run ({ast.unparse(node)[:60]})")


_ENVIRONMENT = {"os.getenv", "getenv", "os.environ.get", "environ.get"}
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "str": str}


def _from_environment(name: str, default: Any = None) -> Any:
    if default is None:
        if name not in os.environ:
            raise Unread(f"it needs ${name}, which has no default: write ${{env:{name}}} there")
        return Filled(f"${{env:{name}}}")
    if isinstance(default, Filled) or "}" in str(default) or default == CPUS:
        raise Unread(f"its default, where ${name} is not set, is worked out when the file is run")
    return Filled(f"${{env:{name}:-{default}}}")


def _any_filled(parts: list[Any]) -> bool:
    return any(isinstance(each, Filled) for each in parts)


def _joined(parts: list[Any]) -> str:
    if CPUS in parts:
        raise Unread("it depends on the number of CPUs")
    if not _any_filled(parts):
        return "".join(map(str, parts))
    return Filled("".join(each if isinstance(each, Filled) else str(each).replace("${", "$${") for each in parts))


def _interleaved(pieces: list[str], values: list[Any]) -> str:
    if len(pieces) != len(values) + 1:
        raise Unread("it is formatted")
    parts: list[Any] = [pieces[0]]
    for value, piece in zip(values, pieces[1:], strict=True):
        parts += [value, piece]
    return _joined(parts)
