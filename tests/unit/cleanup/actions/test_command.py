import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from cleanup_kit import ended, in_background, run, runner
from patience import PATIENCE

from flaskd.cleanup import ACTIONS, Fate, Step
from flaskd.cleanup.actions.command import KEPT_OUTPUT, _anyone_in
from flaskd.config import Phase

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")

MARGIN = 1.0


def command(*argv, timeout=PATIENCE, phase=Phase.FINAL, retries=0, **fields):
    """Give a step that runs a program."""
    fields = ACTIONS["command"].fields(argv=list(argv), **fields)
    return Step("cmd", ACTIONS["command"], fields, phase, timeout, retries=retries)


def shell(script, **more):
    """Give a step that runs a shell script."""
    return command("sh", "-c", script, **more)


def perform(step, **more):
    """Run one step on its own and give its result."""
    return run(step, **more)["cmd"]


def children():
    """Give the pids of all children of this process."""
    found = set()
    for each in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found.update(map(int, each.read_text().split()))
    return found


@pytest.fixture(autouse=True)
def _nothing_left():
    """After each test there is no child of it, dead or alive, and no thread of the cleanup."""
    before = children()
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("flaskd-cleanup"):
            thread.join(PATIENCE)
            assert not thread.is_alive(), thread.name
    assert children() <= before  # other tests of this process may have left some, as multiprocessing's tracker


@pytest.fixture
def told(tmp_path):
    """Give a FIFO's path and a function that waits for one line in it, by which a script tells where it is."""
    path = tmp_path / "told"
    os.mkfifo(path)

    def line():
        with path.open() as file:
            return file.readline().split()

    return path, line


def test_exit_code_zero_is_ok():
    """A command that exits with 0 is ok, and the last line of its output is the detail."""
    result = perform(shell("echo one; echo two >&2"))
    assert (result.fate, result.detail) == (Fate.OK, "two")


def test_another_exit_code_is_a_failure_with_the_output():
    """The failure has the exit code and the end of both outputs, and no traceback."""
    result = perform(shell("echo out; echo err >&2; exit 3"))
    assert (result.fate, result.why, result.trace) == (Fate.FAILED, "exit code 3: out | err", "")


def test_death_by_signal_is_named():
    """A command that a signal ends has failed, and the signal is named."""
    assert perform(shell("kill -SEGV $$")).why == "killed by SIGSEGV"


@pytest.mark.parametrize(
    ("argv", "more", "why"),
    [
        (["/no/such/program"], {}, 'cannot run "/no/such/program": No such file or directory: /no/such/program'),
        (["/etc/passwd"], {}, 'cannot run "/etc/passwd": Permission denied: /etc/passwd'),
        (["true"], {"cwd": "/no/where"}, 'cannot run "true": No such file or directory: /no/where'),
    ],
)
def test_what_cannot_be_run_says_so(argv, more, why):
    """A missing program, and a directory in its place, are named in the failure."""
    result = perform(command(*argv, **more))
    assert (result.fate, result.why, result.trace) == (Fate.FAILED, why, "")


def test_no_shell_touches_the_arguments(tmp_path):
    """Arguments arrive as they are, in the directory that was asked for."""
    result = perform(
        command(sys.executable, "-c", "import os,sys; print(os.getcwd(), sys.argv[1:])", "$HOME", "a b", cwd=tmp_path)
    )
    assert result.detail == f"{tmp_path.resolve()} ['$HOME', 'a b']"


def test_the_environment(monkeypatch):
    """The command's environment describes the stop, has the configured variables, and none that systemd set for flaskd."""
    private = ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"]
    for name in private:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "kept")
    names = ["FLASKD_REASON", "FLASKD_PHASE", "FLASKD_POLICY", "KEPT", "MORE", *private]
    script = "import os, sys; print(*map(os.environ.get, sys.argv[1:]))"
    result = perform(command(sys.executable, "-c", script, *names, env={"MORE": "more"}))
    assert result.detail == "signal final cmd kept more" + " None" * len(private)


def test_standard_input_is_empty():
    """The command's standard input is empty."""
    assert perform(shell("cat; echo done")).detail == "done"


