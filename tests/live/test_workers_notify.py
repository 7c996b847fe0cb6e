"""What systemd is told of workers: that they are being started, that all are ready, and why one is not."""

from __future__ import annotations

import json
import re
import time

from daemon_kit import Flaskd

APP = """
import pathlib
from gateapp import app
exec(pathlib.Path("on_import").read_text())
"""


def heard(flaskd: Flaskd) -> list[str]:
    """The messages since the last look."""
    flaskd.drain_messages()
    said, flaskd.messages = flaskd.messages, []
    return [each for each in said if not each.startswith(("WATCHDOG=1", "FDSTORE"))]


def test_a_start_and_reloads_of_workers(flaskd: Flaskd) -> None:
    """The start time is extended while workers start, READY comes after the last, STATUS has a reload's error."""
    flaskd.write("slow.py", APP)
    flaskd.write("on_import", "")
    flaskd.start("-w", "3", app="slow")
    *before, ready = heard(flaskd)
    assert ready.startswith("READY=1\nSTATUS=ready: slow on ")
    assert "EXTEND_TIMEOUT_USEC=20000000" in before
    assert not any("READY" in each for each in before)
    flaskd.until(lambda: "ready: slow on" in flaskd.log)
    assert len(re.findall(r"worker \d .* is ready after", flaskd.log.partition("ready: slow on")[0])) == 3

    asked = time.monotonic()
    code, out, err = flaskd.client("reload")
    assert code == 0, out + err
    reloading, *between, ready = heard(flaskd)
    began = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)\nSTATUS=reloading", reloading)
    assert began, reloading
    assert asked < int(began[1]) / 1e6 < time.monotonic()
    assert set(between) == {"EXTEND_TIMEOUT_USEC=20000000"}
    assert ready.startswith("READY=1\nSTATUS=ready: slow on ")
    workers = json.loads(flaskd.client("workers", "--json")[1])["list"]
    assert sorted(each["slot"] for each in workers if each["generation"] == 2) == [0, 1, 2]

    flaskd.write("on_import", "raise RuntimeError('the first line\\nand another')")
    assert flaskd.client("reload")[0] == 70
    reloading, *between, ready = heard(flaskd)
    assert reloading.startswith("RELOADING=1")
    assert set(between) == {"EXTEND_TIMEOUT_USEC=20000000"}
    assert ready.startswith("READY=1\nSTATUS=ready, but the reload failed: ")
    assert "the first line" in ready
    assert "Traceback" not in ready
