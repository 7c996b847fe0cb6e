"""Client verbs in a real terminal (a pseudo-terminal here), and without one."""

import json
import os
import re
import signal
import subprocess
import sys
import termios

from daemon_kit import NOBODY, Flaskd
from patience import PATIENCE
from terminal_kit import terminal


def test_top_in_a_terminal(flaskd: Flaskd) -> None:
    """`top` shows requests as they come and go, ends with q, and restores the terminal."""
    flaskd.start()
    with terminal(flaskd, "top", "--interval", "0.1") as top:
        top.until(r"nothing is in flight")
        held = flaskd.hold()
        shown = top.until(r"running .*GET /hold")
        assert "\x1b[32mready\x1b[0m" in shown
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        top.press("q")
        assert top.wait() == 0
        assert top.shown.startswith("\x1b[?1049h\x1b[?25l")
        assert top.shown.endswith("\x1b[?25h\x1b[?1049l")
        assert termios.tcgetattr(top.slave) == top.before
    assert flaskd.stop() == 0


def test_top_in_a_narrow_terminal_without_unicode(flaskd: Flaskd) -> None:
    """A line that does not fit is cut off with a character that the terminal has."""
    flaskd.start()
    flaskd.env["PYTHONIOENCODING"] = "ascii"
    with terminal(flaskd, "top", "--interval", "0.1", columns=30) as top:
        top.until(r"flaskd .*>\s")
        top.until(r"nothing is in flight")
        top.press("q")
        assert top.wait() == 0
    assert flaskd.stop() == 0


def test_an_answer_is_written_whatever_standard_output_can_say(flaskd: Flaskd) -> None:
    """A character that the encoding lacks is escaped, without a traceback."""
    flaskd.env["PYTHONIOENCODING"] = "latin-1"
    (flaskd.directory / "日.yaml").write_text("")
    assert flaskd.client("check", "日.yaml") == (0, "\\u65e5.yaml: OK\n", "")
    code, out, _ = flaskd.client("check", "--json", "日.yaml")
    assert (code, json.loads(out)["config"]) == (0, "日.yaml")


def test_top_at_the_size_that_the_terminal_gets(flaskd: Flaskd) -> None:
    """It is drawn again as soon as the terminal is made narrower, not with the next look; Ctrl-C typed there ends it."""
    flaskd.start()
    held = flaskd.hold()
    with terminal(flaskd, "top", "--interval", "3600") as top:
        top.until(r"running .*GET /hold")
        top.shown = ""
        top.resize(40, 12)
        shown = top.until(r"q quits[\s\S]*95 % queued").rpartition("\x1b[H")[2]
        lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line) for line in shown.split("\r\n")]
        assert max(map(len, lines)) <= 40
        assert len(lines) == 12
        top.press("\x03")
        assert top.wait() == 0
        assert termios.tcgetattr(top.slave) == top.before
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.stop() == 0


def test_ctrl_c_typed_while_a_stop_is_waited_for(flaskd: Flaskd) -> None:
    """It ends the waiting alone, and says so: the stop goes on, and loses nothing."""
    flaskd.start()
    held = flaskd.hold()
    with terminal(flaskd, "stop", "--wait") as stop:
        stop.until(r"stopping ░+ ")
        stop.press("\x03")
        assert stop.wait() == 130
        assert stop.shown.replace("\r\n", "\n").endswith("flaskd: not waiting any more; the stop goes on\n")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0


def test_top_outlives_the_daemon(flaskd: Flaskd) -> None:
    """`top` waits for a flaskd that has ended, and goes on with the next; Ctrl-C ends it."""
    flaskd.start()
    with terminal(flaskd, "top", *NOBODY, "--interval", "0.1") as top:
        top.until(f"pid {flaskd.pid}")
        assert flaskd.stop() == 0
        top.until("waiting for it to come back")
        flaskd.start()
        top.until(f"pid {flaskd.pid}")
        top.process.send_signal(signal.SIGINT)
        assert top.wait() == 0
        assert top.shown.endswith("\x1b[?25h\x1b[?1049l")
    assert flaskd.stop() == 0


def test_top_puts_the_terminal_back_when_it_is_terminated(flaskd: Flaskd) -> None:
    """SIGTERM ends top as q does, except for the exit code."""
    flaskd.start()
    with terminal(flaskd, "top", "--interval", "60") as top:
        top.until(r"nothing is in flight")
        top.process.send_signal(signal.SIGTERM)
        assert top.wait() == 128 + signal.SIGTERM
        assert top.shown.endswith("\x1b[?25h\x1b[?1049l")
        assert termios.tcgetattr(top.slave) == top.before
    assert flaskd.stop() == 0


def test_top_gives_the_terminal_back_while_it_is_suspended(flaskd: Flaskd) -> None:
    """At Ctrl-Z the shell gets its own screen back; afterwards top goes on."""
    flaskd.start()
    with terminal(flaskd, "top", "--interval", "0.1", job=True) as top:
        top.until(r"nothing is in flight")
        top.process.send_signal(signal.SIGTSTP)
        os.waitid(os.P_PID, top.process.pid, os.WSTOPPED)
        assert termios.tcgetattr(top.slave) == top.before
        top.until(r"\x1b\[\?25h\x1b\[\?1049l$")
        top.shown = ""
        top.process.send_signal(signal.SIGCONT)
        top.until(r"\x1b\[\?1049h\x1b\[\?25l[^$]*nothing is in flight")
        top.press("q")
        assert top.wait() == 0
        assert termios.tcgetattr(top.slave) == top.before
    assert flaskd.stop() == 0


