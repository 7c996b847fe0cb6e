"""Exceptions of the app in the main thread and in logging: requests are answered, and the stop is complete."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from daemon_kit import GATE_APP, Flaskd
from http_client import get

RAISING = """
import signal

def raising(number, frame):
    raise {error}

signal.signal(signal.SIGUSR1, raising)
"""


@pytest.mark.parametrize("error", ["ValueError('not now')", "SystemExit", "SystemExit(3)", "KeyboardInterrupt"])
def test_a_signal_handler_that_raises_cuts_nothing(flaskd: Flaskd, error: str) -> None:
    """An Exception of a signal handler is logged; SystemExit and the like stop flaskd; its exit code is not 0."""
    flaskd.write("raising.py", GATE_APP + RAISING.format(error=error))
    flaskd.start(app="raising")
    answer = flaskd.hold()
    flaskd.kill(signal.SIGUSR1)
    name = error.partition("(")[0]
    flaskd.until(lambda: f"{name} was raised in the main thread" in flaskd.log)
    goes_on = name == "ValueError"
    if goes_on:
        assert flaskd.status()["state"] == "ready"
        flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.gate.open()
    assert answer.result() == (200, b"held")
    assert flaskd.wait() == (0 if goes_on else 70)
    record = flaskd.record()
    assert (record["completed"], record["cut"]) == (1, [])
    assert record["reason"].startswith("signal: SIGTERM" if goes_on else f"failure: {name}")


STORM = """
import signal

def raising(number, frame):
    raise ValueError("tick")

signal.signal(signal.SIGURG, raising)
"""


def test_a_handler_that_raises_all_the_time_breaks_nothing_off(flaskd: Flaskd) -> None:
    """With hundreds of exceptions a second in the main thread, reload, drain, resume and stop work."""
    flaskd.write("storm.py", GATE_APP + STORM)
    flaskd.write("flaskd.yaml", "cleanup: {policies: {mark: {use: command, with: {argv: [touch, mark]}}}}\n")
    flaskd.start(app="storm")
    url = flaskd.url
    calm = threading.Event()

    def storm() -> None:
        while not calm.wait(0.002):
            flaskd.kill(signal.SIGURG)  # ignored by default, so a late one has no effect

    with ThreadPoolExecutor() as threads:
        threads.submit(storm)
        try:
            for _ in range(5):
                assert flaskd.command("reload").startswith("OK reloaded")
                assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
                assert flaskd.command("resume") == "OK ready\n"
                flaskd.drain_messages()
            flaskd.stop_holding(url)
        finally:
            calm.set()
    assert flaskd.record()["policies"]["mark"]["fate"] == "ok"
    assert flaskd.record()["cut"] == []
    assert 1 <= flaskd.log.count("ValueError was raised in the main thread") < 20


LOGGING = {
    "a record factory": "logging.setLogRecordFactory(raising)",
    "a record factory of nothing": "logging.setLogRecordFactory(lambda *args, **kwargs: None)",
    "a filter": "logging.getLogger('flaskd').addFilter(raising); logging.getLogger('flaskd.daemon').addFilter(raising)",
    "a handler": "logging.getLogger('flaskd').addHandler(Raising())",
    "a handler before ours": "logging.getLogger('flaskd').handlers.insert(0, Raising())",
}
RAISING_LOG = """
import logging

def raising(*args, **kwargs):
    raise {error}

class Raising(logging.Handler):
    def handle(self, record):
        raise {error}

{what}
"""


@pytest.mark.parametrize("error", ["ValueError", "SystemExit"])
@pytest.mark.parametrize("what", LOGGING)
def test_what_raises_in_logging_costs_nothing(flaskd: Flaskd, what: str, error: str) -> None:
    """If logging raises, requests and commands are answered, and flaskd's own lines are written."""
    flaskd.write("logging_app.py", GATE_APP + RAISING_LOG.format(what=LOGGING[what], error=error))
    flaskd.start(app="logging_app")
    url = flaskd.url
    assert get(url, "/boom")[0] == 500
    assert flaskd.command("reload").startswith("OK reloaded")
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    assert flaskd.command("resume") == "OK ready\n"
    flaskd.stop_holding(url)
    assert (flaskd.record()["completed"], flaskd.record()["cut"]) == (1, [])
    assert "ready: logging_app" in flaskd.log
    assert "stopped: completed=1" in flaskd.log
    # A filter on flaskd's loggers would apply to the app's handlers, of which there are none.
    assert ("flaskd's lines go on without it" in flaskd.log) == ("filter" not in what)


HOOKS = """
import sys, threading

def raising(*args):
    raise SystemExit

sys.excepthook = threading.excepthook = sys.unraisablehook = raising
"""


def test_hooks_that_raise_cost_nothing(flaskd: Flaskd) -> None:
    """With hooks for uncaught exceptions that raise, flaskd serves and stops."""
    flaskd.write("hooks.py", GATE_APP + HOOKS)
    flaskd.start(app="hooks")
    flaskd.stop_holding()
    assert flaskd.record()["cut"] == []


@pytest.mark.parametrize("error", ["ValueError", "SystemExit", "KeyboardInterrupt"])
def test_what_raises_at_the_end_of_the_import_fails_the_start(flaskd: Flaskd, error: str) -> None:
    """If a profile function raises in the main thread after the import, the start fails with 70 and one line."""
    profile = f"import sys\ndef raising(*args):\n    raise {error}\n"
    flaskd.write("profiled.py", profile + GATE_APP + "sys.setprofile(raising)\n")
    code, log = flaskd.fails(app="profiled")
    assert code == 70
    assert error in log
    assert flaskd.leftovers() == []
    assert any("ERRNO=" in message for message in flaskd.drain_messages())
