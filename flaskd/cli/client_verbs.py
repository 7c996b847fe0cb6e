"""The client verbs: the verbs of the control plane as commands, made from the table of verbs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click

from flaskd.cli import completion, show
from flaskd.cli.pages import no_such_verb
from flaskd.errors import CannotCreateError, FlaskdError, UnknownCommandError, UsageError
from flaskd.verbs import FLAGS, VERBS, Role, Verb, find_verb

_BY_HAND = {"help", "check"}
"""Verbs whose commands need no daemon; their commands are defined one by one."""
_VALUES = {"level": completion.levels, "count": completion.counts}
"""The functions with which a shell completes arguments."""

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
        from flaskd.cli.asking import ask_or_read  # noqa: PLC0415 - a serving process needs none of that

        return told(lambda: ask_or_read(verb, socket, name, words, as_json=as_json), as_json=as_json)

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
    from flaskd.finding import find_socket  # noqa: PLC0415

    def look() -> int:
        return watch(lambda: find_socket(socket, name, os.environ), interval=interval, count=count, as_json=as_json)

    return told(look, as_json=as_json)
