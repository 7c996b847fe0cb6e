"""``flaskd top``: watches a daemon in the terminal."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from flaskd.cli import answers, show
from flaskd.client import ControlClient, reading
from flaskd.errors import NoDaemonError
from flaskd.text import escaped
from flaskd.values import value

_QUEUE, _TROUBLE = "queue: ", "trouble: "
_STAND_OUT = (f"  {_QUEUE}", f"  {_TROUBLE}")
"""The beginnings of the lines that are highlighted."""
_RESIZED = 0.25
"""Seconds between two checks of the terminal's size."""
_QUIT = {b"q", b"Q", b"\x03", b""}
"""The keys that end it, and the end of standard input."""
_NARROW = 69
"""The width in characters below which the page has one column, and shows less of each request."""


@value
class Look:
    """The result of one look; `when` is a time.monotonic() moment."""

    when: float
    status: dict[str, Any]
    """It has the requests in flight of the same moment, the oldest first."""

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The requests in flight."""
        found: list[dict[str, Any]] = self.status["requests"]
        return found


@value
class Rates:
    """What happened between two looks: answers a second, and the seconds within which 50 and 95 % were answered."""

    rate: float
    errors: float
    half: float | None
    most: float | None
    waited: float | None
    """The same 95 % for the wait for a thread."""
    seconds: float
    """The seconds between the two looks."""


def rates(before: Look | None, now: Look) -> Rates:
    """Compare two looks; with only one, compare with the daemon's start."""
    if before and before.status["pid"] != now.status["pid"]:  # another daemon
        before = None
    tally = now.status["tally"]
    older = before.status["tally"] if before else None
    seconds = max(0.001, now.when - before.when if before else now.status["uptime"])
    took = _between(tally, older, "took")
    wrong = tally["statuses"]["5xx"] - (older["statuses"]["5xx"] if older else 0)
    bounds = tally["bounds"]
    return Rates(
        sum(took) / seconds,
        wrong / seconds,
        answers.quantile(took, bounds, 0.5),
        answers.quantile(took, bounds, 0.95),
        answers.quantile(_between(tally, older, "waited"), bounds, 0.95),
        seconds,
    )


def _between(tally: dict[str, Any], older: dict[str, Any] | None, key: str) -> list[int]:
    counts: list[int] = tally[key]["counts"]
    return [a - b for a, b in zip(counts, older[key]["counts"], strict=True)] if older else counts


def page(look: Look, measured: Rates, width: int, height: int, *, keys: bool = True) -> list[str]:
    """The page in lines that fit, with the keys that it reacts to."""
    status = look.status
    head = [
        f"flaskd {status['state']} for {show.short(status['for'])}",
        f"at most {show.short(status['left'])} left" if status.get("left") is not None else "",
        f"up for {show.short(status['uptime'])}",
        status.get("app"),
        f"pid {status['pid']}",
        *status["listen"],
    ]
    half, most, waited = map(answers.at_most, (measured.half, measured.most, measured.waited))
    table = [
        ("answered", f"{measured.rate:.1f}/s", "in flight", status["in_flight"], "threads busy", _of(status)),
        ("50 % took", half, "queued", status["queued"], "connections", status["connections"]),
        ("95 % took", most, "5xx", f"{measured.errors:.1f}/s", "95 % queued", waited),
    ]
    what = "q quits; rates are of the last" if keys else "rates are of the last"
    lines = [", ".join(filter(None, head)), f"{what} {show.short(measured.seconds)}", ""]
    if narrow := width < _NARROW:
        lines += [f"  {row[i]:<13}{row[i + 1]!s:>10}" for i in (0, 2, 4) for row in table]
    else:
        lines += [f"  {a:<10}{b:>9}    {c:<10}{d:>8}    {e:<13}{f!s:>9}" for a, b, c, d, e, f in table]
    extra = [f"{key}: {', '.join(map(str, status[key]))}" for key in ("cleanup",) if status.get(key)]
    if workers := answers.workers_now(status.get("workers")):
        extra.insert(0, f"workers: {workers}")
    if limits := answers.limits(status):
        extra.append(f"limits: {limits}")
    if status.get("trouble"):
        extra.append(f"{_TROUBLE}{status['trouble']}")
    if status.get("reason"):
        extra.insert(0, f"reason: {status['reason']}")
    if status["queued"] or 0 < status["threads"] <= status["busy"]:
        waiting = f"{status['queued']} waiting for a thread" if status["queued"] else "every thread is busy"
        extra.insert(0, f"{_QUEUE}{waiting}; see flaskd requests{answers.named(status)} --stacks")
    lines += [f"  {each}" for each in extra]
    lines += ["", f"  {'AGE':>8}  {'PHASE':<8} " + ("REQUEST" if narrow else f"{'SENT':>9}  {'CLIENT':<15} REQUEST")]
    room = max(1, height - len(lines) - 1)
    shown = look.requests if len(look.requests) <= room else look.requests[: room - 1]
    for entry in shown:
        lines.append(
            f"  {show.short(entry['age']):>8}  {entry['phase']:<8} "
            + ("" if narrow else f"{entry['sent']:>9}  {entry['client']:<15} ")
            + f"{entry['method']} {entry['path']}"
        )
    if len(shown) < len(look.requests):
        lines.append(f"  ... and {len(look.requests) - len(shown)} more")
    if not look.requests:
        lines.append("  nothing is in flight")
    return fitting(lines, width, height)


