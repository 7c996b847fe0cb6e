"""The client verbs: the verbs of the control plane as commands, made from the table of verbs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flaskd.cli import answers, bar, completion, show
from flaskd.cli.pages import no_such_verb
from flaskd.client import ControlClient, reading
from flaskd.errors import (
    EX_LOST,
    CannotCreateError,
    FlaskdError,
    ForbiddenError,
    NoDaemonError,
    UnknownCommandError,
    UsageError,
)
from flaskd.finding import find_socket
from flaskd.present import died
from flaskd.protocol import MARK, RECORD, damage, state_directory
from flaskd.verbs import FLAGS, VERBS, Role, Verb, find_verb

_BY_HAND = {"help", "check"}
"""Verbs whose commands need no daemon; their commands are defined one by one."""
_VALUES = {"level": completion.levels, "count": completion.counts}
"""The functions with which a shell completes arguments."""
_LONG = 60.0
"""Seconds of silence after which a daemon counts as dead that otherwise reports its progress every second."""

PLACE: list[click.Parameter] = [
    click.Option(
        ["--socket"],
        metavar="PATH",
        help="Control socket; else $FLASKD_CONTROL, else the usual places.",
        shell_complete=completion.files,
    ),
    click.Option(
        ["--name"],
        metavar="NAME",
        default="flaskd",
        show_default=True,
        help="Name of the daemon.",
        shell_complete=completion.names,
    ),
]
_JSON = click.Option(["--json", "as_json"], is_flag=True, help="Answer for programs.")


def add_client_verbs(group: click.Group) -> None:
    """Add the client verbs to the command."""
    for name, verb in VERBS.items():
        if name not in _BY_HAND and name not in group.commands:
            params = [*PLACE, _JSON]
            params += [
                click.Option([f"--{flag}"], is_flag=True, help=_sentence(FLAGS[flag])) for flag in sorted(verb.flags)
            ]
            if verb.argument:
                values = _VALUES.get(verb.argument)
                params.append(click.Argument([verb.argument], required=False, shell_complete=values))
            group.add_command(
                click.Command(
                    name,
                    callback=_client(name),
                    params=params,
                    help=f"{_sentence(verb.summary)}\n\n{_needs(verb)}",
                    short_help=_sentence(verb.summary),
                )
            )
    interval = click.Option(
        ["--interval"], default=1.0, type=click.FloatRange(0.1, 3600), help="Seconds between looks."
    )
    count = click.Option(["-n", "--count"], type=click.IntRange(1), help="How many looks; default: until interrupted.")
    group.add_command(
        click.Command(
            "top",
            callback=_top,
            params=[*PLACE, _JSON, interval, count],
            help=_TOP,
            short_help="Watch a daemon in the terminal.",
        )
    )
    argument = click.Argument(["verb"], required=False, shell_complete=completion.verbs)
    group.add_command(
        click.Command(
            "help", callback=_help, params=[_JSON, argument], help=_HELP, short_help="All verbs, or one of them."
        )
    )


_TOP = "Watch a daemon: rate, latency, in flight, queue, requests by age. One page where there is no terminal."
_HELP = "What flaskd --help says, or VERB --help. With --json: the commands that a daemon takes, for programs."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _needs(verb: Verb) -> str:
    looks = f"; without {verb.argument.upper()} {Role.VIEWER} will do" if verb.looks else ""
    return f"Where control.roles names users, it needs the role {verb.role}{looks}."


def _client(verb: str) -> Any:
    def run(socket: str | None, name: str, as_json: bool, **words: Any) -> int:
        return told(lambda: _run(socket, name, words, as_json=as_json), as_json=as_json)

    def _run(socket: str | None, name: str, words: dict[str, Any], *, as_json: bool) -> int:
        try:
            path = find_socket(socket, name, os.environ)
            return ask(path, verb, {key: value for key, value in words.items() if value}, as_json=as_json)
        except (NoDaemonError, ForbiddenError) as error:
            if verb != "last-stop" or socket or os.environ.get("FLASKD_CONTROL"):
                raise  # the record may be another daemon's
            _say(verb, _read_record(name, error), as_json)
            return 0

    return run


def told(run: Callable[[], int], *, as_json: bool) -> int:
    """Run a verb and return its exit code; with `as_json` faults are written as JSON like answers."""
    try:
        return run()
    except FlaskdError as error:
        if not as_json or isinstance(error, CannotCreateError):  # CannotCreateError is about standard output itself
            raise
        show.say(
            show.for_programs({"ok": False, "error": {"code": error.code, "message": str(error), **error.for_programs}})
        )
        return error.exit_code


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


def _help(verb: str | None, as_json: bool) -> None:
    if as_json:
        show.say(json.dumps(_verbs_as_json(verb)))
        return
    above = click.get_current_context().find_root()
    assert isinstance(above.command, click.Group)
    if verb is None:
        show.say(above.get_help())
    elif (command := above.command.get_command(above, verb)) is None:
        no_such_verb(verb, above.command.commands)
    else:
        with click.Context(command, info_name=verb, parent=above) as context:
            show.say(command.get_help(context))


def _verbs_as_json(verb: str | None) -> dict[str, Any]:
    try:
        found = {verb: find_verb(verb)} if verb else VERBS
    except UnknownCommandError as error:
        raise UsageError(f"there is no control command {error}") from error
    return {"verbs": [each.as_json(name) for name, each in found.items()], "flags": FLAGS}


def _top(socket: str | None, name: str, as_json: bool, interval: float, count: int | None) -> int:
    from flaskd.cli.top import watch  # noqa: PLC0415 - the other verbs do not need it

    def look() -> int:
        return watch(lambda: find_socket(socket, name, os.environ), interval=interval, count=count, as_json=as_json)

    return told(look, as_json=as_json)
