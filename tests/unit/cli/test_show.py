"""What people see, without a daemon: the status page, the bar, the page of top."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from flaskd.cli import show
from flaskd.cli.top import Look, _draw, fitting, page, quantile, rates
from flaskd.protocol import summary
from flaskd.server import Tally

BOUNDS = Tally().as_json()["bounds"]


def status(**more):
    return {
        "result": "ready", "state": "ready", "for": 11522.4, "uptime": 11530.0, "pid": 123, "app": "shop.wsgi:app",
        "listen": ["127.0.0.1:8000"], "in_flight": 0, "queued": 0, "threads": 8, "busy": 0, "connections": 0,
        "completed": 0, "tally": Tally().as_json(), **more,
    }  # fmt: skip


def test_the_status_page():
    """What there is stands in a page of a few lines; what is nothing is not there."""
    tally = Tally(outcomes={"completed": 120333, "rejected": 4, "cut": 0, "gone": 0}, statuses=[0, 0, 120330, 0, 2, 1])
    fields = status(
        in_flight=12, queued=4, busy=8, connections=43, completed=120333, tally=tally.as_json(),
        oldest="GET /export (running for 4.2s in flaskd-thread-3)",
        last_reload={"ok": False, "time": "T", "fault": "f.yaml:1:1 a: expected b"},
        last_stop={"reason": "signal: SIGTERM", "started": "T", "took": 4.1, "cut": 1, "failed": 2},
        background=[{"name": "export", "age": 3.04, "thread": "pool-1"}], config="/etc/flaskd/flaskd.yaml",
        version="1.2.3", memory=41 << 20,
    )  # fmt: skip
    assert show.answer("status", fields) == (
        "ready for 3h12m2s, shop.wsgi:app, pid 123\n"
        "  listen       127.0.0.1:8000\n"
        "  requests     12 in flight, 4 of them queued; oldest GET /export (running for 4.2s in flaskd-thread-3)\n"
        "  answered     120,333, 2 4xx, 1 5xx, 4 rejected\n"
        "  threads      8 of 8 busy\n"
        "  connections  43\n"
        "  background   export (for 3s in pool-1)\n"
        "  last reload  failed, T: f.yaml:1:1 a: expected b\n"
        "  last stop    T, signal: SIGTERM, took 4.1s, 1 cut, 2 cleanup steps failed\n"
        "  config       /etc/flaskd/flaskd.yaml\n"
        "  flaskd       1.2.3, up for 3h12m10s, 41 MiB"
    )


@pytest.mark.parametrize(("state", "undo"), [("drained", True), ("draining", True), ("stopping", False)])
def test_the_status_says_who_asked_for_a_drain(state, undo):
    """When, by whom, and how to undo it, which a stop cannot be."""
    page = show.answer("status", status(state=state, drain={"time": "T", "by": "control: uid=0 pid=7"}))
    said = "  drain        asked for T by control: uid=0 pid=7"
    assert said + ('; "flaskd resume" undoes it' if undo else "") in page.splitlines()


@pytest.mark.parametrize(("ready", "state", "told"), [(0, "ready", True), (1, "ready", False), (0, "drained", False)])
def test_the_status_says_that_no_worker_is_ready(ready, state, told):
    """The state alone would say that all is well; a drained flaskd has none anyway."""
    workers = {"ready": ready, "wanted": 2, "generations": [1][:ready], "died": 2}
    work = [{"name": "in worker 1", "age": 0.0, "thread": ""}]
    page = show.answer("status", status(state=state, workers=workers, background=work)).splitlines()
    assert (", but no worker is ready, " in page[0]) is told
    assert f"  workers      {ready} of 2 ready, generation {'1' if ready else 'none'}; 2 died" in page
    assert "  background   in worker 1" in page


def test_the_status_says_what_became_of_limits():
    """How many workers reached which one, and why one cannot be kept."""
    recycled = {"max_requests": 0, "max_age": 0, "max_memory": 3}
    workers = {"ready": 2, "wanted": 2, "generations": [1], "died": 0, "recycled": recycled}
    page = show.answer("status", status(workers=workers, trouble="worker 0 grows")).splitlines()
    assert "  workers      2 of 2 ready, generation 1; 3 recycled (3 for max_memory)" in page
    assert "  trouble      worker 0 grows" in page


def test_a_stop_of_which_nothing_can_be_read_lost_nobody_knows_what():
    """The status page says that the record is damaged, and not that nothing was lost."""
    told = show.answer("status", status(last_stop=summary({"damaged": "no JSON"})))
    assert told.splitlines()[-1] == "  last stop    cannot be read: no JSON"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environ", "terminal", "coloured"),
    [({}, True, True), ({"NO_COLOR": ""}, True, False), ({"TERM": "dumb"}, True, False), ({}, False, False)],
)
def test_colour_is_for_terminals_that_want_it(monkeypatch, environ, terminal, coloured):
    """None elsewhere, none on a dumb one, none with NO_COLOR, whatever its value."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if terminal else io.StringIO()
    assert show.coloured("ready", "32", stream) == ("\x1b[32mready\x1b[0m" if coloured else "ready")


