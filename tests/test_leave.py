"""The end of a process, in one of its own."""

import subprocess
import sys

import pytest

FULL = """
import array, fcntl, logging, os, sys, termios, threading, time
from flaskd.leave import leave

logging.basicConfig()  # its handler flushes standard error in an atexit callback

def fill():
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(2, True)

def keep_writing():
    threading.Thread(target=lambda: sys.stderr.write("x" * 2**20), daemon=True).start()
    size, waiting = fcntl.fcntl(2, fcntl.F_GETPIPE_SZ), array.array("i", [0])
    while waiting[0] < size:  # then it is within write(2), and has the stream's lock
        fcntl.ioctl(2, termios.FIONREAD, waiting)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it looks at a pipe as Linux shows it")
@pytest.mark.parametrize(
    "app",
    [
        "fill(); threading.Thread(target=time.sleep, args=(600,)).start()",
        "keep_writing()",
        "fill(); print('x', end='')",
    ],
    ids=["something to say", "a thread that writes", "nothing to say"],
)
def test_nobody_who_reads_keeps_the_exit(app):
    """Standard error is full and not read: the process ends with its own code all the same."""
    with subprocess.Popen(
        [sys.executable, "-E", "-c", f"{FULL}\n{app}\nleave(7)"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.wait(20) == 7
        finally:
            process.kill()
