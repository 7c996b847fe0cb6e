"""The units as people use them: several instances, an upgrade under a running daemon, and the documentation."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from http_client import Answer, get, refused
from patience import until
from systemd_kit import PROJECT, QUIET, VENV, Systemd, free_port, wheels

CLONE = "/srv/clone"
URL = "http://127.0.0.1:8000/"
LISTEN = "server: {listen: '127.0.0.1:PORT'}\n"


def test_instances_side_by_side(each_systemd: Systemd) -> None:
    """Stopping one of two, by `flaskd@` or by `--name`, leaves the other's nodes and files alone."""
    systemd = each_systemd
    first, second = (systemd.flaskd(name, LISTEN).start() for name in ("first", "second"))
    third_port = free_port()
    named = f"""
        [Service]
        Type=notify
        User=flaskd
        ExecStart={VENV}/bin/flaskd serve shop --name third -l 127.0.0.1:{third_port}
        WorkingDirectory=/srv/app
        RuntimeDirectory=third
        StateDirectory=third
    """
    systemd.write("/etc/systemd/system/third.service", named)
    systemd.ctl("daemon-reload")
    systemd.ctl("start", "third.service")
    nodes = {
        name: systemd.run("ls", "-i", f"/run/{name}").stdout for name in ("flaskd-first", "flaskd-second", "third")
    }
    assert all("control.sock" in each for each in nodes.values())
    systemd.ctl("stop", first.unit)
    assert refused(first.url)
    assert get(second.url) == (200, b"hello")
    assert get(f"http://127.0.0.1:{third_port}/") == (200, b"hello")
    systemd.ctl("stop", "third.service")
    assert systemd.run("ls", "-i", "/run/flaskd-second").stdout == nodes["flaskd-second"]
    assert systemd.run("ls", "/run/flaskd-first", check=False).returncode == 2
    assert "last-stop.json" in systemd.run("ls", "/var/lib/flaskd-first").stdout
    assert "running.json" in systemd.run("ls", "/var/lib/flaskd-second").stdout
    assert second.status()["state"] == "ready"
    systemd.ctl("stop", second.unit)


def test_a_dynamic_user(each_systemd: Systemd) -> None:
    """With DynamicUser=yes each directory is a link to a private one: control, record, tidying and removal work."""
    systemd = each_systemd
    service = """
        [Service]
        DynamicUser=yes
        User=passing
        Group=passing
        RuntimeDirectoryPreserve=restart
        CacheDirectory=flaskd-dynamic
        ExecStartPre=touch /var/cache/flaskd-dynamic/1.tmp
    """
    remove = "{use: files.remove, with: {paths: [/var/cache/flaskd-dynamic/*.tmp]}}"
    dynamic = systemd.flaskd(
        "dynamic", LISTEN + f"cleanup: {{policies: {{tidy: {remove}}}}}\n", service=service
    ).start()
    assert systemd.run("readlink", "/run/flaskd-dynamic").stdout == "private/flaskd-dynamic\n"
    assert systemd.run("readlink", "/var/lib/flaskd-dynamic").stdout == "private/flaskd-dynamic\n"
    assert dynamic.status()["state"] == "ready"
    killed = dynamic.pid
    dynamic.signal("KILL")
    until(lambda: dynamic.pid not in {0, killed}, "no restart after the crash")
    dynamic.until_state("active")
    systemd.ctl("restart", dynamic.unit)
    assert dynamic.fates() == {"tidy": "ok"}
    assert systemd.run("ls", "/var/cache/flaskd-dynamic").stdout == "1.tmp\n"  # made at this start
    systemd.ctl("stop", dynamic.unit)
    assert systemd.run("ls", "/var/cache/flaskd-dynamic/").stdout == ""
    said = dynamic.journal()
    assert "died without a complete stop" in said
    assert "cannot" not in said


def test_a_virtual_environment_may_go_away_under_the_daemon(each_systemd: Systemd) -> None:
    """With its packages deleted after READY it reloads, drains, cleans up and exits with 0: all it needs is loaded."""
    systemd = each_systemd
    systemd.run("cp", "-a", "/opt/flaskd", "/opt/doomed")
    systemd.run("sed", "-i", "s,/opt/flaskd,/opt/doomed,", "/opt/doomed/bin/flaskd")
    policies = (
        "{program: {use: command, with: {argv: ['true']}}, own: {use: call, with: {target: 'shop:tidy'}},"
        " slow: {use: command, with: {argv: [sleep, '9']}, timeout: 300ms}}"
    )
    service = "[Service]\nExecStart=\nExecStart=/opt/doomed/bin/flaskd serve --name flaskd-%i -c /etc/flaskd/%i.yaml\n"
    config = LISTEN + f"shutdown: {{drain: {{timeout: 300ms}}}}\ncleanup: {{policies: {policies}}}\n"
    doomed = systemd.flaskd("doomed", config, service=service).start()
    get(doomed.url)
    systemd.run("rm", "-rf", "/opt/doomed")
    doomed.configure(config + "nonsense: 1\n")
    assert systemd.run("systemctl", "reload", doomed.unit, check=False).returncode
    assert "nonsense: expected a known key" in doomed.show("StatusText")
    doomed.configure(config)
    systemd.ctl("reload", doomed.unit)
    sleeping = Answer(doomed.url, "/sleep/5")
    until(lambda: doomed.status()["in_flight"] == 1)
    systemd.ctl("stop", doomed.unit)
    journal = doomed.journal()
    assert doomed.show("Result") == "success", journal
    assert "2 ok, 1 timed_out" in journal
    assert "cut=1" in journal
    assert "Error" not in journal
    sleeping.result()


