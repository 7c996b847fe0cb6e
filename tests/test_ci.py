"""The steps of the gate that are scripts of their own."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEP = ROOT / ".ci" / "newest-waitress"
PUBLISHED = "99.0b1"


def publish(index: Path) -> None:
    """Make a wheel of the installed Waitress, as a pre-release of a future version."""
    found = distribution("waitress")
    info = f"waitress-{PUBLISHED}.dist-info"
    with zipfile.ZipFile(index / f"waitress-{PUBLISHED}-py3-none-any.whl", "w") as wheel:
        for file in found.files or ():
            if file.parts[0] == "waitress" and file.suffix == ".py":
                wheel.write(file.locate(), str(file))
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: waitress\nVersion: {PUBLISHED}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def step(index: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the step with a package index of the test."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTEST_"))}
    env |= {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run([STEP, *args], env=env, capture_output=True, text=True, check=False)


def test_the_contract_is_tested_with_a_pre_release(tmp_path):
    """The contract tests import a newer Waitress from the index, even a pre-release."""
    publish(tmp_path)
    probe = tmp_path / "test_probe.py"
    probe.write_text(
        "import importlib.metadata, waitress\n"
        f"def test_it(): assert importlib.metadata.version('waitress') == '{PUBLISHED}', waitress.__file__\n"
    )
    done = step(
        tmp_path, "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(probe), "tests/unit/server/test_contract.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"with Waitress {PUBLISHED}, the newest (here is {distribution('waitress').version})" in done.stdout
    assert int(re.search(r"([0-9]+) passed", done.stdout)[1]) > 40


def test_an_index_that_cannot_be_reached_is_a_failure_with_a_word(tmp_path):
    """An index that cannot be reached fails the step with a message."""
    done = step(tmp_path)
    assert done.returncode == 1
    assert "cannot test with the newest Waitress: pip could not get it" in done.stderr
    assert "pytest" not in done.stdout


def test_who_is_not_root_is_told_what_was_not_tested():
    """Without root the script prints what was not tested, and does not fail."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root cannot become another user without setpriv")
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    script = (ROOT / ".ci" / "as-others").read_text().replace('cd "$(dirname "$0")/.."', "")
    done = subprocess.run(
        [*prefix, "bash", "-c", script], capture_output=True, text=True, check=False, cwd="/", timeout=20
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("NOT TESTED here: flaskd as root in /root, and as another user")


def test_the_gate_takes_each_step():
    """`.ci/run` runs all other scripts in its directory."""
    gate = (ROOT / ".ci" / "run").read_text()
    for step in (ROOT / ".ci").iterdir():
        assert step.name == "run" or f"\n.ci/{step.name}\n" in gate or f" .ci/{step.name}\n" in gate
