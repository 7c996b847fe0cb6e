"""How many CPUs a process may use; the kernel's files are made up here."""

import os

import pytest

from flaskd.process.cpus import usable


@pytest.fixture(autouse=True)
def eight(monkeypatch):
    """A machine of eight CPUs, all of which the process may run on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


@pytest.fixture
def machine(tmp_path):
    """Make the files of a process and the quotas of its groups; returns the directory in /proc."""

    def machine(groups, mounts, **quotas):
        proc = tmp_path / "self"
        proc.mkdir()
        (proc / "cgroup").write_text("".join(f"{line}\n" for line in groups))
        lines = [f"31 23 0:28 {root} {tmp_path / where} rw - {rest}\n" for root, where, rest in mounts]
        (proc / "mountinfo").write_text("".join(["23 1 0:20 / / rw - ext4 /dev/sda1 rw\n", *lines]))
        for path, text in quotas.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return proc

    return machine


V2 = ("/", "fs", "cgroup2 cgroup2 rw,nsdelegate")
V1 = ("/", "fs/cpu", "cgroup cgroup rw,cpu,cpuacct")


def test_without_quotas_the_affinity_counts(machine, tmp_path):
    """Without quotas, or if files are missing, the affinity counts."""
    assert usable(tmp_path / "nothing") == 8
    quotas = {"fs/a/b/cpu.max": "max 100000\n", "fs/cpu/a/cpu.cfs_quota_us": "-1\n"}
    proc = machine(["1:cpu,cpuacct:/a", "0::/a/b"], [V2, V1], **quotas, **{"fs/cpu/a/cpu.cfs_period_us": "100000\n"})
    assert usable(proc) == 8


@pytest.mark.parametrize(
    ("quota", "cpus"), [("150000 100000", 2), ("400000 100000", 4), ("5000 100000", 1), ("9000000 100000", 8)]
)
def test_a_quota_is_rounded_up(machine, quota, cpus):
    """A part of a CPU counts as a whole one, and the number of CPUs is the most."""
    assert usable(machine(["0::/a/b"], [V2], **{"fs/a/b/cpu.max": f"{quota}\n"})) == cpus


def test_a_group_above_may_be_narrower(machine):
    """The smallest quota of the groups above counts; that of another group does not."""
    quotas = {"fs/a/b/cpu.max": "600000 100000\n", "fs/a/cpu.max": "300000 100000\n", "fs/c/cpu.max": "1000 100000\n"}
    assert usable(machine(["0::/a/b"], [V2], **quotas)) == 3


def test_quotas_of_version_1_count(machine):
    """In version 1 the quota of the hierarchy with the cpu controller counts, and no other."""
    quotas = {"fs/cpu/a/cpu.cfs_quota_us": "250000\n", "fs/cpu/a/cpu.cfs_period_us": "100000\n"}
    proc = machine(["4:memory:/other", "3:cpuset:/x", "1:cpu,cpuacct:/a", "0::/"], [V1, V2], **quotas)
    assert usable(proc) == 3


@pytest.mark.parametrize("path", ["/docker/1f", "/docker/1f/"])
def test_a_container_sees_its_own_group_as_the_top(machine, path):
    """In a container its group is mounted as the top, although the process' path is that of the host."""
    mount = ("/docker/1f", "fs", "cgroup2 cgroup2 rw")
    assert usable(machine([f"0::{path}"], [mount], **{"fs/cpu.max": "200000 100000\n"})) == 2


def test_a_group_that_is_not_to_be_seen_leaves_the_mounted_one(machine):
    """If the process' path leads out of the mount, the mounted group counts."""
    assert usable(machine(["0::/../../x"], [V2], **{"fs/cpu.max": "200000 100000\n"})) == 2


def test_a_mount_may_have_blanks_in_its_path(machine, tmp_path):
    """Blanks in a mount point are written as octal numbers (proc_pid_mountinfo(5))."""
    proc = machine(["0::/a"], [("/", "my\\040fs", "cgroup2 cgroup2 rw")], **{"my fs/a/cpu.max": "100000 100000\n"})
    assert usable(proc) == 1