def test_the_bar_tells_how_a_stop_goes(monkeypatch):
    """It fills as requests are answered, ages the oldest by itself, and leaves each step that is over above it."""
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    bar = show.Bar("stop", stream)
    assert bar.text() == "stopping ..."
    oldest = {"method": "GET", "path": "/export", "age": 30.2}
    bar.update({"in_flight": 4, "oldest": oldest})
    assert bar.text().startswith("stopping ░░░░░░░░░░░░░░░░░░░░ ")
    bar.update({"in_flight": 1, "oldest": oldest, "background": 2, "cleanup": ["close-db", "warm"]})
    assert bar.text().startswith("stopping ███████████████░░░░░ ")
    assert bar.text().endswith(", 1 in flight, oldest 30s GET /export, 2 in the background; cleanup: close-db, warm")
    assert bar.text(40).startswith("stopping ████░░ ")
    bar.update({"policy": "close-db", "fate": "ok", "took": 0.25})
    bar.update({"policy": "warm", "fate": "timed_out", "took": 5.0})
    bar.close()
    shown = stream.getvalue()
    assert "\r\x1b[K  ✓ close-db: ok in 250ms\n" in shown
    assert "\r\x1b[K  ✗ warm: timed_out in 5s\n" in shown
    assert shown.endswith("\r\x1b[K")


def test_a_bar_for_terminals_without_unicode():
    """It is drawn with what the terminal's encoding has."""
    stream = Terminal()
    stream.encoding = "ascii"
    bar = show.Bar("drain", stream)
    bar.update({"in_flight": 2})
    bar.update({"in_flight": 1})
    bar.close()
    assert bar.text().startswith("draining ##########---------- ")
    assert stream.getvalue().isascii()


def test_the_bar_is_as_wide_as_its_own_terminal(monkeypatch):
    """It fits into the terminal that it is drawn on, wherever standard output goes, and whatever that says."""
    monkeypatch.setenv("COLUMNS", "500")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 40, 0, 0))
    stream = Terminal()
    monkeypatch.setattr(stream, "fileno", lambda: slave)
    bar = show.Bar("drain", stream)
    bar.update({"in_flight": 4, "oldest": {"method": "GET", "path": "/a" * 40, "age": 1.0}})
    bar.close()
    os.close(master)
    os.close(slave)
    assert max(len(line) for line in stream.getvalue().split("\r\x1b[K")) == 39


