"""What the app has left to the end of its process is finished within a time limit; what is cut is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from daemon_kit import Flaskd, Terminal
from http_client import get

APP = """
import atexit, concurrent.futures, multiprocessing, os, threading, time
from gateapp import app

pool = concurrent.futures.ThreadPoolExecutor(1)

def done(what):
    with open("done", "a") as file:
        file.write(what + "\\n")

def wait(seconds, what):
    threading.Event().wait(seconds)
    done(what)

def finish(seconds, what):
    atexit.register(wait, seconds, what)

@app.get("/jobs/<int:count>")
def jobs(count):
    for number in range(count):
        pool.submit(wait, 0.1, f"job {number}")
    return "accepted"

@app.get("/thread/<float:seconds>")
def thread(seconds):
    threading.Thread(target=wait, args=(seconds, "thread"), name="mailer").start()
    return "accepted"

@app.get("/child/<float:seconds>")
def child(seconds):
    multiprocessing.get_context("fork").Process(target=wait, args=(seconds, "child"), name="report").start()
    return "accepted"

@app.get("/callback/<float:seconds>")
def callback(seconds):
    finish(seconds, "callback")
    return "accepted"
"""
CONFIG = "shutdown: {{deadline: {deadline}, exit_wait: {wait}, exit_codes: {{degraded: 9}}}}\ncleanup: {{discovery: {{exclude: []}}}}\n"


def serve(flaskd: Flaskd, *asked: str, deadline: str = "15s", wait: str = "8s") -> None:
    """Serve the app, and have it start the given kinds of work."""
    flaskd.write("exits.py", APP)
    flaskd.write("flaskd.yaml", CONFIG.format(deadline=deadline, wait=wait))
    flaskd.start(app="exits")
    for path in asked:
        assert get(flaskd.url, path) == (200, b"accepted")


def done(flaskd: Flaskd) -> list[str]:
    """The work that was finished."""
    path = flaskd.directory / "done"
    return path.read_text().splitlines() if path.exists() else []


def unfinished(flaskd: Flaskd) -> list[str]:
    """What was not finished, from the record."""
    return [each["name"] for each in flaskd.record().get("unfinished", [])]


def test_what_was_accepted_is_finished(flaskd: Flaskd) -> None:
    """Queued jobs, threads, children and slow exit callbacks are finished before the process ends."""
    serve(flaskd, "/jobs/8", "/thread/3.0", "/child/1.0", "/callback/0.8", "/finalizer/0.0")
    assert flaskd.stop() == 0
    assert sorted(done(flaskd)) == sorted(["callback", "child", *(f"job {number}" for number in range(8)), "thread"])
    assert "finalizing" in flaskd.log
    assert unfinished(flaskd) == []


@pytest.mark.parametrize(
    ("asked", "name"),
    [("/thread/60.0", "thread/mailer"), ("/callback/60.0", "atexit/exits.wait"), ("/child/60.0", "process/report")],
)
def test_what_takes_longer_than_exit_wait_is_cut_and_told(flaskd: Flaskd, asked: str, name: str) -> None:
    """The plan lists it before, log and record after the cut; the stop is degraded, and ends at the limit."""
    serve(flaskd, asked, wait="500ms")
    (line,) = [each for each in flaskd.command("plan").splitlines() if each.startswith("the exit waits")]
    assert line.startswith("the exit waits at most 500ms for: ")
    assert name in line
    pids = [int(each) for each in Path(f"/proc/{flaskd.pid}/task/{flaskd.pid}/children").read_text().split()]
    assert flaskd.stop() == 9
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert flaskd.record()["took"] < 5
    assert [each.partition(" ")[0] for each in unfinished(flaskd)][:1] == [name]
    assert f"cut at the exit: {name}" in flaskd.log
    code, out, _ = flaskd.client("last-stop", "--json")
    assert code == 0
    assert json.loads(out)["unfinished"][0]["name"].startswith(name)
    assert f"not finished: {name}" in flaskd.client("last-stop")[1]


def test_jobs_beyond_the_steps_timeout_are_cut_and_told(flaskd: Flaskd) -> None:
    """A thread pool has its step's timeout for its queue; jobs that have not begun then make the stop degraded."""
    serve(flaskd)
    flaskd.write(
        "flaskd.yaml",
        CONFIG.format(deadline="15s", wait="8s").replace("exclude: []}", "exclude: []}, defaults: {timeout: 300ms}"),
    )
    assert flaskd.command("reload").startswith("OK")
    assert get(flaskd.url, "/jobs/100")[0] == 200
    assert flaskd.stop() == 9
    (told,) = unfinished(flaskd)
    assert told.startswith("found:executor.stop: exits:pool: ")
    assert told.endswith(" jobs not begun")
    assert flaskd.record()["policies"]["found:executor.stop"]["fate"] == "timed_out"
    assert len(done(flaskd)) + int(told.split()[2]) == 100  # the running job was finished


def test_a_finalizer_cannot_outlast_the_exit(flaskd: Flaskd) -> None:
    """An object whose ``__del__`` never ends is cut before the deadline, with its stack in the log."""
    serve(flaskd, "/finalizer/600.0", deadline="3s", wait="60s")
    before = time.monotonic()
    assert flaskd.stop() == 9
    assert time.monotonic() - before < 4
    assert unfinished(flaskd) == ["finalizers"]
    assert "in __del__" in flaskd.log
    (flaskd.state / ".last-stop.json.flaskd-tmp").unlink()


