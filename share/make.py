"""Write the man pages and the completions of this directory from the code: verbs, model, actions, errors.

    .venv/bin/python share/make.py [DIRECTORY]

DIRECTORY is where they go, this directory if none is given; it is laid out as PREFIX/share is. The wheel takes them
from here, and `tests/test_share.py` compares what would be written with what is here.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from flaskd import errors
from flaskd.cleanup import ACTIONS, action_specs
from flaskd.cli import cli
from flaskd.cli.completion import SHELLS, script
from flaskd.cli.pages import GROUPS, examples
from flaskd.config import schema
from flaskd.config.cleanup_model import Policy
from flaskd.config.model import Config
from flaskd.config.settings import Field, Settings
from flaskd.version import __version__

HERE = Path(__file__).resolve().parent
COMPLETIONS = {
    "bash": "bash-completion/completions/flaskd",
    "zsh": "zsh/site-functions/_flaskd",
    "fish": "fish/vendor_completions.d/flaskd.fish",
}

ENVIRONMENT = {
    "FLASKD_CONFIG": "The configuration file, where -c names none.",
    "FLASKD_CONTROL": "The control socket of the daemon that is meant, where --socket and --name name none.",
    "XDG_RUNTIME_DIR": "Where daemons of a user have their runtime directories; RUNTIME_DIRECTORY comes first.",
    "XDG_STATE_HOME": "Where daemons of a user have their state directories; STATE_DIRECTORY comes first.",
    "CREDENTIALS_DIRECTORY": "Where ${cred:NAME} of the configuration is looked up; systemd sets it.",
    "LISTEN_FDS": "Sockets that were passed in (sd_listen_fds(3)).",
    "NOTIFY_SOCKET": "Where flaskd says how it is (sd_notify(3)).",
    "JOURNAL_STREAM": "Whether standard error is the journal: then log.format: auto writes fields.",
}

SIGNALS = {
    "SIGTERM, SIGINT, SIGQUIT": "Stop in good order; another one cuts the drain and the cleanup short.",
    "SIGHUP": "Read the configuration again; with workers take new code, too.",
}

FILES = {
    "./flaskd.yaml": "The configuration, where neither -c nor FLASKD_CONFIG names one; see flaskd.yaml(5).",
    "/run/NAME/control.sock, $XDG_RUNTIME_DIR/NAME/control.sock": "The control socket of the daemon NAME.",
    "/run/NAME/control, $XDG_RUNTIME_DIR/NAME/control": "The FIFO beside it, which takes verbs as lines.",
}

FORMAT = """\
The file is YAML, of at most 256 KiB. Words such as no and on are text, as in YAML 1.2; anchors, aliases and tags are \
refused. Each key may be left out, and has its default then. "flaskd check" finds all faults of a file and says where \
they are; "flaskd config" tells which values are in force, and where each came from; "flaskd schema" prints the JSON \
Schema.