def fitting(lines: Sequence[str], width: int, height: int) -> list[str]:
    """The lines from the top that fit, each cut to the width."""
    more = show.drawable("…", ">")
    lines = [escaped(line) for line in lines[: max(1, height)]]
    return [line if len(line) <= width else line[: max(0, width - 1)] + more for line in lines]


def _of(status: dict[str, Any]) -> str:
    return f"{status['busy']} of {status['threads']}"


def watch(find: Callable[[], Path], *, interval: float, count: int | None, as_json: bool) -> int:
    """Look repeatedly; only once without a terminal, unless a count was given. Returns the exit code."""
    gc.enable()  # this command runs long
    on_terminal = sys.stdout.isatty() and not as_json and os.environ.get("TERM") != "dumb"
    if not on_terminal and not as_json and count is None:
        count = 1
    before: Look | None = None
    looks = 0
    with _screen() if on_terminal else contextlib.nullcontext():
        while True:
            try:
                path = find()
                now = _look(path)
                with reading(path):
                    measured = rates(before, now)
                    shown = partial(page, now, measured, keys=on_terminal)
                    lines = shown(10_000, 10_000)
            except NoDaemonError as error:
                if not on_terminal or before is None:
                    raise
                shown = partial(_waiting, error)
            else:
                before = now
            if as_json:
                show.say(show.for_programs(_as_json(now, measured)))
            elif not on_terminal:
                show.say("\n".join(lines))
            looks += 1
            if _asked_to_quit(interval if looks != count else 0, draw=shown if on_terminal else None) or looks == count:
                return 0


def _look(path: Path) -> Look:
    with ControlClient(path) as client:
        return Look(time.monotonic(), client.request("status", requests=True))


def _as_json(look: Look, measured: Rates) -> dict[str, Any]:
    finite = {key: None if value == float("inf") else value for key, value in vars(measured).items()}
    return {
        **finite,
        "status": {key: look.status[key] for key in look.status if key != "requests"},
        "requests": look.requests,
    }


# --- the terminal ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """The alternate screen without a cursor (xterm control sequences); keys are read one by one (termios(3))."""
    import termios  # noqa: PLC0415 - Windows does not have it
    import tty  # noqa: PLC0415

    keys = sys.stdin.fileno() if sys.stdin.isatty() else -1
    before = termios.tcgetattr(keys) if keys >= 0 else None

    def enter() -> None:
        if before is not None:
            tty.setcbreak(keys)
        os.write(sys.stdout.fileno(), b"\x1b[?1049h\x1b[?25l")  # a signal may come in the middle of a buffered write

    def leave() -> None:
        os.write(sys.stdout.fileno(), b"\x1b[?25h\x1b[?1049l")
        if before is not None:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)

    def pause(_number: int, _frame: object) -> None:
        leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # waits here until SIGCONT; without a shell it is not stopped
        signal.signal(signal.SIGTSTP, pause)
        enter()

    show.escape_what_cannot_be_encoded(
        "replace"
    )  # one character for each that the terminal lacks, so that lines keep their length
    signal.signal(signal.SIGTERM, _leave)  # ends like at q, so that the terminal is restored
    signal.signal(signal.SIGTSTP, pause)
    enter()
    try:
        yield
    except KeyboardInterrupt:
        pass  # Ctrl-C ends it
    finally:
        leave()


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _waiting(error: NoDaemonError, width: int, height: int) -> list[str]:
    from textwrap import wrap  # noqa: PLC0415 - rarely needed

    return fitting(
        ["flaskd top: waiting for it to come back; q quits", "", *wrap(str(error), max(1, width))], width, height
    )


def _draw(lines: Sequence[str], height: int) -> None:
    head, *rest = lines
    word = head.split(" ")[1] if " " in head else ""
    head = head.replace(word, show.state(word), 1)
    # Each line is cleared before it is written; clearing after a line as wide as the terminal would remove its last
    # character. The last line has no newline, which would scroll a full terminal.
    blank = [""] * (height - len(lines))
    rest = [show.coloured(line, show.YELLOW) if line.startswith(_STAND_OUT) else line for line in rest]
    sys.stdout.write("\x1b[H" + "\n".join(f"\x1b[K{line}" for line in [head, *rest, *blank]))
    sys.stdout.flush()


def _asked_to_quit(seconds: float, draw: Callable[[int, int], list[str]] | None) -> bool:
    """Wait for the next look, and draw again if the size of the terminal changes; True if q was pressed.

    `draw` gives the lines for a width and a height; None if there is no terminal.
    """
    if draw is None:
        time.sleep(seconds)
        return False
    until, keys, drawn = time.monotonic() + seconds, [sys.stdin] if sys.stdin.isatty() else [], None
    while True:
        size = _size()
        if size != drawn:
            _draw(draw(size.columns, size.lines), size.lines)
            drawn = size
        if (left := until - time.monotonic()) <= 0:
            return False
        if select.select(keys, [], [], min(left, _RESIZED))[0] and os.read(sys.stdin.fileno(), 64)[:1] in _QUIT:
            return True


def _size() -> os.terminal_size:
    """The size of the terminal itself, because $COLUMNS may be out of date."""
    with contextlib.suppress(OSError, ValueError):
        if (size := os.get_terminal_size(sys.stdout.fileno())).columns:
            return size
    return shutil.get_terminal_size()
