"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# The same examples everywhere, so that a fault shows where it was made; and no clock decides whether a test fails.
settings.register_profile("flaskd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flaskd")
