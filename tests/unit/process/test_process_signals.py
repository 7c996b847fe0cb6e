"""Counting signals."""

import pytest

from flaskd.process.signals import Escalation


@pytest.mark.parametrize(
    ("moments", "counted"),
    [
        ([0.0, 0.12], 1),  # a PID 1 that is slow to pass a Ctrl-C on
        ([0.0, 0.05, 0.1, 0.249], 1),
        ([0.0, 0.26], 2),
        ([0.0, 0.2, 0.4, 0.6, 0.7], 3),
    ],
)
def test_signals_close_together_are_one(moments, counted):
    """What comes less than 250 ms after the last one that counted does not count."""
    escalation = Escalation()
    for each in moments:
        escalation.another(100.0 + each)
    assert escalation.count == counted