def test_the_deadline_holds_for_the_exit(flaskd: Flaskd) -> None:
    """However long exit_wait is, the stop ends at its deadline."""
    serve(flaskd, "/callback/60.0", deadline="2s", wait="60s")
    before = time.monotonic()
    assert flaskd.stop() == 9
    assert time.monotonic() - before < 3
    assert unfinished(flaskd) == ["atexit/exits.wait"]


def exiting(flaskd: Flaskd) -> None:
    """Ask for the stop, and wait until the process has reached its exit."""
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("the exit waits for atexit/")


def test_a_second_signal_hurries_the_exit(flaskd: Flaskd) -> None:
    """A second signal leaves one more second, also while the app's exit callbacks run."""
    serve(flaskd, "/callback/60.0", deadline="60s", wait="60s")
    exiting(flaskd)
    before = time.monotonic()
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 9
    assert time.monotonic() - before < 3
    assert unfinished(flaskd) == ["atexit/exits.wait"]


def test_a_third_signal_ends_the_exit_at_once(flaskd: Flaskd) -> None:
    """A third signal ends the process at once."""
    serve(flaskd, "/callback/60.0", deadline="60s", wait="60s")
    exiting(flaskd)
    flaskd.kill(signal.SIGTERM)
    flaskd.until(lambda: "asked again" in flaskd.log)
    time.sleep(0.3)  # two signals within 250 ms count as one
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 128 + signal.SIGTERM
    (flaskd.state / "running.json").unlink()


def test_who_waits_for_the_stop_hears_what_was_cut(flaskd: Flaskd) -> None:
    """The reply comes after the exit, names what was not finished, and the client's exit code says so."""
    serve(flaskd, "/thread/60.0", wait="300ms")
    code, out, _ = flaskd.client("stop", "--wait")
    assert code == 1
    assert "not finished: thread/mailer" in out
    assert flaskd.wait() == 9


def test_a_start_that_fails_is_over_in_time(flaskd: Flaskd) -> None:
    """After a failed start, a thread of the app has its time; the exit code is that of the failure."""
    flaskd.write("broken.py", "import threading\nthreading.Thread(target=threading.Event().wait, name='stray').start()\n"
                 "raise RuntimeError('broken')\n")  # fmt: skip
    code, log = flaskd.fails(app="broken")
    assert code == 70
    assert "leaving without waiting for thread/stray" in log


@pytest.mark.parametrize("how", ["full", "closed pipe", "closed", "standard output full"])
def test_standard_streams_that_cannot_be_written(flaskd: Flaskd, how: str) -> None:
    """A stop ends with 0 even if standard output and error cannot be written and the app prints."""
    flaskd.write("prints.py", "import sys\nfrom gateapp import app\n"
                 "@app.get('/print')\ndef say():\n    print('x' * 100, end='')\n    return 'said'\n")  # fmt: skip
    for name in [name for name in flaskd.env if name.startswith("PYTHON")]:
        del flaskd.env[name]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe, Path("/dev/full").open("wb") as full:
        if how == "closed":
            flaskd.start(app="prints", prefix=["sh", "-c", 'exec "$@" >&- 2>&-', "sh"])
        elif how == "standard output full":
            flaskd.start(app="prints", stdout=full)
        else:
            stream = full if how == "full" else pipe
            flaskd.start(app="prints", stdout=stream, stderr=stream)
    assert get(flaskd.url, "/print") == (200, b"said")
    assert flaskd.stop() == 0


def test_a_terminal_that_hung_up(flaskd: Flaskd) -> None:
    """If the terminal hung up, nothing can be logged, and the stop ends as usual."""
    for name in [name for name in flaskd.env if name.startswith("PYTHON")]:
        del flaskd.env[name]
    terminal = Terminal(flaskd)
    flaskd.wait_message("READY=1")
    terminal.close()
    assert flaskd.wait() == 0


def test_the_end_of_a_program_is_its_own(flaskd: Flaskd) -> None:
    """flaskd.serve() returns after the stop, and leaves exit callbacks and threads to the program."""
    flaskd.write("exits.py", APP)
    flaskd.write("program.py", "import flaskd, exits\nexits.finish(0, 'callback')\n"
                 "code = flaskd.serve(exits.app, {'server': {'listen': '127.0.0.1:0'}})\n"
                 "exits.done('the program')\nraise SystemExit(code)\n")  # fmt: skip
    flaskd.process = subprocess.Popen([sys.executable, "program.py"], cwd=flaskd.directory, env=flaskd.env)
    flaskd.wait_message("READY=1")
    assert get(flaskd.url, "/jobs/3")[0] == 200
    assert "the exit waits" not in flaskd.command("plan")
    assert flaskd.stop() == 0
    assert done(flaskd) == ["job 0", "job 1", "job 2", "the program", "callback"]


def test_a_program_that_cannot_write_ends_with_its_own_code(flaskd: Flaskd) -> None:
    """What flaskd could not log does not change the exit code of the program that called it."""
    flaskd.write("program.py", "import flaskd\nfrom gateapp import app\n"
                 "raise SystemExit(flaskd.serve(app, {'server': {'listen': '127.0.0.1:0'}}))\n")  # fmt: skip
    env = {name: value for name, value in flaskd.env.items() if not name.startswith("PYTHON")}
    with Path("/dev/full").open("wb") as full:
        flaskd.process = subprocess.Popen([sys.executable, "program.py"], cwd=flaskd.directory, env=env, stderr=full)
    flaskd.wait_message("READY=1")
    assert flaskd.stop() == 0
