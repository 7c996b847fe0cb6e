"""Write the pages of this directory from the code: the model, the actions, the verbs, the errors, the metrics.

    .venv/bin/python docs/reference/make.py [DIRECTORY]

DIRECTORY is where the pages go, this directory if none is given. `tests/test_reference_pages.py` compares what it would write
with the pages that are here.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click

from flaskd import errors
from flaskd.admin import metrics
from flaskd.cleanup import ACTIONS
from flaskd.cleanup.model import Action
from flaskd.cli import cli
from flaskd.cli.pages import GROUPS, examples
from flaskd.config.fields import (
    MAX_WORKERS,
    Duration,
    Listen,
    Member,
    Mode,
    OneOrMany,
    OwnAddress,
    PathPattern,
    Size,
    TrustedProxy,
    UrlPath,
    VerbName,
    Workers,
)
from flaskd.config.model import Config
from flaskd.config.settings import Field, Settings
from flaskd.lifecycle import State
from flaskd.server import BOUNDS
from flaskd.serving.api import ServingSnapshot
from flaskd.snapshot import Counts, Held, Snapshot
from flaskd.verbs import FLAGS, VERBS

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/reference/make.py; change the code, and run it. -->"
_EXIT = re.compile(r" \(exit \d+\)")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table of Markdown."""
    lines = [list(headers), ["---"] * len(headers), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentence(text: str) -> str:
    """A docstring as a sentence of Markdown: its first paragraph on one line."""
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split()).replace("``", "`")


# --- what stands around the tables -----------------------------------------------------------------------------------

_CONFIGURATION = """\
All keys of `flaskd.yaml`. Each may be left out, and has its default then. [config/flaskd.yaml](../../config/flaskd.yaml)
is the same as a file, with an example for each key. `flaskd check` finds all faults of a file, `flaskd config` shows the
values in force and where each came from, `flaskd schema` prints the JSON Schema for editors."""

_VALUES = """\
- A *duration* has a unit: `250ms`, `1.5s`, `2m`, `1h30m`, `1d`.
- A *size* has one, too, or is a number of bytes: `64MiB`, `10kB`, `1048576`.
- *An X, or a list*: a single one may be written without brackets.
- `${env:NAME}`, `${env:NAME:-default}`, `${file:PATH}` and `${cred:NAME}` (a credential of systemd) may stand in any
  value. What they give is not shown again."""

_CHANGES = """\
What **a change takes** to be in force:

- *at once*: a reload (`flaskd reload`, SIGHUP, or an edit with `watch: true`) is enough.
- *new workers*: with `server.workers` a reload replaces the workers; without it flaskd has to be restarted.
- *a restart*: a reload that changes it is refused, and names the key. `server.workers` is an exception: one number of
  workers for another is taken at once; only from or to 0 it takes a restart."""

_ACTIONS = """\
What a policy can `use`, with the fields that stand under its `with`. [Cleanup policies](../cleanup.md) explains phases,
scopes and time; the keys of every policy are those of
[cleanup.policies.NAME](configuration.md#cleanuppoliciesname)."""

_COLUMNS = """\
- *scope*: where it can run with worker processes; the first one is its default.
- *at a replacement*: whether it also runs in a worker whose place another one takes.
- *needs*: the package that has to be installed."""

_COMMANDS = """\
What `flaskd VERB` does in a shell. `flaskd help VERB` says the same. Most verbs talk to a running daemon, over its
[control socket](control.md); [exit codes](exit-codes.md) tell how it went."""

_CONTROL = """\
What the control socket and the FIFO take. [Talking to a running flaskd](../control.md) explains where they are, the
dialects (text, JSON, HTTP) and the roles."""

_EXIT_CODES = """\
Of `flaskd serve` and of all other commands; they follow sysexits.h. The *code* is what a reply of the control socket
says: `ERR code`, or `error.code` in JSON."""

