"""What people see, without a daemon: the status page, the bar, the page of top."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from flaskd.cli import show
from flaskd.cli.answers import answer, quantile
from flaskd.cli.bar import Bar
from flaskd.cli.top import Look, _draw, fitting, page, rates
from flaskd.protocol import summary
from flaskd.server import Tally

BOUNDS = Tally().as_json()["bounds"]


def status(**more):
    return {
        "result": "ready", "state": "ready", "for": 11522.4, "uptime": 11530.0, "pid": 123, "app": "shop.wsgi:app",
        "name": "flaskd", "left": None, "requests": [],
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
        version="1.2.3", memory=41 << 20, recent={"seconds": 60.0, "counts": [0, 0, 540, 60, *([0] * 10)]},
    )  # fmt: skip
    assert answer("status", fields) == (
        "ready for 3h12m2s, up for 3h12m10s, shop.wsgi:app, pid 123\n"
        "  listen       127.0.0.1:8000\n"
        "  requests     12 in flight, 4 of them queued; oldest GET /export (running for 4.2s in flaskd-thread-3)\n"
        "  answered     120,333, 2 4xx, 1 5xx, 4 rejected\n"
        "  recently     10.0 answers a second in the last 1m; 50 % took <= 25ms, 95 % <= 50ms\n"
        "  threads      8 of 8 busy: all of them\n"
        "  connections  43\n"
        "  background   export (for 3s in pool-1)\n"
        "  last reload  failed, T: f.yaml:1:1 a: expected b\n"
        "  last stop    T, signal: SIGTERM, took 4.1s, 1 cut, 2 cleanup steps failed\n"
        "  config       /etc/flaskd/flaskd.yaml\n"
        "  flaskd       1.2.3, 41 MiB of memory\n"
        "next:\n"
        "  flaskd requests --stacks               where they are in the code of the app\n"
        "  flaskd check /etc/flaskd/flaskd.yaml   is the configuration valid now?\n"
        "  flaskd reload                          try again"
    )


@pytest.mark.parametrize(
    ("state", "undo"),
    [("drained", "resume --name shop "), ("draining", "resume --name shop "), ("stopping", "stop --name shop --now ")],
)
def test_the_status_says_who_asked_for_a_drain(state, undo):
    """When, by whom, how long it may still take, and by which command it is undone, or a stop is cut short."""
    fields = status(state=state, name="shop", left=12.0, drain={"time": "T", "by": "control: uid=0 pid=7"})
    page = answer("status", fields).splitlines()
    assert page[0] == f"{state} for 3h12m2s, at most 12s left, up for 3h12m10s, shop.wsgi:app, pid 123"
    assert "  drain        asked for T by control: uid=0 pid=7" in page
    assert page[page.index("next:") + 1].startswith(f"  flaskd {undo}")


@pytest.mark.parametrize(
    ("more", "command"),
    [
        ({}, ""),
        ({"queued": 1}, "requests --stacks"),
        ({"busy": 8}, "requests --stacks"),
        ({"trouble": "a thread is lost"}, "threads --stacks"),
        ({"trouble": "it grows", "workers": {"ready": 1, "wanted": 1, "generations": [1], "died": 0}}, "workers"),
        ({"workers": {"ready": 0, "wanted": 1, "generations": [], "died": 1}}, "workers"),
        ({"last_reload": {"ok": True, "time": "T"}}, ""),
        ({"last_reload": {"ok": False, "time": "T", "fault": "f"}}, "check"),
    ],
)
def test_the_status_says_what_to_do_next(more, command):
    """One command for each thing that is not as it should be, and none where all is well."""
    lines = answer("status", status(**more)).splitlines()
    told = lines[lines.index("next:") + 1].strip() if "next:" in lines else ""
    assert told.startswith(f"flaskd {command}" if command else "")
    assert bool(told) is bool(command)


def test_busy_threads_and_a_queue_stand_out(monkeypatch):
    """By a word, and by a colour where there is one."""
    monkeypatch.setattr(show, "coloured", lambda text, colour, stream=None: f"<{text}>")
    lines = answer("status", status(busy=8, in_flight=10, queued=2)).splitlines()
    assert "  requests     10 in flight<, 2 of them queued>" in lines
    assert "  threads      <8 of 8 busy: all of them>" in lines
    assert "  threads      7 of 8 busy" in answer("status", status(busy=7)).splitlines()


@pytest.mark.parametrize(("ready", "state", "told"), [(0, "ready", True), (1, "ready", False), (0, "drained", False)])
def test_the_status_says_that_no_worker_is_ready(ready, state, told):
    """The state alone would say that all is well; a drained flaskd has none anyway."""
    workers = {"ready": ready, "wanted": 2, "generations": [1][:ready], "died": 2}
    work = [{"name": "in worker 1", "age": 0.0, "thread": ""}]
    page = answer("status", status(state=state, workers=workers, background=work)).splitlines()
    assert (", but no worker is ready, " in page[0]) is told
    assert f"  workers      {ready} of 2 ready, generation {'1' if ready else 'none'}; 2 died" in page
    assert "  background   in worker 1" in page


def test_the_status_says_what_became_of_limits():
    """How many workers reached which one, and why one cannot be kept."""
    recycled = {"max_requests": 0, "max_age": 0, "max_memory": 3}
    workers = {"ready": 2, "wanted": 2, "generations": [1], "died": 0, "recycled": recycled}
    page = answer("status", status(workers=workers, trouble="worker 0 grows")).splitlines()
    assert "  workers      2 of 2 ready, generation 1; 3 recycled (3 for max_memory)" in page
    assert "  trouble      worker 0 grows" in page


def test_a_stop_of_which_nothing_can_be_read_lost_nobody_knows_what():
    """The status page says that the record is damaged, and not that nothing was lost."""
    told = answer("status", status(last_stop=summary({"damaged": "no JSON"})))
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
    bar = Bar("stop", stream)
    assert bar.text() == "stopping ..."
    oldest = {"method": "GET", "path": "/export", "age": 30.2}
    bar.update({"in_flight": 4, "oldest": oldest})
    assert bar.text().startswith("stopping ░░░░░░░░░░░░░░░░░░░░ ")
    bar.update({"in_flight": 1, "oldest": oldest, "background": 2, "cleanup": ["close-db", "warm"]})
    assert bar.text().startswith("stopping ███████████████░░░░░ ")
    assert bar.text().endswith(", 1 in flight, oldest 30s GET /export, 2 in the background; cleanup: close-db, warm")
    assert bar.text(40).startswith("stopping ████░░ ")
    bar.update({"policy": "close-db", "fate": "ok", "took": 0.25})
    assert bar.text().endswith("; cleanup: warm")  # a step that is over is not shown as running
    bar.update({"policy": "warm", "fate": "timed_out", "took": 5.0})
    bar.close()
    shown = stream.getvalue()
    assert "\r\x1b[K  ✓ close-db: ok in 250ms\n" in shown
    assert "\r\x1b[K  ✗ warm: timed_out in 5s\n" in shown
    assert shown.endswith("\r\x1b[K")


def test_the_bar_says_how_much_time_is_left_at_most():
    """It counts down by itself between two words of the daemon; a reload with workers waits for those that start."""
    bar = Bar("drain", Terminal())
    bar.update({"in_flight": 1, "left": 14.6})
    assert re.fullmatch(r"draining ░{20} \S+, at most 15s left, 1 in flight", bar.text())
    bar._heard -= 10  # noqa: SLF001 - as if that was 10 s ago
    assert ", at most 5s left, " in bar.text()
    bar._heard -= 10  # noqa: SLF001
    assert ", at most 0s left, " in bar.text()
    bar.close()
    bar = Bar("reload", Terminal())
    bar.update({"starting": 2, "age": 5.0, "left": 55.0})
    assert re.fullmatch(r"reloading \S+, at most 55s left, 2 workers starting", bar.text())
    bar.close()


def test_a_bar_for_terminals_without_unicode():
    """It is drawn with what the terminal's encoding has."""
    stream = Terminal()
    stream.encoding = "ascii"
    bar = Bar("drain", stream)
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
    bar = Bar("drain", stream)
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
    return Look(when, status(tally=tally.as_json(), **more))


