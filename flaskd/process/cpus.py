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
    """How many CPUs this process may use at the same time, at least 1.

    That is the smallest of its affinity, the quota of its control group, and the quotas of the groups above; a part of
    a CPU counts as a whole one. `proc` is the process' directory in proc(5).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _quotas(proc))]))


def _quotas(proc: Path) -> Iterator[float]:
    """The quotas of all control groups that contain the process, in CPUs; groups without a quota are left out."""
    for top, version, inside in _groups(proc):
        for directory in (inside, *inside.parents):
            if quota := _quota_v2(directory) if version == 2 else _quota_v1(directory):  # noqa: PLR2004
                yield quota
            if directory == top:
                break


def _groups(proc: Path) -> Iterator[tuple[Path, int, Path]]:
    """For each hierarchy that can limit CPUs: its mount point, its version, and the directory of the process' group."""
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
        # The mounted directory may be a group below the root; the path of the process still begins at the root.
        below = path.removeprefix(root.rstrip("/")) if f"{path}/".startswith(f"{root.rstrip('/')}/") else ""
        yield top, version, top if ".." in below.split("/") else top / below.strip("/")


def _plain(text: str) -> str:
    """A path from mountinfo, in which blanks are written as octal numbers."""
    return text.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")


def _quota_v2(group: Path) -> float | None:
    match "".join(_lines(group / "cpu.max")).split():  # "max 100000" means no quota
        case [quota, period] if quota.isdigit() and int(period):
            return int(quota) / int(period)
    return None


def _quota_v1(group: Path) -> float | None:
    quota, period = ("".join(_lines(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    # A quota of -1 means that there is none.
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _lines(path: Path) -> list[str]:
    """The lines of a file; none if it cannot be read: then its group counts as one without a quota."""
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
