"""A real `systemd --system` for tests, as PID 1 of namespaces of its own.

A service manager that sees the machine's root cgroup moves every process of the machine into its own. So nothing here
starts one unless it is PID 1 of a new PID namespace, alone in a leaf cgroup that it sees as the root; the guards in
`_BOOT` ask for each of these and leave when one is missing. The network is the machine's: take free ports.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from daemon_kit import children, requires
from patience import PATIENCE, until

PROJECT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flaskd-tests"
VENV = "/opt/flaskd"
"""Where the service managers see flaskd's virtual environment."""
LONG = bool(os.environ.get("FLASKD_LONG"))
"""Whether to run the full number of cycles, on every version."""
_BOOTED_IN = 30.0
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q")
_TOOLS = ("setpriv", "unshare", "nsenter", "systemctl", "journalctl")
QUIET = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}

_ENTER_LEAF = """
set -eu
echo 0 > "$KIT_CGROUP/cgroup.procs"     # only what will be PID 1 enters the leaf
exec unshare --cgroup bash -c "$KIT_BOOT"
"""
_BOOT = r"""
set -eu
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# The guards. Explicit exits, because `set -e` does not heed a failing "! command".
[ -e /sys/fs/cgroup/cgroup.type ] || { echo "guard: this is the real root cgroup" >&2; exit 78; }
if grep -qx 0 /sys/fs/cgroup/cgroup.procs; then echo "guard: somebody else is in this cgroup" >&2; exit 78; fi
[ "$$" = 1 ] || { echo "guard: this is no PID namespace of its own" >&2; exit 78; }

if [ -n "$KIT_ROOT" ]; then             # another root file system: an overlay of it, thrown away afterwards
    new=$KIT_DIR/root; mkdir -p "$new" "$KIT_DIR/upper/root" "$KIT_DIR/work/root"
    mount -t overlay -o "lowerdir=$KIT_ROOT,upperdir=$KIT_DIR/upper/root,workdir=$KIT_DIR/work/root" overlay "$new"
    mkdir -p "$new$KIT_DIR" "$new$KIT_VENV_DIR"
    for each in proc sys dev; do mkdir -p "$new/$each"; mount --rbind "/$each" "$new/$each"; done
    mount --bind "$KIT_DIR" "$new$KIT_DIR"
    mount --bind "$KIT_VENV_DIR" "$new$KIT_VENV_DIR"
    mkdir "$new/.old"; cd "$new"; pivot_root . .old; cd /; umount -l /.old; rmdir /.old
else                                    # this machine's: writable places are overlays, thrown away afterwards
    for each in etc var; do
        mkdir -p "$KIT_DIR/upper/$each" "$KIT_DIR/work/$each"
        mount -t overlay -o "lowerdir=/$each,upperdir=$KIT_DIR/upper/$each,workdir=$KIT_DIR/work/$each" overlay "/$each"
    done
fi

dev=$KIT_DIR/dev; mkdir "$dev"; mount -t tmpfs -o mode=755,nosuid tmpfs "$dev"
for each in null zero full random urandom tty; do touch "$dev/$each"; mount --bind "/dev/$each" "$dev/$each"; done
mkdir "$dev/pts" "$dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$dev/pts"; ln -s pts/ptmx "$dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$dev/shm"
ln -s /proc/self/fd "$dev/fd"; ln -s fd/0 "$dev/stdin"; ln -s fd/1 "$dev/stdout"; ln -s fd/2 "$dev/stderr"
touch "$dev/console"; mount --bind "$KIT_DIR/console" "$dev/console"; mount --move "$dev" /dev

mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys     # the kernel's knobs are the machine's
[ ! -e /proc/sysrq-trigger ] || mount --bind /dev/null /proc/sysrq-trigger
mount -o remount,bind,ro /sys
mount --bind "$KIT_DIR/run" /run
mkdir -p /opt /srv /run/lock /run/log/journal
mount -t tmpfs -o mode=755 tmpfs /opt
[ -n "$KIT_BARE" ] || { mkdir /opt/flaskd; mount --bind "$KIT_VENV_DIR" /opt/flaskd; }
mount --bind "$KIT_DIR/srv" /srv
rm -rf /var/log/journal
echo "$KIT_MACHINE_ID" > /etc/machine-id
hostname flaskd-test
mount --make-rshared /                  # as at a real boot: credentials' mounts propagate
unset KIT_BOOT KIT_CGROUP
export container=flaskd-test LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export SYSTEMD_UNIT_PATH="/etc/systemd/system:/run/systemd/system:$KIT_DIR/base"
exec /lib/systemd/systemd --system --unit=test.target --log-target=journal --show-status=no
"""