def test_rates_are_between_two_looks():
    """With one look, since the start; after a restart of the daemon, since that."""
    assert rates(None, look(5.0, 1153, uptime=11.53)).rate == pytest.approx(100)
    measured = rates(look(5.0, 100), look(7.0, 160, errors=10))
    assert (measured.rate, measured.errors, measured.half, measured.most) == (30, 5, 0.025, 0.025)
    assert rates(look(5.0, 3), look(7.0, 7, uptime=0.7, pid=124)).rate == pytest.approx(10)


@pytest.mark.parametrize(
    ("width", "height"), [(200, 50), (80, 24), (69, 13), (50, 30), (20, 15), (5, 3), (80, 6), (60, 1)]
)
def test_the_page_of_top_fits(width, height):
    """No line is wider than the terminal, and the first, with the state, stays; what does not fit below is counted."""
    requests = [
        {"id": i, "client": "192.168.100.100", "method": "GET", "path": "/" + "x" * i, "age": i / 3, "phase": "running",
         "thread": "w", "sent": 10**i, "stack": ""}
        for i in range(30)
    ]  # fmt: skip
    seen = Look(0.0, status(in_flight=30, reason="signal: SIGTERM", cleanup=["close-db"], requests=requests))
    lines = page(seen, rates(None, seen), width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= height
    assert lines[0].startswith("flaskd ready for"[: width - 1])
    if 10 < height < 40 and width > 20:
        assert lines[-1].endswith("more")


def test_the_page_of_top_says_what_is_wrong():
    """As the status does."""
    seen = Look(0.0, status(trouble="worker 0 grows", busy=8, queued=3))
    lines = page(seen, rates(None, seen), 80, 24)
    assert "  trouble: worker 0 grows" in lines
    assert "  queue: 3 waiting for a thread; see flaskd requests --stacks" in lines
    calm = Look(0.0, status())
    assert "queue:" not in "".join(page(calm, rates(None, calm), 80, 24))


def test_the_page_of_top_says_its_keys_and_what_its_numbers_are_of():
    """Where a key is heard; a rate is of the seconds between two looks, at first of those since the start."""
    seen = look(7.0, 160, uptime=7200.0)
    assert page(seen, rates(None, seen), 80, 24)[1] == "q quits; rates are of the last 2h"
    assert page(seen, rates(look(5.0, 100), seen), 80, 24, keys=False)[1] == "rates are of the last 2s"
    assert re.search(
        r"answered +30.0/s .*\n +50 % took +<= 25ms ", "\n".join(page(seen, rates(look(5.0, 100), seen), 80, 24))
    )


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
