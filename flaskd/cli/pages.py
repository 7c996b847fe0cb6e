"""The help of the command: its verbs in groups, examples for each, and advice about unknown verbs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import click

from flaskd.errors import UsageError
from flaskd.text import did_you_mean, table

GROUPS = {
    "Run": ("serve", "units"),
    "Look": (
        "list", "status", "top", "requests", "threads", "workers", "plan", "last-stop", "health", "ready", "version",
    ),
    "Change": ("drain", "resume", "stop", "reload", "scale", "restart", "log-level"),
    "Configure": ("init", "check", "config", "schema", "completion", "help"),
}  # fmt: skip
"""The verbs in the order of the help; each is in one group."""

_EXAMPLES: dict[str, dict[str, str]] = {
    "": {
        "flaskd serve flaskd.demo:app": 'a demo to drain and to stop; it needs pip install "flaskd[demo]"',
        "flaskd serve shop.wsgi:app -l :8000 -w 4": "an app of yours, on port 8000, in 4 worker processes",
        "flaskd status": "in another terminal: how it is",
        "flaskd stop --wait": "finish what is in hand, clean up, exit",
    },
    "serve": {
        "flaskd serve shop.wsgi:app": "an object of a module",
        "flaskd serve 'shop:create_app()' -w auto": "what a factory makes, in a worker process for each CPU",
        "flaskd serve shop.wsgi:app --reload": "while you develop: new code at each saved file",
        "flaskd serve -c /etc/shop.yaml": "what a configuration file says",
        "flaskd serve app.py -l :8000 -l unix:/run/shop/http.sock": "a file, on two addresses",
    },
    "units": {
        "flaskd units --instance shop": "show the units of flaskd@shop",
        "sudo flaskd units --install /": "write them where systemd reads them",
    },
    "list": {"flaskd list": "what runs here, and since when", "flaskd list --json": "for programs"},
    "status": {"flaskd status": "a page for people", "flaskd status --json": "an object for programs"},
    "top": {"flaskd top": "until q is pressed", "flaskd top --count 1": "one page, for a script"},
    "requests": {"flaskd requests --stacks": "where each request is in the app's code"},
    "threads": {"flaskd threads --stacks": "where each thread is"},
    "workers": {"flaskd workers": "pid, memory, requests and deaths of each"},
    "plan": {
        "flaskd plan": "what a stop would do now",
        "flaskd plan -c flaskd.yaml --simulate-hang close-db": "what is late or left out if that step hangs",
    },
    "last-stop": {"flaskd last-stop": "what the last stop completed, cut and cleaned up"},
    "health": {"flaskd health && echo alive": "exit code 0, else 75, or 69 where no daemon runs"},
    "ready": {"flaskd ready && echo ready": "exit code 0, else 75, or 69 where no daemon runs"},
    "version": {"flaskd version": "of the daemon that runs; flaskd --version is that of the command"},
    "drain": {"flaskd drain --wait": "and wait until nothing is in flight"},
    "resume": {"flaskd resume": "take requests again after a drain"},
    "stop": {
        "flaskd stop --wait": "show how it goes; exit code 1 if work was lost",
        "flaskd stop --now": "cut requests and cleanup short",
    },
    "reload": {
        "flaskd reload": "read flaskd.yaml again; with workers also take new code",
        "flaskd reload --config": "the configuration alone",
    },
    "scale": {"flaskd scale 4": "four workers", "flaskd scale auto": "one for each CPU"},
    "restart": {"flaskd restart": "all workers, one after the other", "flaskd restart 2": "the one in slot 2"},
    "log-level": {"flaskd log-level": "say it", "flaskd log-level debug": "change it until the next reload"},
    "init": {
        "flaskd init": "for the app that is here",
        "flaskd init --from gunicorn.conf.py": "what gunicorn was told",
        "flaskd init - --from 'waitress-serve --threads=8 shop:app'": "to standard output, from a command line",
    },
    "check": {
        "flaskd check": "./flaskd.yaml",
        "flaskd check /etc/shop.yaml --json": "another file; faults for programs",
    },
    "config": {"flaskd config": "each value, and where it came from"},
    "schema": {"flaskd schema > flaskd.schema.json": "for editors that check and complete YAML"},
    "completion": {
        "flaskd completion bash > ~/.local/share/bash-completion/completions/flaskd": "bash",
        "flaskd completion fish > ~/.config/fish/completions/flaskd.fish": "fish",
        "flaskd completion zsh > ~/.zfunc/_flaskd": "zsh, with fpath+=~/.zfunc before compinit",
    },
    "help": {"flaskd help stop": "what flaskd stop --help says", "flaskd help --json": "all control commands"},
}

_CALLED_ELSEWHERE = {
    "run": "serve", "start": "serve", "kill": "stop --now", "quit": "stop", "shutdown": "stop", "ps": "list",
    "ls": "list", "info": "status", "logs": "log-level", "install": "units", "undrain": "resume", "test": "check",
    "validate": "check", "hup": "reload",
}  # fmt: skip


def examples(verb: str) -> dict[str, str]:
    """Example command lines with explanations, for a verb, or with "" for the command as a whole."""
    return _EXAMPLES.get(verb, {})


class Verbs(click.Group):
    """The command with its verbs: its help shows them in groups, and each verb's own help ends with examples."""

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self.epilog = _as_epilog("")

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a verb with its examples."""
        super().add_command(cmd, name)
        cmd.epilog = _as_epilog(name or cmd.name or "")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        """Write the verbs, one section for each group."""
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                room = formatter.width - 4 - width
                rows = [(name.ljust(width), self.commands[name].get_short_help_str(room)) for name in names]
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb of a command line; raises UsageError, which names a similar one."""
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            no_such_verb(args[0], self.commands)
        return super().resolve_command(ctx, args)


def no_such_verb(name: str, verbs: Iterable[str]) -> NoReturn:
    """Raise UsageError for an unknown verb, with the verb that may be meant."""
    is_app = ":" in name or name.endswith(".py")
    instead = f"serve {name}" if is_app else _CALLED_ELSEWHERE.get(name.lower(), "")
    meant = f'; did you mean "{instead}"?' if instead else did_you_mean(name.lower(), verbs) or ";"
    raise UsageError(f'there is no command "{name}"{meant} try "flaskd --help"')


def _as_epilog(verb: str) -> str:
    rows = table([*examples(verb).items()], indent=2, gap=3) if examples(verb) else []
    return "\n".join(["\b", "Examples:", *rows]) if rows else ""
