"""The ``flaskd`` command: each verb takes its arguments and makes one call.

Large imports (Flask, waitress, pydantic, PyYAML) are made only by the verbs that need them, so client verbs start fast.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flaskd.cli import client_verbs, show
from flaskd.cli.completion import files, policies, shell_script
from flaskd.cli.listing import list_daemons
from flaskd.cli.pages import Verbs
from flaskd.cli.units import units
from flaskd.errors import (
    EX_CONFIG,
    EX_LOST,
    EX_OK,
    EX_USAGE,
    CannotCreateError,
    ConfigError,
    FlaskdError,
    ForbiddenError,
    NoDaemonError,
    UsageError,
    shortage,
)
from flaskd.text import lines
from flaskd.version import __version__

if TYPE_CHECKING:
    from flaskd.config import Configuration, Fault
    from flaskd.pool.early import Early


def main() -> int:
    """Run the command, and return the exit code."""
    show.escape_what_cannot_be_encoded("backslashreplace")
    code = reported(lambda: cli.main(prog_name="flaskd", standalone_mode=False))
    show.discard_what_cannot_be_written()
    return code


def reported(run: Callable[[], object]) -> int:
    """Run a verb and return the exit code; every fault is written to standard error as one clear line, if possible."""
    try:
        result = run()
    except click.UsageError as error:
        _complain(functools.partial(show_usage_fault, error))
        return EX_USAGE
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader of the output has closed it. Nothing more can be written there, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EX_LOST
    except FlaskdError as error:
        prefix = "" if isinstance(error, ConfigError) else "flaskd: "
        said = "\n".join(f"{prefix}{line}" for line in lines(error.whole))
        _complain(lambda: click.echo(said, err=True))
        return error.exit_code
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, OSError) and show.discard_what_cannot_be_written():
            lack: FlaskdError | None = CannotCreateError(f"cannot write the answer: {error.strerror}")
        else:
            lack = shortage(error)
        if lack is None:
            raise
        _complain(lambda: click.echo(f"flaskd: {lack}", err=True))
        return lack.exit_code
    return result if isinstance(result, int) else 0


def show_usage_fault(error: click.UsageError) -> None:
    """Write what is wrong with a command line; for an unknown option, what to use instead, in one line."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        from flaskd.cli.foreign import advice  # noqa: PLC0415 - only for mistakes

        command = error.ctx.command
        known = [name for each in command.get_params(error.ctx) for name in each.opts if name.startswith("-")]
        click.echo(f"flaskd: {advice(error.ctx.command_path, error.option_name, known)}", err=True)
    else:
        click.echo(f"flaskd: {error.format_message().rstrip('.')}{_see(error.ctx)}", err=True)


def _see(context: click.Context | None) -> str:
    return f'; see "{context.command_path} --help"' if context is not None and context.parent is not None else ""


