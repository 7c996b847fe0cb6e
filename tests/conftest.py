"""What holds for all tests."""

import signal

from hypothesis import HealthCheck, settings

# The same examples everywhere, so that a fault shows where it was made; and no clock decides whether a test fails.
settings.register_profile("flaskd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flaskd")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell does it for what it starts in the background (POSIX, 2.12); what the tests start is to hear Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
