"""Signals as the kernel has them: blocked, ignored, or taken by C code; those of the app; and those other servers heed.

What they are to do: signal(7), pthread_sigmask(3), wait(2), nohup(1), and docs/signals.md.
"""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from daemon_kit import Flaskd, children
from http_client import get
from patience import PATIENCE

OTHERS = ("SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU")


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (SigCgt, proc_pid_status(5))."""
    with contextlib.suppress(FileNotFoundError):
        status = Path(f"/proc/{pid}/status").read_text()
        return bool(int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16) >> (number - 1) & 1)
    return False


def state_of(pid: int) -> str:
    """The state of a process: T is stopped (proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def threads(flaskd: Flaskd, number: int) -> None:
    """Write a configuration with this number of threads, by which a reload can be seen."""
    flaskd.write("flaskd.yaml", f"server: {{threads: {number}}}\n")


# --- as the parent left them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--block-signal", "--ignore-signal"])
def test_sigterm_stops_whatever_the_parent_did(flaskd: Flaskd, how: str) -> None:
    """SIGTERM drains and stops flaskd, even if it was blocked or ignored at the start."""
    flaskd.start(prefix=["env", f"{how}=TERM"])
    flaskd.stop_holding()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_signals_that_were_blocked_are_heard(flaskd: Flaskd, number: int) -> None:
    """The other signals work if they were blocked: SIGHUP reloads, SIGINT and SIGQUIT stop."""
    flaskd.start(prefix=["env", "--block-signal=HUP,INT,QUIT"])
    flaskd.kill(number)
    if number == signal.SIGHUP:
        flaskd.wait_message("RELOADING=1")
        number = signal.SIGTERM
        flaskd.kill(number)
    assert flaskd.wait() == 0


def test_what_nohup_and_scripts_ignore_stays_ignored_and_is_told(flaskd: Flaskd) -> None:
    """SIGHUP under nohup, and SIGINT and SIGQUIT after a script's `&`, stay ignored, and the log says so once."""
    flaskd.start(prefix=["env", "--ignore-signal=HUP,INT,QUIT"])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        flaskd.kill(number)
    assert get(flaskd.url) == (200, b"hello")
    assert "SIGINT, SIGQUIT, SIGHUP: ignored, as it was when flaskd was started" in flaskd.log
    assert flaskd.status()["last_reload"] is None
    assert flaskd.stop() == 0


def test_exit_codes_are_known_whoever_ignored_sigchld(flaskd: Flaskd) -> None:
    """If the parent ignored SIGCHLD, exit codes of children are right all the same."""
    flaskd.write("asking.py", "import subprocess\nfrom gateapp import app\n@app.get('/code')\ndef code():\n"
                 "    return str(subprocess.run(['sh', '-c', 'exit 3']).returncode)\n")  # fmt: skip
    flaskd.write("flaskd.yaml", "cleanup: {policies: {p: {use: command, with: {argv: [sh, -c, 'exit 4']}}}}\n")
    flaskd.start(app="asking", prefix=["env", "--ignore-signal=CHLD"])
    assert get(flaskd.url, "/code") == (200, b"3")
    assert flaskd.stop() == 0
    assert flaskd.record()["policies"]["p"]["why"] == "exit code 4"


# --- as the app's code leaves them ----------------------------------------------------------------------------------

C = "import ctypes, signal\nlibc = ctypes.CDLL(None)\nlibc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]\n"
TAKEN = {
    "ignored": "libc.signal(signal.SIGTERM, 1)\n",  # SIG_IGN
    "default": "libc.signal(signal.SIGTERM, 0)\n",  # SIG_DFL
    "handled": "libc.signal(signal.SIGTERM, ctypes.cast(libc.abs, ctypes.c_void_p))\n",
}


@pytest.mark.parametrize("how", TAKEN)
def test_a_handler_that_c_code_took_while_imported_is_taken_back(flaskd: Flaskd, how: str) -> None:
    """A handler of C code, which Python does not see, is replaced after the import: SIGTERM drains."""
    flaskd.write("taking.py", f"{C}{TAKEN[how]}from gateapp import app\n")
    flaskd.start(app="taking")
    flaskd.stop_holding()
    assert ("C code removed the handler for SIGTERM; flaskd sets it again" in flaskd.log) is (how != "handled")


def test_a_handler_that_c_code_takes_later_is_taken_back(flaskd: Flaskd) -> None:
    """If a library replaces the handler later, flaskd's own is back within a second or two."""
    flaskd.write("taking.py", f"{C}from gateapp import app\n@app.get('/take')\ndef take():\n    {TAKEN['ignored']}"
                 "    return 'taken'\n")  # fmt: skip
    flaskd.start(app="taking")
    assert get(flaskd.url, "/take") == (200, b"taken")
    flaskd.until(lambda: "C code removed the handler for SIGTERM" in flaskd.log)
    assert flaskd.stop() == 0


def test_signals_that_the_app_blocks_are_heard(flaskd: Flaskd) -> None:
    """If the app blocks signals in all its threads, flaskd's own thread still gets them."""
    flaskd.write("blocking.py", "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
                 "from gateapp import app\n")  # fmt: skip
    flaskd.start(app="blocking")
    flaskd.kill(signal.SIGHUP)
    flaskd.wait_message("RELOADING=1")
    assert flaskd.stop() == 0


def test_a_wakeup_descriptor_that_the_app_takes_away_costs_nothing(flaskd: Flaskd) -> None:
    """If the app replaces the wakeup descriptor on import, as asyncio does, SIGTERM still ends the import."""
    flaskd.write("waking.py", "import os, signal, socket, time\nsignal.set_wakeup_fd(-1)\n"
                 "gate = socket.socket(socket.AF_UNIX)\ngate.connect(os.environ['GATE'])\ngate.sendall(b'entered')\n"
                 "time.sleep(60)\n")  # fmt: skip
    flaskd.launch(app="waking")
    flaskd.gate.entered()
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 0
    assert "stopped while starting: SIGTERM" in flaskd.log


# --- the app's own --------------------------------------------------------------------------------------------------

OWN = """
import os, signal, subprocess, time
from pathlib import Path
from gateapp import app

here = Path(__file__).parent
for name in ("SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGCHLD", "SIGALRM", "SIGTTIN", "SIGTTOU", "SIGWINCH", "SIGRTMIN"):
    signal.signal(getattr(signal, name), lambda number, _: here.joinpath(f"got-{number}").touch())

@app.get("/child")
def child():
    return str(subprocess.run(["true"]).returncode)
"""


@pytest.mark.parametrize(
    "name", ["SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGCHLD", "SIGALRM", "SIGTTIN", "SIGTTOU", "SIGWINCH", "SIGRTMIN"]
)
def test_a_signal_that_the_app_handles_is_the_apps(flaskd: Flaskd, name: str) -> None:
    """The app's own handler is called, also after a reload, and flaskd does nothing and logs nothing."""
    number = getattr(signal, name)
    flaskd.write("handling.py", OWN)
    flaskd.write("flaskd.yaml", "")
    threads(flaskd, 3)
    flaskd.start(app="handling")
    got = flaskd.directory / f"got-{number:d}"
    for _ in range(2):
        flaskd.kill(number)
        flaskd.until(got.exists)
        got.unlink()
        assert flaskd.command("reload").startswith("OK reloaded")
    assert get(flaskd.url) == (200, b"hello")
    assert name not in flaskd.log
    assert flaskd.stop() == 0
    assert "stopping (signal: SIGTERM)" in flaskd.log


def test_children_that_end_stop_nothing(flaskd: Flaskd) -> None:
    """An app with a SIGCHLD handler can start programs, and flaskd does not stop at their ends."""
    flaskd.write("handling.py", OWN)
    flaskd.start(app="handling")
    for _ in range(3):
        assert get(flaskd.url, "/child") == (200, b"0")
    assert (flaskd.directory / f"got-{signal.SIGCHLD:d}").exists()
    assert flaskd.command("health") == "OK healthy\n"
    assert flaskd.stop() == 0


def test_a_handler_of_faulthandler_is_the_apps(flaskd: Flaskd) -> None:
    """A handler of faulthandler.register(), which Python does not see, is not replaced."""
    flaskd.write(
        "handling.py", "import faulthandler, signal\nfaulthandler.register(signal.SIGUSR1)\nfrom gateapp import app\n"
    )
    flaskd.start(app="handling")
    assert flaskd.client("reload")[0] == 0
    flaskd.kill(signal.SIGUSR1)
    flaskd.until(lambda: "most recent call first" in flaskd.log)
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0


# --- those that other servers heed ----------------------------------------------------------------------------------


def test_what_other_servers_heed_is_answered_in_the_log(flaskd: Flaskd) -> None:
    """SIGUSR1, SIGUSR2, SIGTTIN and SIGTTOU do nothing, and the log says what to do; SIGWINCH does nothing."""
    flaskd.start()
    for name in (*OTHERS, "SIGWINCH"):
        flaskd.kill(getattr(signal, name))
    for name in OTHERS:
        flaskd.until(lambda name=name: f"{name} does nothing here: " in flaskd.log)
    assert "no log files to reopen" in flaskd.log
    assert "SIGWINCH" not in flaskd.log
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0


@pytest.mark.parametrize("name", [*OTHERS, "SIGHUP"])
def test_no_signal_ends_a_start_without_a_word(flaskd: Flaskd, name: str) -> None:
    """No such signal ends a start, at any moment from the first handlers on: flaskd becomes ready."""
    number = getattr(signal, name)
    flaskd.write("importing.py", "import os, socket\ngate = socket.socket(socket.AF_UNIX)\ngate.connect(os.environ['GATE'])\n"
                 "gate.sendall(b'entered')\ngate.recv(1)\nfrom gateapp import app\n")  # fmt: skip
    flaskd.launch(app="importing")
    flaskd.until(lambda: handles(flaskd.pid, number))
    entered = time.monotonic() + PATIENCE
    while not flaskd.gate.is_called(0.01):
        assert time.monotonic() < entered
        flaskd.kill(number)
    flaskd.gate.entered()
    flaskd.kill(number)
    flaskd.gate.open()
    flaskd.wait_message("READY=1")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0


def test_sighup_during_the_import_is_a_reload_once_it_is_over(flaskd: Flaskd) -> None:
    """After a SIGHUP during the import, an edited configuration is in force soon after READY."""
    threads(flaskd, 3)
    flaskd.write("importing.py", "import os, socket\ngate = socket.socket(socket.AF_UNIX)\ngate.connect(os.environ['GATE'])\n"
                 "gate.sendall(b'entered')\ngate.recv(1)\nfrom gateapp import app\n")  # fmt: skip
    flaskd.launch(app="importing")
    flaskd.gate.entered()
    threads(flaskd, 5)
    flaskd.kill(signal.SIGHUP)
    flaskd.gate.open()
    flaskd.wait_message("READY=1")
    flaskd.wait_message("RELOADING=1")
    flaskd.wait_message("READY=1")
    assert flaskd.status()["threads"] == 5
    assert flaskd.stop() == 0


def test_sigquit_is_a_stop(flaskd: Flaskd) -> None:
    """SIGQUIT is a stop: requests are answered, exit code 0."""
    flaskd.start()
    held = flaskd.hold()
    flaskd.kill(signal.SIGQUIT)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert flaskd.record()["reason"] == "signal: SIGQUIT"


# --- at a terminal --------------------------------------------------------------------------------------------------


class Shell:
    """A shell with job control on a terminal of its own, with flaskd in its background."""

    def __init__(self, flaskd: Flaskd) -> None:
        argv = f"{sys.executable} -m flaskd serve gateapp -l 127.0.0.1:0"
        log = flaskd.directory / "log"
        log.touch()
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["sh", "-c", f"set -m; {argv} </dev/null >>{log} 2>&1 & read line"],
            cwd=flaskd.directory, env=flaskd.env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        flaskd.wait_message("READY=1")
        [self.pid] = children(self.process.pid)

    def close(self) -> None:
        """End the shell and flaskd."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def shell(make_flaskd):
    """A flaskd in the background of a shell; its pid is `shell.pid`."""
    made = make_flaskd()
    each = Shell(made)
    each.flaskd = made
    yield each
    each.close()


def test_a_later_sighup_of_what_outlived_its_terminal_is_a_reload(shell: Shell) -> None:
    """After the terminal was lost without a SIGHUP, a later SIGHUP is a reload."""
    shell.process.kill()
    shell.process.wait()
    time.sleep(2.5)  # the time in which a SIGHUP would still mean a hang-up
    os.kill(shell.pid, signal.SIGHUP)
    shell.flaskd.wait_message("RELOADING=1")
    shell.flaskd.wait_message("READY=1")
    assert get(shell.flaskd.url) == (200, b"hello")


def test_a_sighup_with_the_hang_up_is_a_stop(shell: Shell) -> None:
    """A SIGHUP within a moment of the loss of the terminal, as bash sends it, is a stop."""
    shell.process.kill()
    shell.process.wait()
    os.kill(shell.pid, signal.SIGHUP)
    shell.flaskd.wait_message("STOPPING=1")


def test_job_control_stops_what_is_in_the_background(shell: Shell) -> None:
    """At SIGTTIN a background flaskd is suspended, as usual, with a log line."""
    os.kill(shell.pid, signal.SIGTTIN)
    shell.flaskd.until(lambda: state_of(shell.pid) == "T")
    os.kill(shell.pid, signal.SIGCONT)
    assert get(shell.flaskd.url) == (200, b"hello")
    shell.flaskd.until(lambda: "SIGTTIN: the terminal belongs to another job; stopped" in shell.flaskd.log)
