"""``flaskd completion``: the script by which a shell completes verbs, options and their values."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import click

from flaskd.cli import show
from flaskd.client import ControlClient, reading
from flaskd.errors import FlaskdError
from flaskd.finding import find_socket, running, way_to
from flaskd.verbs import LEVELS, VERBS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_FLASKD_COMPLETE"
"""The variable by which the script asks the command for what may come next; click has the name from the program's."""


@click.command("completion", short_help="The script for a shell to complete flaskd's commands.")
@click.argument("shell", type=click.Choice(SHELLS))
def shell_script(shell: str) -> None:
    """Print the script by which SHELL (bash, zsh or fish) completes verbs, options, log levels and names of daemons."""
    from click.shell_completion import ShellComplete, get_completion_class  # noqa: PLC0415 - for this verb alone

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root()
    # Not its own source(): that of bash looks for a bash, of which version, where the script is printed.
    show.say(ShellComplete.source(kind(root.command, {}, "flaskd", _VARIABLE)).removesuffix("\n"))


# --- values: each is asked by a shell only ------------------------------------------------------------------------


def levels(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Log levels."""
    return [each for each in LEVELS if each.startswith(incomplete.lower())]


def counts(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The one number of workers that is a word."""
    return [each for each in ("auto",) if each.startswith(incomplete)]


def verbs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Verbs of the command."""
    command = context.find_root().command
    return [name for name in getattr(command, "commands", VERBS) if name.startswith(incomplete)]


def names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of the daemons that run."""
    ways = (way_to(path, os.environ) for path, _ in running(os.environ))
    found = {way.removeprefix("--name ") for way in ways if way.startswith("--name ")}
    return sorted(name for name in found if name.startswith(incomplete))


def policies(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of the cleanup policies of the daemon that is meant."""
    asked = context.params
    with contextlib.suppress(FlaskdError):
        path = find_socket(asked.get("socket"), asked.get("name") or "flaskd", os.environ)
        with ControlClient(path, timeout=2.0) as client, reading(path):
            steps = client.request("plan")["policies"]
            return [name for name in (str(each["name"]) for each in steps) if name.startswith(incomplete)]
    return []


def files(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files: the shell finds them by itself."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - see above

    return [CompletionItem(incomplete, type="file")]
