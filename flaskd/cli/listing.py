"""``flaskd list``: shows every flaskd of this machine that this user can see."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from flaskd.cli import show
from flaskd.errors import FlaskdError, NoDaemonError
from flaskd.text import table


@click.command("list", short_help="Every flaskd of this machine.")
@click.option("--json", "as_json", is_flag=True, help="Answer for programs.")
def list_daemons(as_json: bool) -> None:
    """Every flaskd of this machine that this user can see, whatever its name."""
    from flaskd.finding import running, way_to  # noqa: PLC0415 - only for this verb

    found = [*running(os.environ)]
    if as_json:
        daemons = [
            {"socket": str(path), **({"fault": str(told)} if isinstance(told, FlaskdError) else told)}
            for path, told in found
        ]
        show.say(show.for_programs({"ok": True, "daemons": daemons}))
    elif found:
        show.say(page([(way_to(path, os.environ, told).removeprefix("--name "), told) for path, told in found]))
    else:
        click.echo("flaskd: no daemon is running that this user can see", err=True)


def page(found: Sequence[tuple[str, dict[str, Any] | FlaskdError]]) -> str:
    """A line for each daemon: its name, or ``--socket PATH`` if no name leads to it, and its state."""
    rows = [("NAME", "STATE", "APP", "PID", "UPTIME", "LISTEN")]
    for way, told in found:
        name = show.made_printable(way)
        if isinstance(told, FlaskdError):
            row = (name, "no answer" if isinstance(told, NoDaemonError) else "not told", "-", "-", "-", "-")
        else:
            each = show.made_printable(told)
            listen = ", ".join(each["listen"]) or "-"
            row = (name, each["state"], each["app"] or "-", str(each["pid"]), show.short(each["uptime"]), listen)
        rows.append(row)
    return "\n".join(table(rows))