@dataclass
class Shell:
    """A shell in a copy of the project, in which the documentation's commands are run."""

    systemd: Systemd
    environ: Mapping[str, str]

    def run(self, script: str) -> str:
        """Run a command until the first failure; gives its standard output."""
        done = self.systemd.run(
            "bash", "-euxo", "pipefail", "-c", f"cd {CLONE}\n{script}", environ=self.environ, check=False, timeout=80
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.systemd.journal("flaskd.service")
        return done.stdout


@pytest.fixture
def shell(bare_systemd: Systemd) -> Shell:
    """A shell on a machine without flaskd; the packages for pip are in a directory, because no index can be used."""
    systemd = bare_systemd
    shutil.copytree(
        PROJECT, systemd.seen(CLONE), ignore=shutil.ignore_patterns(".git", ".venv", "dist", "__pycache__", ".*_cache")
    )
    shutil.copytree(wheels(systemd.python), systemd.seen("/srv/wheels"))
    pip = {"NO_INDEX": "1", "FIND_LINKS": "/srv/wheels", "CONFIG_FILE": "/dev/null", "NO_CACHE_DIR": "1"}
    environ = {**QUIET, **{f"PIP_{name}": value for name, value in pip.items()}, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environ["PATH"] += f":{VENV}/bin"  # for what the documentation says of `flaskd` in a sentence
    return Shell(systemd, environ)


def test_the_documentation_is_true(shell: Shell) -> None:
    """The commands of docs/systemd.md give what the page says, and remove it again."""
    systemd = shell.systemd
    text = (PROJECT / "docs/systemd.md").read_text()
    install, journal, upgrade, uninstall = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)

    def said(command: str) -> str:
        assert f"`{command}`" in text
        return shell.run(command)

    assert len(install.strip().splitlines()) <= 10
    assert shell.run(install).endswith("Hello from flaskd\n")
    assert systemd.show("flaskd.service", "PrivateNetwork") == "yes"
    # An answer may come before READY=1 has arrived, and its line in the journal after that.
    until(lambda: "ready: hello:app" in said("systemctl status flaskd"))
    until(lambda: "FLASKD_REQUEST_ID=1\n" in said("journalctl -u flaskd -o verbose"))
    shell.run(journal)
    said("flaskd check --unit /etc/systemd/system/flaskd.service /etc/flaskd/flaskd.yaml")
    (exposure,) = re.findall(
        r"Overall exposure level for flaskd\.service: ([0-9.]+)", said("systemd-analyze security flaskd")
    )
    assert float(exposure) <= 0.4
    said("systemctl reload flaskd")
    hello = 'app: {target: "hello:app", chdir: /srv/hello}\nserver: {listen: "127.0.0.1:8001"}\n'
    systemd.write("/etc/flaskd/shop.yaml", hello)
    said("flaskd units --instance shop")
    shell.run("flaskd units --instance shop --install / && systemctl daemon-reload && systemctl start flaskd@shop")
    assert "127.0.0.1:8001" in said("flaskd status --name flaskd-shop")
    shell.run("systemctl disable --now flaskd@shop")

    before = systemd.show("flaskd.service", "MainPID")
    shell.run(upgrade)
    assert systemd.show("flaskd.service", "MainPID") not in {before, "0"}
    assert shell.run(f"curl -sS {URL}") == "Hello from flaskd\n"
    said("systemctl stop flaskd.socket flaskd.service")
    shell.run(uninstall + "systemctl daemon-reload")
    gone = [systemd.run(*each, check=False).returncode for each in (("id", "flaskd"), ("ls", VENV), ("curl", URL))]
    assert gone == [1, 2, 7], "no user, no such directory, nobody listens"
    for unit in ("flaskd.service", "flaskd.socket", "flaskd@shop.service"):
        assert systemd.show(unit, "LoadState") == "not-found"
    assert shell.run("ls /etc/flaskd /var/lib/flaskd").split() == [
        "/etc/flaskd:", "flaskd.yaml", "shop.yaml", "/var/lib/flaskd:", "last-stop.json",
    ]  # fmt: skip
