"""``flaskd init``: writes a commented flaskd.yaml for the app in this directory, or from another server's settings."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flaskd.cli import show
from flaskd.cli.python_values import Filled, Setting, read
from flaskd.cli.translation import Translation, flask_run, gunicorn, waitress
from flaskd.errors import CannotCreateError, UsageError
from flaskd.text import quoted

if TYPE_CHECKING:
    from flaskd.config.settings import Settings

_SHOWN = (
    "app.target", "server.listen", "server.workers", "server.threads", "server.request_timeout", "server.trusted_proxy",
    "server.trusted_proxy_headers", "pool.max_requests", "log.level", "log.access", "health.path", "admin.listen",
    "shutdown.deadline", "shutdown.drain.timeout",
)  # fmt: skip
"""Keys that are shown as comments with their defaults if they have no value."""
_HEAD = """\
# flaskd.yaml: how flaskd serves this app. "flaskd check" finds faults, "flaskd serve" starts it.
# A key behind a # has the value that is shown there; "flaskd schema" tells all others.
"""
_LONGEST = 1 << 20
"""How many bytes of a module are searched for the app."""


def init(source: str | None, place: str, *, force: bool) -> None:
    """Write a configuration to a file, or to standard output if the file is ``-``."""
    done = translated(source) if source else _found_app()
    text = valid(done)
    if place == "-":
        show.say(text.removesuffix("\n"))
    else:
        path = Path(place)
        try:
            with path.open("w" if force else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise UsageError(
                f"cannot write {path}: it is there already; --force overwrites it, - shows what it would be"
            ) from error
        except OSError as error:
            raise CannotCreateError(f"cannot write {path}: {error.strerror}") from error
    for note in done.notes:
        click.echo(f"flaskd: {note}", err=True)
    if place != "-":
        click.echo(f'flaskd: wrote {place}; next: "flaskd check", then "flaskd serve"', err=True)


# --- where it comes from --------------------------------------------------------------------------------------------


def _found_app() -> Translation:
    done = Translation()
    for path in _modules():
        if (name := _app_in(path)) and str(path) not in {"wsgi.py", "app.py"}:
            module = path.with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
            done.put("app.target", f"{module}:{name}", f"found in {path}")
        if name:
            break
    return done


def _modules() -> Iterator[Path]:
    """The files that may contain an app, first those that flaskd itself looks for."""
    yield from (
        path for path in map(Path, ("wsgi.py", "app.py", "application.py", "main.py", "server.py")) if path.is_file()
    )
    for pattern in ("*/wsgi.py", "*/app.py", "*/__init__.py"):
        yield from sorted(path for path in Path().glob(pattern) if path.parent.name.isidentifier())


def _app_in(path: Path) -> str:
    """The name of a module's app or factory; empty if it has none."""
    try:
        if path.stat().st_size > _LONGEST:
            return ""
        found = read(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ""
    for name in ("application", "app"):
        if name in found.settings:
            return name
    return next((f"{name}()" for name in ("create_app", "make_app") if name in found.functions), "")


def translated(source: str) -> Translation:
    """The settings of a gunicorn configuration file, or of a server's command line, translated."""
    if os.path.isfile(source) or source.endswith(".py"):  # noqa: PTH113 - Path raises for a line that is too long
        return _from_file(Path(source), {})
    try:
        words = shlex.split(source)
    except ValueError as error:
        raise UsageError(f"cannot read {quoted(source)}: {error}") from error
    while words and (words[0] in {"exec", "env"} or re.match(r"\w+=", words[0])):
        del words[0]
    if len(words) > 1 and re.fullmatch(r"python[0-9.]*", Path(words[0]).name) and words[1] == "-m":
        del words[:2]
    server, *rest = words or [""]
    match Path(server).name:
        case "gunicorn":
            return _from_gunicorn(rest)
        case "waitress-serve" | "waitress":
            return waitress(_options(rest, _WAITRESS_FLAGS, several={"listen", "unix-socket"}), "--{}".format)
        case "flask":
            return flask_run(_options([each for each in rest if each != "run"], {"debug", "reload"}), "--{}".format)
        case "uvicorn" | "hypercorn" | "daphne":
            raise UsageError(f"cannot translate {quoted(server)}: it serves ASGI apps, flaskd serves WSGI apps")
    raise UsageError(
        f"cannot translate {quoted(source)}: expected a gunicorn.conf.py that is there, or a command line of gunicorn, "
        "waitress-serve or flask run"
    )


def _from_file(path: Path, over: dict[str, Setting]) -> Translation:
    try:
        found = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except SyntaxError as error:
        raise UsageError(f"cannot read {path}: {error.msg}, line {error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error

    def where(name: str, line: int) -> str:
        return f"{path}:{line} {name}" if line else _option(name, line)

    return gunicorn({**found.settings, **over}, where, found.functions)


_GUNICORN_SHORT = {
    "b": "bind", "w": "workers", "k": "worker-class", "t": "timeout", "c": "config", "p": "pid", "D": "daemon",
    "u": "user", "g": "group", "m": "umask", "e": "env", "n": "name", "R": "enable-stdio-inheritance",
}  # fmt: skip
_GUNICORN_NAMES = {
    "access-logfile": "accesslog", "access-logformat": "access_log_format", "error-logfile": "errorlog",
    "keep-alive": "keepalive", "log-file": "errorlog", "log-level": "loglevel", "log-config": "logconfig",
    "preload": "preload_app", "pid": "pidfile", "name": "proc_name", "env": "raw_env", "no-sendfile": "sendfile",
    "log-syslog": "syslog", "app": "wsgi_app",
}  # fmt: skip
_GUNICORN_FLAGS = {
    "daemon", "preload", "reload", "check-config", "print-config", "spew", "capture-output", "enable-stdio-inheritance",
    "initgroups", "reuse-port", "no-sendfile", "log-syslog",
}  # fmt: skip

_WAITRESS_FLAGS = {
    "call", "asyncore-use-poll", "expose-tracebacks", "clear-untrusted-proxy-headers", "log-untrusted-proxy-headers",
    "log-socket-errors", "ipv4", "ipv6",
}  # fmt: skip


def _option(name: str, _line: int) -> str:
    """The command line option for a setting of gunicorn."""
    options = {setting: option for option, setting in _GUNICORN_NAMES.items()}
    return "the app" if name == "wsgi_app" else f"--{options.get(name, name.replace('_', '-'))}"


def _from_gunicorn(words: list[str]) -> Translation:
    options = _options(words, _GUNICORN_FLAGS, short=_GUNICORN_SHORT, several={"bind", "env"})
    settings = {
        _GUNICORN_NAMES.get(name, name.replace("-", "_")): Setting(0, value)
        for name, value in options.items()
        if name != "config"
    }
    path = Path(str(options.get("config", "gunicorn.conf.py")).removeprefix("file:"))
    if "config" in options or path.is_file():  # gunicorn reads that file by itself
        return _from_file(path, settings)
    return gunicorn(settings, _option, {})


def _options(
    words: list[str], flags: set[str], *, short: dict[str, str] | None = None, several: set[str] | None = None
) -> dict[str, Any]:
    """The options of a command line by their names without dashes; other words are the ``app``."""
    short, several = short or {"h": "host", "p": "port", "A": "app"}, several or set()
    found: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
        elif word.startswith("-") and len(word) > 1:
            name, value = short.get(word[1], word[1]), word[2:].removeprefix("=")
            equals = value
        else:
            found.setdefault("app", word)
            continue
        if name in flags or name.startswith("no-"):
            found[name] = True
            continue
        if not equals:
            if not left:
                raise UsageError(f'cannot translate: "{word}" has no value')
            value = left.pop(0)
        if name in several:
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found


# --- what it becomes ------------------------------------------------------------------------------------------------


def valid(done: Translation) -> str:
    """The configuration file as text that passes a check; values that fail are left out and noted."""
    from flaskd.config import InvalidConfigError, load  # noqa: PLC0415 - only here

    while True:
        text = rendered(done)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            try:
                load(Path(file.name), actions={})
            except InvalidConfigError as error:
                wrong = {key: each.message for each in error.faults for key in done.values if each.key.startswith(key)}
                if not wrong:
                    raise
            else:
                return text
        for key, why in wrong.items():
            done.drop(key, why)


def rendered(done: Translation) -> str:
    """The configuration file as text: found or translated values, and usual keys with their defaults as comments."""
    from flaskd.config.model import Config  # noqa: PLC0415 - only here

    lines = [*_HEAD.splitlines(), "", "version: 1"]
    for name, each in Config.model_fields.items():
        if isinstance(kind := each.annotation, type) and name not in {"cleanup", "version"} and _is_section(kind):
            lines += _section(kind, (name,), done)
    if done.notes:
        lines += ["", "# What has no equivalent, or is different:", *(f"#   {note}" for note in done.notes)]
    return "\n".join(lines) + "\n"


def _is_section(kind: type) -> bool:
    return hasattr(kind, "model_fields")


def _section(kind: type[Settings], path: tuple[str, ...], done: Translation) -> list[str]:
    indent = "  " * len(path)
    lines = []
    for name, each in kind.model_fields.items():
        key = ".".join((*path, name))
        if isinstance(each.annotation, type) and _is_section(each.annotation):
            lines += _section(each.annotation, (*path, name), done)
        elif key in done.values:
            lines.append(f"{indent}{name}: {written(done.values[key])}  # {done.origins[key]}")
        elif key in _SHOWN:
            default = each.make_default()
            value = "null" if default is None else written(each.kind.write(default))
            lines.append(f"{indent}# {name}: {value}  # {each.description}")
    head = f"{indent[2:]}{path[-1]}:"
    return [*([""] if len(path) == 1 else []), head, *lines] if lines else []


def written(value: Any) -> str:
    """A value as YAML."""
    if isinstance(value, list):
        return "[" + ", ".join(written(each) if not isinstance(each, Filled) else _quoted(each) for each in value) + "]"
    if isinstance(value, Filled):  # without quotes if possible, so that a number stays one
        plain = value.isprintable() and re.match(r"[\w./$]", value) and not re.search(r": | #|[\s:]$", value)
        return str(value) if plain else _quoted(value)
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value) and not re.fullmatch(
            r"null|true|false|yes|no|on|[0-9.e_-]+|0[xo].*", value, re.IGNORECASE
        )
        return value if plain else _quoted(value.replace("${", "$${"))
    return json.dumps(value)


def _quoted(text: str) -> str:
    """Text in YAML's double quotes, with escapes for what YAML takes for a line break or does not take at all."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]", lambda each: f"\\u{ord(each[0]):04x}", quoted)