@pytest.mark.parametrize(
    ("encoding", "drawn", "told"), [("utf-8", "…", '{"a": "日é"}'), ("latin-1", ">", '{"a": "\\u65e5\\u00e9"}')]
)
def test_what_standard_output_has_no_character_for(monkeypatch, encoding, drawn, told):
    """Text is written with escapes, JSON in ASCII, and a picture is drawn with something else."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    show.escape_what_cannot_be_encoded("backslashreplace")
    show.say("日é")
    assert raw.getvalue().decode(encoding) == {"utf-8": "日é\n", "latin-1": "\\u65e5é\n"}[encoding]
    assert show.for_programs({"a": "日é"}) == told
    assert fitting(["too long"], 4, 1) == ["too" + drawn]


@pytest.mark.parametrize(
    ("counts", "part", "seconds"),
    [
        ({}, 0.5, None),
        ({0: 1}, 0.5, BOUNDS[0]),
        ({0: 1}, 0.95, BOUNDS[0]),
        ({0: 50, 3: 50}, 0.5, BOUNDS[0]),
        ({0: 50, 3: 50}, 0.51, BOUNDS[3]),
        ({0: 94, 13: 6}, 0.95, float("inf")),
    ],
)
def test_quantiles_are_upper_bounds(counts, part, seconds):
    """The bucket in which that part of all ends, and nothing is invented inside it."""
    assert quantile([counts.get(i, 0) for i in range(14)], BOUNDS, part) == seconds


def look(when, answered, errors=0, **more):
    tally = Tally(statuses=[0, 0, answered - errors, 0, 0, errors])
    for _ in range(answered):
        tally.took.add(0.02)
    return Look(when, status(tally=tally.as_json(), **more), [])


def test_rates_are_between_two_looks():
    """With one look, since the start; after a restart of the daemon, since that."""
    assert rates(None, look(5.0, 1153, uptime=11.53)).rate == pytest.approx(100)
    measured = rates(look(5.0, 100), look(7.0, 160, errors=10))
    assert (measured.rate, measured.errors, measured.half, measured.most) == (30, 5, 0.025, 0.025)
    assert rates(look(5.0, 3), look(7.0, 7, uptime=0.7)).rate == pytest.approx(10)


@pytest.mark.parametrize(
    ("width", "height"), [(200, 50), (80, 24), (66, 12), (50, 30), (20, 15), (5, 3), (80, 6), (60, 1)]
)
def test_the_page_of_top_fits(width, height):
    """No line is wider than the terminal, and the first, with the state, stays; what does not fit below is counted."""
    requests = [
        {"id": i, "client": "192.168.100.100", "method": "GET", "path": "/" + "x" * i, "age": i / 3, "phase": "running",
         "thread": "w", "sent": 10**i, "stack": ""}
        for i in range(30)
    ]  # fmt: skip
    seen = Look(0.0, status(in_flight=30, reason="signal: SIGTERM", cleanup=["close-db"]), requests)
    lines = page(seen, rates(None, seen), width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= height
    assert lines[0].startswith("flaskd ready for"[: width - 1])
    if 10 < height < 40 and width > 20:
        assert lines[-1].endswith("more")


def test_the_page_of_top_says_what_is_wrong():
    """As the status does."""
    seen = Look(0.0, status(trouble="worker 0 grows"), [])
    assert "  trouble: worker 0 grows" in page(seen, rates(None, seen), 80, 24)


def test_a_full_terminal_is_not_pushed_up(capsys):
    """Each line is cleared before it is written, none has a newline behind it but those that another follows."""
    _draw(["flaskd ready for 1s", "x" * 20], 3)
    assert capsys.readouterr().out == "\x1b[H\x1b[Kflaskd ready for 1s\n\x1b[K" + "x" * 20 + "\n\x1b[K"


def test_a_client_verb_starts_with_little():
    """What reads configurations and units, and what is slow to import, is left to the verbs that need it."""
    heavy = {"dataclasses", "difflib", "sysconfig", "tempfile", "flask", "pydantic", "yaml", "flaskd.systemd.unitfiles"}
    code = f"import sys, click; its = set(sys.modules); import flaskd.cli; print(*({heavy} & sys.modules.keys() - its))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