def _complain(say: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):  # the message cannot be written, but there is the exit code
        say()


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__, prog_name="flaskd", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Serve a Flask app, and stop it without losing a request."""
    if context.invoked_subcommand is None:
        show.say(context.get_help())


_CONFIG = "Configuration file; else $FLASKD_CONFIG, else ./flaskd.yaml."


@cli.command(short_help="Serve an app until asked to stop.")
@click.argument("app", required=False)
@click.option("-c", "--config", metavar="FILE", help=_CONFIG, shell_complete=files)
@click.option(
    "-l", "--listen", metavar="LISTEN", multiple=True, help="HOST:PORT, [IPv6]:PORT or unix:/path; repeatable."
)
@click.option("-t", "--threads", metavar="N", help="Threads that run the app, per worker.")
@click.option("-w", "--workers", metavar="N|auto", help="Worker processes; auto: one for each CPU.")
@click.option(
    "--reload", is_flag=True, help="While you develop: new code at each saved file, with one worker at least."
)
@click.option(
    "--name", metavar="NAME", default="flaskd", show_default=True, help="Name of the runtime and state directory."
)
def serve(app: str | None, **options: Any) -> None:
    """Serve APP (MODULE, MODULE:NAME, MODULE:FACTORY() or a file) until asked to stop.

    Of a MODULE its "application" is served, else its "app", else its only Flask app, else what its create_app() or
    make_app() makes.
    """
    serve_app(app, **options)


def serve_app(
    app: str | None,
    *,
    config: str | None,
    listen: tuple[str, ...],
    threads: str | None,
    workers: str | None,
    reload: bool,
    name: str,
    make_app: Callable[[], Any] | None = None,
) -> NoReturn:
    """Serve with the options of ``flaskd serve``, or what `make_app` makes, and exit with the exit code."""
    from flaskd.process.pid1 import stand_in_front  # noqa: PLC0415

    stand_in_front()
    from flaskd.serving.launch import check_system  # noqa: PLC0415

    check_system()
    from flaskd.boot import Boot  # noqa: PLC0415
    from flaskd.control import ControlPlane  # noqa: PLC0415
    from flaskd.process.exit import Ending, leave  # noqa: PLC0415
    from flaskd.serving.configuration import reader  # noqa: PLC0415

    if not gc.isenabled():  # `flaskd.__main__` has switched it off for the imports
        gc.freeze()
        gc.unfreeze()  # imported objects count as old, and are not searched soon
        gc.enable()
    if not name or "/" in name or name.startswith("."):
        raise click.BadParameter(f'expected a plain name, got "{name}"', param_hint="--name")
    overrides = {
        "app.target": app,
        "server.listen": list(listen) or None,
        "server.threads": threads,
        "server.workers": workers,
    }
    load = reader(_config_path(config), overrides, follows_code=reload)
    early: list[Early] = []
    if make_app is None:
        load, early = _forked_early(load)
    environ = dict(os.environ)
    boot = Boot(
        load,
        plane=lambda daemon: ControlPlane(daemon, name, environ),
        name=name,
        environ=environ,
        make_app=make_app,
        ending=(ending := Ending()),
        early=early,
    )
    boot.daemon.reload.follows_code = reload
    leave(boot.run(last=True), ending)


def _forked_early(load: Callable[[], Configuration]) -> tuple[Callable[[], Configuration], list[Early]]:
    """Read the configuration, and fork the processes of the first workers that it wants; see `flaskd.pool.early`."""
    from flaskd.serving.configuration import reads_once  # noqa: PLC0415

    load, configuration = reads_once(load)
    if (
        configuration is None
        or not (count := configuration.values.count_workers())
        or configuration.values.pool.preload
    ):
        return load, []
    from flaskd.pool.early import fork_early  # noqa: PLC0415 - a daemon without workers starts faster
    from flaskd.pool.pool import Pool  # noqa: F401, PLC0415 - imported before the fork, not after it in each process
    from flaskd.workers.worker import main  # noqa: PLC0415

    return load, fork_early(count, main)


def _config_path(option: str | None) -> Path | None:
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"cannot work here: the working directory is gone ({error.strerror}); cd elsewhere"
        ) from error
    if chosen := option or os.environ.get("FLASKD_CONFIG"):
        if chosen.endswith(".py"):
            raise UsageError(
                f'cannot use {chosen}: expected YAML; "flaskd init --from {chosen}" makes a flaskd.yaml of it'
            )
        return Path(chosen)
    here = Path("flaskd.yaml")
    return here if here.exists() else None


@cli.command()
@click.option("-c", "--config", metavar="FILE", help=_CONFIG, shell_complete=files)
@click.option("--unit", metavar="UNIT", help="A systemd unit file to compare with.", shell_complete=files)
@click.option("--json", "as_json", is_flag=True, help="Answer for programs: each fault with its place.")
@click.argument("file", required=False, shell_complete=files)
def check(config: str | None, unit: str | None, as_json: bool, file: str | None) -> int:
    """Check a configuration file, importing nothing of the app."""
    from flaskd.config import Fault, InvalidConfigError  # noqa: PLC0415

    if config and file:  # only one of them could be checked
        raise click.UsageError(f'expected one file, got "{config}" and "{file}"')
    path = _config_path(config or file)
    answer: dict[str, Any] = {"ok": True, "config": str(path) if path else None, "faults": [], "omitted": 0}
    warnings: tuple[Fault, ...] = ()
    try:
        warnings = _check(path, unit)
    except ConfigError as error:
        if not as_json:
            raise
        answer["ok"] = False
        if isinstance(error, InvalidConfigError):
            answer["faults"] = [fault.as_json() for fault in error.faults]
            answer["omitted"] = error.omitted
        else:  # a fault of the whole file, or of a unit that does not fit it
            faults = [Fault(unit or str(path or ""), 0, 0, "", line) for line in str(error).splitlines()]
            answer["faults"] = [fault.as_json() for fault in faults]
    if as_json:
        show.say(show.for_programs({**answer, "warnings": [each.as_json() for each in warnings]}))
    else:
        for each in warnings:
            click.echo(f"flaskd: warning: {show.made_printable(str(each))}", err=True)
        show.say(f"{path}: OK" if path else "no configuration file: the defaults are in force")
    return EX_OK if answer["ok"] else EX_CONFIG


def _check(path: Path | None, unit: str | None) -> tuple[Fault, ...]:
    """The doubts about a valid configuration; raises ConfigError for an invalid one."""
    from flaskd.serving.configuration import read  # noqa: PLC0415

    configuration = read(path)
    values = configuration.values
    if unit is not None:
        from flaskd.systemd.unitfiles import compare  # noqa: PLC0415

        faults = compare(
            Path(unit),
            deadline=values.shutdown.deadline,
            fdstore=values.systemd.fdstore,
            workers=bool(values.server.workers),
        )
        if faults:
            raise ConfigError("\n".join(faults))
    return configuration.doubts


@cli.command("init", short_help="Write a commented flaskd.yaml.")
@click.option(
    "--from",
    "source",
    metavar="WHAT",
    help="A gunicorn.conf.py, or a server's command line in quotes.",
    shell_complete=files,
)
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@click.argument("file", default="flaskd.yaml")
def init_(source: str | None, force: bool, file: str) -> None:
    """Write a commented configuration FILE (default: flaskd.yaml; "-": standard output) for the app that is found here.

    With --from it says what a gunicorn.conf.py says, which is read and never run, or a command line of gunicorn,
    waitress-serve or flask run. What has no equivalent is told line by line.
    """
    from flaskd.cli.init import init  # noqa: PLC0415 - only for this verb

    init(source, file, force=force)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file."""
    from flaskd.cleanup import action_specs  # noqa: PLC0415
    from flaskd.config import schema as json_schema  # noqa: PLC0415

    actions = action_specs()
    for name, spec in actions.items():
        if spec.fault:
            click.echo(f'flaskd: the action "{name}" is not in the schema: {spec.fault}', err=True)
    show.say(json.dumps(json_schema(actions), indent=2))


