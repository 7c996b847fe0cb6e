"""The kinds of values that flaskd adds: durations, sizes, addresses, modes; each says what it expects.

A message here ends before ", got ...", which the caller adds.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import stat
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from flaskd.config.faults import Faults
from flaskd.config.kind import (
    INTERPOLATION,
    NOTHING,
    Around,
    Kind,
    Schema,
    Unshown,
    attempt,
    checked,
    described,
    exampled,
    in_any_case,
    matching,
    text_schema,
)
from flaskd.config.kinds import ListOf
from flaskd.config.nodes import Scalar
from flaskd.config.wording import hint, refuse
from flaskd.sockets import Address
from flaskd.units import format_duration, parse_duration, parse_size
from flaskd.verbs import VERBS, log_level

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
    from pydantic_core import CoreSchema

    from flaskd.config.nodes import Node, Path

Item = TypeVar("Item")

_LONGEST = 366 * 86400.0
"""Seconds; more is surely not meant, and far above this the operating system's timers overflow."""


def _parse_duration(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("expected a duration such as 5s")  # noqa: TRY004 - kinds refuse with ValueError
    text = str(value)
    try:
        seconds = parse_duration(text)
    except ValueError:
        hint = " (a unit is missing)" if text.strip()[-1:].isdigit() else ""
        raise ValueError(f"expected a duration such as 5s{hint}") from None
    if seconds > _LONGEST:
        raise ValueError("expected a duration of at most 366d")
    return seconds


def _parse_size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("expected a size such as 64MiB")  # noqa: TRY004 - kinds refuse with ValueError
    try:
        return parse_size(str(value))
    except (ValueError, OverflowError):
        raise ValueError("expected a size such as 64MiB") from None


def write_duration(seconds: float) -> str:
    """Seconds as text from which the same number is read again: ``1.5s``, ``2m``, ``61.25s``."""
    text = format_duration(seconds)
    return text if parse_duration(text) == seconds else f"{Decimal(repr(float(seconds))):f}s"


def write_size(size: int) -> str:
    """Bytes in the largest binary unit of which they are a multiple: ``64MiB``, ``1000B``."""
    for unit, length in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size and size % length == 0:
            return f"{size // length}{unit}"
    return f"{size}B"


class _Unit(Kind):
    """A number that is written with its unit; usable in pydantic models as well."""

    def __init__(self, parse: Callable[[object], Any], write: Callable[[Any], str], schema: Schema) -> None:
        self._parse, self._write, self._schema = parse, write, schema

    def __call__(self, _number: Kind) -> Kind:
        return self

    def read(self, node: Node, path: Path, faults: Faults) -> Any:
        return attempt(lambda: self._parse(node.value if isinstance(node, Scalar) else node), node, path, faults)

    def write(self, value: Any) -> str:
        return self._write(value)

    def schema(self, definitions: dict[str, Schema]) -> Schema:  # noqa: ARG002 - it has no name
        return dict(self._schema)

    def __get_pydantic_core_schema__(self, source: Any, inner: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema  # noqa: PLC0415 - loaded when a pydantic model is made

        def parse(value: Any, info: ValidationInfo) -> Any:
            # Code that builds a model gives seconds or bytes.
            return value if info.mode == "python" and not isinstance(value, str) else self._parse(value)

        written = core_schema.plain_serializer_function_ser_schema(
            self._write, return_schema=core_schema.str_schema(), when_used="json"
        )
        return core_schema.with_info_before_validator_function(parse, inner(source), serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, inner: GetJsonSchemaHandler) -> dict[str, Any]:
        return dict(self._schema)


_NUMBER = r"[0-9]+(\.[0-9]+)?"

Duration = Annotated[
    float,
    _Unit(
        _parse_duration,
        write_duration,
        {
            "unit": "duration",
            "type": ["string", "integer"],
            "pattern": rf"^(?:\s*(0|({_NUMBER}(ms|s|m|h|d)\s*)+)\s*)$|{INTERPOLATION}",
            "minimum": 0,
            "maximum": 0,
            "examples": ["250ms", "1.5s", "2m", "1h30m"],
        },
    ),
]
"""Seconds, written ``250ms``, ``1.5s``, ``2m`` (flaskd.units)."""

Size = Annotated[
    int,
    _Unit(
        _parse_size,
        write_size,
        {
            "unit": "size",
            "type": ["string", "integer"],
            "pattern": rf"^(?:\s*{_NUMBER}\s*(B|kB|MB|GB|KiB|MiB|GiB)?\s*)$|{INTERPOLATION}",
            "minimum": 0,
            "examples": ["64MiB", "10kB", 4096],
        },
    ),
]
"""Bytes, written ``64MiB``, ``10kB`` or without a unit (flaskd.units)."""


class _Workers(Kind):
    """A number of worker processes, or the word auto."""

    def __call__(self, _anything: Kind) -> Kind:
        return self

    def read(self, node: Node, path: Path, faults: Faults) -> Any:
        if isinstance(node, Scalar):
            if node.text == AUTO:
                return AUTO
            if type(node.value) is int and 0 <= node.value <= MAX_WORKERS:
                return node.value
        refuse(node, path, faults, f"expected 0 to {MAX_WORKERS}, or {AUTO}", lambda: hint(node, quotes=int))
        return NOTHING

    def schema(self, definitions: dict[str, Schema]) -> Schema:  # noqa: ARG002 - it has no name
        number = {"type": "integer", "minimum": 0, "maximum": MAX_WORKERS}
        return {"anyOf": [number, {"type": "string", "enum": [AUTO]}]}


AUTO = "auto"
MAX_WORKERS = 512

Workers = Annotated[Any, _Workers()]
"""How many worker processes: a number, or ``auto``, which is one for each CPU."""


class _OneOrMany:
    """Lets a single entry stand in place of a list; usable in pydantic models as well."""

    def __call__(self, several: Kind) -> Kind:
        assert isinstance(several, ListOf)
        return ListOf(several.item, alone=True)

    def __get_pydantic_core_schema__(self, source: Any, inner: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema  # noqa: PLC0415 - loaded when a pydantic model is made

        return core_schema.no_info_before_validator_function(self._as_list, inner(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, inner: GetJsonSchemaHandler) -> dict[str, Any]:
        several = inner(schema)
        return {"anyOf": [several["items"], several]}

    @staticmethod
    def _as_list(value: Any) -> Any:
        return value if value is None or isinstance(value, (list, dict)) else [value]


OneOrMany = Annotated[list[Item], _OneOrMany()]
"""A list; a single entry may be written without the brackets."""


# The addresses that flaskd.sockets.Address accepts, as far as a pattern can say it; it does not count IPv6 digits.
_PORT = "([0-9]{1,4}|[0-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HOST = r"(?![0-9.]+:)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?"
_ADDRESS = rf"({_OCTET}(\.{_OCTET}){{3}}|\[[0-9A-Fa-f:.]+(%[^\]%]+)?\]|{_HOST})?:{_PORT}|unix:/[^\0]*"
_FD = "fd:[!-9;-~]+"  # a name has no colon: systemd.socket(5), FileDescriptorName=


def _listen(text: str) -> str:
    if not re.fullmatch(_FD, text):
        Address.parse(text)
    return text


def _own_address(text: str) -> str:
    Address.parse(text)
    return text


Listen = Annotated[
    str,
    checked(_listen),
    described(text_schema(f"{_ADDRESS}|{_FD}")),
    exampled("127.0.0.1:8000", ":8080", "[::1]:8000", "unix:/run/shop/http.sock", "fd:http"),
]
"""An address to listen on, in the form of flaskd.sockets.Address, or a passed socket by name."""
OwnAddress = Annotated[str, checked(_own_address), described(text_schema(_ADDRESS)), exampled("127.0.0.1:9091")]
"""An address that flaskd binds itself, and not a passed socket."""


def _trusted_proxy(text: str) -> str:
    if text in {"*", "localhost"}:
        return text
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        several = " (several are a list)" if "," in text else ""
        raise ValueError(f"expected an IP address, a network such as 10.0.0.0/8, localhost or *{several}") from None
    if "/" in text and ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
        raise ValueError(f"expected the address of a whole network, such as {network}, or of one machine")
    return text


TrustedProxy = Annotated[
    str,
    checked(_trusted_proxy),
    described(
        text_schema(r"\*|localhost|([0-9]+\.){3}[0-9]+(/[0-9.]+)?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[^/%]+)?(/[0-9]+)?")
    ),
    exampled("127.0.0.1", "10.0.0.0/8", "localhost", "*"),
]
"""The peer of a connection: an address, a network, or localhost, which includes Unix sockets."""

HostName = Annotated[
    str,
    # The form of a client's Host header: RFC 9110, section 7.2.
    matching(
        r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?",
        "expected a Host header, such as 127.0.0.1:9090 or localhost:9090",
    ),
    exampled("localhost:9090"),
    checked(str.lower),
]
"""A Host header; its case does not matter."""

CredentialName = Annotated[
    str, matching(r"(?!\.{1,2}$)[^/]+", "expected the name of a systemd credential, without /"), exampled("stop-token")
]
"""A file's name in $CREDENTIALS_DIRECTORY (systemd.exec(5), LoadCredential=)."""


def _mode(text: str) -> str:
    if not re.fullmatch(r"(0o?)?[0-7]{3}", text):
        raise ValueError(f'expected a file mode from 0000 to 0777, such as "0660"{_from_decimal(text)}')
    bits = int(text.removeprefix("0o"), 8)
    if not (bits & stat.S_IRUSR and bits & stat.S_IWUSR):
        raise ValueError(
            f'expected a file mode that lets its owner read and write, such as "0660"{_from_decimal(text)}'
        )
    if bits & stat.S_IRWXO & ~(bits >> 3):
        raise ValueError('expected a file mode that lets others do no more than the group, such as "0660"')
    return f"{bits:04o}"


def _from_decimal(text: str) -> str:
    """A hint if a decimal number is a likely mode: PyYAML and Python code write 0660 as 432."""
    mode = int(text) if re.fullmatch(r"[1-9][0-9]{2}", text) else 0
    return f" ({mode} is 0{mode:o} in decimal)" if stat.S_IRUSR | stat.S_IWUSR <= mode <= 0o777 else ""  # noqa: PLR2004


_MODE = "(0o?)?[67](00|1[01]|2[02]|3[0-3]|4[04]|5[0145]|6[0246]|7[0-7])"
"""The modes that `_mode` accepts: after each digit for the group, those that others may have with it."""

_MODES = [mode for mode in range(600, 778) if re.fullmatch(_MODE, str(mode))]
"""The modes written without a leading zero and without quotes, which YAML reads as numbers."""

Mode = Annotated[
    str,
    checked(_mode),
    described({"anyOf": [text_schema(_MODE) | {"type": "string"}, {"type": "integer", "enum": _MODES}]}),
    exampled("0660", "0600"),
]
"""A file mode as octal text of four digits; its owner may read and write, others no more than the group."""

_PATH = "/[!-~]*"  # it is put into a request line unchanged (RFC 9112, section 3)
_NO_PATH = "expected a path that starts with / and holds no blanks"

UrlPath = Annotated[str, matching(_PATH, _NO_PATH), exampled("/healthz")]
PathPattern = Annotated[
    str,
    matching("/[!-)+->@-~]*[*]?", "expected a path without a query, with * at its end at most"),
    matching(_PATH, _NO_PATH),
    described(text_schema("/[!-)+->@-~]*[*]?")),
    exampled("/export/*"),
]
"""A path; with ``*`` at its end, all paths that begin with it."""
UrlPrefix = Annotated[str, matching(f"({_PATH})?", _NO_PATH), exampled("/shop"), checked(lambda text: text.rstrip("/"))]
HeaderText = Annotated[str, matching("[ -~]*", "expected printable ASCII text")]
InstanceName = Annotated[
    str,
    matching("[!-~]{1,128}", "expected a name of 1 to 128 printable ASCII characters without blanks"),
    exampled("web-1"),
]
SomeText = Annotated[str, matching(r"[\s\S]*\S[\s\S]*", "expected text that is not empty")]
Hidden = Unshown
"""For values that may be secret though they are written in plain text: never shown, not even in faults."""

PolicyName = Annotated[
    str,
    matching(
        r"[a-z0-9][a-z0-9._-]*", "expected a name of a-z, 0-9, dots, hyphens and underscores, a letter or digit first"
    ),
]

Member = Annotated[
    str,
    # Without characters that names in passwd(5) and group(5) cannot have.
    matching(r"@?[^\s@:,]+", "expected a user's name or number, or a group's after an @"),
    exampled("alice", "1000", "@ops"),
]


def _verb_name(text: str) -> str:
    if text not in VERBS:
        raise ValueError(f"expected one of {', '.join(VERBS)}")
    return text


VerbName = Annotated[str, checked(_verb_name), described({"enum": list(VERBS), "type": "string"})]
"""A command of the control plane."""


class LevelName(Around):
    """A log level in upper or lower case; ``warn`` means ``warning``."""

    def read(self, node: Node, path: Path, faults: Faults) -> Any:
        """The level as flaskd writes it."""
        if isinstance(node, Scalar) and log_level(node.text) != node.text:
            node = dataclasses.replace(node, text=log_level(node.text))
        return self.inner.read(node, path, faults)

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        """The levels that an editor proposes; every case is accepted."""
        return in_any_case(super().schema(definitions), ["warn"])
