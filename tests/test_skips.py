"""The summary of skipped tests at the end of a run."""

import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_one(number):
    pytest.skip("haproxy is not available: haproxy")

@pytest.mark.skipif(True, reason="haproxy is not available: haproxy")
def test_another(): pass

@pytest.mark.skipif(True, reason="only root can\\n become another user")
def test_of_roots(): pass

def test_that_runs(): pass
"""


def test_each_reason_is_said_once(tmp_path):
    """Five tests that are skipped for two reasons give two lines with their numbers, also with several processes."""
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:flask", "-n", "2", f"--rootdir={tmp_path}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if "SKIPPED" in line] == [
        "SKIPPED [4] haproxy is not available: haproxy",
        "SKIPPED [1] only root can become another user",
    ]
