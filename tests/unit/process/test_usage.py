"""The memory of a process, from the kernel."""

import os
import signal
import subprocess
import sys

import pytest

from flaskd.process.usage import exists, pss, read_pss, resident

MIB = 1024**2
GROWN = "held = b'x' * (64 << 20); print(len(held), flush=True); input()"


def test_memory_of_a_process():
    """64 MiB show in both figures; shared memory counts in part in one of them."""
    with subprocess.Popen([sys.executable, "-c", GROWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 64 * MIB < read_pss(process.pid) <= resident(process.pid) < 128 * MIB
        assert pss(process.pid) == pytest.approx(read_pss(process.pid), abs=MIB)  # what it shares, others may leave


def test_a_process_that_has_ended():
    """A process that has ended exists, without memory, until it is reaped."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "input()"], os.environ)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        read_pss(pid)
    assert (exists(pid), pss(pid), resident(pid)) == (True, None, 0)
    os.waitpid(pid, 0)
    assert (exists(pid), pss(pid), resident(pid)) == (False, None, None)
