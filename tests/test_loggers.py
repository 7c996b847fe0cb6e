"""Loggers that never raise, whatever an app puts into logging."""

import logging

import pytest

from flaskd import loggers
from flaskd.loggers import UnfailingLogger


class Kept(logging.Handler):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


class Raising(logging.Handler):
    """Raises what it was made with."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def handle(self, record):
        raise self.error


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(loggers, "_told", set())
    factory = logging.getLogRecordFactory()
    logger = UnfailingLogger("flaskd.tried")
    yield logger
    logging.setLogRecordFactory(factory)


@pytest.fixture(params=[ValueError, SystemExit, KeyboardInterrupt])
def error(request):
    return request.param()


def raising(error):
    def function(*_args, **_kwargs):
        raise error

    return function


def test_a_record_factory_that_raises_costs_no_line(log, error):
    """The line is written as Python would by itself, with its extra fields, and the factory's fault is told once."""
    log.addHandler(kept := Kept())
    logging.setLogRecordFactory(raising(error))
    for number in range(2):
        log.warning("line %d", number, extra={"fields": {"a": 1}})
    fault = f"the log record factory raised {type(error).__name__}; flaskd's lines go on without it"
    assert kept.said == [fault, "line 0", "line 1"]


def test_a_record_factory_that_makes_no_record_costs_no_line(log):
    """What is no LogRecord is not used."""
    log.addHandler(kept := Kept())
    logging.setLogRecordFactory(lambda *_args, **_kwargs: None)
    log.warning("line")
    assert kept.said[-1] == "line"
    assert "gave NoneType where a LogRecord was expected" in kept.said[0]


def test_a_filter_that_raises_lets_the_line_pass(log, error):
    """A filter's fault is told once, and costs no line."""
    log.addHandler(kept := Kept())
    log.addFilter(raising(error))
    log.warning("one")
    log.warning("two")
    assert [each for each in kept.said if len(each) == 3] == ["one", "two"]
    assert len(kept.said) == 3


def test_a_handler_that_raises_keeps_the_line_from_no_other(log, error):
    """The handlers beside it and above it get each line once."""
    before, after, above = Kept(), Kept(), Kept()
    log.parent = UnfailingLogger("above")
    log.parent.addHandler(above)
    for each in (before, Raising(error), after):
        log.addHandler(each)
    log.warning("line")
    assert [each.said.count("line") for each in (before, after, above)] == [1, 1, 1]


def test_flaskd_s_loggers_are_adopted_and_no_others():
    """Those below flaskd and waitress are made unfailing ones, whatever made them."""
    ours, other = logging.getLogger("flaskd.adopted"), logging.getLogger("flaskdish")
    loggers.adopt()
    assert type(ours) is UnfailingLogger
    assert type(other) is logging.Logger