_DEGRADED = """\
- A stop that had to cut work off exits with `shutdown.exit_codes.degraded`, which is 0 by default.
- `flaskd health` and `flaskd ready` exit with 75 where the answer is no.
- A log that cannot be written changes no exit code."""

_METRICS = """\
What `/metrics` of the admin listener tells Prometheus; it takes `pip install 'flaskd[metrics]'`. Times are in seconds,
from the first byte of a request to the moment at which the kernel took the last byte of its answer. With worker
processes the counts are those of all of them, and do not fall when one is replaced. Metrics whose name begins with
`flaskd_worker` are there with worker processes alone."""

_LABELS = """\
- `state` is one of {states}.
- `outcome` is `completed`, `rejected`, `cut`, or `gone`: the client left.
- `limit` is the key of the configuration that says the limit, such as `server.request_timeout`; see
  [limits](../limits.md).
- `stop` is `current`, the stop under way, or `last`, the one before; `policy` and `fate` are those of the step.
- `instance` of `flaskd_info` is `server.instance`. Prometheus has an `instance` of its own, the place where it asks,
  and calls this one `exported_instance`."""


# --- configuration ----------------------------------------------------------------------------------------------------


_WORDS = (
    (Duration, "duration"), (Size, "size"), (Workers, f"integer from 0 to {MAX_WORKERS}, or `auto`"), (Listen, "address"),
    (OwnAddress, "address"), (UrlPath, "path of a URL"), (PathPattern, "path of a URL"), (Mode, "file mode"),
    (Member, "user or `@group`"), (VerbName, "[control command](control.md)"), (TrustedProxy, "address or network"),
)  # fmt: skip
"""Kinds of the model's own, in words."""
_ALONE = get_args(OneOrMany[str])[1]
"""What marks a list whose single entry may be written without brackets."""
_TYPES = {str: "text", Path: "path", int: "integer", float: "number", bool: "`true`, `false`", Any: "any value"}


def in_words(annotation: Any) -> str:
    """What a value may be, from a field's annotation."""
    for known, word in _WORDS:
        if annotation == known:
            return word
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = in_words(parts[0])
        return f"{inner.removeprefix('list of ')}, or a list" if _ALONE in parts else inner
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in parts)
    if origin in {Union, UnionType}:
        return ", or ".join("`null`" if each is type(None) else in_words(each) for each in parts)
    if origin is list:
        return f"list of {in_words(parts[0])}"
    if origin is dict:
        return "mapping" if is_section(parts[1]) else f"mapping to {in_words(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return ", ".join(f"`{each}`" for each in annotation)
    return _TYPES.get(annotation, "text, never shown")


def is_section(annotation: Any) -> bool:
    """Whether it is a section of the configuration."""
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def value_in_words(each: Field) -> str:
    """What the value of a key may be, within its bounds."""
    bounds = each._bounds  # noqa: SLF001 - how it is read, and not told elsewhere
    words = in_words(each.annotation)
    if words.startswith("integer") and "ge" in bounds:
        most = f" to {bounds['le']:g}" if bounds.get("le", 2**31) < 2**31 - 1 else ""
        words = words.replace("integer", f"integer from {bounds['ge']:g}{most}", 1)
    return words if each.key != "with" else "mapping, see [actions](actions.md)"


def default_in_words(each: Field) -> str:
    """The default as it is written in a file."""
    if each.is_required():
        return "required"
    value = each.make_default()
    written = None if value is None else each.kind.write(value)
    return f"`{written if isinstance(written, str) and written else json.dumps(written)}`" if each.told else ""


def at_a_reload(each: Field) -> str:
    """What has to happen until another value is in force."""
    if each.renewal:
        return "new workers; else a restart" if each.restart else "new workers"
    return "a restart" if each.restart else "at once"


def described(each: Field) -> str:
    """A key's description."""
    return sentence(each.description)


