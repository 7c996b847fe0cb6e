"""How answers look to people: plain text, with colour and a bar where there is a terminal."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import click

from flaskd import text
from flaskd.errors import CannotCreateError
from flaskd.present import (
    account_lines,
    as_text,
    outcome,
    record_lines,
    recycled_words,
    request_lines,
    step_line,
    thread_lines,
    worker_lines,
)
from flaskd.units import format_duration

_GREEN, _YELLOW, _RED, _DIM = "32", "33", "31", "2"
_COLOURS = {
    "ready": _GREEN, "reloading": _GREEN, "starting": _YELLOW, "draining": _YELLOW, "drained": _YELLOW,
    "stopping": _YELLOW, "ok": _GREEN, "failed": _RED, "timed_out": _RED,
}  # fmt: skip
_TENTHS = 10.0
"""Seconds below which tenths of them matter to people."""


def say(text: str) -> None:
    """Write an answer to standard output; raises CannotCreateError where it cannot go, and BrokenPipeError."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_what_cannot_be_written()
        raise CannotCreateError(f"cannot write the answer: {error.strerror}") from error


def discard_what_cannot_be_written() -> bool:
    """Let what is left in a standard stream's buffer go nowhere, where it cannot go where it should.

    It would fail once more at the exit, whose code would then be 120 (Py_FinalizeEx). Whether there was any.
    """
    discarded = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            discarded = True
        except (ValueError, AttributeError):  # closed, or never there
            pass
    return discarded


def escape_what_cannot_be_encoded(errors: str) -> None:
    """Let standard output take any text, where its encoding has not every character (`errors`: codecs).

    What has been done is done: an outcome that cannot be written down must not look like one that failed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=errors)


def drawable(wanted: str, instead: str, stream: TextIO | None = None) -> str:
    """What to draw with on a stream, standard output if none is given: `instead` where its encoding lacks `wanted`."""
    try:
        wanted.encode((sys.stdout if stream is None else stream).encoding or "ascii")
    except UnicodeEncodeError:
        return instead
    return wanted


def for_programs(answer: Mapping[str, Any]) -> str:
    """An answer for programs, in ASCII alone where standard output may not have all other characters."""
    return json.dumps(answer, ensure_ascii=codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8")


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Put text in a colour (SGR, ECMA-48), where the stream is a terminal and $NO_COLOR is not set."""
    stream = sys.stdout if stream is None else stream
    if not colour or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def state(word: str) -> str:
    """A state in its colour."""
    return coloured(word, _COLOURS.get(word, ""))


_IN_LINES = {"stack", "yaml", "text"}
"""Fields of answers that have several lines."""


def made_printable(value: Any, key: str = "") -> Any:
    """A field of an answer, with all in it, as it can be shown: what the app or a client named paints no terminal."""
    if isinstance(value, str):
        return "\n".join(text.lines(value)) if key in _IN_LINES else text.escaped(value)
    if isinstance(value, list):
        return [made_printable(each, key) for each in value]
    if isinstance(value, dict):
        return {made_printable(name): made_printable(each, name) for name, each in value.items()}
    return value


def answer(verb: str, fields: dict[str, Any]) -> str:
    """An answer for people."""
    page, fields = _PAGES.get(verb), made_printable(fields)
    return page(fields) if page else _outcome(fields)


def _outcome(fields: dict[str, Any]) -> str:
    result, hint = fields.pop("result"), fields.pop("hint", "")
    return "\n".join([*account_lines(fields), outcome(result, fields=fields, hint=hint)])


def status(fields: dict[str, Any]) -> str:
    """The status as a page that one reads in five seconds; what is nothing is left out."""
    none_ready = fields["state"] in {"ready", "reloading"} and fields.get("workers") and not fields["workers"]["ready"]
    heads = [
        f"{state(fields['state'])} for {short(fields['for'])}",
        coloured("but no worker is ready", _RED) if none_ready else "",
        fields.get("app"),
        f"pid {fields['pid']}",
    ]
    rows = {
        "reason": fields.get("reason"),
        "drain": _drain(fields),
        "cleanup": ", ".join(fields.get("cleanup") or []),
        "listen": ", ".join(fields["listen"]),
        "admin": ", ".join(fields.get("admin") or []),
        "agent": ", ".join(fields.get("agent") or []),
        "requests": _requests_now(fields),
        "answered": _answered(fields),
        "limits": limits(fields),
        "threads": f"{fields['busy']} of {fields['threads']} busy",
        "workers": workers_now(fields.get("workers")),
        "trouble": fields.get("trouble") and coloured(fields["trouble"], _RED),
        "connections": str(fields["connections"]),
        "background": ", ".join(map(_background, fields.get("background") or [])),
        "last reload": _last_reload(fields.get("last_reload")),
        "last stop": _last_stop(fields.get("last_stop")),
        "previous run": fields.get("previous"),
        "idle stop at": fields.get("idle_stop_at"),
        "config": fields.get("config"),
        "flaskd": _itself(fields),
    }  # fmt: skip
    shown = [(key, str(value)) for key, value in rows.items() if value]
    return "\n".join([", ".join(filter(None, heads)), *text.table(shown, indent=2, gap=1, least=12)])


