"""Workers under load; with $FLASKD_LONG several times as often."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from systemd_kit import LONG

from flaskd.cli import serve

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
ROUNDS = range(10 if LONG else 1)
"""Runs, each with as many steps as fit into a test's time."""

pytestmark = pytest.mark.skipif(
    not any("-w" in each.opts for each in serve.params), reason="this flaskd has no worker processes"
)


def account_of(scenario: str, cycles: int, workers: int, directory: Path) -> dict:
    """Run a scenario of loss.py; returns what clients and the supervisor report."""
    file = directory / "account.json"
    argv = [sys.executable, str(BENCHMARKS / "loss.py"), "--servers", "flaskd", "--scenario", scenario]
    argv += ["--cycles", str(cycles), "--workers", str(workers), "--json", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=85, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [account] = json.loads(file.read_text())["accounts"]
    assert (account["cycles"], account["faults"], account["fates"]["refused"]) == (cycles, [], 0)
    assert account["requests"] == sum(account["fates"].values())
    return account


@pytest.mark.parametrize("_round", ROUNDS)
@pytest.mark.parametrize(
    ("scenario", "cycles"),
    [
        ("reload", 10),
        ("replace", 10),
        ("scale", 5),
        ("bad", 5),
        pytest.param("leak", 10, marks=pytest.mark.skipif(not LONG, reason="takes a minute; set FLASKD_LONG")),
    ],
)
def test_no_change_of_workers_loses_a_request(scenario, cycles, _round, tmp_path) -> None:
    """While workers come and go, or faulty code is refused, no request of any kind of client is lost or refused."""
    account = account_of(scenario, cycles, 2, tmp_path)
    assert account["lost"] == 0
    assert account["fates"]["answered"] > 24 * cycles


@pytest.mark.parametrize("_round", range(2 * len(ROUNDS)))
def test_a_kill_hurts_one_worker_alone(_round, tmp_path) -> None:
    """Five times `kill -9`: only that worker's connections end, its requests are named, no client is refused."""
    account = account_of("kill", 5, 4, tmp_path)
    assert account["named"] > 0
    assert account["fates"]["wrong"] == 0