_TARGETS = {
    "sysinit.target": "DefaultDependencies=no\nWants=systemd-journald.service\n"
    "After=systemd-journald.service systemd-journald.socket",
    "basic.target": "Requires=sysinit.target\nAfter=sysinit.target\nWants=sockets.target",
    "test.target": "Requires=basic.target\nAfter=basic.target\nAllowIsolate=yes",
    "multi-user.target": "Requires=basic.target\nAfter=basic.target",
    **dict.fromkeys(("sockets.target", "network.target", "network-online.target", "nss-user-lookup.target"), ""),
    **dict.fromkeys(("timers.target", "paths.target", "umount.target", "final.target"), "DefaultDependencies=no"),
    "shutdown.target": "DefaultDependencies=no\nRefuseManualStart=yes",
}
_OF_THE_ROOT = (
    "systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket", "exit.target",
    "systemd-exit.service", "local-fs.target", "local-fs-pre.target",
)  # fmt: skip
_JOURNAL = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0\nForwardToWall=no\nRuntimeMaxUse=64M\n"


class UnavailableError(Exception):
    """No service manager can be started here; the text says why."""


def cgroup2() -> Path | None:
    """The mount point of the unified hierarchy."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.split()[0] == "cgroup2":
            return Path(mount.split()[4])
    return None


def why_not() -> list[str]:
    """What is missing to boot a service manager; empty if nothing is."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return ["root on Linux"]
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if not Path("/lib/systemd/systemd").exists():
        missing.append("/lib/systemd/systemd")
    mount = cgroup2()
    if mount is None:
        return [*missing, "a cgroup2 mount"]
    probe = mount / f"flaskd-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        missing.append(f"a writable cgroup2 ({error.strerror})")
    if not missing:
        spaces = ["unshare", "--pid", "--fork", "--mount", "--cgroup", "--uts", "--ipc", "--mount-proc", "true"]
        tried = subprocess.run(spaces, capture_output=True, text=True, check=False)
        if tried.returncode:
            missing.append(f"namespaces ({tried.stderr.strip()})")
    return missing


def debian_13() -> Path:
    """The root file system of a Debian 13, made once (about 40 s); raises UnavailableError with what is missing."""
    root = CACHE / "debian-13"
    if not root.exists():
        if not shutil.which("mmdebstrap"):
            raise UnavailableError("mmdebstrap, to make a Debian 13 root")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
            into = Path(unfinished) / "root"
            made = subprocess.run(
                ["mmdebstrap", "--variant=minbase", "--include=systemd,python3,python3-venv,curl", "trixie", str(into)],
                capture_output=True, text=True, check=False, timeout=600,
            )  # fmt: skip
            if made.returncode:
                raise UnavailableError(f"a Debian 13 root: {made.stderr.strip().splitlines()[-1:]}")
            into.chmod(0o755)
            try:
                into.rename(root)
            except OSError:  # another run was faster
                if not root.exists():
                    raise
    return root


