"""The main thread while another thread does the work."""

import contextlib
import signal
import threading

import pytest
from patience import PATIENCE

from flaskd.process import main_thread
from flaskd.process.main_thread import MainThread


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Waits are short, and signal handlers are restored after the test."""
    monkeypatch.setattr(main_thread, "_TURN", 0.01)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def handled(number, handler):
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_the_exit_code_is_that_of_the_work():
    """The work runs in another thread, and its exit code is returned."""
    threads = []
    main = MainThread(lambda: threads.append(threading.current_thread()) or 7, print, lambda: None)
    main.begin()
    assert main.wait() == 7
    assert threads != [threading.main_thread()]


def test_what_ends_the_work_is_raised():
    """An exception of the work is raised in the main thread."""

    def work():
        raise LookupError

    main = MainThread(work, print, lambda: None)
    main.begin()
    with pytest.raises(LookupError):
        main.wait()


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_a_signal_handler_raises_is_told_and_ends_nothing(error):
    """Exceptions of signal handlers are reported, and the work goes on to its end."""
    raised, heard, waits = [], threading.Event(), threading.Event()

    def handler(_number, _frame):
        raise error

    def work():
        assert waits.wait(PATIENCE)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        assert heard.wait(PATIENCE)
        return 0

    def tell(what):
        raised.append(what)
        heard.set()

    main = MainThread(work, tell, waits.set)
    with handled(signal.SIGUSR1, handler):
        main.begin()
        assert main.wait() == 0
    assert [type(each) for each in raised] == [error]


def test_handlers_rest_from_the_end_on():
    """After the end no handler of the app runs, until the handlers are put back."""
    called = []

    def handler(number, _frame):
        called.append(number)

    with handled(signal.SIGUSR1, handler):
        main = MainThread(lambda: 0, print, lambda: None)
        main.begin()
        main.wait()
        signal.raise_signal(signal.SIGUSR1)
        assert called == []
        main.put_handlers_back()
        signal.raise_signal(signal.SIGUSR1)
        assert called == [signal.SIGUSR1]


def test_it_looks_and_calls_in_the_main_thread():
    """`look` and requested calls run in the main thread."""
    looked, called = threading.Event(), []

    def work():
        assert looked.wait(PATIENCE)
        main.call(lambda: called.append(threading.current_thread()))
        return 0

    main = MainThread(work, print, looked.set)
    main.begin()
    main.wait()
    assert called == [threading.main_thread()]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_before_its_first_line_is_stood_in_for():
    """If the thread dies before its first line, as by a profile function, the main thread does the work."""

    def raising(*_):
        raise SystemExit

    before = threading.getprofile()
    threading.setprofile(raising)
    try:
        main = MainThread(lambda: 3, print, lambda: None)
        main.begin()
        assert main.wait() == 3
    finally:
        threading.setprofile(before)


def test_an_end_whose_word_is_lost_is_seen(monkeypatch):
    """The end is noticed even if a handler's exception lost the message about it."""

    class Storm:
        def __init__(self):
            self.calls = []

        def put(self, call):
            self.calls.append(call)

        def empty(self):
            return not self.calls

        def get(self, **_):
            if self.calls:
                self.calls.pop()
            raise ValueError("tick")

    monkeypatch.setattr(main_thread.queue, "SimpleQueue", Storm)
    raised = []
    main = MainThread(lambda: 7, raised.append, lambda: None)
    main.begin()
    assert main.wait() == 7
    assert {type(each) for each in raised} <= {ValueError}
