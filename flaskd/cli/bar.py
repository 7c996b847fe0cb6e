"""Shows the progress of a drain, a stop or a reload to a waiting user: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import click

from flaskd.cli import show
from flaskd.present import as_text, step_line
from flaskd.units import format_duration


@contextlib.contextmanager
def progress(verb: str, *, as_json: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show progress: a bar on a terminal, lines elsewhere, JSON for programs. Without `verb` nothing is waited for."""
    if as_json:
        yield lambda fields: show.say(show.for_programs(fields))
    elif not verb or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda fields: _line(show.made_printable(fields))
    else:
        bar = Bar(verb, sys.stderr)
        try:
            yield lambda fields: bar.update(show.made_printable(fields))
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
"""Seconds between two drawings of the bar."""
_BAR, _SHORT_BAR, _NARROW = 20, 6, 70
"""The lengths of the bar in characters, and the width of a terminal below which it is short."""


class Bar:
    """One line that shows the progress of a drain or stop; finished cleanup steps are written above it."""

    def __init__(self, verb: str, stream: TextIO) -> None:
        self._stream = stream
        self._doing = _DOING.get(verb, verb)
        self._began = time.monotonic()
        self._fields: dict[str, Any] = {}
        self._heard = self._began
        self._most = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._full, self._empty, self._good, self._bad = tuple(show.drawable("█░✓✗", "#-+!", stream))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def update(self, fields: dict[str, Any]) -> None:
        """Show a progress event."""
        with self._lock:
            if "policy" in fields:
                if running := self._fields.get("cleanup"):
                    self._fields = {**self._fields, "cleanup": [each for each in running if each != fields["policy"]]}
                good = fields["fate"] == "ok"
                mark = show.coloured(
                    self._good if good else self._bad, show.COLOURS.get(fields["fate"], show.DIM), self._stream
                )
                self._write(f"\r\x1b[K  {mark} {step_line(fields['policy'], fields)}\n")
                self._draw()
                return
            before = self._fields, self._heard, self._most
            self._fields, self._heard = fields, time.monotonic()
            try:
                self._most = max(self._most, fields.get("in_flight", 0))
                self._draw()
            except Exception:  # if drawing fails, the thread ends
                self._fields, self._heard, self._most = before
                raise

    def _run(self) -> None:
        while not self._over.wait(_REDRAW):
            with self._lock:
                self._draw()

    def text(self, width: int = 80) -> str:
        """The line for a terminal of this width, without colour."""
        now = time.monotonic()
        if not self._fields:
            return f"{self._doing} ..."
        if starting := self._fields.get("starting"):
            bar, what = "", f"{starting} worker{'s' if starting > 1 else ''} starting"
        else:
            bar, what = self._bar(_BAR if width >= _NARROW else _SHORT_BAR), self._in_hand(now - self._heard)
        text = f"{self._doing} {bar}{show.short(now - self._began)}"
        if (left := self._fields.get("left")) is not None:
            text += f", at most {show.short(max(0.0, float(math.ceil(left - (now - self._heard)))))} left"
        return f"{text}, {what}"

    def _bar(self, size: int) -> str:
        done = round(size * (self._most - self._fields.get("in_flight", 0)) / self._most) if self._most else size
        return f"{self._full * done + self._empty * (size - done)} "

    def _in_hand(self, since: float) -> str:
        """What is in flight, as it was reported `since` seconds ago."""
        text = f"{self._fields.get('in_flight', 0)} in flight"
        if oldest := self._fields.get("oldest"):
            text += f", oldest {show.short(oldest['age'] + since)} {oldest['method']} {oldest['path']}"
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
        """The width of the bar's own terminal; standard output may go elsewhere, and is not asked."""
        with contextlib.suppress(OSError, ValueError):  # no descriptor
            if columns := os.get_terminal_size(self._stream.fileno()).columns:
                return columns
        from shutil import get_terminal_size  # noqa: PLC0415 - rarely needed

        return get_terminal_size().columns

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._stream.write(text)
            self._stream.flush()

    def close(self) -> None:
        """Remove the line."""
        self._over.set()
        self._thread.join()
        self._write("\r\x1b[K")
