import logging
import logging.handlers
import queue
import sys
import threading

import pytest
from cleanup_kit import run
from patience import PATIENCE

from flaskd.cleanup import ACTIONS, Fate, Step


def flush(timeout=PATIENCE):
    """Run the action and give its result."""
    action = ACTIONS["logging.flush"]
    return run(Step("it", action, action.fields(), action.default_phase, timeout))["it"]


class Slow(logging.Handler):
    """Keeps messages, but accepts none until it is released."""

    def __init__(self):
        super().__init__()
        self.messages = []
        self.may_go_on = threading.Event()
        self.flushed = False

    def emit(self, record):
        self.may_go_on.wait(PATIENCE)
        self.messages.append(record.getMessage())

    def flush(self):
        self.flushed = True


@pytest.fixture
def logger():
    """Give a logger with a function that adds handlers to it."""
    found = logging.getLogger("test_cleanup_logflush")
    found.setLevel(logging.INFO)
    found.propagate = False
    yield found
    for each in list(found.handlers):
        found.removeHandler(each)


def queued(logger, output, records=None):
    """Put a queue and its listener, started, before an output."""
    handler = logging.handlers.QueueHandler(records if records is not None else queue.SimpleQueue())
    handler.listener = logging.handlers.QueueListener(handler.queue, output)
    handler.listener.start()
    logger.addHandler(handler)
    return handler


def test_no_record_in_a_queue_is_lost(logger):
    """All records in the queue are written, later ones at once, and the output is flushed."""
    output = Slow()
    handler = queued(logger, output)
    for number in range(100):
        logger.info("record %d", number)
    assert output.messages == []
    output.may_go_on.set()
    assert flush().fate is Fate.OK
    assert output.messages == [f"record {number}" for number in range(100)]
    logger.info("late")
    assert output.messages[-1] == "late"
    assert output.flushed
    assert handler.queue.empty()


def test_a_second_time_harms_nothing(logger):
    """Neither a second flush nor the app's own stop, as in an exit callback, raises or loses a record."""
    output = Slow()
    output.may_go_on.set()
    handler = queued(logger, output)
    assert flush().fate is Fate.OK
    logger.info("between")
    assert flush().fate is Fate.OK
    handler.listener.stop()
    assert output.messages == ["between"]


def test_a_listener_that_was_never_started(logger):
    """Records in a queue without a started listener are written too."""
    output = Slow()
    output.may_go_on.set()
    handler = logging.handlers.QueueHandler(queue.SimpleQueue())
    handler.listener = logging.handlers.QueueListener(handler.queue, output)
    logger.addHandler(handler)
    logger.info("waiting")
    assert flush().fate is Fate.OK
    assert output.messages == ["waiting"]


def test_a_queue_that_is_full(logger):
    """The end marker waits for room in a full queue."""
    output = Slow()
    handler = queued(logger, output, queue.Queue(maxsize=2))
    while not handler.queue.full():
        logger.info("record")
    results = []
    thread = threading.Thread(target=lambda: results.append(flush()))
    thread.start()
    output.may_go_on.set()
    thread.join(PATIENCE)
    assert results[0].fate is Fate.OK
    assert len(output.messages) in {2, 3}
    assert handler.queue.empty()


def test_an_output_that_hangs_is_abandoned(logger):
    """If a listener's output never returns, the step is abandoned, and the stop goes on."""
    output = Slow()
    queued(logger, output)
    logger.info("stuck")
    assert flush(timeout=0.1).fate is Fate.TIMED_OUT
    output.may_go_on.set()


def test_handlers_behind_handlers_are_flushed(logger):
    """A buffering handler passes its records on, and its target is flushed."""
    output = Slow()
    output.may_go_on.set()
    logger.addHandler(logging.handlers.MemoryHandler(100, flushLevel=logging.CRITICAL, target=output))
    logger.info("buffered")
    assert output.messages == []
    assert flush().fate is Fate.OK
    assert (output.messages, output.flushed) == (["buffered"], True)


def test_one_that_raises_does_not_keep_the_others(logger):
    """A handler that cannot flush is named, and those after it are flushed."""

    class Broken(logging.Handler):
        def flush(self):
            raise OSError("no space")

    output = Slow()
    logger.addHandler(Broken())
    logger.addHandler(output)
    result = flush()
    assert (result.fate, result.why) == (Fate.FAILED, "cannot flush Broken: OSError('no space')")
    assert output.flushed


def test_a_listener_of_the_apps_own_is_stopped(logger):
    """A listener of the app's own class is stopped if it has a method stop."""
    stopped = threading.Event()

    class Listener:
        def stop(self):
            stopped.set()

    handler = logging.NullHandler()
    handler.listener = Listener()
    logger.addHandler(handler)
    assert flush().fate is Fate.OK
    assert stopped.is_set()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="logging.config makes listeners from Python 3.12 on")
def test_what_logging_config_makes(logger):
    """The listener of a queue handler made by logging.config is found."""
    from logging.config import dictConfig

    dictConfig({
        "version": 1, "disable_existing_loggers": False,
        "handlers": {
            "out": {"()": Slow},
            "queue": {"class": "logging.handlers.QueueHandler", "handlers": ["out"]},
        },
        "loggers": {logger.name: {"handlers": ["queue"]}},
    })  # fmt: skip
    (handler,) = logger.handlers
    handler.listener.start()
    (output,) = handler.listener.handlers
    output.may_go_on.set()
    logger.info("record")
    assert flush().fate is Fate.OK
    assert output.messages == ["record"]
