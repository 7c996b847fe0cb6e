"""``flaskd completion``: prints the script with which a shell completes verbs, options and their values."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import click

from flaskd.cli import show
from flaskd.errors import FlaskdError
from flaskd.verbs import LEVELS, VERBS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_FLASKD_COMPLETE"
"""The environment variable with which the script asks the command for completions; click makes it of the name."""


@click.command("completion", short_help="The script for a shell to complete flaskd's commands.")
@click.argument("shell", type=click.Choice(SHELLS))
def shell_script(shell: str) -> None:
    """Print the script by which SHELL (bash, zsh or fish) completes verbs, options, log levels and names of daemons."""
    show.say(script(shell))


def script(shell: str) -> str:
    """The completion script for a shell."""
    from click.shell_completion import ShellComplete, get_completion_class  # noqa: PLC0415 - only for this verb

    kind = get_completion_class(shell)
    assert kind is not None
    # Not its method source(), which for bash looks for an installed bash and its version.
    return ShellComplete.source(kind(click.Command("flaskd"), {}, "flaskd", _VARIABLE)).removesuffix("\n")


# --- values: only a shell asks for them -----------------------------------------------------------------------------


def levels(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The log levels."""
    return [each for each in LEVELS if each.startswith(incomplete.lower())]


def counts(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The only number of workers that is a word."""
    return [each for each in ("auto",) if each.startswith(incomplete)]


def verbs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The verbs of the command."""
    command = context.find_root().command
    return [name for name in getattr(command, "commands", VERBS) if name.startswith(incomplete)]


def names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names of the running daemons."""
    from flaskd.finding import running, way_to  # noqa: PLC0415 - only to complete

    ways = (way_to(path, os.environ) for path, _ in running(os.environ))
    found = {way.removeprefix("--name ") for way in ways if way.startswith("--name ")}
    return sorted(name for name in found if name.startswith(incomplete))


def policies(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names of the daemon's cleanup policies; the daemon is that of the other options."""
    from flaskd.client import ControlClient, reading  # noqa: PLC0415 - only to complete
    from flaskd.finding import find_socket  # noqa: PLC0415

    asked = context.params
    with contextlib.suppress(FlaskdError):
        path = find_socket(asked.get("socket"), asked.get("name") or "flaskd", os.environ)
        with ControlClient(path, timeout=2.0) as client, reading(path):
            steps = client.request("plan")["policies"]
            return [name for name in (str(each["name"]) for each in steps) if name.startswith(incomplete)]
    return []


def files(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files: the shell completes them itself."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - see above

    return [CompletionItem(incomplete, type="file")]
