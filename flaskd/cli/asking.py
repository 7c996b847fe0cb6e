"""What a client verb does: it asks the daemon, shows progress, and prints the answer; `last-stop` may read a file."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import click

from flaskd.cli import answers, bar, show
from flaskd.client import ControlClient, reading
from flaskd.errors import EX_LOST, FlaskdError, ForbiddenError, NoDaemonError
from flaskd.finding import find_socket
from flaskd.present import died
from flaskd.protocol import MARK, RECORD, damage, state_directory
from flaskd.verbs import VERBS

_LONG = 60.0
"""Seconds of silence after which a daemon counts as dead that otherwise reports its progress every second."""


def ask_or_read(verb: str, socket: str | None, name: str, words: dict[str, Any], *, as_json: bool) -> int:
    """Send a command to the daemon of that socket or name; for last-stop read the record if no daemon is there."""
    try:
        path = find_socket(socket, name, os.environ)
        return ask(path, verb, {key: value for key, value in words.items() if value}, as_json=as_json)
    except (NoDaemonError, ForbiddenError) as error:
        if verb != "last-stop" or socket or os.environ.get("FLASKD_CONTROL"):
            raise  # the record may be another daemon's
        _say(verb, _read_record(name, error), as_json)
        return 0


def ask(path: Path, verb: str, words: dict[str, Any], *, as_json: bool = False) -> int:
    """Send a command, show progress and outcome; returns the exit code."""
    wait, asked = "wait" in words, False
    open_still: NoDaemonError | None = None
    try:
        with (
            bar.progress(verb if wait else "", as_json=as_json) as progress,
            ControlClient(path, timeout=_LONG if wait or VERBS[verb].lengthy else 10.0) as client,
        ):
            asked = True
            answer = client.request(verb, progress=progress, **words)
            if verb == "stop" and wait:
                try:
                    client.wait_closed()
                except NoDaemonError as error:
                    open_still = error
    except KeyboardInterrupt:
        if asked and VERBS[verb].changes:  # users may believe that interrupting undoes it
            click.echo(f"flaskd: not waiting any more; the {verb} goes on", err=True)
            raise click.exceptions.Exit(130) from None  # for other exceptions click writes an empty line
        raise
    with reading(path):
        _say(verb, answer, as_json)
    if open_still is not None:  # the outcome is shown all the same
        raise open_still
    lost = any(answer.get(key) for key in ("cut", "background", "unaccepted", "unfinished"))
    return EX_LOST if lost and verb in {"drain", "stop"} else 0


def _say(verb: str, answer: dict[str, Any], as_json: bool) -> None:
    show.say(show.for_programs({"ok": True, **answer}) if as_json else answers.answer(verb, answer))


def _read_record(name: str, no_daemon: FlaskdError) -> dict[str, Any]:
    """The last stop, and a run that died since, from the state directory; raises the class of `no_daemon`."""
    directory = state_directory(name, os.environ)
    found: dict[str, Any] = {"result": "last-stop"}
    fault = ""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        if why := damage(record):
            raise ValueError(why)
        found |= record
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        fault = str(getattr(error, "strerror", None) or error)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # no mark, or an incomplete one
        mark = json.loads((directory / MARK).read_text(encoding="utf-8"))
        if "unrecorded" in mark or not Path(f"/proc/{mark['pid']}").exists():  # otherwise it runs, but does not answer
            found["previous"] = died(mark)
    if len(found) == 1:
        unreadable = f" that can be read ({fault})" if fault else ""
        raise type(no_daemon)(f"{no_daemon}; and there is no record in {directory / RECORD}{unreadable}")
    return {**found, "damaged": fault} if fault else found