def test_output_is_kept_within_bounds():
    """Only the end of much output is kept, and the command is never blocked."""
    result = perform(shell("yes 0123456789 | head -c 3000000; echo; echo last; exit 1"))
    assert result.why.startswith("exit code 1: ")
    assert result.why.endswith(" | last")
    assert len(result.why) < KEPT_OUTPUT


def test_output_cannot_disguise_itself():
    """Control characters and invalid bytes in the output are escaped in the log."""
    assert perform(shell(r"printf 'a\033[31mb\377\n'")).detail == "a [31mb�"


def test_an_endless_flood_is_ended():
    """A command that writes without end is ended at its timeout."""
    result = perform(command("yes", timeout=0.3))
    assert result.fate is Fate.TIMED_OUT
    assert "not done within its timeout of 300ms; ended by SIGTERM: y | y" in result.why


def test_the_whole_group_is_ended(told):
    """A timeout ends the command and all processes that it started."""
    path, line = told
    stop = runner(shell(f"sleep 100 & one=$!; sleep 100 & echo $$ $one $! > {path}; wait"))
    with in_background(lambda: stop.run(Phase)) as results:
        pids = [int(word) for word in line()]
        stop.hurry(0.5)
    (result,) = results[0]
    assert result.fate is Fate.TIMED_OUT
    assert "ended by SIGTERM" in result.why
    assert len(pids) == 3
    assert all(ended(pid) for pid in pids)
    assert stop.abandoned == ()
    assert stop.finished()


def test_who_ignores_sigterm_gets_sigkill():
    """A command that ignores SIGTERM is killed when its grace is over."""
    begun = time.monotonic()
    result = perform(shell("trap '' TERM; echo ready; while :; do sleep 100; done", timeout=0.3, kill_grace=0.2))
    assert time.monotonic() - begun < 0.5 + MARGIN
    assert result.fate is Fate.TIMED_OUT
    assert "ended by SIGKILL" in result.why


def test_the_grace_is_for_tidying_up(told):
    """A command that ends in its grace after SIGTERM has still timed out."""
    path, line = told
    stop = runner(
        shell(f"trap 'echo tidy; exit 0' TERM; echo ready > {path}; while :; do sleep 0.01; done", kill_grace=PATIENCE)
    )
    with in_background(lambda: stop.run(Phase)) as results:
        line()
        stop.hurry(1.0)
    (result,) = results[0]
    assert result.fate is Fate.TIMED_OUT
    assert result.why.endswith("tidy")
    assert "ended by SIGTERM" in result.why


def test_the_grace_ends_with_the_time(told):
    """However long its grace is, a command that ignores SIGTERM is killed when the stop's time is up."""
    path, line = told
    stop = runner(shell(f"trap '' TERM; echo $$ > {path}; while :; do sleep 100; done", kill_grace=60.0))
    with in_background(lambda: stop.run(Phase)) as results:
        (pid,) = line()
        begun = time.monotonic()
        stop.hurry(0.3)
    assert time.monotonic() - begun < 0.3 + MARGIN
    assert results[0][0].fate is Fate.TIMED_OUT
    assert ended(int(pid))


def test_a_stopped_command_is_ended_too(told):
    """A stopped command (SIGSTOP) is continued, so that it receives its SIGTERM."""
    path, line = told
    stop = runner(
        shell(f"trap 'exit 0' TERM; echo $$ > {path}; kill -STOP $$; while :; do sleep 0.01; done", kill_grace=PATIENCE)
    )
    with in_background(lambda: stop.run(Phase)) as results:
        (pid,) = line()
        os.waitid(os.P_PID, int(pid), os.WSTOPPED | os.WNOWAIT)
        stop.hurry(1.0)
    assert "ended by SIGTERM" in results[0][0].why


def test_a_grandchild_that_keeps_the_pipe_open_holds_nobody_up(tmp_path):
    """A process left in the group that keeps the output open is ended once the command has exited."""
    begun = time.monotonic()
    result = perform(shell(f"sleep 100 & echo $! > {tmp_path}/pid; echo done"))
    assert time.monotonic() - begun < PATIENCE / 2
    assert (result.fate, result.detail) == (Fate.OK, "processes it left behind were ended by SIGTERM; done")
    assert ended(int((tmp_path / "pid").read_text()))


