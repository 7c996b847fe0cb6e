"""Fixtures and settings for all tests."""

import os
import signal
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite(
    "cleanup_kit",
    "daemon_kit",
    "http_client",
    "patience",
    "podman_kit",
    "screens",
    "server_kit",
    "services",
    "systemd_kit",
    "terminal_kit",
)

# The same examples in each run, so that a test fails at the change that broke it; and no test fails for being slow.
settings.register_profile("flaskd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flaskd")

SILENCE = 240
"""Seconds; a test may take 90 (`faulthandler_timeout`)."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT for background processes (POSIX, 2.12), but processes of the tests must get Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signal_handlers_stay():
    """A signal handler that a test leaves behind fails that test."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Silence:
    """Aborts a process of pytest-xdist, which then writes its stacks, when no test of it has ended for a long time.

    In a test, `faulthandler_timeout` does that; between two tests, or if a test has taken its timer, nothing else does.
    """

    def __init__(self):
        self.ended, self.over = threading.Event(), False
        self.thread = threading.Thread(target=self.watch, name="silence", daemon=True)

    def pytest_runtest_logreport(self):
        self.ended.set()

    def pytest_sessionfinish(self):
        self.over = True
        self.ended.set()

    def watch(self):
        while self.ended.wait(SILENCE) and not self.over:
            self.ended.clear()
        if not self.over:
            os.abort()


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        silence = Silence()
        config.pluginmanager.register(silence)
        silence.thread.start()


def pytest_terminal_summary(terminalreporter):
    """Say what was not tested, and why: a line for each reason, however many tests were skipped for it."""
    skipped = terminalreporter.stats.get("skipped", ())
    if skipped:
        reasons = Counter(" ".join(report.longrepr[2].removeprefix("Skipped: ").split()) for report in skipped)
        terminalreporter.section("not tested here", "=")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"SKIPPED [{count}] {reason}")
