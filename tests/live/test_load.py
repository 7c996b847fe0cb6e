"""No request is lost under load, in many stops."""

import json
import subprocess
import sys
from pathlib import Path

LOSS = Path(__file__).parent.parent.parent / "benchmarks" / "loss.py"


def test_twenty_stops_under_load_lose_nothing(tmp_path: Path) -> None:
    """24 clients of all kinds, twenty SIGTERMs and starts: each request that was accepted is answered."""
    file = tmp_path / "account.json"
    done = subprocess.run(
        [sys.executable, str(LOSS), "--servers", "flaskd", "--scenario", "stop", "--cycles", "20", "--json", str(file)],
        capture_output=True, text=True, timeout=85, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [account] = json.loads(file.read_text())["accounts"]
    assert (account["cycles"], account["lost"]) == (20, 0)
    assert account["fates"]["answered"] > 20 * 24
    assert account["requests"] == sum(account["fates"].values())
