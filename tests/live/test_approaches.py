"""The examples of docs/approaches.md work."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_kit import requires

PAGE = Path(__file__).parent.parent.parent / "docs" / "approaches.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
FILES = {block.splitlines()[0].removeprefix("# "): block for kind, block in BLOCKS if kind in {"python", "yaml"}}
DAEMON, FLASK_RUN = (block for kind, block in BLOCKS if kind == "sh")
TOKEN = DAEMON.splitlines()[0]


@pytest.fixture
def scratch(tmp_path):
    """A directory with all files of the page, on free ports; runs commands there."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"8000": str(one.getsockname()[1]), "8001": str(other.getsockname()[1])}

    def with_free_ports(text):
        return re.sub(r"\b800[01]\b", lambda found: ports[found[0]], text)

    for name, block in FILES.items():
        (tmp_path / name).write_text(with_free_ports(block))
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RUNTIME_DIRECTORY": str(tmp_path), "STATE_DIRECTORY": str(tmp_path), "PYTHONWARNINGS": "error",
    }  # fmt: skip

    def run(*command):
        done = subprocess.run(
            [with_free_ports(word) for word in command],
            cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("name", ["in_a_thread.py", "in_a_process.py", "stops_itself.py"])
def test_the_scripts_run(scratch, name):
    """Each script exits with 0: the order is answered, and after that its on_stop function runs once."""
    assert scratch(sys.executable, name) == "the books are closed\n"


def test_the_pytest_example_passes(scratch):
    """The fixture serves the app of the page, and nothing leaks."""
    assert " passed" in scratch(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop.py")


@pytest.mark.parametrize("commands", [DAEMON, f"{TOKEN}\n{FLASK_RUN}"], ids=["daemon", "flask-run"])
def test_the_shell_examples_stop_what_serves(scratch, commands):
    """The commands make the token, ask the server, which answers with its plan, cleans up, and ends as the page says."""
    requires("curl", [] if shutil.which("curl") else ["curl"])
    out = scratch("bash", "-e", "-c", commands)
    assert "hello\n" in out
    assert "close_the_books" in out
    assert out.endswith("the books are closed\n")


def test_the_page_measures_every_way():
    """The table of costs has a row for each way that benchmarks/approaches.py measures."""
    source = (PAGE.parent.parent / "benchmarks" / "approaches.py").read_text()
    ways = re.findall(r"^    [\"'](.*)[\"']: (?:lambda|\w+)", source.partition("WAYS")[2], re.MULTILINE)
    assert len(ways) == 7
    rows = {line.split("|")[1].strip().strip("`") for line in PAGE.read_text().splitlines() if line.startswith("|")}
    assert set(ways) <= rows