A DURATION has a unit: 250ms, 1.5s, 2m, 1h30m, 1d. A SIZE has one, too, or is a number of bytes: 64MiB, 10kB, 1048576. \
Of what may be a LIST, a single entry may be written without brackets. Any single value may have ${env:NAME}, \
${env:NAME:-default}, ${file:PATH} or ${cred:NAME} in it, which are filled in and not shown again; a plain ${ is $${.

"Restart" behind a key says that a reload cannot change it, "new workers" that a reload replaces the workers for it; \
all other keys are changed by a reload: "flaskd reload", SIGHUP, or a saved edit with watch: true."""


# --- roff -------------------------------------------------------------------------------------------------------------


def roff(text: str) -> str:
    """Text as roff has it (groff_man(7)): nothing in it is an instruction, and a hyphen can be copied."""
    for char, written in ("\\", "\\e"), ("-", "\\-"), ("'", "\\(aq"), ("^", "\\(ha"), ("~", "\\(ti"), ("`", "\\(ga"):
        text = text.replace(char, written)
    return f"\\&{text}" if text.startswith(".") else text


def paragraphs(text: str, between: str = ".PP") -> str:
    """A docstring's paragraphs; what is in backticks stands out."""
    found = [" ".join(each.split()) for each in inspect.cleandoc(text).replace("\b", "").split("\n\n")]
    return f"\n{between}\n".join(
        re.sub(r"\\\(ga(.+?)\\\(ga", r"\\fB\1\\fR", roff(each.replace("``", "`"))) for each in found
    )


def entry(head: str, *texts: str) -> str:
    """A term with what is said of it."""
    return "\n".join([".TP", head, *filter(None, texts)])


def bold(text: str) -> str:
    """What is typed as it is."""
    return f"\\fB{roff(text)}\\fR"


def inside(parts: Iterator[str]) -> str:
    """Entries that belong to the one before."""
    text = "\n".join(parts)
    return f".RS\n{text}\n.RE" if text else ""


def head(name: str, section: int, title: str, about: str) -> str:
    """The first lines of a page."""
    note = '.\\" Written by share/make.py; change the code, and run it.'
    return "\n".join(
        [
            note,
            f'.TH "{name.upper()}" "{section}" "" "flaskd {__version__}" "{title}"',
            f".SH NAME\n{roff(name)} \\- {roff(about)}",
        ]
    )


def typed(lines: dict[str, str]) -> str:
    """Command lines, with what they do behind a #."""
    width = max(map(len, lines))
    return "\n".join([".EX", *(roff(f"{line.ljust(width)}   # {what}") for line, what in lines.items()), ".EE"])


def table_of(title: str, rows: dict[str, str]) -> str:
    """A section of terms."""
    return "\n".join([f".SH {title}", *(entry(bold(name), roff(text)) for name, text in rows.items())])


# --- flaskd(1) --------------------------------------------------------------------------------------------------------


def options_of(command: click.Command) -> list[click.Option]:
    """The options of a verb."""
    return [each for each in command.params if isinstance(each, click.Option) and not each.hidden]


def _told_once() -> dict[str, str]:
    """Options that most verbs have, with what they do."""
    count = Counter(
        (each.opts[0], each.help or "") for command in cli.commands.values() for each in options_of(command)
    )
    return {name: text for (name, text), times in count.items() if times > len(cli.commands) / 3}


def option(each: click.Option) -> str:
    """An option with its value, and what it does."""
    names = ", ".join(map(bold, each.opts)) + (f" \\fI{roff(each.metavar)}\\fR" if each.metavar else "")
    default = f" Default: {each.default}." if each.show_default and each.default is not None else ""
    return entry(names, roff((each.help or "") + default))


def verb(name: str) -> str:
    """All about one verb."""
    command = cli.commands[name]
    usage = click.Context(command, info_name=f"flaskd {name}").command.collect_usage_pieces(click.Context(command))
    call = " ".join([bold(f"flaskd {name}"), *(f"\\fI{roff(each)}\\fR" for each in usage)])
    own = (each for each in options_of(command) if _told_once().get(each.opts[0]) != each.help)
    shown = f".IP\n{typed(examples(name))}" if examples(name) else ""
    return entry(call, paragraphs(command.help or "", ".IP"), inside(map(option, own)), shown)


def exit_codes() -> dict[str, str]:
    """Each exit code with what it means."""
    kinds = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.FlaskdError)]
    found: dict[int, list[str]] = {
        0: ["It is done, and no work was lost."],
        1: ["Work was lost in a drain or a stop, or something failed."],
    }
    for each in kinds:
        said = " ".join(inspect.cleandoc(each.__doc__ or "").split("\n\n")[0].split())
        if (code := each.exit_code) != 1:
            found.setdefault(code, []).append(re.sub(r" \(exit \d+\)", "", said))
    return {str(code): " ".join(said) for code, said in sorted(found.items())}


def flaskd_1() -> str:
    """The page of the command."""
    parts = [
        head("flaskd", 1, "User Commands", "serve a Flask app, and stop it without losing a request"),
        f".SH SYNOPSIS\n{bold('flaskd serve')} [\\fIOPTIONS\\fR] [\\fIAPP\\fR]",
        f".br\n{bold('flaskd')} \\fIVERB\\fR [\\fIOPTIONS\\fR]",
        ".SH DESCRIPTION",
        paragraphs(
            "flaskd serves a Flask app, or any WSGI callable, through Waitress, with threads and, if asked to, with "
            "worker processes. It drains: it takes no new work, and finishes what is in hand. It cleans up after the "
            "app, and stops within a deadline. All verbs but serve talk to a daemon that runs, over its control "
            "socket, or look at files.\n\nWithout a verb it prints its help."
        ),
        ".SH VERBS",
    ]
    for title, names in GROUPS.items():
        parts += [f'.SS "{title}"', *map(verb, names)]
    common = {each.opts[0]: each for command in cli.commands.values() for each in options_of(command)
              if _told_once().get(each.opts[0]) == each.help}  # fmt: skip
    parts += [
        ".SH OPTIONS OF MOST VERBS",
        *map(option, common.values()),
        entry(f"{bold('-h')}, {bold('--help')}", "Say what a verb does, and which options it has."),
        table_of("EXIT STATUS", exit_codes()),
        table_of("SIGNALS", SIGNALS),
        table_of("ENVIRONMENT", ENVIRONMENT),
        table_of("FILES", FILES),
        ".SH EXAMPLES",
        typed(examples("")),
        ".SH SEE ALSO\n.BR flaskd.yaml (5),\n.BR systemd.service (5),\n.BR sd_notify (3)",
    ]
    return "\n".join(parts) + "\n"


