"""Orphans, in a process of their own, because a process that adopts them gets all."""

import subprocess
import sys

import pytest

from flaskd.process import orphans

START = """
import os, subprocess, sys, threading, time
from flaskd.process.orphans import orphans

def orphan():
    # It waits for its end; its parent, a shell, has ended by now.
    reader, writer = os.pipe()
    run = ["sh", "-c", f"(read line <&{reader}) >&- & echo $!"]
    pid = int(subprocess.run(run, stdout=subprocess.PIPE, check=True, pass_fds=[reader]).stdout)
    os.close(reader)
    return pid, writer

def end(pid, writer):
    os.close(writer)
    ended(pid)

def ended(pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def is_there(pid):
    return os.path.exists(f"/proc/{pid}")

assert orphans.adopt()
"""


def check(code: str) -> None:
    """Run code in a process that has adopted its orphans."""
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_that_has_ended_is_reaped() -> None:
    """All orphans that have ended are reaped at the next look; living ones are left alone."""
    check(
        """
lives, *others = orphan(), orphan(), orphan()
for each in others: end(*each)
orphans.reap()
assert not any(is_there(pid) for pid, _ in others)
assert is_there(lives[0])
end(*lives)
"""
    )


def test_one_that_is_known_is_left() -> None:
    """A known orphan is not reaped here, until it was reaped elsewhere."""
    check(
        """
with orphans.expected() as known:
    pid, writer = orphan()
    end(pid, writer)
    orphans.reap()
    assert is_there(pid)
    known.add(pid)
orphans.reap()
assert is_there(pid)
orphans.forget(pid)
orphans.reap()
assert not is_there(pid)
"""
    )


def test_a_child_of_another_thread_keeps_its_status() -> None:
    """A child of `subprocess` in another thread keeps its exit status."""
    check(
        """
begun, go_on = threading.Event(), threading.Event()
def run():
    global child
    child = subprocess.Popen(["sh", "-c", "exit 7"])
    begun.set()
    go_on.wait()
    assert child.wait() == 7
thread = threading.Thread(target=run)
thread.start()
begun.wait()
ended(child.pid)
orphans.reap()
go_on.set()
thread.join()
assert child.returncode == 7
"""
    )


def test_without_ctypes_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ctypes `adopt` returns False."""
    monkeypatch.setitem(sys.modules, "ctypes", None)
    there = orphans.Orphans()
    assert not there.adopt()
    there.reap()
