"""What holds for all tests."""

import signal
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite(
    "cleanup_kit", "daemon_kit", "http_client", "patience", "podman_kit", "server_kit", "services", "systemd_kit"
)

# The same examples everywhere, so that a fault shows where it was made; and no clock decides whether a test fails.
settings.register_profile("flaskd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flaskd")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell does it for what it starts in the background (POSIX, 2.12); what the tests start is to hear Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signal_handlers_stay():
    """A handler that one test leaves behind is another one's fault."""
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
