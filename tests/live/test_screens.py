"""Every screen in the documents is replayed, those of docs/terminal.md and docs/drain.md here."""

import re
import subprocess
import sys

from daemon_kit import GATE_APP, Flaskd
from http_client import Answer
from patience import PATIENCE
from screens import DOCS, check, check_frames, screens
from terminal_kit import terminal

REPLAYED = {
    "terminal.md": "here",
    "drain.md": "here",
    "control.md": "test_control_docs",
    "first-steps.md": "test_first_steps",
}
SAID = {"migrating.md": "test_migrating_docs"}
"""Pages whose screens are compared with what the command says, and by which test."""
ADDRESS = "127.0.0.1:8000"
BUSY = 5
SHOP = GATE_APP.replace('@app.get("/hold")\ndef hold', '@app.get("/export")\ndef export').replace(
    '"held"', '"exported"'
)
"""An app whose exports end when the test lets them."""


def test_every_screen_of_the_documents_is_replayed() -> None:
    """A page that shows a command with its answer is one of those whose commands are typed; no other block has a prompt."""
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    assert {page.name for page in pages if screens(page)} == {*REPLAYED, *SAID}
    for page in pages:
        for kind, block in re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            assert kind.startswith("console") or not re.search(r"^\$ ", block, re.MULTILINE), f"{page.name}: {block}"


class Operator:
    """Types the commands of the page, while clients wait for exports where a screen is a busy one."""

    def __init__(self, flaskd: Flaskd) -> None:
        self.flaskd = flaskd
        self.url = flaskd.url
        self.exports: list[Answer] = []

    def make_busy(self) -> None:
        for running in (True, True, True, False, False)[len(self.exports) :]:
            self.exports.append(Answer(self.url, "/export"))
            if running:
                self.flaskd.gate.entered()
        self.flaskd.until(lambda: self.flaskd.status()["in_flight"] == BUSY)

    def let_go(self) -> None:
        """Have all exports end: those that wait come to the gate as soon as others leave it."""
        self.flaskd.gate.open()
        for _ in self.exports[3:]:
            self.flaskd.gate.entered()
        self.flaskd.gate.open()
        assert [each.result() for each in self.exports] == [(200, b"exported")] * len(self.exports)
        self.exports.clear()

    def typed(self, command: str) -> str:
        command = re.sub(r"^flaskd ", f"{sys.executable} -m flaskd ", command)
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.flaskd.directory, env=self.flaskd.env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return done.stdout

    def drawn(self, command: str) -> str:
        with terminal(self.flaskd, *command.split()[1:], columns=120) as screen:
            if command == "flaskd top":
                screen.until(r"rates are of the last 1s[\s\S]*AGE[\s\S]*queued .*\n.*queued .*\n")
                screen.press("q")
            elif command == "flaskd stop --wait":
                screen.until(r"oldest \S+ GET")
                self.let_go()
            assert screen.wait() == 0
        return screen.shown


def test_the_screens_of_the_terminal(flaskd: Flaskd) -> None:
    """In the order of the page, on a terminal where it says so: what is drawn is what the page shows."""
    flaskd.write("shop.py", SHOP)
    flaskd.write(
        "flaskd.yaml",
        "server: {threads: 3}\nlog: {access: off}\n"
        "cleanup: {policies: {tell-the-team: {use: command, with: {argv: ['true']}}}}\n",
    )
    flaskd.start(app="shop")
    operator = Operator(flaskd)
    [address] = flaskd.status()["listen"]
    typed = 0
    for kind, commands in screens(DOCS / "terminal.md"):
        if "busy" in kind:
            operator.make_busy()
        elif operator.exports:
            operator.let_go()
        for command, expected in commands:
            on_terminal = "on a terminal" in kind and command != "flaskd last-stop"
            answer = (operator.drawn if on_terminal else operator.typed)(command).replace(address, ADDRESS)
            some = on_terminal or command == "flaskd list"  # which may show others of this machine
            (check_frames if some else check)(command, answer, expected)
            typed += 1
    assert typed >= 12
    assert flaskd.wait() == 0


def test_the_screen_of_a_stop_that_cuts_a_request(flaskd: Flaskd) -> None:
    """Of two exports one ends in time; what the command prints and its exit code are those of docs/drain.md."""
    flaskd.write("shop.py", SHOP)
    flaskd.write("flaskd.yaml", "shutdown: {drain: {timeout: 2s}}\n")
    flaskd.start(app="shop")
    exports = []
    for _ in range(2):
        exports.append(Answer(flaskd.url, "/export"))
        flaskd.gate.entered()
    [(_, [(stop, expected), (_, code)])] = screens(DOCS / "drain.md")
    with subprocess.Popen(
        [sys.executable, "-m", *stop.split()], cwd=flaskd.directory, env=flaskd.env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        first = process.stdout.readline()
        flaskd.gate.open(1)
        check_frames(stop, first + process.stdout.read(), expected)
    assert f"{process.returncode}\n" == code
    assert exports[0].result() == (200, b"exported")
    assert flaskd.wait() == 0
