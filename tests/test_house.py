"""The house itself: layers, lint, types, and what the README promises."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flaskd"

LAYERS = [
    {"version", "errors", "units", "text", "objects", "stacks", "files", "values"},
    {"process"},
    {"log", "sockets", "verbs", "lifecycle", "background_work"},
    {"ledger", "protocol", "readings", "starting"},
    {"present", "client", "slow_query", "config", "places.record", "places.runtime"},
    {"cleanup", "server", "systemd", "finding"},
    {"places", "serving"},
    {"pool", "notices", "inbox"},
    {"snapshot", "systemd.service"},
    {"admin"},
    {"reload", "holdings", "workforce"},
    {"stopping", "drains", "questions"},
    {"daemon"},
    {"boot"},
    {"control", "workers"},
    {"cli", "flaskd", "testing"},
    {"__main__"},
]
"""Rooms, and modules that stand apart from theirs: each may import from its own room, and from layers above it here."""
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LONGEST_FILE, LONGEST_CLASS = 400, 300
"""Lines."""
TOO_LONG: dict[str, int] = {}
"""Files and classes that are longer, with their length; it can only shrink."""


def module_of(path: Path) -> str:
    """The name of a file's module, without the package's; that of the package itself is "flaskd"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "flaskd"


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The modules of flaskd that a file imports: also for type checkers, and inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "flaskd":
            package = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{package}.{alias.name}".lstrip(".")
                found.add(name if name in MODULES else package or "flaskd")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "flaskd"]
            found |= {name.partition(".")[2] or "flaskd" for name in names}
    return found - {module_of(path)}


def room_of(module: str) -> str:
    """The entry of the table of layers that a module belongs to: the longest one that its name begins with."""
    parts = module.split(".")
    rooms = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((room for room in rooms if room in LEVEL), "")


@pytest.mark.parametrize("module", MODULES)
def test_an_import_goes_down(module):
    """Each goes to a layer with a smaller number, or stays in its room; the demo is a guest, and imports nothing."""
    imports = imports_of(MODULES[module])
    if module.partition(".")[0] == "demo":
        assert imports == set()
        return
    room = room_of(module)
    assert room, f"{module} has no layer: give it one here and in CONTRIBUTING.md"
    for other in imports:
        there = room_of(other)
        assert there == room or LEVEL[there] < LEVEL[room], f"{module} ({room}) imports {other} ({there})"


def test_there_are_no_circles():
    """Of files, not of rooms; graphlib names the first one that it finds."""
    graphlib.TopologicalSorter({module: imports_of(path) for module, path in MODULES.items()}).prepare()


def lengths():
    """The lengths of files and classes that are longer than they may be."""
    for module, path in MODULES.items():
        text = path.read_text()
        if (length := len(text.splitlines())) > LONGEST_FILE:
            yield module, length
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_CLASS:
                yield f"{module}:{node.name}", length


def test_no_file_and_no_class_is_too_long():
    """What was too long when the bound was drawn may only become shorter."""
    found = dict(lengths())
    assert {name: length for name, length in found.items() if length > TOO_LONG.get(name, 0)} == {}
    assert TOO_LONG.keys() <= found.keys(), "shorter by now: take it out of the list"


def test_the_layers_are_written_down():
    """CONTRIBUTING.md has the same table."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    written = {int(level): set(re.findall(r"`([\w.]+)/?`", rooms)) for level, rooms in rows}
    assert written == dict(enumerate(LAYERS))


def test_sentences_about_programs_name_the_program() -> None:
    """No text of the code says somebody, nobody, whoever or anybody where a client, a thread or a caller is meant."""
    files = [path for kind in ("*.py", "*.html") for path in (ROOT / "flaskd").rglob(kind)]
    found = {path: re.findall(r"\b(?:[Ss]ome|[Nn]o|[Aa]ny)body\b|\b[Ww]hoever\b", path.read_text()) for path in files}
    assert len(files) > 200
    assert {path: words for path, words in found.items() if words} == {}


def test_waitress_is_touched_in_the_server_alone():
    """No other room imports waitress."""
    users = {
        module.partition(".")[0]
        for module, path in MODULES.items()
        if re.search(r"^\s*(from|import) waitress", path.read_text(), re.MULTILINE)
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


def test_no_pattern_has_a_possessive_quantifier_behind_a_group():
    """Python 3.11.2, which Debian 12 has, gets `(?:ab)*+` wrong (fixed in 3.11.4); the atomic group `(?>(?:ab)*)` is right."""
    wrong = re.compile(r"\)(?:[*+?]|\{\{?[0-9]*,?[0-9]*\}?\})\+")
    assert wrong.search(r"(?:ab)*+")
    assert wrong.search(r"(?:ab){1,2}+")
    for path in (ROOT / "flaskd").rglob("*.py"):
        without_sets = re.sub(r"\[(?:\\.|[^\]\\\n])*\]", "[]", path.read_text())
        assert [line for line in without_sets.splitlines() if wrong.search(line)] == [], path


def test_the_readme_has_its_two_commands():
    """One line each: install and run the demo, install and run the tests."""
    lines = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    assert lines[0].endswith(".venv/bin/flaskd serve flaskd.demo:app")
    assert lines[1].endswith(".venv/bin/pytest -n 2 --dist loadfile")


def test_the_short_run_of_the_readme_names_tests_that_are_there():
    """One line, whose directories have tests; `.ci/run` takes the time of it."""
    [line] = re.findall(r"^\.venv/bin/pytest .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    places = [word for word in line.split() if word.startswith("tests/")]
    assert len(places) > 5
    assert [place for place in places if not [*(ROOT / place).glob("test_*.py")]] == []
    assert "quick=$(grep '^\\.venv/bin/pytest ' README.md)\n" in (ROOT / ".ci" / "run").read_text()


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
