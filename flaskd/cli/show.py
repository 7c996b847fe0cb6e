"""Writes text for people and programs: printable, in the encoding of the stream, with colours on a terminal."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import click

from flaskd import text
from flaskd.errors import CannotCreateError
from flaskd.units import format_duration

GREEN, YELLOW, RED, DIM = "32", "33", "31", "2"
COLOURS = {
    "ready": GREEN, "reloading": GREEN, "starting": YELLOW, "draining": YELLOW, "drained": YELLOW,
    "stopping": YELLOW, "ok": GREEN, "failed": RED, "timed_out": RED,
}  # fmt: skip
_TENTHS = 10.0
"""Seconds below which a time is shown with tenths."""


def say(text: str) -> None:
    """Write an answer to standard output; raises BrokenPipeError, and CannotCreateError for every other fault."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_what_cannot_be_written()
        raise CannotCreateError(f"cannot write the answer: {error.strerror}") from error


def discard_what_cannot_be_written() -> bool:
    """Drop what is left in the buffer of a standard stream that cannot be written; returns whether there was any.

    The write would fail again at the exit, and change the exit code to 120 (Py_FinalizeEx).
    """
    discarded = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            discarded = True
        except (ValueError, AttributeError):  # closed, or never there
            pass
    return discarded


def escape_what_cannot_be_encoded(errors: str) -> None:
    """Make standard output accept any text; `errors` says how to write what its encoding lacks (codecs).

    An action that succeeded must not look like one that failed because its outcome cannot be written.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=errors)


def drawable(wanted: str, instead: str, stream: TextIO | None = None) -> str:
    """Characters to draw with: `wanted`, or `instead` if the encoding of the stream (standard output) lacks them."""
    try:
        wanted.encode((sys.stdout if stream is None else stream).encoding or "ascii")
    except UnicodeEncodeError:
        return instead
    return wanted


def for_programs(answer: Mapping[str, Any]) -> str:
    """An answer as JSON, in ASCII if standard output does not take all characters."""
    return json.dumps(answer, ensure_ascii=codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8")


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Text in a colour (SGR, ECMA-48) if the stream is a terminal and $NO_COLOR is not set; else as it is."""
    stream = sys.stdout if stream is None else stream
    if not colour or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def state(word: str) -> str:
    """The word for a state, in its colour."""
    return coloured(word, COLOURS.get(word, ""))


_IN_LINES = {"stack", "yaml", "text"}
"""The fields of answers whose text has several lines."""


def made_printable(value: Any, key: str = "") -> Any:
    """A field of an answer, made printable with all that it contains: apps and clients chose names in it."""
    if isinstance(value, str):
        return "\n".join(text.lines(value)) if key in _IN_LINES else text.escaped(value)
    if isinstance(value, list):
        return [made_printable(each, key) for each in value]
    if isinstance(value, dict):
        return {made_printable(name): made_printable(each, name) for name, each in value.items()}
    return value


def short(seconds: float) -> str:
    """Seconds as short text: 4.1s, 12s, 3h2m5s."""
    return format_duration(float(round(seconds)) if seconds >= _TENTHS else round(seconds, 1))
