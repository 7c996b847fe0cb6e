"""Writes text for people and programs: printable, coloured on a terminal, in the terminal's encoding."""

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
"""Below this many seconds, tenths of a second are shown."""


def say(text: str) -> None:
    """Write an answer to standard output; raises CannotCreateError if that fails, and BrokenPipeError."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_what_cannot_be_written()
        raise CannotCreateError(f"cannot write the answer: {error.strerror}") from error


def discard_what_cannot_be_written() -> bool:
    """Drop what remains in the buffers of the standard streams if it cannot be written; returns whether there was any.

    Python would fail again at exit, with exit code 120 (Py_FinalizeEx).
    """
    discarded = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            discarded = True
        except (ValueError, AttributeError):  # the stream is closed, or None
            pass
    return discarded


def escape_what_cannot_be_encoded(errors: str) -> None:
    """Let standard output accept any text, even if its encoding lacks characters (`errors`: see codecs).

    The command has been carried out: an outcome that cannot be written must not look like a failure.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=errors)


def drawable(wanted: str, instead: str, stream: TextIO | None = None) -> str:
    """Characters to draw with on a stream (default: standard output); `instead` if its encoding lacks `wanted`."""
    try:
        wanted.encode((sys.stdout if stream is None else stream).encoding or "ascii")
    except UnicodeEncodeError:
        return instead
    return wanted


def for_programs(answer: Mapping[str, Any]) -> str:
    """An answer for programs, in ASCII if standard output may lack other characters."""
    return json.dumps(answer, ensure_ascii=codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8")


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Text in a colour (SGR, ECMA-48), if the stream is a terminal and $NO_COLOR is not set."""
    stream = sys.stdout if stream is None else stream
    if not colour or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def state(word: str) -> str:
    """The word for a state, in its colour."""
    return coloured(word, COLOURS.get(word, ""))


_IN_LINES = {"stack", "yaml", "text"}
"""The fields of answers that have several lines."""


def made_printable(value: Any, key: str = "") -> Any:
    """A field of an answer with its parts, escaped, because the app or a client may have named something in it."""
    if isinstance(value, str):
        return "\n".join(text.lines(value)) if key in _IN_LINES else text.escaped(value)
    if isinstance(value, list):
        return [made_printable(each, key) for each in value]
    if isinstance(value, dict):
        return {made_printable(name): made_printable(each, name) for name, each in value.items()}
    return value


def short(seconds: float) -> str:
    """Seconds for people: 4.1s, 12s, 3h2m5s."""
    return format_duration(float(round(seconds)) if seconds >= _TENTHS else round(seconds, 1))
