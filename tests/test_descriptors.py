"""The limit of open files: raised when it is needed, and not handed on before."""

import contextlib
import os
import resource
import subprocess
import sys

import pytest

from flaskd import descriptors

SOFT = 64


def in_a_process(code):
    """Run Python code in a process with a soft limit of its own; returns what it printed."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    done = subprocess.run(
        [sys.executable, "-Wignore::DeprecationWarning", "-c", code],
        capture_output=True, text=True, check=True, timeout=20,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, hard)),
    )  # fmt: skip
    return done.stdout.split()


HEAD = """
import os, resource, subprocess
from flaskd import descriptors
def soft(): return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
def ulimit(): return int(subprocess.run(["sh", "-c", "ulimit -Sn"], capture_output=True, text=True).stdout)
def fill(most): return [os.open(os.devnull, os.O_RDONLY) for _ in range(most)]
"""


def test_the_hard_limit_is_what_can_be_had():
    """It is told at once, and the soft one stays as it was, for programs that are started."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = "print(descriptors.open_files_limit(), descriptors.open_files_limit(raised=True), soft(), ulimit())"
    assert in_a_process(HEAD + code) == [str(SOFT), str(hard), str(SOFT), str(SOFT)]


@pytest.mark.parametrize(
    "how",
    ["descriptors.make_room(fill(SOFT * 3 // 4)[-1])", "fill(SOFT * 3 // 4); descriptors.adjust()"],
    ids=["as one is opened", "as they are looked at"],
)
def test_it_is_raised_when_they_run_short(how):
    """Three quarters of the soft limit are open: it is raised, and that many more can be opened."""
    code = f"descriptors.open_files_limit(raised=True)\n{how}\nfill(SOFT)\nprint(soft() > SOFT)"
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == ["True"]


def test_it_is_raised_when_there_are_none():
    """The app took all of them meanwhile: the next look raises it."""
    code = """
descriptors.open_files_limit(raised=True)
try:
    fill(SOFT)
except OSError as error:
    print(error.errno)
descriptors.adjust()
fill(SOFT)
print("more")
"""
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == ["24", "more"]


def test_it_falls_back():
    """Once they are closed, programs that are started have the old limit again."""
    code = """
descriptors.open_files_limit(raised=True)
some = fill(SOFT * 3 // 4)
descriptors.adjust()
for each in some:
    os.close(each)
descriptors.adjust()
print(soft(), ulimit())
"""
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == [str(SOFT), str(SOFT)]


def test_a_forked_child_has_the_old_one():
    """However many are open in its parent."""
    code = """
descriptors.open_files_limit(raised=True)
descriptors.make_room(fill(SOFT * 3 // 4)[-1])
if os.fork() == 0:
    print(soft(), flush=True)
    os._exit(0)
os.wait()
print(soft() > SOFT)
"""
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == [str(SOFT), "True"]


def test_a_limit_that_is_nobodys_stays():
    """A process whose limit was not asked to be raised, with a server in a thread, keeps it."""
    code = "descriptors.make_room(fill(SOFT * 3 // 4)[-1]); descriptors.adjust(); print(soft())"
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == [str(SOFT)]


def test_a_limit_that_cannot_be_raised_is_told_as_it_is(monkeypatch):
    """Where the limit cannot be changed the present one is given."""

    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert descriptors.open_files_limit(raised=True) == 100
    with contextlib.closing(os.fdopen(os.open(os.devnull, os.O_RDONLY))) as file:
        assert not descriptors.make_room(file.fileno())
