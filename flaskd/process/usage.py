"""The memory and processor time that a process uses, from proc(5)."""

from __future__ import annotations

import os
from pathlib import Path


def pss(pid: int) -> int | None:
    """Bytes of memory that a process uses, with its part of the memory that it shares with others (PSS).

    None if the kernel does not tell, for example because the process has ended.
    """
    try:
        return read_pss(pid)
    except (OSError, ValueError):
        return None


def read_pss(pid: int) -> int:
    """The same as `pss`; raises OSError if it cannot be read, ValueError if it cannot be understood.

    The kernel walks through all pages: that takes 0.3 ms for 100 MiB, 2.5 ms for 1 GiB. It waits for the process while
    that changes its mappings.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    for line in lines:
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup has no Pss")


def resident(pid: int) -> int | None:
    """Bytes of memory that a process uses, with all shared memory counted in full (RSS); never less than its PSS.

    Reading it takes some microseconds. None if the kernel does not tell.
    """
    try:
        text = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
    except OSError:
        return None
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def exists(pid: int) -> bool:
    """Whether there is a process with this pid, even if it has ended and was not reaped."""
    return Path(f"/proc/{pid}").exists()


def cpu_seconds(pid: int) -> float | None:
    """Seconds of processor time that a process has used; None if the kernel does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the process' name before it may have any characters
    user, system = int(fields[11]), int(fields[12])
    return round((user + system) / os.sysconf("SC_CLK_TCK"), 2)
