"""The command in a terminal, which is a pseudo-terminal here."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

from daemon_kit import Flaskd
from patience import PATIENCE


class Terminal:
    """A client verb in a terminal of its own."""

    def __init__(self, flaskd: Flaskd, *args: str, columns: int = 80, job: bool = False) -> None:
        self.master, slave = pty.openpty()
        self.slave = slave
        self.resize(columns)
        self.before = termios.tcgetattr(slave)
        env = {key: value for key, value in flaskd.env.items() if key not in {"NO_COLOR", "COLUMNS", "LINES"}}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flaskd", *args],
            cwd=flaskd.directory, env={**env, "TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=not job, process_group=0 if job else None,
            preexec_fn=None if job else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.shown = ""

    def until(self, pattern: str) -> str:
        """Wait until the terminal shows something that matches."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.shown):
            assert time.monotonic() < end, f"no {pattern} in:\n{self.shown}"
            self._read(0.2)
        return self.shown

    def _read(self, seconds: float) -> None:
        if select.select([self.master], [], [], seconds)[0]:
            self.shown += os.read(self.master, 65536).decode()

    def press(self, key: str) -> None:
        os.write(self.master, key.encode())

    def resize(self, columns: int, lines: int = 24) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def wait(self) -> int:
        """Wait for the end; returns the exit code, after all output was read."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end, self.shown
            self._read(0.05)
        while select.select([self.master], [], [], 0)[0]:
            self._read(0)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextlib.contextmanager
def terminal(flaskd: Flaskd, *args: str, columns: int = 80, job: bool = False) -> Iterator[Terminal]:
    """With `job` it is a job of this process, as in a shell; without, no process can continue it."""
    opened = Terminal(flaskd, *args, columns=columns, job=job)
    try:
        yield opened
    finally:
        opened.close()
