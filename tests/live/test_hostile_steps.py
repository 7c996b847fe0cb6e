"""Cleanup steps that hang, raise, exit, fork, start threads and fill pipes do not hold up the stop."""

import os
import signal
import time
from pathlib import Path

import pytest
from daemon_kit import Flaskd

STEPS = """
import os, signal, sys, threading, time, _thread

def beside(context): open("beside", "w").close()
def after(context): open("after", "w").close()

def hang(context): time.sleep(60)
def spin(context):
    while True: pass
def fail(context): raise RuntimeError("out of order")
def leave(context): sys.exit("that is all")
def leave_interpreter(context): raise SystemExit(3)
def interrupt(context): raise KeyboardInterrupt
def interrupt_main(context): _thread.interrupt_main(); _thread.interrupt_main(signal.SIGTERM)
def fork(context):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    open("child", "w").write(str(child))
def fork_and_return(context):
    child = os.fork()
    if child:
        open("child", "w").write(str(child))
def stray(context): threading.Thread(target=time.sleep, args=(60,), name="stray", daemon=False).start()
def flood(context):
    while True: print("x" * 1000)
def steal_signals(context):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    time.sleep(60)
def deep(context): deep(context)
def lock_log(context):
    import logging
    for handler in logging.getLogger("flaskd").handlers: handler.acquire()
    time.sleep(60)
"""
POLICIES = """
shutdown: {{deadline: 4s, reserve: 1s}}
cleanup:
  policies:
    hostile: {{{hostile}, phase: close, timeout: 300ms}}
    beside: {{use: call, with: {{target: "steps:beside"}}, phase: close}}
    after: {{use: call, with: {{target: "steps:after"}}, phase: flush}}
"""
TIMED_OUT = "timed_out"


@pytest.fixture
def orphan(flaskd: Flaskd):
    """Kills the process whose pid a step has written."""
    yield flaskd.directory / "child"
    if (flaskd.directory / "child").exists():
        pid = int((flaskd.directory / "child").read_text())
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def stop_with(flaskd: Flaskd, hostile: str, **popen) -> dict:
    """Start, stop, and check what must hold whatever the step does; returns the step's entry in the record."""
    flaskd.write("steps.py", STEPS)
    flaskd.write("flaskd.yaml", POLICIES.format(hostile=hostile))
    flaskd.start(**popen)
    before = time.monotonic()
    assert flaskd.stop() == 0
    assert time.monotonic() - before < 4.5
    policies = flaskd.record()["policies"]
    assert (policies["beside"]["fate"], policies["after"]["fate"]) == ("ok", "ok")
    assert (flaskd.directory / "beside").exists()
    assert (flaskd.directory / "after").exists()
    return dict(policies["hostile"])


@pytest.mark.parametrize(
    ("function", "fate", "logged"),
    [
        ("hang", TIMED_OUT, "def hang(context): time.sleep(60)"),
        ("spin", TIMED_OUT, "while True: pass"),
        ("fail", "failed", "RuntimeError: out of order"),
        ("leave", "failed", "SystemExit: that is all"),
        ("leave_interpreter", "failed", "SystemExit: 3"),
        ("interrupt", "failed", "KeyboardInterrupt"),
        ("interrupt_main", "ok", "close/hostile: ok"),
        ("stray", "ok", "cut at the exit: thread/stray"),
        ("steal_signals", TIMED_OUT, "time.sleep(60)"),
        ("deep", "failed", "RecursionError"),
    ],
)
def test_a_hostile_function(flaskd: Flaskd, function: str, fate: str, logged: str) -> None:
    """The step's result, its stack or output are in the log, other steps run, and the exit is in time."""
    entry = stop_with(flaskd, f'use: call, with: {{target: "steps:{function}"}}')
    assert entry["fate"] == fate
    assert logged in flaskd.log


def test_a_function_that_keeps_the_log(flaskd: Flaskd) -> None:
    """A step that hangs with the log's locks costs log lines; record, exit code and deadline are right."""
    assert stop_with(flaskd, 'use: call, with: {target: "steps:lock_log"}')["fate"] == TIMED_OUT


@pytest.mark.parametrize(("function", "fate"), [("fork", "ok"), ("fork_and_return", "ok")])
def test_a_function_that_forks(flaskd: Flaskd, orphan, function: str, fate: str) -> None:
    """Whether a step's child lives on or ends, the daemon stops, and the child has neither lock nor listener."""
    assert stop_with(flaskd, f'use: call, with: {{target: "steps:{function}"}}')["fate"] == fate
    child = int(orphan.read_text())
    if function == "fork":
        assert not gone(child)
        flaskd.start()
        assert "previous" not in flaskd.command("status")
        assert "another flaskd" not in flaskd.log
        assert flaskd.stop() == 0


def test_a_function_that_fills_its_pipe(flaskd: Flaskd) -> None:
    """A step that floods an unread standard output hangs alone."""
    reader, writer = os.pipe()
    try:
        entry = stop_with(flaskd, 'use: call, with: {target: "steps:flood"}', stdout=writer)
    finally:
        os.close(reader)
        os.close(writer)
    assert entry["fate"] == TIMED_OUT
    assert "print(" in flaskd.log


@pytest.mark.parametrize(
    "script",
    [
        "sleep 60 & echo $! $$ > pids; wait",
        "trap '' TERM; sleep 60 & echo $! $$ > pids; while :; do sleep 1; done",
        "sleep 60 & echo $! $$ > pids; yes",
        "sleep 60 & echo $! $$ > pids; kill -STOP $$",
        "sleep 60 & echo $! $$ > pids; exit 0",
    ],
    ids=["waits", "ignores SIGTERM", "floods its pipe", "is stopped", "leaves a child behind"],
)
def test_a_hostile_command(flaskd: Flaskd, script: str) -> None:
    """The whole process group of a command has ended when flaskd has."""
    flaskd.write("hostile.sh", script)
    entry = stop_with(flaskd, "use: command, with: {argv: [sh, hostile.sh], kill_grace: 200ms}")
    assert entry["fate"] == ("ok" if "exit 0" in script else TIMED_OUT)
    for pid in (flaskd.directory / "pids").read_text().split():
        flaskd.until(lambda pid=pid: gone(int(pid)))


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


def test_everything_at_once(flaskd: Flaskd) -> None:
    """With a hostile step of each kind in every phase the deadline holds, and `always` steps have run."""
    flaskd.write("steps.py", STEPS)
    lines = ["shutdown: {deadline: 3s, reserve: 1s}", "cleanup:", "  policies:"]
    for phase in ("announce", "drain", "quiesce", "persist", "close", "flush"):
        lines += [
            f'    {phase}-{function}: {{use: call, with: {{target: "steps:{function}"}}, phase: {phase}, timeout: 20s}}'
            for function in ("hang", "fail", "leave", "stray", "spin")
        ]
    lines.append('    last: {use: call, with: {target: "steps:after"}, phase: close, always: true}')
    flaskd.write("flaskd.yaml", "\n".join(lines))
    flaskd.start()
    held = flaskd.hold()
    before = time.monotonic()
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert time.monotonic() - before < 4.5
    fates = {name: entry["fate"] for name, entry in flaskd.record()["policies"].items()}
    assert len(fates) == 31
    assert fates["last"] == "ok"
    assert fates["announce-fail"] == "failed"
    assert fates["announce-hang"] == TIMED_OUT