def installed(root: Path | None, into: Path) -> None:
    """Make a virtual environment with this flaskd for the Python of a root file system; services see it at `VENV`."""
    version = _python(root)
    _run(*_PIP, "wheel", "--no-deps", "-w", into / "wheel", PROJECT)
    site = into / "lib" / f"python{version}" / "site-packages"
    shutil.copytree(_dependencies(version), site)
    (wheel,) = (into / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    shutil.rmtree(into / "wheel")
    (into / "bin").mkdir()
    (into / "bin/python3").symlink_to("/usr/bin/python3")
    (into / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    script = into / "bin/flaskd"  # the script that pip would write
    script.write_text(f"#!{VENV}/bin/python3\nimport sys\nfrom flaskd.__main__ import main\nsys.exit(main())\n")
    script.chmod(0o755)


def _python(root: Path | None) -> str:
    """The version of a root file system's own Python, such as 3.11."""
    names = {path.name.removeprefix("python") for path in (root or Path("/")).glob("usr/lib/python3.*")}
    (version,) = (name for name in names if name.removeprefix("3.").isdigit())
    return version


def _dependencies(version: str) -> Path:
    """The packages that flaskd needs, for one version of Python; kept in the cache."""
    wanted = _wanted("project", "dependencies")

    def make(place: Path) -> None:
        only = ("--no-index", "--find-links", wheels(version))
        _run(*_PIP, "install", "--target", place, "--python-version", version, "--only-binary=:all:", *only, *wanted)

    return _kept(f"packages-{version}-{_digest(wanted)}", make)


def wheels(version: str) -> Path:
    """A directory of wheels with all that flaskd needs to build and to run, for one version of Python; kept."""
    wanted = _wanted("project", "dependencies") + _wanted("build-system", "requires")

    def make(place: Path) -> None:
        _run(*_PIP, "wheel", "--no-deps", "-w", place, "sdnotify")  # it is published as source only
        only = ("--python-version", version, "--only-binary=:all:", "--find-links", place)
        _run(*_PIP, "download", "-d", place, *only, *wanted)

    return _kept(f"wheels-{version}-{_digest(wanted)}", make)


def _wanted(table: str, key: str) -> list[str]:
    """Requirements in pyproject.toml."""
    return list(tomllib.loads((PROJECT / "pyproject.toml").read_text())[table][key])


def _digest(wanted: list[str]) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, " ".join(wanted)).hex[:8]


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """A directory of the cache; made if it does not exist."""
    kept = CACHE / name
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
            make(Path(unfinished) / "it")
            with contextlib.suppress(OSError):  # another run was faster
                (Path(unfinished) / "it").rename(kept)
    return kept


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise UnavailableError(f"{command[3:5]} to succeed: {done.stderr.strip()[-500:]}")


class Systemd:
    """One service manager, booted when the context is entered and gone with all of its processes when it is left.

    `root` is another root file system whose systemd is used. `/etc`, `/var`, `/run`, `/opt` and `/srv` are private. A
    `bare` one has nothing of flaskd, and a network of its own, where every port is free.
    """

    def __init__(self, root: Path | None = None, *, bare: bool = False) -> None:
        self.root = root
        self.bare = bare
        self.pid = 0
        """The pid of PID 1 of the namespaces, as seen outside; 0 until it is a systemd that sees a /run of its own."""
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as ends:
            self.directory = Path(
                tempfile.mkdtemp(prefix="flaskd-systemd-", dir="/tmp")
            )  # short, because of Unix sockets
            ends.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.directory.chmod(0o755)
            self.srv = self.directory / "srv"
            self.venv = self.directory / "venv"
            self._lay_out()
            if not self.bare:
                installed(self.root, self.venv)
            mount = cgroup2()
            assert mount is not None
            self._cgroup = mount / self.directory.name
            self._cgroup.mkdir()
            ends.callback(self._remove_cgroup)
            self._boot(ends)
            self._ends = ends.pop_all()
        if not self.bare:
            self.run("/opt/flaskd/bin/python3", "-m", "compileall", "-q", "/opt/flaskd/lib", check=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _lay_out(self) -> None:
        base, conf = self.directory / "base", self.directory / "run/systemd/journald.conf.d"
        for each in (base / "systemd-journald.service.d", conf, self.srv, self.venv):
            each.mkdir(parents=True)
        (self.directory / "console").touch()
        for name, text in _TARGETS.items():
            (base / name).write_text(f"[Unit]\n{text}\n")
        for name in _OF_THE_ROOT:
            unit = (self.root or Path("/")) / "usr/lib/systemd/system" / name
            if unit.exists():
                shutil.copy(unit, base)
        (base / "systemd-journald.service.d/test.conf").write_text("[Service]\nDeviceAllow=\n")
        (conf / "test.conf").write_text(_JOURNAL)

    def _boot(self, ends: contextlib.ExitStack) -> None:
        log = ends.enter_context((self.directory / "boot.log").open("wb"))
        environ = {
            "PATH": os.environ["PATH"], "KIT_DIR": str(self.directory), "KIT_CGROUP": str(self._cgroup),
            "KIT_BOOT": _BOOT, "KIT_ROOT": str(self.root or ""), "KIT_VENV_DIR": str(self.venv),
            "KIT_MACHINE_ID": uuid.uuid4().hex, "KIT_BARE": "1" if self.bare else "",
        }  # fmt: skip
        self._outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount",
             "--propagation", "private", "--uts", "--ipc", *(["--net"] if self.bare else []), "--mount-proc",
             "bash", "-c", _ENTER_LEAF],
            env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        ends.callback(self._end)
        end = time.monotonic() + _BOOTED_IN
        while True:
            state = self._find() and self.ctl("is-system-running", check=False)
            if state in {"running", "degraded"}:
                return
            if self._outer.poll() is not None or time.monotonic() > end:
                raise UnavailableError(f"a booting systemd: {state}\n{(self.directory / 'boot.log').read_text()}")
            time.sleep(0.02)

    def _first_child(self) -> int:
        """The pid, as seen outside, of the process that becomes PID 1 of the namespaces; 0 until there is one."""
        return next(iter(children(self._outer.pid)), 0)

    def _find(self) -> int:
        """Set `pid` once it is a systemd, and return it.

        Before `_BOOT` executes that, the child sees the machine's /run, where systemctl would reach the machine's own
        service manager.
        """
        if not self.pid and (child := self._first_child()):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    self.pid = child
        return self.pid

    def _end(self) -> None:
        if self._outer.poll() is None:
            if self.pid:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.ctl("exit", "--force", check=False, timeout=10)
            elif child := self._first_child():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            else:
                self._outer.kill()
            try:
                self._outer.wait(5)
            except subprocess.TimeoutExpired:
                self._outer.kill()  # --kill-child also kills PID 1, and with that the whole namespace
                self._outer.wait()

    def _remove_cgroup(self) -> None:
        with contextlib.suppress(OSError):
            (self._cgroup / "cgroup.kill").write_text("1")
        for _ in range(200):
            for each, _, _ in sorted(os.walk(self._cgroup), reverse=True):
                with contextlib.suppress(OSError):
                    Path(each).rmdir()
            if not self._cgroup.exists():
                return
            time.sleep(0.02)

    # --- what is done inside ---

    @property
    def python(self) -> str:
        """The version of its own Python."""
        return _python(self.root)

    def seen(self, path: str) -> Path:
        """The path, as seen outside, of a path below /srv as the services see it."""
        return self.srv / Path(path).relative_to("/srv")

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command where the services run."""
        assert self.pid, "nothing is sent before there is a systemd of its own"
        return ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-n", "-C", "--", *command]

    def run(
        self, *command: str, check: bool = True, timeout: float = 60, environ: Mapping[str, str] = QUIET
    ) -> subprocess.CompletedProcess[str]:
        """Run a command where the services run."""
        done = subprocess.run(
            self.command(*command), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=timeout, env=environ, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def ctl(self, *args: str, check: bool = True, timeout: float = 60) -> str:
        """The output of systemctl."""
        done = self.run("systemctl", "--no-pager", "--no-ask-password", *args, check=False, timeout=timeout)
        if check and done.returncode:
            about = [self.journal(arg) for arg in args[1:] if "." in arg]
            raise AssertionError(f"systemctl {args}: {done.returncode} {done.stderr}" + "\n".join(about))
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.ctl("show", "-P", name, unit)

    def journal(self, unit: str, *args: str) -> str:
        """The journal of a unit."""
        self.run("journalctl", "--sync", check=False)
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, *args, check=False).stdout

    def write(self, path: str, text: str) -> None:
        """Write a file where the services see it, readable for all."""
        text = textwrap.dedent(text)
        self.run("mkdir", "-p", str(Path(path).parent))
        subprocess.run(self.command("tee", path), input=text, text=True, stdout=subprocess.DEVNULL, check=True)

    # --- flaskd as a service ---

    def prepare(self) -> None:
        """Install the shipped units, make the user, and write an app for the services to serve."""
        self.run(f"{VENV}/bin/flaskd", "units", "--install", "/")
        for name in ("flaskd@.service", "flaskd@.socket"):
            self.write(f"/etc/systemd/system/{name}", (PROJECT / "systemd" / name).read_text())
        self.run("systemd-sysusers", "/etc/sysusers.d/flaskd.conf")
        self.run("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/flaskd.conf")
        self.write("/srv/app/shop.py", APP)

    def flaskd(self, name: str, config: str = "", *, service: str = "", socket_unit: str = "") -> Instance:
        """The instance flaskd@NAME, on a port of its own, with drop-ins for its service and socket; not started."""
        return Instance(self, name, config, service, socket_unit)


class Instance:
    """One flaskd@NAME of a service manager."""

    def __init__(self, systemd: Systemd, name: str, config: str, service: str, socket_unit: str) -> None:
        self.systemd, self.name, self.port = systemd, name, free_port()
        self.unit, self.socket = f"flaskd@{name}.service", f"flaskd@{name}.socket"
        self.configure(config)
        for unit, text in ((self.unit, service), (self.socket, socket_unit)):
            if text:
                systemd.write(f"/etc/systemd/system/{unit}.d/test.conf", text.replace("PORT", str(self.port)))
        systemd.ctl("daemon-reload")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def configure(self, text: str) -> None:
        """Write its configuration; PORT stands for the port; its app is written already."""
        whole = "app: {target: shop, chdir: /srv/app}\n" + textwrap.dedent(text).replace("PORT", str(self.port))
        self.systemd.write(f"/etc/flaskd/{self.name}.yaml", whole)

    def start(self) -> Self:
        self.systemd.ctl("start", self.unit)
        return self

    def show(self, name: str) -> str:
        return self.systemd.show(self.unit, name)

    @property
    def pid(self) -> int:
        """The pid of its main process where the services run."""
        return int(self.show("MainPID"))

    def signal(self, number: str) -> None:
        """Send a signal to its main process."""
        self.systemd.run("bash", "-c", f"kill -{number} {self.pid}")

    def client(self, *args: str, check: bool = True) -> str:
        """Run a client verb."""
        return self.systemd.run(f"{VENV}/bin/flaskd", *args, "--name", f"flaskd-{self.name}", check=check).stdout

    def status(self) -> dict[str, Any]:
        """The status, as programs see it."""
        return dict(json.loads(self.client("status", "--json")))

    def fates(self) -> dict[str, str]:
        """The fate of each policy at the last stop, from the record.

        The journal may have lost the unit's name of the last lines of a process that has ended.
        """
        record = json.loads(self.systemd.run("cat", f"/var/lib/flaskd-{self.name}/last-stop.json").stdout)
        return {name: policy["fate"] for name, policy in record["policies"].items()}

    def journal(self, *args: str) -> str:
        return self.systemd.journal(self.unit, *args)

    def entries(self, *args: str) -> list[dict[str, Any]]:
        """The journal's entries with all their fields."""
        return [json.loads(line) for line in self.journal("-o", "json", "--all", *args).splitlines()]

    def until_state(self, state: str, patience: float = PATIENCE) -> None:
        """Wait for an ActiveState."""
        until(lambda: self.show("ActiveState") == state, lambda: f"{state}:\n{self.journal()}", patience=patience)


class Managers:
    """Service managers with flaskd's units installed, each booted once for all tests that follow each other.

    A `kind` is this machine's systemd ("machine"), or that of Debian 13 ("debian-13").
    """

    def __init__(self) -> None:
        self.booted: dict[str, Systemd] = {}
        self._ends = contextlib.ExitStack()

    def boot(self, kind: str) -> Systemd:
        """The service manager of a kind; booted if it does not run."""
        requires("systemd", why_not())
        if kind not in self.booted:
            with or_skipped(kind), contextlib.ExitStack() as ends:
                manager = ends.enter_context(Systemd(root_of(kind)))
                manager.prepare()
                self._ends.enter_context(ends.pop_all())
            self.booted[kind] = manager  # only one that is prepared is kept for the next test
        return self.booted[kind]

    def end(self) -> None:
        """End all of them."""
        self.booted.clear()
        self._ends.close()


def root_of(kind: str) -> Path | None:
    """The root file system of a kind; None for this machine's."""
    return None if kind == "machine" else debian_13()


@contextlib.contextmanager
def or_skipped(kind: str) -> Iterator[None]:
    """Skip the test if a service manager, or podman, cannot be had; fail if it is required."""
    try:
        yield
    except UnavailableError as error:
        requires({"machine": "systemd", "debian-13": "systemd-257"}.get(kind, kind), [str(error)])
        raise


APP = """
import gc, os, pathlib, threading, time
from flask import Flask, Response, request

app = Flask(__name__)

@app.get("/")
def index():
    return "hello"

@app.get("/pid")
def pid():
    return str(os.getpid())

@app.get("/sleep/<seconds>")
def sleep(seconds):
    time.sleep(float(seconds))
    return "slept"

@app.post("/upload")
def upload():
    return str(len(request.get_data()))

@app.get("/stream")
def stream():
    def parts():
        while True:
            yield "data: x\\n\\n"
            time.sleep(0.1)
    return Response(parts(), mimetype="text/event-stream")

@app.get("/hang")
def hang():
    threading.Event().wait()

@app.get("/wedge")
def wedge():
    from flaskd.server.loop import EventLoop
    loop, = (each for each in gc.get_objects() if isinstance(each, EventLoop))
    def stick():
        print("wedged at", time.monotonic(), flush=True)
        threading.Event().wait()
    loop.call(stick)
    return "never sent"

@app.get("/environ")
def environ():
    return dict(os.environ)

def tidy(_app):
    print("tidied up", flush=True)
"""


def free_port() -> int:
    """A free port outside of the range for clients: it can be bound, freed and bound again."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    while True:
        port = random.randrange(10_000, max(10_001, lowest))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