def test_top_goes_on_at_ctrl_z_where_nobody_could_continue_it(flaskd: Flaskd) -> None:
    """In an orphaned process group (setpgid(2)), as with ssh -t or docker exec -it, Ctrl-Z does not suspend top."""
    flaskd.start()
    with terminal(flaskd, "top", "--interval", "0.1") as top:
        top.until(r"nothing is in flight")
        top.process.send_signal(signal.SIGTSTP)
        top.until(r"\x1b\[\?1049l\x1b\[\?1049h\x1b\[\?25l[^$]*nothing is in flight")
        top.press("q")
        assert top.wait() == 0
    assert flaskd.stop() == 0


def test_top_where_there_is_no_terminal(flaskd: Flaskd) -> None:
    """Without a terminal top prints one plain page, or as many as asked for, as JSON."""
    flaskd.start()
    code, out, err = flaskd.client("top")
    assert (code, err) == (0, "")
    assert out.startswith("flaskd ready for ")
    assert "\x1b" not in out
    code, out, _ = flaskd.client("top", "--json", "-n", "2", "--interval", "0.1")
    looks = [json.loads(line) for line in out.splitlines()]
    assert [look["status"]["state"] for look in looks] == ["ready", "ready"]
    assert code == 0
    assert flaskd.stop() == 0
    assert flaskd.client("top", *NOBODY)[0] == 69


def test_a_stop_with_a_bar(flaskd: Flaskd) -> None:
    """The bar shows requests in flight, then each cleanup step; at the end only the outcome is left."""
    flaskd.write(
        "flaskd.yaml",
        "cleanup: {policies: {first: {use: command, phase: quiesce, with: {argv: ['true']}},"
        " second: {use: command, phase: close, with: {argv: [cat, hold]}}}}\n",
    )
    os.mkfifo(flaskd.directory / "hold")
    flaskd.start()
    held = flaskd.hold()
    with terminal(flaskd, "stop", "--wait", columns=100) as stop:
        stop.until(r"stopping ░+ [\d.]+m?s, at most 2\ds left, 1 in flight, oldest [\d.]+m?s GET /hold")
        flaskd.gate.open()
        stop.until(r"✓\x1b\[0m first: ok in ")
        stop.until(r"; cleanup: second")
        (flaskd.directory / "hold").write_text("")
        assert stop.wait() == 0
        assert "second: ok in" in stop.shown
        last = stop.shown.replace("\r\n", "\n").rpartition("\x1b[K")[2]
        assert last.startswith("stopped completed=1 rejected=0 cut=0 took=")
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0


def test_who_interrupts_the_waiting_is_told_that_it_goes_on(flaskd: Flaskd) -> None:
    """Ctrl-C ends the client alone; in the place of the bar it says that the stop goes on."""
    flaskd.start()
    held = flaskd.hold()
    with terminal(flaskd, "drain", "--wait") as drain:
        drain.until(r"draining ░+ ")
        drain.process.send_signal(signal.SIGINT)
        assert drain.wait() == 130
        last = drain.shown.replace("\r\n", "\n").rpartition("\x1b[K")[2]
        assert last.startswith("flaskd: not waiting any more; the drain goes on\n")
    assert flaskd.status()["state"] == "draining"
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.stop() == 0


def test_a_drain_where_there_is_no_terminal(flaskd: Flaskd) -> None:
    """Without a terminal, progress goes to standard error, and only the outcome to standard output."""
    flaskd.start()
    held = flaskd.hold()
    flaskd.env["NO_COLOR"] = "1"
    drain = subprocess.Popen(
        [sys.executable, "-m", "flaskd", "drain", "--wait"],
        cwd=flaskd.directory, env=flaskd.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert drain.stderr is not None
    assert drain.stderr.readline() == ".. in_flight=1 left=15s\n"
    assert re.fullmatch(r"\.\. in_flight=1 left=[\d.]+s oldest=[\d.]+m?s GET /hold\n", drain.stderr.readline())
    flaskd.gate.open()
    out, _ = drain.communicate(timeout=PATIENCE)
    assert out.startswith("drained completed=1 rejected=0 cut=0 took=")
    assert drain.returncode == 0
    assert held.result() == (200, b"held")
    assert flaskd.stop() == 0


def test_help_needs_no_daemon(flaskd: Flaskd) -> None:
    """The client shows the table of verbs, and the error for a wrong one, without a daemon."""
    code, out, _ = flaskd.client("help", "stop")
    assert (code, out.splitlines()[0]) == (0, "Usage: flaskd stop [OPTIONS]")
    code, out, _ = flaskd.client("help", "--json")
    assert {verb["name"]: verb["role"] for verb in json.loads(out)["verbs"]}["drain"] == "operator"
    assert flaskd.client("help", "drian")[::2] == (
        64,
        'flaskd: there is no command "drian"; did you mean "drain"? try "flaskd --help"\n',
    )
