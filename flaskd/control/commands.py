"""A command, made from words, from JSON or from an HTTP request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote

from flaskd.control.peer import Peer
from flaskd.errors import UsageError
from flaskd.values import value
from flaskd.verbs import Flags, Role, Verb, find_verb

_BOOLEANS = {"": True, "1": True, "true": True, "0": False, "false": False}
_AUTHORITY = re.compile(r"\Ahttps?://[^/]*", re.IGNORECASE)
_LOOKING = ("GET", "HEAD", "POST")
"""The HTTP methods for commands that change nothing."""


@value
class Command:
    """A verb with its words, and the client that gave it."""

    name: str
    verb: Verb
    peer: Peer
    flags: Flags = frozenset()
    argument: str = ""

    @property
    def changes(self) -> bool:
        """Whether it changes something; some verbs only do with an argument."""
        return self.verb.changes and (not self.verb.looks or bool(self.argument))

    @property
    def role(self) -> Role:
        """The role that the client needs."""
        return self.verb.role if self.changes or not self.verb.changes else Role.VIEWER

    @property
    def waits(self) -> bool:
        """Whether its outcome may take long."""
        return self.verb.lengthy or "wait" in self.flags

    def __str__(self) -> str:
        return " ".join([self.name, *sorted(self.flags), *([self.argument] * bool(self.argument))])


def from_words(words: Sequence[str], peer: Peer) -> Command:
    """Make a command of words such as ``log-level debug``; raises UsageError and UnknownCommandError."""
    if not words:
        raise UsageError('expected a command; try "help"')
    _check_printable(*words)
    name, *rest = words
    verb = find_verb(name)
    flags = frozenset(rest) & verb.flags
    others = [word for word in rest if word not in verb.flags]
    if verb.argument and len(others) == 1:
        return Command(name, verb, peer, flags, others[0])
    if verb.argument and len(others) > 1:
        raise UsageError(f"{name} takes one {verb.argument}, got {len(others)}")
    if others:
        raise UsageError(_unknown(name, verb, min(others)))
    return Command(name, verb, peer, flags)


def _check_printable(*words: str) -> None:
    """Raise UsageError for characters that could forge a log line or control a terminal."""
    if not all(word.isprintable() for word in words):
        raise UsageError("expected a command of printable characters")


def _unknown(name: str, verb: Verb, word: str) -> str:
    known = sorted(verb.flags) + ([f"one {verb.argument}"] if verb.argument else [])
    return f'{name} does not know "{word}"; it ' + (f"knows {', '.join(known)}" if known else "takes none")


def from_fields(name: Any, fields: Mapping[str, Any], peer: Peer) -> Command:
    """Make a command of a verb and fields such as ``{"wait": true}``; raises UsageError and UnknownCommandError."""
    if not isinstance(name, str):
        raise UsageError('expected "cmd" with a verb; try {"cmd":"help"}')
    _check_printable(name, *fields, *(value for value in fields.values() if isinstance(value, str)))
    verb = find_verb(name)
    flags, argument = set(), ""
    for key, given in fields.items():
        if key in verb.flags:
            if not isinstance(given, bool):
                raise UsageError(f'{name}: "{key}" must be true or false')
            flags |= {key} if given else set()
        elif key == verb.argument and key:
            argument = str(given) if type(given) is int else given  # excludes bool, a subclass of int
            if not isinstance(argument, str) or not argument:
                raise UsageError(f'{name}: "{key}" must be text or a whole number')
        else:
            raise UsageError(_unknown(name, verb, key))
    return Command(name, verb, peer, frozenset(flags), argument)


def from_http(method: str, target: str, body: bytes, peer: Peer) -> Command:
    """Make a command of ``POST /drain?wait``, or of a JSON object as the body.

    Flags are ``?wait``, ``?wait=true`` or ``?wait=1``. GET is allowed for what changes nothing. Raises UsageError and
    UnknownCommandError.
    """
    path, _, query = target.partition("?")
    path = _AUTHORITY.sub("", path)  # the form for proxies: RFC 9112 §3.2.2
    name = unquote(path).strip("/") or "help"
    fields: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        fields[key] = text if key == find_verb(name).argument else _BOOLEANS.get(text, text)
    if body.strip():
        try:
            more = json.loads(body)
        except (ValueError, RecursionError):
            more = None
        if not isinstance(more, dict):
            raise UsageError("expected a JSON object as the body, or none")
        fields |= more
    command = from_fields(name, fields, peer)
    if command.changes and method != "POST":
        raise MethodError(f"{name} changes something: expected POST, got {method[:16]}", ("POST",))
    if method not in _LOOKING:
        raise MethodError(f"expected GET, HEAD or POST, got {method[:16]}", _LOOKING)
    return command


class MethodError(UsageError):
    """The request's method is unknown, or does not allow a command that changes something."""

    code = "method"

    def __init__(self, message: str, allowed: Sequence[str]) -> None:
        super().__init__(message)
        self.allowed = allowed
