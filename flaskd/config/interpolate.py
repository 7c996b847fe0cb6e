"""Fills in ``${env:NAME}``, ``${env:NAME:-default}``, ``${file:path}`` and ``${cred:name}``.

``$${`` is a plain ``${``. It works on the parsed tree, so what is filled in cannot change the file's structure. A
scalar that was filled in, even in part, is secret from then on.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from flaskd.config.faults import Faults, dotted
from flaskd.config.nodes import Items, Node, Path, Scalar, Table, core_not_null, unfit
from flaskd.text import quoted
from flaskd.values import value

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SECRET_BYTES = 64 * 1024
_MAX_PATH = 4096
"""A fault shows a path up to this length: all of it (PATH_MAX)."""

_TOKEN = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FORMS = "${env:NAME}, ${env:NAME:-default}, ${file:PATH} or ${cred:NAME} (a plain ${ is written $${)"


class _Missing(Exception):  # noqa: N818 - carries the fault's message out of a replacement function
    """What an interpolation names does not exist; the text is the fault's message."""


@value
class Sources:
    """Where interpolations are looked up: the environment, and the directory for relative files."""

    environ: Mapping[str, str]
    base: FilePath

    def look_up(self, token: str) -> str:
        """The text for what stands between the braces; raises _Missing with the fault's words."""
        kind, _, rest = token.partition(":")
        if kind == "env":
            name, has_default, default = rest.partition(":-")
            if _NAME.fullmatch(name):
                found = self.environ.get(name)
                # As in the shell, the default of ":-" also replaces a variable that is set but empty.
                if has_default and not found:
                    return default
                if found is None:
                    raise _Missing(f"expected the environment variable {name}, which is not set")
                return found
        elif kind == "file" and rest:
            return _read(self.base / rest)
        elif kind == "cred" and rest and "/" not in rest and rest not in {".", ".."}:
            directory = self.environ.get("CREDENTIALS_DIRECTORY")
            if not directory:
                raise _Missing(f"expected the credential {quoted(rest)}, but $CREDENTIALS_DIRECTORY is not set")
            return _read(FilePath(directory) / rest)
        raise _Missing(f"expected {_FORMS}, got {quoted('${' + token + '}')}")


def _read(path: FilePath) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a usable path"
        raise _Missing(f"expected a readable file, got {quoted(str(path), _MAX_PATH)}: {reason}") from None
    if len(data) > MAX_SECRET_BYTES:
        raise _Missing(f"expected at most {MAX_SECRET_BYTES // 1024} KiB in {quoted(str(path), _MAX_PATH)}, got more")
    try:
        return data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        pass
    raise _Missing(f"expected UTF-8 in {quoted(str(path), _MAX_PATH)}, got other bytes")


def interpolated(node: Node, sources: Sources, faults: Faults, path: Path = ()) -> Node:
    """The tree with every interpolation filled in; one that cannot be filled in is a fault at its scalar."""
    if isinstance(node, Table):
        entries = {k: interpolated(v, sources, faults, (*path, k)) for k, v in node.entries.items()}
        return replace(node, entries=entries)
    if isinstance(node, Items):
        items = tuple(interpolated(v, sources, faults, (*path, i)) for i, v in enumerate(node.items))
        return replace(node, items=items)
    return _filled(node, sources, faults, path) if "${" in node.text else node


def _filled(node: Scalar, sources: Sources, faults: Faults, path: Path) -> Scalar:
    broken = secret = False
    pieces: list[str] = []

    def fill(match: re.Match[str]) -> str:
        nonlocal broken, secret
        if match[0] == "$${":
            return "${"
        secret = True
        try:
            if not match[2]:
                raise _Missing(f"expected a closing }}, got {quoted(match[0])}; a plain ${{ is written $${{")
            text = sources.look_up(match[1])
            if wrong := unfit(text):
                raise _Missing(f"expected text from {quoted(match[0])}, got {wrong}")
        except _Missing as missing:
            if not broken:  # only one fault for each scalar
                faults.add(node.place, dotted(path), str(missing))
            broken = True
            return ""
        pieces.append(text)
        return text

    text = _TOKEN.sub(fill, node.text)
    value = core_not_null(text) if secret else text
    return replace(node, text=text, value=value, secret=secret, broken=broken, pieces=tuple(pieces))