def test_who_leaves_the_group_is_let_go(tmp_path):
    """A process that made a session of its own is not ended, and does not delay the step by keeping the output open."""
    begun = time.monotonic()
    script = """if True:
        import os, sys, time
        ready, tell = os.pipe()
        if os.fork() == 0:
            os.setsid()
            with open(sys.argv[1], "w") as file:
                print(os.getpid(), file=file)
            os.write(tell, b"x")
            time.sleep(100)
        os.read(ready, 1)
        print("parent done")
    """
    result = perform(command(sys.executable, "-c", script, str(tmp_path / "pid")))
    pid = int((tmp_path / "pid").read_text())
    try:
        assert time.monotonic() - begun < PATIENCE / 2
        assert (result.fate, result.detail) == (Fate.OK, "parent done")
        os.kill(pid, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert ended(pid)


def test_a_command_that_closes_its_output_is_waited_for():
    """A command that closes its output is still waited for."""
    result = perform(
        command(sys.executable, "-c", "import os,time; os.close(1); os.close(2); time.sleep(0.2); os._exit(4)")
    )
    assert (result.fate, result.why) == (Fate.FAILED, "exit code 4")


def test_a_command_that_times_out_is_tried_again(caplog):
    """After an attempt that timed out comes another one, with its own timeout."""
    caplog.set_level(logging.DEBUG, logger="flaskd.cleanup")
    result = perform(command("sleep", "100", timeout=0.1, retries=2))
    assert (result.fate, result.attempts) == (Fate.TIMED_OUT, 3)
    assert caplog.text.count("timed_out") == 3


def test_an_exit_code_that_somebody_took_is_not_taken_for_success(monkeypatch):
    """If other code reaps the child, the exit code is unknown, which is a failure."""
    real = os.waitpid

    def stolen(pid, options):
        real(pid, options)
        raise ChildProcessError

    with monkeypatch.context() as patch:
        patch.setattr(os, "waitpid", stolen)
        result = perform(command("true"))
    assert result.fate is Fate.FAILED
    assert "exit code is not known" in result.why


def test_without_a_thread_to_watch_it_the_command_is_looked_after_all_the_same(monkeypatch):
    """Without a thread that waits for it, a command runs to its end, and one that hangs is ended in time."""
    real = threading.Thread.start

    def refuse(thread):
        if thread.name.endswith("-wait"):
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        done, failed = perform(command("echo", "yes")), perform(command("false"))
        late = perform(command("sleep", "100", timeout=0.3))
    assert (done.fate, done.detail) == (Fate.OK, "yes")
    assert (failed.fate, failed.why) == (Fate.FAILED, "exit code 1")
    assert (late.fate, "ended by SIGTERM" in late.why) == (Fate.TIMED_OUT, True)


def test_a_command_that_cannot_be_ended_is_given_up(monkeypatch):
    """If signals do not reach the group, the runner returns at the deadline, and reports it."""
    real = os.killpg
    pids = []

    def deaf(pid, number):
        pids.append(pid)
        if number == 0:
            real(pid, number)
        else:
            raise PermissionError

    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", deaf)
        stop = runner(command("sleep", "100", timeout=0.1, kill_grace=0.1), deadline=0.5)
        (result,) = stop.run(Phase)
    assert time.monotonic() - begun < 0.5 + MARGIN
    assert (result.fate, "not seen to end" in result.why) == (Fate.TIMED_OUT, True)
    real(pids[0], signal.SIGKILL)


def test_a_group_is_looked_up(monkeypatch, tmp_path):
    """A group with a running member is told from one without; if that is unknown, it counts as running."""
    nobody = 2**22 + 1
    assert _anyone_in(os.getpgrp())
    assert not _anyone_in(nobody)
    monkeypatch.setattr("flaskd.cleanup.actions.command._PROC", tmp_path)
    assert _anyone_in(nobody)
