"""The instrument: every request has a fate, and what is lost is seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LOSS = Path(__file__).parent.parent / "benchmarks" / "loss.py"


@pytest.mark.parametrize("scenario", ["stop", "connect", "restart", "drain"])
def test_every_request_has_a_fate(scenario, tmp_path):
    """One cycle of flaskd under 24 clients: a table, an account that adds up, and nothing lost."""
    file = tmp_path / "account.json"
    done = subprocess.run(
        [sys.executable, str(LOSS), "--servers", "flaskd", "--scenario", scenario, "--cycles", "1", "--json", str(file)],
        capture_output=True, text=True, timeout=80, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| flaskd |" in done.stdout
    text = file.read_text()
    accounts = [each for each in find(json.loads(text)) if each["server"] == "flaskd"]
    assert accounts, text
    for account in accounts:
        assert account["requests"] == sum(account["fates"].values()) > 0


def find(value):
    """All accounts in what was written."""
    if isinstance(value, dict):
        if "fates" in value:
            yield value
        for each in value.values():
            yield from find(each)
    elif isinstance(value, list):
        for each in value:
            yield from find(each)
