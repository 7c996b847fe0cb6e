"""What a process uses, as the kernel tells it (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path


def pss(pid: int) -> int | None:
    """Bytes of memory that are a process' own, with its share of what it has in common with others (PSS).

    None where the kernel does not tell, as of a process that is gone.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)


def cpu_seconds(pid: int) -> float | None:
    """Seconds of processor time that a process has used; None where the kernel does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in front of it may hold anything
    user, system = int(fields[11]), int(fields[12])
    return round((user + system) / os.sysconf("SC_CLK_TCK"), 2)