# --- flaskd.yaml(5) ---------------------------------------------------------------------------------------------------


def values(part: dict[str, Any], whole: dict[str, Any]) -> str:
    """What a value may be, from its JSON Schema."""
    if "$ref" in part:
        return values(whole["$defs"][part["$ref"].removeprefix("#/$defs/")], whole)
    if part == whole["$defs"]["Policy"]["properties"]["use"]:
        return "action"
    if unit := part.get("unit"):
        return str(unit)
    if choices := part.get("enum") or [each for each in [part.get("const")] if each is not None]:
        return ", ".join(map(str, choices))
    if "anyOf" in part:
        in_any_case = "^(["
        several = (each for each in part["anyOf"] if not each.get("pattern", "").startswith(in_any_case))
        found = [values(each, whole) for each in several]
        found = ["a list" if each == f"list of {found[0]}" else each for each in found]
        return " or ".join(dict.fromkeys(each for each in found if each not in {"", "null"}))
    given = part.get("type")
    given = given[0] if isinstance(given, list) else given
    if given == "array":
        return f"list of {values(part['items'], whole)}".removesuffix(" of ")
    names = {"null": "null", "string": "text", "boolean": "true, false", "integer": "number", "object": "mapping"}
    return names.get(str(given), "" if part.keys() == {"pattern"} else "anything")


def key(path: str, each: Field, part: dict[str, Any], whole: dict[str, Any]) -> str:
    """A key: what its value may be, what it is by default, what it is for."""
    value = None if each.is_required() or not each.told else each.make_default()
    written = None if value is None else each.kind.write(value)
    shown = written if isinstance(written, str) else json.dumps(written)
    default = f" Default: {shown}." if written not in (None, "", [], {}) else " Required." if each.is_required() else ""
    changed = "New workers." if each.renewal else "Restart." if each.restart else ""
    about = f"\\fI{roff(values(part, whole))}\\fR"
    return entry(f"{bold(path)} ({about})", paragraphs(f"{each.description}{roff('') + default} {changed}".strip()))


def section(settings: type[Settings], path: str, whole: dict[str, Any]) -> Iterator[str]:
    """The keys of a section, then those of the sections in it."""
    known = whole if settings is Config else whole["$defs"][settings.__name__]
    inner = []
    for each in settings.model_fields.values():
        name = f"{path}{each.key}"
        kind = each.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            inner.append((f"{name}.", kind))
        else:
            yield key(name, each, known["properties"][each.key], whole)
    for name, kind in inner:
        yield f'.SS "{name.removesuffix(".")}"'
        yield paragraphs(kind.__doc__ or "")
        yield from section(kind, name, whole)


def action(name: str, whole: dict[str, Any]) -> str:
    """An action with its fields."""
    fields = ACTIONS[name].fields
    known = whole["$defs"][fields.__name__]["properties"] if fields.model_fields else {}
    own = (
        key(each.key, each, known[each.key], whole) for each in fields.model_fields.values() if isinstance(each, Field)
    )
    return entry(bold(name), paragraphs(f"{ACTIONS[name].summary} Phase: {ACTIONS[name].default_phase}."), inside(own))


def flaskd_yaml_5() -> str:
    """The page of the configuration file."""
    own = {name: spec for name, spec in action_specs().items() if issubclass(spec.fields, Settings)}
    whole = schema(own)
    parts = [
        head("flaskd.yaml", 5, "File Formats", "configuration of flaskd"),
        f".SH SYNOPSIS\n.I ./flaskd.yaml\n.br\n.I $FLASKD_CONFIG\n.br\n{bold('flaskd serve -c')} \\fIFILE\\fR",
        ".SH DESCRIPTION",
        paragraphs(FORMAT),
        ".SH KEYS",
        *section(Config, "", whole),
        '.SS "cleanup.policies.NAME"',
        paragraphs("What is done at a stop, after the drain; NAME is chosen freely."),
        *section(Policy, "cleanup.policies.NAME.", whole),
        ".SH ACTIONS",
        paragraphs("What a policy can use, with the fields that stand under its with:"),
        *(action(name, whole) for name in sorted(own)),
        ".SH EXAMPLE",
        f".EX\n{chr(10).join(map(roff, yaml.safe_dump(whole['examples'][0], sort_keys=False).splitlines()))}\n.EE",
        ".SH SEE ALSO\n.BR flaskd (1)",
    ]
    return "\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """All files of this directory that are written, by their names in it."""
    completions = {COMPLETIONS[shell]: script(shell) + "\n" for shell in SHELLS}
    return {"man/man1/flaskd.1": flaskd_1(), "man/man5/flaskd.yaml.5": flaskd_yaml_5(), **completions}


if __name__ == "__main__":
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, text in pages().items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_text(text)
