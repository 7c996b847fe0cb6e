"""``flask daemon``: like ``flaskd serve``, for the app of Flask's own command line."""

from __future__ import annotations

import functools
from typing import Any

import click

from flaskd import cli
from flaskd.errors import EX_USAGE
from flaskd.process.bootstrap import heed_signals, open_standard_streams


class _Daemon(click.Command):
    """The command; faults of its command line have flaskd's exit code, as with ``flaskd serve``."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            cli.show_usage_fault(error)
            raise click.exceptions.Exit(EX_USAGE) from None


@click.pass_context
def _daemon(context: click.Context, /, **options: Any) -> None:
    open_standard_streams()
    heed_signals()
    # This command runs in a process that has imported flask.cli, so the import loads nothing, and no app.
    from flask.cli import ScriptInfo  # noqa: PLC0415 - `flask` reads this file for each of its commands
    from flask.helpers import get_debug_flag  # noqa: PLC0415

    info = context.ensure_object(ScriptInfo)
    if get_debug_flag():
        click.echo(
            'flaskd: debug mode has no debugger here, "flask run --debug" has; --reload brings new code', err=True
        )
    make_app = None
    if info.create_app is not None:  # the app's own command line: FlaskGroup(create_app=…)

        @functools.wraps(info.create_app)
        def make_app() -> Any:
            return info.load_app()

    context.exit(cli.reported(lambda: cli.serve_app(info.app_import_path, make_app=make_app, **options)))


daemon = _Daemon(
    "daemon",
    callback=_daemon,
    params=[each for each in cli.serve.params if each.name != "app"],
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Serve the app in production, and stop it without losing a request.

    The same as "flaskd serve", for the app that --app or FLASK_APP names; else the one in the configuration file, else
    wsgi.py or app.py. Debug mode brings no debugger; --reload takes new code at each saved file.""",
)
"""The entry point in the group ``flask.commands``."""