def sections(settings: type[Settings], path: str = "") -> Iterator[tuple[str, type[Settings], list[Field]]]:
    """Each section with its path and its own keys, in the order of the model."""
    own, inner = [], []
    for each in settings.model_fields.values():
        found = each.annotation
        if is_section(found):
            inner.append((f"{path}.{each.key}" if path else each.key, found))
        else:
            own.append(each)
    if own:
        yield path, settings, own
    for where, found in inner:
        yield from sections(found, where)


def keys_of(own: list[Field]) -> str:
    """The table of a section's own keys."""
    rows = (
        [f"`{each.key}`", value_in_words(each), default_in_words(each), at_a_reload(each), described(each)]
        for each in own
    )
    return table(["key", "value", "default", "a change takes", "meaning"], rows)


def policy_of(own: list[Field]) -> tuple[str, type[Settings]]:
    """The name of the mapping in which a section's keys are chosen by the user, and the section of each of them."""
    for each in own:
        if get_origin(each.annotation) is dict and is_section(found := get_args(each.annotation)[1]):
            return each.key, found
    return "", Settings


def configuration() -> str:
    """The page of the configuration."""
    parts = ["# Configuration", NOTE, _CONFIGURATION, _VALUES, _CHANGES]
    for path, settings, own in sections(Config):
        parts += [f"## {path or 'At the top'}", sentence(settings.__doc__ or ""), keys_of(own)]
        name, inner = policy_of(own)
        if name:
            for deeper, each, keys in sections(inner, f"{path}.{name}.NAME"):
                parts += [f"## {deeper}", sentence(each.__doc__ or ""), keys_of(keys)]
    return "\n\n".join(parts)


# --- cleanup actions --------------------------------------------------------------------------------------------------


def fields_of(action: Action) -> str:
    """The table of the fields of an action; no text when it has none."""
    fields = action.fields.model_fields
    rows = [
        [f"`{each.key}`", value_in_words(each), default_in_words(each), described(each)]
        for each in fields.values()
        if isinstance(each, Field)
    ]
    return table(["field", "value", "default", "meaning"], rows) if rows else "It has no fields."


def actions() -> str:
    """The page of the cleanup actions."""
    own = {name: ACTIONS[name] for name in sorted(ACTIONS) if type(ACTIONS[name].fields).__module__ != "pydantic"}
    rows = (
        [
            f"[`{name}`](#{name.replace('.', '')})",
            f"`{action.default_phase}`",
            " or ".join(f"`{each}`" for each in action.scopes),
            "yes" if action.at_replacement else "no",
            " or ".join(f"`{each}`" for each in action.needs.values()),
        ]
        for name, action in own.items()
    )
    parts = [
        "# Cleanup actions",
        NOTE,
        _ACTIONS,
        _COLUMNS,
        table(["action", "phase", "scope", "at a replacement", "needs"], rows),
    ]
    for name, action in own.items():
        parts += [f"## {name}", action.summary, fields_of(action)]
    return "\n\n".join(parts)


# --- commands ---------------------------------------------------------------------------------------------------------


def options_of(command: click.Command) -> str:
    """The table of a command's options; no text when it has none."""
    rows = []
    for each in command.params:
        if isinstance(each, click.Option) and not each.hidden:
            names = ", ".join(f"`{name}`" for name in each.opts) + (f" {each.metavar}" if each.metavar else "")
            default = f" Default: `{each.default}`." if each.show_default and each.default is not None else ""
            rows.append([names, (each.help or "") + default])
    return table(["option", "meaning"], rows) if rows else ""


def command_part(name: str) -> list[str]:
    """All about one command."""
    command = cli.commands[name]
    context = click.Context(command, info_name=f"flaskd {name}")
    text = inspect.cleandoc(command.help or "").replace("\b\n", "").replace("``", "`")
    width = max(map(len, examples(name)), default=0)
    shown = "\n".join(f"{line.ljust(width)}   # {what}" for line, what in examples(name).items())
    usage = command.get_usage(context).removeprefix("Usage: ")
    blocks = [f"### {name}", f"`{' '.join(usage.split())}`", text, options_of(command)]
    return [*filter(None, blocks), *([f"```sh\n{shown}\n```"] if shown else [])]


