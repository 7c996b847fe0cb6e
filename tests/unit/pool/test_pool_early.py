"""Processes that are forked early: what they have when they become workers, and that none is left behind."""

import json
import os
import signal
import subprocess
import sys

import pytest

from flaskd.pool.early import fork_early

HEAD = """
import json, os, resource, signal, socket, sys, threading
from flaskd.pool.early import fork_early
from flaskd.process.bootstrap import heed_signals
from flaskd.process.orphans import orphans
from flaskd.pool.spawn import reap

def run(*descriptors):
    with open(descriptors[0], "w") as out:
        json.dump({
            "pid": os.getpid(), "env": dict(os.environ), "same": [os.fstat(each).st_ino for each in descriptors[1:]],
            "term": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            "int": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "usr1": signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL,
            "hup": signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
            "open": sorted(int(each) for each in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{each}")),
        }, out)
    sys.exit(7)
"""


def outcome(code, **options):
    """The standard output of a process that runs `code`, once it and all that it forked have ended."""
    command = [sys.executable, "-c", HEAD + code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30, **options)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def test_a_process_becomes_a_worker():
    """It has the environment and the descriptors that it is given, and otherwise what a new process has."""
    said = json.loads(
        outcome("""
os.environ["GONE"] = "with the others"
signal.signal(signal.SIGHUP, signal.SIG_IGN)
heed_signals()
passed = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
assert passed == [3, 4]
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()))
first, second = fork_early(2, run)
before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
assert not before, before
reader, writer = os.pipe()
others = [os.open(each, os.O_RDONLY) for each in ("/proc/self/stat", "/")]
pid, pidfd = first.become({"HERE": "1"}, [writer, *others])
os.close(writer)
with open(reader) as pipe:
    said = json.load(pipe)
assert said["pid"] == pid
assert said["same"] == [os.fstat(each).st_ino for each in others]
assert reap(pidfd) == 7
os.close(pidfd)
for each in (first, second, second):
    each.end()
assert not orphans._known
print(json.dumps(said))
""")
    )
    assert said["env"] == {"HERE": "1"}
    assert (said["term"], said["int"], said["usr1"], said["hup"]) == (True, True, True, True)
    assert len(said["open"]) == 3 + 3  # the standard streams, and what it was given


def test_none_is_left_when_flaskd_ends():
    """Those that have not become workers end with the process that forked them: its output has an end."""
    assert outcome("fork_early(3, run); print('three', flush=True); os._exit(0)") == "three\n"


def test_one_that_has_ended_is_noticed():
    """It does not become a worker, and is reaped."""
    outcome("""
import time
one, = fork_early(1, run)
os.kill(one.pid, signal.SIGKILL)
os.waitid(os.P_PIDFD, one.pidfd, os.WEXITED | os.WNOWAIT)
assert not one.become({}, [0, 1, 2])
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    pass
else:
    raise AssertionError
""")


def test_a_process_with_threads_is_not_forked():
    """A lock that another thread holds would stay locked in the child."""
    outcome("""
stop = threading.Event()
threading.Thread(target=stop.wait).start()
assert fork_early(2, run) == []
stop.set()
""")


@pytest.mark.skipif(os.getuid() != 0, reason="another user's processes count for this limit")
def test_where_no_process_can_be_had_there_are_fewer():
    """The start of a worker tells that there is no room."""
    outcome("""
os.setuid(54321)
resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))
few = fork_early(5, run)
assert len(few) == 1, few
few[0].end()
""")


def test_an_error_in_the_child_does_not_return_into_the_parents_code():
    """A worker that fails ends with a traceback and exit code 1."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + "one, = fork_early(1, lambda *_: os.stat('/nowhere'))\n"
         "pid, pidfd = one.become({}, [0, 1, 2])\nassert reap(pidfd) == 1"],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError")


def test_nothing_is_forked_without_workers(monkeypatch):
    """No process is made for a count of zero."""
    monkeypatch.setattr(os, "fork", pytest.fail)
    assert fork_early(0, pytest.fail) == []
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
