"""Podman for tests, inside of a service manager with namespaces of its own; all that it makes ends with that.

Its network has only a loopback, so that no network of the machine is changed, whatever podman is told.
"""

from __future__ import annotations

import resource
import shlex
import shutil
import subprocess
from pathlib import Path

from patience import until
from systemd_kit import CACHE, PROJECT, Systemd, UnavailableError, debian_13, wheels, why_not

BASE, IMAGE = "localhost/base", "localhost/shop"
_TOOLS = ("podman", "crun", "conmon", "catatonit", "curl", "dpkg-deb")
_CONTAINERS = """\
[containers]
netns = "host"
pids_limit = 0
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
cgroup_manager = "cgroupfs"
[engine.runtimes]
crun = ["/srv/crun"]
"""
_STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "/srv/containers"\nrunroot = "/run/containers/storage"\n'
_CRUN = '#!/bin/sh\nexec crun --cgroup-manager=disabled "$@"\n'
_NO_CONTROLLERS = """
mkdir /sys/fs/cgroup/libpod_parent
for each in /sys/fs/cgroup /sys/fs/cgroup/libpod_parent; do
    touch /run/subtree_control && mount --bind /run/subtree_control $each/cgroup.subtree_control
done
"""
_PIP = "[global]\nno-index = true\nfind-links = /wheels\n"


def why_no_podman() -> list[str]:
    """What is missing for containers; empty if nothing is."""
    return why_not() + [tool for tool in _TOOLS if not shutil.which(tool)]


def quadlet() -> Path:
    """The generator of units from Debian 13's podman, kept in the cache; Debian 12's podman has no quadlets."""
    kept = CACHE / "quadlet-debian-13"
    if not kept.exists():
        place = CACHE / "apt-debian-13"
        for each in ("lists/partial", "archives/partial"):
            (place / each).mkdir(parents=True, exist_ok=True)
        options = [
            f"Dir::State::lists={place}/lists", f"Dir::Cache={place}", "APT::Sandbox::User=root", "Acquire::Languages=none",
            f"Dir::Etc::SourceList={debian_13()}/etc/apt/sources.list", "Dir::Etc::SourceParts=/dev/null",
        ]  # fmt: skip
        apt = shlex.join(["apt-get", "-qq", *(part for each in options for part in ("-o", each))])
        script = f"{apt} update && {apt} download podman && dpkg-deb -x podman_*.deb unpacked"
        done = subprocess.run(["sh", "-c", script], cwd=place, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            raise UnavailableError(f"podman of Debian 13: {done.stderr.strip()[-500:]}")
        (place / "unpacked/usr/libexec/podman/quadlet").rename(kept)
        shutil.rmtree(place)
    return kept


class Podman:
    """The machine's podman, with containers and images of its own.

    Containers get no cgroups. Limits take controllers, which the kernel of a test machine may keep in its older
    hierarchy; and crun would raise a limit of memory that root in a container of its own may not raise.
    """

    def __init__(self, systemd: Systemd) -> None:
        self.systemd = systemd
        files, processes = (
            min(4096, resource.getrlimit(each)[1]) if resource.getrlimit(each)[1] > 0 else 4096
            for each in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
        )
        systemd.run("mkdir", "/srv/containers")
        systemd.run(
            "mount", "-t", "tmpfs", "tmpfs", "/srv/containers"
        )  # removed at once; removing many files takes long
        systemd.write("/etc/containers/containers.conf", _CONTAINERS.format(files=files, processes=processes))
        systemd.write("/etc/containers/storage.conf", _STORAGE)
        systemd.write("/srv/crun", _CRUN)
        systemd.run("chmod", "755", "/srv/crun")
        systemd.run("bash", "-ec", _NO_CONTROLLERS)  # what podman enables for a pod goes to a file

    def __call__(self, *args: str, timeout: float = 60) -> str:
        """Run podman, which must succeed; returns its output."""
        return self.systemd.run("podman", *args, timeout=timeout).stdout.strip()

    def import_base(self) -> None:
        """Import the base image from a Debian 13 root file system, which has Python 3.13."""
        self.systemd.run("bash", "-c", f"tar -C {debian_13()} -c . | podman import -q - {BASE}", timeout=120)

    def build(self, tag: str, *args: str) -> None:
        """Build the image from this checkout, with packages from the cache instead of the network."""
        self.systemd.write("/srv/pip.conf", _PIP)
        self(
            "build", "-q", "--isolation=chroot", "--format=docker", "--build-arg", f"BASE={BASE}", "-t", tag,
            "-v", f"{wheels('3.13')}:/wheels:ro", "-v", "/srv/pip.conf:/etc/pip.conf:ro", *args,
            "-f", str(PROJECT / "Containerfile"), str(PROJECT), timeout=300,
        )  # fmt: skip

    def size(self, image: str) -> int:
        """The size of an image in bytes, with the layers of its base."""
        return int(self("image", "inspect", "-f", "{{.Size}}", image))

    def logs(self, name: str) -> str:
        """All that a container wrote."""
        done = self.systemd.run("podman", "logs", name, check=False)
        return done.stdout + done.stderr

    def until_healthy(self, name: str) -> None:
        """Wait until the image's own check succeeds."""
        until(lambda: self.systemd.run("podman", "healthcheck", "run", name, check=False).returncode == 0,
              lambda: self.logs(name))  # fmt: skip

    def ask(self, url: str) -> str:
        """GET a URL where the containers run; gives body and status, 000 without an answer."""
        return self.systemd.run("curl", "-sS", "-w", " %{http_code}", url, check=False).stdout