def commands() -> str:
    """The page of the commands in a shell."""
    parts = ["# Commands", NOTE, _COMMANDS]
    for group, names in GROUPS.items():
        parts += [f"## {group}", *[part for name in names for part in command_part(name)]]
    return "\n\n".join(parts)


def control() -> str:
    """The page of the control commands."""
    rows = (
        [f"`{verb.usage(name)}`", str(verb.role), "yes" if verb.changes else "", verb.summary]
        for name, verb in VERBS.items()
    )
    flags = ([f"`{name}`", text] for name, text in FLAGS.items())
    return "\n\n".join(
        [
            "# Control commands",
            NOTE,
            _CONTROL,
            table(["command", "role", "changes something", "meaning"], rows),
            "A word in brackets may be left out.",
            table(["flag", "meaning"], flags),
        ]
    )


# --- exit codes -------------------------------------------------------------------------------------------------------


def all_errors() -> list[type[errors.FlaskdError]]:
    """The classes of flaskd's errors that have an exit code of their own meaning."""
    found = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, errors.FlaskdError)]
    return sorted((each for each in found if each is not errors.FlaskdError), key=lambda each: each.exit_code)


def exit_codes() -> str:
    """The page of the exit codes."""
    rows = [
        [f"{each.exit_code}", f"`{each.code}`", _EXIT.sub("", sentence(each.__doc__ or ""))] for each in all_errors()
    ]
    return "\n\n".join(
        [
            "# Exit codes",
            NOTE,
            _EXIT_CODES,
            table(
                ["exit", "code", "meaning"],
                [
                    [f"{errors.EX_OK}", "", "All went well. Of `flaskd serve`: it was stopped, and no work was cut."],
                    [
                        f"{errors.EX_LOST}",
                        "`failed`",
                        "A `drain --wait` or `stop --wait` saw that work was lost; or an unexpected failure.",
                    ],
                    *rows,
                    ["128 + N", "", "`flaskd serve` was ended at once by the third signal, of the number N."],
                ],
            ),
            _DEGRADED,
        ]
    )


# --- metrics ----------------------------------------------------------------------------------------------------------


def a_moment() -> Snapshot:
    """What the metrics are made of, of a daemon that has workers and has done nothing."""
    last = {"completed": 0, "rejected": 0, "cut": [], "took": 1.0, "policies": {}}
    return Snapshot(
        name="flaskd", state=State.READY, since=0, age=0, started=0, uptime=0, reason=None, app=None, threads=4,
        serving=ServingSnapshot(wanted=1), held=Held(last_stop=last), log_level="info", config=None, counts=Counts(),
    )  # fmt: skip


def prometheus() -> str:
    """The page of the metrics."""
    rows = []
    for family in metrics.families(a_moment()):
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = family._labelnames or (("version", "instance") if family.type == "info" else ())  # noqa: SLF001
        rows.append([f"`{name}`", family.type, ", ".join(f"`{each}`" for each in labels), family.documentation])
    bounds = ", ".join(f"{each:g}" for each in BOUNDS)
    return "\n\n".join(
        [
            "# Metrics",
            NOTE,
            _METRICS,
            table(["metric", "type", "labels", "meaning"], rows),
            f"The buckets of both histograms end at {bounds} seconds.",
            _LABELS.format(states=", ".join(f"`{each}`" for each in State)),
        ]
    )


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "actions.md": actions,
    "commands.md": commands,
    "control.md": control,
    "exit-codes.md": exit_codes,
    "metrics.md": prometheus,
}


def main() -> None:
    """Write all pages."""
    directory = Path(sys.argv[1]) if sys.argv[1:] else HERE
    directory.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (directory / name).write_text(page() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
