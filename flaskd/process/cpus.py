"""How many CPUs this process may use: by its affinity, and by the quotas of its control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROC = Path("/proc/self")


def usable(proc: Path = _PROC) -> int:
    """The CPUs that this process may use at the same time, at least 1.

    That is the smallest of its affinity and of the quotas of its control group and of those above, a part of a CPU
    counting as a whole one. `proc` is the process' directory in proc(5).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _quotas(proc))]))


def _quotas(proc: Path) -> Iterator[float]:
    """The quota of each control group that holds the process, in CPUs, where it has one."""
    for top, version, inside in _groups(proc):
        for directory in (inside, *inside.parents):
            if quota := _quota_v2(directory) if version == 2 else _quota_v1(directory):  # noqa: PLR2004
                yield quota
            if directory == top:
                break


def _groups(proc: Path) -> Iterator[tuple[Path, int, Path]]:
    """For each hierarchy that can limit CPUs: where it is mounted, its version, and the group of the process."""
    paths = {}
    for line in _lines(proc / "cgroup"):  # cgroups(7): ID:CONTROLLERS:PATH, in version 2 without controllers
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[2] = path
        elif "cpu" in controllers.split(","):
            paths[1] = path
    for line in _lines(proc / "mountinfo"):  # proc_pid_mountinfo(5)
        before, _, after = line.partition(" - ")
        root, mount = map(_plain, before.split(" ")[3:5])
        kind, _, options = after.split(" ", 2)
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "cpu" in options.split(",") else 0
        if version not in paths:
            continue
        path, top = paths[version], Path(mount)
        # What is mounted may be a group below the root; its path is then seen from the root all the same.
        below = path.removeprefix(root.rstrip("/")) if f"{path}/".startswith(f"{root.rstrip('/')}/") else ""
        yield top, version, top if ".." in below.split("/") else top / below.strip("/")


def _plain(text: str) -> str:
    """A path out of mountinfo, where blanks are written as octal numbers."""
    return text.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")


def _quota_v2(group: Path) -> float | None:
    match "".join(_lines(group / "cpu.max")).split():  # "max 100000" where there is no quota
        case [quota, period] if quota.isdigit() and int(period):
            return int(quota) / int(period)
    return None


def _quota_v1(group: Path) -> float | None:
    quota, period = ("".join(_lines(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None  # -1: none


def _lines(path: Path) -> list[str]:
    """The lines of a file; none where it is not there, or not for us: its group limits nothing that can be known."""
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