def short(seconds: float) -> str:
    """Seconds as they are said: 4.1s, 12s, 3h2m5s."""
    return format_duration(float(round(seconds)) if seconds >= _TENTHS else round(seconds, 1))


def _drain(fields: dict[str, Any]) -> str:
    """Who asked for the drain, and how it is undone; nothing where there is none."""
    if not (drain := fields.get("drain")):
        return ""
    undo = "" if fields["state"] == "stopping" else '; "flaskd resume" undoes it'
    return f"asked for {drain['time']} by {drain['by']}{undo}"


def _itself(fields: dict[str, Any]) -> str:
    """Which flaskd it is, how long it has been running, and the memory of this one process."""
    if "version" not in fields:  # an older daemon
        return ""
    memory = f", {fields['memory'] >> 20} MiB" if fields.get("memory") else ""
    return f"{fields['version']}, up for {short(fields['uptime'])}{memory}"


def _background(entry: dict[str, Any]) -> str:
    if not entry["thread"]:  # a worker's, of which no more is known from here
        return str(entry["name"])
    return f"{entry['name']} (for {short(entry['age'])} in {entry['thread']})"


def _requests_now(fields: dict[str, Any]) -> str:
    text = f"{fields['in_flight']} in flight"
    if fields.get("queued"):
        text += f", {fields['queued']} of them queued"
    return text + (f"; oldest {fields['oldest']}" if fields.get("oldest") else "")


def workers_now(workers: dict[str, Any] | None) -> str:
    """The workers in a few words; nothing where there are none."""
    if not workers:
        return ""
    generations = ", ".join(map(str, workers["generations"])) or "none"
    died = f"; {workers['died']} died" if workers["died"] else ""
    recycled = recycled_words(workers.get("recycled") or {})
    ready = f"{workers['ready']} of {workers['wanted']} ready, generation {generations}{died}"
    return "; ".join(filter(None, [ready, recycled]))


def limits(fields: dict[str, Any]) -> str:
    """What the limits have done, in a few words; nothing where they did nothing."""
    return ", ".join(f"{count:,} for {limit}" for limit, count in (fields.get("limited") or {}).items())


def _answered(fields: dict[str, Any]) -> str:
    tally = fields["tally"]
    text = f"{fields['completed']:,}"
    notable = {
        "4xx": tally["statuses"]["4xx"], "5xx": tally["statuses"]["5xx"],
        **{key: tally["outcomes"][key] for key in ("rejected", "cut", "gone")},
    }  # fmt: skip
    return ", ".join([text, *(f"{count:,} {key}" for key, count in notable.items() if count)])


