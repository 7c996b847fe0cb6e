"""What the kernel says about processes and connections: proc(5)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def memory_of(pid: int) -> float:
    """MiB of memory of a process, shared pages counted in parts: proc_pid_smaps_rollup(5)."""
    return int(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").partition("\nPss:")[2].split()[0]) / 1024


def cpu_of(pid: int) -> float:
    """CPU seconds of a process's living threads, to the nanosecond: the first field of each schedstat."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def group(leader: int) -> list[int]:
    """The processes of a group in this session, also those that a server has started and left behind."""
    found, session = [], os.getsid(0)
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            with contextlib.suppress(OSError):
                # The fields after the name: state, parent, group, session.
                words = (each / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
                if (int(words[2]), int(words[3])) == (leader, session):
                    found.append(int(each.name))
    return found


def accepted(line: str) -> bool:
    """Whether a line of proc_net(5) is an open connection that is in no backlog."""
    words = line.split()
    return words[3] == "01" and words[9] != "0"


def children(pid: int) -> list[int]:
    """The children of a process that it has not reaped; none if the process is gone."""
    with contextlib.suppress(OSError):
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(each) for task in tasks for each in (task / "children").read_text(encoding="ascii").split()]
    return []
