"""Counting signals, and sending one to the process itself."""

import signal
import threading

import pytest

from flaskd.process.signals import Escalation, interrupt


@pytest.mark.parametrize(
    ("moments", "counted"),
    [
        ([0.0, 0.12], 1),  # a PID 1 that passes a Ctrl-C on slowly
        ([0.0, 0.05, 0.1, 0.249], 1),
        ([0.0, 0.26], 2),
        ([0.0, 0.2, 0.4, 0.6, 0.7], 3),
    ],
)
def test_signals_close_together_are_one(moments, counted):
    """A signal less than 250 ms after the last one that counted does not count."""
    escalation = Escalation()
    for each in moments:
        escalation.another(100.0 + each)
    assert escalation.count == counted


@pytest.mark.parametrize(
    ("handler", "number"), [(signal.default_int_handler, signal.SIGINT), (signal.SIG_IGN, signal.SIGTERM)]
)
def test_the_process_is_ended_whatever_it_ignores(monkeypatch, handler, number):
    """`interrupt` sends SIGINT, or SIGTERM if SIGINT is ignored, as in the background of a shell."""
    sent = []
    monkeypatch.setattr(signal, "getsignal", lambda _: handler)
    monkeypatch.setattr(signal, "pthread_kill", lambda thread, number: sent.append((thread, number)))
    interrupt()
    assert sent == [(threading.main_thread().ident, number)]
