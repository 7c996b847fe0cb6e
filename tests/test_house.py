"""The house itself: layers, lint, types, and what the README promises."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flaskd"

LAYERS = [
    {
        "errors",
        "units",
        "forks",
        "descriptors",
        "logs",
        "notify",
        "sockets",
        "init",
        "prelude",
        "leave",
        "files",
        "work",
        "journal",
        "wsgi",
        "patching",
        "logwriter",
        "text",
        "throttle",
        "threads",
        "objects",
    },
    {
        "config",
        "lifecycle",
        "ledger",
        "choice",
        "loading",
        "protocol",
        "runtime",
        "signals",
        "verbs",
        "store",
        "unitfiles",
    },
    {"server", "cleanup", "client"},
    {"drain", "launch", "state", "stop", "outlook", "inquiry", "admin", "service", "main_thread", "reload"},
    {"daemon", "thread"},
    {"control", "workers"},
    {"cli", "__init__", "__main__", "testing"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
WITHIN = {
    # Rooms of one layer that lean on each other, each for a reason.
    ("runtime", "protocol"),  # where the runtime directory is, is part of the protocol
    ("sockets", "errors"),
    ("patching", "errors"),
    ("patching", "forks"),
    ("patching", "objects"),
    ("wsgi", "objects"),
    ("logs", "forks"),
    ("logs", "units"),
    ("work", "units"),
    ("leave", "threads"),
    ("logs", "journal"),
    ("loading", "choice"),  # which object of the module that it has imported
    ("logs", "logwriter"),  # what it formats, the other writes
    ("logs", "text"),
    ("logwriter", "journal"),
    ("logwriter", "throttle"),
    ("admin", "stop"),  # a process that is not the daemon's is stopped like it
    ("config", "verbs"),  # it names them
    ("__main__", "cli"),
    ("cli", "__init__"),  # the version
}
UPWARD = {("control", "__init__"), ("admin", "__init__")}  # the version


def room_of(path: Path) -> str:
    """The room of a file: the first part of its path below the package."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The rooms of flaskd that a file imports at run time; imports for type checkers are no dependency."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "flaskd":
            parts = node.module.split(".")[1:]
            names = [alias.name for alias in node.names]
            found |= {parts[0]} if parts else {name if name in LEVEL else "__init__" for name in names}
        elif isinstance(node, ast.Import):
            found |= {
                [*alias.name.split("."), "__init__"][1] for alias in node.names if alias.name.startswith("flaskd")
            }
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_layers_above_it(path):
    """Each import goes to a layer with a smaller number, or stays in its room."""
    room = room_of(path)
    if room == "demo":
        assert imports_of(path) <= {"demo"}
        return
    assert room in LEVEL, f"{room} has no layer: give it one here and in CONTRIBUTING.md"
    for other in imports_of(path) - {room}:
        allowed = LEVEL[other] < LEVEL[room] or (room, other) in WITHIN | UPWARD
        assert allowed, f"{path.relative_to(ROOT)} (layer {LEVEL[room]}) imports {other} (layer {LEVEL[other]})"


def test_the_layers_are_written_down():
    """CONTRIBUTING.md has the same table."""
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    written = {int(level): set(re.findall(r"`(\w+)/?`", rooms)) for level, rooms in rows}
    assert written == dict(enumerate(LAYERS))


def test_waitress_is_touched_in_the_server_alone():
    """No other room imports waitress."""
    users = {
        room_of(path) for path in FILES if re.search(r"^\s*(from|import) waitress", path.read_text(), re.MULTILINE)
    }
    assert users == {"server"}


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_static_checks(command):
    """Lint, format and types are clean."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_client_verbs_import_nothing_heavy():
    """What a client verb needs holds none of Flask, waitress, pydantic and PyYAML."""
    code = "import sys, flaskd.cli; print(*({'flask', 'waitress', 'pydantic', 'yaml', 'sqlalchemy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_daemon_does_without_pydantic():
    """Only the actions of other packages need it; importing it costs as much as half of Flask."""
    code = """
import sys, flaskd.cli, flaskd.control, flaskd.daemon
from flaskd.cleanup import action_specs
from flaskd.config import load
load(None, actions=action_specs(), overrides={"cleanup.policies.a": {"use": "logging.flush"}}).describe()
print(*({"pydantic", "pydantic_core"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_readme_has_its_two_commands():
    """One line each: install and run the demo, install and run the tests."""
    lines = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    assert lines[0].endswith(".venv/bin/flaskd serve flaskd.demo:app")
    assert lines[1].endswith(".venv/bin/pytest")


def test_the_readme_links_to_what_is_there():
    """Every relative link of the README leads somewhere."""
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_the_yaml_of_the_readme_is_valid(tmp_path):
    """The configuration that the README shows has no fault."""
    from flaskd.cleanup import action_specs
    from flaskd.config import load

    [block] = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "flaskd.yaml"
    path.write_text(block)
    load(path, actions=action_specs())


def test_the_reference_configuration_is_valid():
    """config/flaskd.yaml has no fault, with the actions that there are."""
    from flaskd.cleanup import action_specs
    from flaskd.config import load

    load(ROOT / "config" / "flaskd.yaml", actions=action_specs())


def test_the_version_stands_in_two_places_and_is_one():
    """The package and pyproject.toml agree."""
    import flaskd

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == flaskd.__version__
