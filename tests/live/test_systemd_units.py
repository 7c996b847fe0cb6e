"""The units as people use them: several side by side, an upgrade under way, and the documentation, literally."""

from __future__ import annotations

import re
import subprocess

from conftest import Answer, get, refused
from systemd_kit import PROJECT, VENV, Systemd, free_port

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


def test_a_virtual_environment_may_go_away_under_the_daemon(each_systemd: Systemd) -> None:
    """All that a stop needs is in memory by READY: with its packages deleted it drains, cleans up and exits with 0."""
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
    sleeping = Answer(doomed.url, "/sleep/5")
    systemd.until(lambda: doomed.status()["in_flight"] == 1)
    systemd.ctl("stop", doomed.unit)
    journal = doomed.journal()
    assert doomed.show("Result") == "success", journal
    assert "2 ok, 1 timed_out" in journal
    assert "cut=1" in journal
    assert "Error" not in journal
    sleeping.result()


def test_the_documentation_is_true(each_systemd: Systemd) -> None:
    """The first block of docs/systemd.md, line by line, gives a hardened, socket-activated service that answers."""
    systemd = each_systemd
    text = (PROJECT / "docs/systemd.md").read_text()
    (block, *_) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert len(block.strip().splitlines()) <= 10
    # What is different here: the package comes from this working copy, and is there already; the port is a free one.
    port = free_port()
    script = block.replace("python3 -m venv /opt/flaskd", "test -x /opt/flaskd/bin/python3")
    script = re.sub(r"/opt/flaskd/bin/pip install .*", "test -x /opt/flaskd/bin/flaskd", script)
    assert script.count("test -x") == 2
    script = script.replace(":8000", f":{port}")
    systemd.write(
        "/etc/systemd/system/flaskd.socket.d/port.conf", f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n"
    )
    done = subprocess.run(
        systemd.command("bash", "-euxo", "pipefail"),
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr + systemd.journal("flaskd.service")
    assert done.stdout.endswith("Hello from flaskd\n"), done.stdout
    assert systemd.show("flaskd.service", "PrivateNetwork") == "yes"
    assert systemd.show("flaskd.service", "ActiveState") == "active"
    security = systemd.run("systemd-analyze", "security", "--no-pager", "--threshold=4", "flaskd.service", check=False)
    assert security.returncode == 0, security.stdout
    systemd.ctl("disable", "--now", "flaskd.socket", "flaskd.service")