def _last_reload(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    return (
        f"ok, {entry['time']}" if entry["ok"] else f"{coloured('failed', _RED)}, {entry['time']}: {entry.get('fault')}"
    )


def _last_stop(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    if why := entry.get("damaged"):
        return f"cannot be read: {why}"
    counts = {"cut": entry["cut"], "not finished": entry.get("unfinished")}
    lost = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing lost"
    failed = f", {entry['failed']} cleanup steps failed" if entry["failed"] else ""
    return f"{entry['started']}, {entry['reason']}, took {format_duration(float(entry['took'] or 0))}, {lost}{failed}"


def requests(fields: dict[str, Any]) -> str:
    """Requests in flight, a line each, with the stacks that were asked for."""
    return "\n".join(request_lines(fields["requests"])) or "nothing is in flight"


def threads(fields: dict[str, Any]) -> str:
    """Threads, a line each, with the stacks that were asked for."""
    return "\n".join(thread_lines(fields["list"]))


_PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "status": status,
    "requests": requests,
    "threads": threads,
    "workers": lambda fields: "\n".join(
        worker_lines(
            [*fields["list"], *fields["templates"]],
            fields["deaths"],
            wanted=fields["wanted"],
            recycled=fields.get("recycled"),
            trouble=fields.get("trouble"),
        )
    ),
    "config": lambda fields: str(fields["yaml"]).rstrip(),
    "log-level": lambda fields: " ".join(
        filter(None, [fields["level"], f"({fields['hint']})" if "hint" in fields else ""])
    ),
    "version": lambda fields: str(fields["version"]),
    "last-stop": lambda fields: "\n".join(record_lines(fields)),
}


# --- progress -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(verb: str, *, as_json: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show how it goes: a bar on a terminal, lines elsewhere, JSON for programs. `verb` empty: there is no waiting."""
    if as_json:
        yield lambda fields: say(for_programs(fields))
    elif not verb or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda fields: _line(made_printable(fields))
    else:
        bar = Bar(verb, sys.stderr)
        try:
            yield lambda fields: bar.update(made_printable(fields))
        finally:
            bar.close()


def _line(fields: dict[str, Any]) -> None:
    oldest = fields.get("oldest")
    more = f" oldest={format_duration(oldest['age'])} {oldest['method']} {oldest['path']}" if oldest else ""
    click.echo(f".. {as_text({key: value for key, value in fields.items() if key != 'event'})}{more}", err=True)


_DOING = {
    "drain": "draining", "stop": "stopping", "resume": "resuming", "reload": "reloading", "scale": "scaling",
    "restart": "restarting",
}  # fmt: skip
_REDRAW = 0.2
"""Seconds."""
_BAR, _SHORT_BAR, _NARROW = 20, 6, 70
"""Characters of the bar, and of the terminal below which it is short."""


class Bar:
    """One line that tells how a drain or stop goes; each cleanup step that is over stands above it, for good."""

    def __init__(self, verb: str, stream: TextIO) -> None:
        self._stream = stream
        self._doing = _DOING.get(verb, verb)
        self._began = time.monotonic()
        self._fields: dict[str, Any] = {}
        self._heard = self._began
        self._most = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._full, self._empty, self._good, self._bad = tuple(drawable("█░✓✗", "#-+!", stream))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def update(self, fields: dict[str, Any]) -> None:
        """Take in a progress event."""
        with self._lock:
            if "policy" in fields:
                good = fields["fate"] == "ok"
                mark = coloured(self._good if good else self._bad, _COLOURS.get(fields["fate"], _DIM), self._stream)
                self._write(f"\r\x1b[K  {mark} {step_line(fields['policy'], fields)}\n")
                self._draw()
                return
            before = self._fields, self._heard, self._most
            self._fields, self._heard = fields, time.monotonic()
            try:
                self._most = max(self._most, fields.get("in_flight", 0))
                self._draw()
            except Exception:  # what cannot be drawn is not drawn again by the thread
                self._fields, self._heard, self._most = before
                raise

    def _run(self) -> None:
        while not self._over.wait(_REDRAW):
            with self._lock:
                self._draw()

    def text(self, width: int = 80) -> str:
        """The line, without colour, for a terminal of so many characters."""
        size = _BAR if width >= _NARROW else _SHORT_BAR
        now = time.monotonic()
        left = self._fields.get("in_flight", 0)
        done = round(size * (self._most - left) / self._most) if self._most else size
        bar = self._full * done + self._empty * (size - done)
        text = f"{self._doing} {bar} {short(now - self._began)}"
        if not self._fields:
            return f"{self._doing} ..."
        text += f", {left} in flight"
        if oldest := self._fields.get("oldest"):
            age = short(oldest["age"] + now - self._heard)
            text += f", oldest {age} {oldest['method']} {oldest['path']}"
        if background := self._fields.get("background"):
            text += f", {background} in the background"
        if cleanup := self._fields.get("cleanup"):
            text += f"; cleanup: {', '.join(cleanup)}"
        return text

    def _draw(self) -> None:
        width = self._columns() - 1
        text = self.text(width)
        self._write("\r\x1b[K" + (text if len(text) <= width else text[: max(0, width - 3)] + "..."))

    def _columns(self) -> int:
        """Of the bar's own terminal: standard output may go elsewhere, and is not asked."""
        with contextlib.suppress(OSError, ValueError):  # no descriptor
            if columns := os.get_terminal_size(self._stream.fileno()).columns:
                return columns
        from shutil import get_terminal_size  # noqa: PLC0415 - seldom needed

        return get_terminal_size().columns

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that went away costs the picture
            self._stream.write(text)
            self._stream.flush()

    def close(self) -> None:
        """Take the line away."""
        self._over.set()
        self._thread.join()
        self._write("\r\x1b[K")
