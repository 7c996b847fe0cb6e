"""What holds for all tests."""

import signal

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
