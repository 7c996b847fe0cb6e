"""docs/control.md is true: its transcripts are replayed on a live daemon, its configuration is valid."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_kit import Flaskd, requires
from patience import PATIENCE
from screens import DOCS, check, screens

PAGE = (DOCS / "control.md").read_text()
SCREENS = screens(DOCS / "control.md")


def test_each_transcript(flaskd: Flaskd) -> None:
    """Typed into a shell in their order, the commands of the page answer what the page says."""
    requires("curl", [] if shutil.which("curl") else ["curl"])
    netcat = "" if shutil.which("nc") else "socat -t 30 - UNIX-CONNECT:"
    requires("netcat", [] if not netcat or shutil.which("socat") else ["nc, socat"])
    flaskd.write("flaskd.yaml", "admin: {listen: '127.0.0.1:0', agent: '127.0.0.1:0'}\n")
    flaskd.start()
    [admin], [agent] = (flaskd.status()[name] for name in ("admin", "agent"))

    def typed(command: str) -> str:
        if netcat:
            command = re.sub(r"nc -N?U /", f"{netcat}/", command)
            command = command.replace("nc 127.0.0.1 9091", "socat -t 30 - TCP:127.0.0.1:9091")
        command = command.replace("127.0.0.1:9091", agent).replace("127.0.0.1 9091", agent.replace(":", " "))
        command = command.replace("/run/flaskd", str(flaskd.runtime)).replace("127.0.0.1:9090", admin)
        command = re.sub(r"^flaskd ", f"{sys.executable} -m flaskd ", command)
        done = subprocess.run(
            ["sh", "-c", command], cwd=flaskd.directory, env=flaskd.env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return done.stdout

    assert len(SCREENS) >= 8
    for kind, commands in SCREENS:
        held = flaskd.hold() if kind == "in flight" else None
        for command, expected in commands:
            if held is not None and "drain wait" in command:
                with flaskd.control() as client:  # it is over only after somebody was told that it is not
                    client.sendall(b"drain wait\n")
                    answer = client.recv(1000).decode()
                    flaskd.gate.open()
                    answer += b"".join(iter(lambda: client.recv(1000), b"")).decode()
                assert held.result() == (200, b"held")
            else:
                answer = typed(command)
            check(command, answer, expected)
    assert flaskd.wait() == 0


def test_the_transcripts_of_the_design(flaskd: Flaskd) -> None:
    """A dozen requests in flight: a drain that answers at once, one that waits, and a reload that is refused."""
    flaskd.write("flaskd.yaml", "server: {threads: 12}\n")
    flaskd.start()
    url = flaskd.url
    held = [flaskd.hold(url) for _ in range(12)]
    flaskd.write("flaskd.yaml", "cleanup:\n  policies:\n    close-db:\n      use: command\n      timeout: soon\n")
    answer = flaskd.command("reload").splitlines()[-1]
    assert re.fullmatch(
        r"ERR config-invalid \S*flaskd\.yaml:\d+:\d+ cleanup\.policies\.close-db\S*: expected .*", answer
    ), answer
    assert flaskd.command("drain") == "OK draining in_flight=12 deadline=15s (undo: resume)\n"
    with flaskd.control() as client, client.makefile("r") as lines:
        client.sendall(b"drain wait\n")
        assert lines.readline() == ".. in_flight=12 left=15s\n"
        flaskd.gate.open()
        last = [line for line in lines if not line.startswith("..")]
    assert re.fullmatch(r"OK drained completed=12 rejected=0 cut=0 took=[\d.]+m?s\n", "".join(last))
    assert [each.result()[0] for each in held] == [200] * 12
    assert flaskd.stop() == 0


@pytest.mark.parametrize("block", re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_the_yaml_is_valid(tmp_path: Path, block: str) -> None:
    """The configuration that the page shows has no fault."""
    from flaskd.cleanup import action_specs
    from flaskd.config import load

    path = tmp_path / "flaskd.yaml"
    path.write_text(block)
    load(path, actions=action_specs())
