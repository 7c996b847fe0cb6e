"""The limit of open files: raised when needed, and programs that the app starts keep the old one."""

import contextlib
import os
import resource
import subprocess
import sys

import pytest

from flaskd.process.descriptors import OpenFiles

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
from flaskd.process.descriptors import open_files
def soft(): return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
def ulimit(): return int(subprocess.run(["sh", "-c", "ulimit -Sn"], capture_output=True, text=True).stdout)
def fill(most): return [os.open(os.devnull, os.O_RDONLY) for _ in range(most)]
"""


def test_the_hard_limit_is_what_can_be_had():
    """The hard limit is returned at once, and the soft limit stays, for programs that are started."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = "print(open_files.limit(), open_files.limit(raised=True), soft(), ulimit())"
    assert in_a_process(HEAD + code) == [str(SOFT), str(hard), str(SOFT), str(SOFT)]


@pytest.mark.parametrize(
    "how",
    ["open_files.make_room(fill(SOFT * 3 // 4)[-1])", "fill(SOFT * 3 // 4); open_files.adjust()"],
    ids=["as one is opened", "as they are looked at"],
)
def test_it_is_raised_when_they_run_short(how):
    """When three quarters of the soft limit are open it is raised, and more files can be opened."""
    code = f"open_files.limit(raised=True)\n{how}\nfill(SOFT)\nprint(soft() > SOFT)"
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == ["True"]


def test_it_is_raised_when_there_are_none():
    """If the app has taken all descriptors, the next look raises the limit."""
    code = """
open_files.limit(raised=True)
try:
    fill(SOFT)
except OSError as error:
    print(error.errno)
open_files.adjust()
fill(SOFT)
print("more")
"""
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == ["24", "more"]


def test_it_falls_back():
    """When the descriptors are closed, the limit falls back, and programs get the old one."""
    code = """
open_files.limit(raised=True)
some = fill(SOFT * 3 // 4)
open_files.adjust()
for each in some:
    os.close(each)
open_files.adjust()
print(soft(), ulimit())
"""
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == [str(SOFT), str(SOFT)]


def test_a_forked_child_has_the_old_one():
    """A forked child has the old limit, however many descriptors are open in its parent."""
    code = """
open_files.limit(raised=True)
open_files.make_room(fill(SOFT * 3 // 4)[-1])
if os.fork() == 0:
    print(soft(), flush=True)
    os._exit(0)
os.wait()
print(soft() > SOFT)
"""
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == [str(SOFT), "True"]


def test_a_limit_that_is_nobodys_stays():
    """A process that did not ask for the raised limit keeps its own."""
    code = "open_files.make_room(fill(SOFT * 3 // 4)[-1]); open_files.adjust(); print(soft())"
    assert in_a_process(f"{HEAD}SOFT = {SOFT}\n{code}") == [str(SOFT)]


def test_a_limit_that_cannot_be_raised_is_told_as_it_is(monkeypatch):
    """If the limit cannot be raised, the present one is returned."""

    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    files = OpenFiles()
    assert files.limit(raised=True) == 100
    with contextlib.closing(os.fdopen(os.open(os.devnull, os.O_RDONLY))) as file:
        assert not files.make_room(file.fileno())


RESERVE = """
import errno, resource
null = lambda: os.open(os.devnull, os.O_RDONLY)
held = []
def leak():
    try:
        while True:
            held.append(null())
    except OSError as error:
        assert error.errno == errno.EMFILE
def full():
    try:
        null()
    except OSError as error:
        return error.errno == errno.EMFILE
"""


@pytest.fixture(params=[False, True], ids=["below the hard limit", "at the hard limit"])
def kept(request):
    """Runs code in a process with few descriptors, whose soft limit is the hard one or lower."""

    def run(code):
        limits = "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n" if request.param else ""
        raised = "" if request.param else "open_files.limit(raised=True)\n"
        return in_a_process(HEAD + RESERVE + limits + raised + code)

    return run


def test_what_is_kept_can_be_used_again_and_again(kept):
    """The app cannot use the reserve, not even after flaskd has closed what it opened there."""
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft(), 256), 256))
with open_files.reserve():
    leak()
    open_files.adjust()
    leak()
    for _ in range(3):
        opened = [open_files.open(null) for _ in range(8)]
        leak()
        for each in opened:
            os.close(each)
        leak()
        print(full())
"""
    assert kept(code) == ["True"] * 3


def test_the_cleanup_has_a_share_and_the_record_the_rest(kept):
    """After `share` the app can use most of the reserve, and flaskd the rest."""
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft(), 256), 256))
with open_files.reserve():
    leak(); open_files.adjust(); leak()
    before = len(held)
    open_files.share()
    leak()
    print(len(held) - before >= 16, full())
    os.close(open_files.open(null))
"""
    assert kept(code) == ["True", "True"]


def test_programs_have_the_limit_that_flaskd_was_started_with_while_some_are_kept():
    """If the hard limit is higher, the reserve is above the soft limit, and programs get that unchanged."""
    code = """
open_files.limit(raised=True)
with open_files.reserve():
    print(ulimit())
    with open_files.used(), open_files.used():
        pass
    print(ulimit())
"""
    assert in_a_process(HEAD + code) == [str(SOFT), str(SOFT)]


def test_uses_may_overlap_and_others_may_set_the_limit():
    """Overlapping uses raise the limit until the last one ends, and it follows a change from outside (prlimit(1))."""
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
with open_files.reserve():
    less = soft()
    with open_files.used():
        with open_files.used():
            print(soft())
        print(soft())
    print(soft() == less < 256)
    resource.setrlimit(resource.RLIMIT_NOFILE, (less - 10, 256))
    with open_files.used():
        pass
    print(soft() == less - 10)
print(soft())
"""
    assert in_a_process(HEAD + code) == ["256", "256", "True", "True", "214"]


@pytest.mark.parametrize("use", ["open_files.used()", "open('/dev/null')"])
def test_a_forked_child_has_the_whole_limit(use):
    """A forked child has no reserve, whatever its parent was doing."""
    code = f"""
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
with open_files.reserve(), {use}:
    if os.fork() == 0:
        print(soft(), flush=True)
        os._exit(0)
    os.wait()
"""
    assert in_a_process(HEAD + code) == ["256"]


def test_without_a_reserve_what_cannot_be_opened_is_raised():
    """Without a reserve, an error of open is raised unchanged."""
    code = """
leak()
try:
    open_files.open(null)
except OSError as error:
    print(error.errno == errno.EMFILE)
"""
    assert in_a_process(HEAD + RESERVE + code) == ["True"]
