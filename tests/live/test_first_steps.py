"""docs/first-steps.md is true: what it tells a newcomer to type is typed, and answers what it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from daemon_kit import Flaskd, requires
from patience import PATIENCE
from screens import check, screens

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-steps.md").read_text()
WAITS = """
    import os, socket
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)
"""
"""What the slow request does here in the place of sleeping."""
ADDRESS = "127.0.0.1:8000"
"""Where flaskd serves on the page; here it is a port that is free."""

UP_TO_READY = re.compile(r"\A(?:.*\n)*?.* info    ready: .*\n")
"""What is in the log before the first request."""


class Reader:
    """A newcomer at two terminals, in a new directory, with flaskd on a port that is free."""

    def __init__(self, flaskd: Flaskd) -> None:
        self.flaskd = flaskd
        self.address = ""
        self.env = flaskd.env | {"PATH": f"{Path(sys.executable).parent}:{flaskd.env['PATH']}"}
        self.behind: list[subprocess.Popen[bytes]] = []

    def started(self, command: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            ["sh", "-c", f"exec {command}"], cwd=self.flaskd.directory, env=self.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def typed(self, command: str) -> str:
        """What a command prints."""
        if command == "flaskd serve":
            self.flaskd.drain_messages()  # a reload says READY, too
            self.flaskd.launch(app=None, listen="127.0.0.1:0")
            self.flaskd.wait_message("READY=1")
            [self.address] = self.flaskd.status()["listen"]
            self.flaskd.until(lambda: bool(UP_TO_READY.match(self.flaskd.log)))
            [log] = UP_TO_READY.findall(self.flaskd.log)
            # Where the tests run in the background of a shell, the log says that some signals are ignored.
            return re.sub(r".*: ignored, as it was when flaskd was started.*\n", "", log)
        if command.endswith(" &"):
            self.behind.append(self.started(command.removesuffix(" &")))
            self.flaskd.gate.entered()
            return ""
        if command == "flaskd drain --wait":
            with self.started(command) as process:
                assert process.stdout
                first = process.stdout.readline()
                self.flaskd.gate.open()
                return (first + process.stdout.read()).decode()
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.flaskd.directory, env=self.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        if command.startswith("flaskd stop"):
            assert self.flaskd.wait() == 0
            self.flaskd.log_file.unlink()
        return done.stdout


def test_the_first_quarter_of_an_hour(flaskd: Flaskd) -> None:
    """Typed in their order, the commands of the page answer what it says, and each stop ends with 0."""
    requires("curl", [] if shutil.which("curl") else ["curl"])
    [app] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert app.count("\n    time.sleep(10)\n") == 1
    flaskd.write("app.py", app.replace("\n    time.sleep(10)\n", WAITS))
    reader = Reader(flaskd)
    typed = 0
    for _, commands in screens(ROOT / "docs" / "first-steps.md"):
        for command, expected in commands:
            answer = reader.typed(command.replace(ADDRESS, reader.address)).replace(reader.address or ADDRESS, ADDRESS)
            check(command, answer, expected)
            typed += 1
    assert typed >= 25
    assert [process.communicate(timeout=PATIENCE)[0] for process in reader.behind] == [b"done\n"]


def test_the_other_commands_stand_on_pages_whose_commands_are_run() -> None:
    """The commands for the demo, systemd and podman are those of the README and the pages whose commands are run."""
    tried = [(ROOT / name).read_text().splitlines() for name in ("README.md", "docs/systemd.md", "docs/fleet.md")]
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block, lines in zip([blocks[0], *blocks[2:]], tried, strict=True):
        assert [line for line in block.splitlines() if line not in lines] == []