@cli.command(params=[*client_verbs.PLACE], short_help="The cleanup policies in their order, and what was found.")
@click.option(
    "-c",
    "--config",
    metavar="FILE",
    help="Ask no daemon: show what this configuration file comes to.",
    shell_complete=files,
)
@click.option(
    "--simulate-hang",
    "hang",
    metavar="POLICY",
    multiple=True,
    help="Show what else suffers if it hangs; repeatable.",
    shell_complete=policies,
)
@click.option("--json", "as_json", is_flag=True, help="Answer for programs.")
def plan(socket: str | None, name: str, config: str | None, hang: tuple[str, ...], as_json: bool) -> int:
    """The cleanup policies in their order, when each begins and ends at the latest, and what was found.

    With --simulate-hang and no daemon there, of the configuration file.
    """
    return client_verbs.told(lambda: _plan(socket, name, config, hang, as_json=as_json), as_json=as_json)


def _plan(socket: str | None, name: str, config: str | None, hang: tuple[str, ...], *, as_json: bool) -> int:
    from flaskd.client import ControlClient, reading  # noqa: PLC0415 - a serving process needs none of that
    from flaskd.finding import find_socket  # noqa: PLC0415

    answer = path = None
    if config is None:
        try:
            path = find_socket(socket, name, os.environ)
            with ControlClient(path) as client:
                answer = client.request("plan")
        except (NoDaemonError, ForbiddenError):
            if socket or not hang:
                raise
    if answer is None:
        answer, path = _offline_plan(config), None
    with reading(path) if path else contextlib.nullcontext():
        if hang:
            from flaskd.cleanup import preview, results_as_json  # noqa: PLC0415

            frame = preview.Frame(**answer["budget"])
            results, text = preview.simulated(preview.plan_from(answer["policies"]), frame, hang)
            answer = {"result": "plan", "hang": list(hang), "policies": results_as_json(results), "text": text}
        show.say(show.for_programs({"ok": True, **answer}) if as_json else show.made_printable(answer["text"], "text"))
    return EX_OK


def _offline_plan(config: str | None) -> dict[str, Any]:
    from flaskd.cleanup import Frame, build_plan, overview  # noqa: PLC0415
    from flaskd.serving.configuration import read  # noqa: PLC0415

    values = read(_config_path(config)).values
    mode = values.cleanup.discovery.mode
    answer = {"result": "plan", "discovery": mode, **overview(build_plan(values.cleanup), Frame.of(values))}
    answer["text"] += "\nfrom the file alone: what the app holds, and registers in code, only its daemon can say"
    return answer


client_verbs.add_client_verbs(cli)
cli.add_command(units)
cli.add_command(list_daemons)
cli.add_command(shell_script)
