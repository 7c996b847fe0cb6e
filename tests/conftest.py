"""Fixtures and settings for all tests."""

import signal
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

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT for background processes (POSIX, 2.12), but processes of the tests must get Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signal_handlers_stay():
    """A signal handler that a test leaves behind fails that test."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def pytest_terminal_summary(terminalreporter):
    """Say what was not tested, and why: a line for each reason, however many tests were skipped for it."""
    skipped = terminalreporter.stats.get("skipped", ())
    if skipped:
        reasons = Counter(" ".join(report.longrepr[2].removeprefix("Skipped: ").split()) for report in skipped)
        terminalreporter.section("not tested here", "=")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"SKIPPED [{count}] {reason}")
