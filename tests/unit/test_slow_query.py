"""Questions that take a while, each kind in a thread of its own."""

import queue
import threading

import pytest
from patience import PATIENCE

from flaskd.errors import ConfigError, FlaskdError
from flaskd.slow_query import SlowQuery


class Reply:
    """Keeps what it is told."""

    def __init__(self):
        self._told = queue.SimpleQueue()

    def ok(self, word):
        self._told.put(word)

    def error(self, code, message, *, detail=None):
        self._told.put(f"{code}: {message}")

    @property
    def told(self):
        return self._told.get(timeout=PATIENCE)

    @property
    def quiet(self):
        return self._told.empty()


class Slow:
    """Finds a number each time the test allows it."""

    def __init__(self):
        self.count = 0
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self):
        self.count += 1
        count = self.count
        self.entered.release()
        assert self.gate.acquire(timeout=PATIENCE)
        return count


def tell(reply, found):
    reply.ok(found)


def test_an_answer_is_never_older_than_its_question():
    """Clients that ask while an answer is being found share the next answer; asking never waits."""
    slow = Slow()
    inquiry = SlowQuery("look", slow)
    first, *others = [Reply() for _ in range(4)]
    inquiry.ask(first, tell)
    assert slow.entered.acquire(timeout=PATIENCE)
    for reply in others:
        inquiry.ask(reply, tell)
    slow.gate.release()
    assert first.told == 1
    assert slow.entered.acquire(timeout=PATIENCE)
    assert all(reply.quiet for reply in others)
    slow.gate.release()
    assert [reply.told for reply in others] == [2] * 3


def test_its_thread_ends_when_nobody_asks():
    """Each kind of question has at most one thread, which ends, and is started again when needed."""
    found = []
    inquiry = SlowQuery("look", lambda: found.append(threading.current_thread()))
    for _ in range(3):
        reply = Reply()
        inquiry.ask(reply, tell)
        assert reply.told is None
        found[-1].join(PATIENCE)
        assert not found[-1].is_alive()
    assert {thread.name for thread in found} == {"flaskd-asked-look"}


def test_an_answer_that_cannot_be_told_is_a_fault():
    """If telling one client raises, it is not told twice, the others get an error, and the next question works."""

    def refuse(_reply, _found):
        raise ValueError("circular")

    slow = Slow()
    inquiry = SlowQuery("look", slow)
    busy, first, second = Reply(), Reply(), Reply()
    inquiry.ask(busy, tell)
    assert slow.entered.acquire(timeout=PATIENCE)
    inquiry.ask(first, tell)
    inquiry.ask(second, refuse)
    slow.gate.release()
    slow.gate.release()
    assert (busy.told, first.told) == (1, 2)
    assert second.told == "failed: cannot look: ValueError('circular'); the log says more"
    inquiry.ask(busy, tell)
    slow.gate.release()
    assert busy.told == 3
    assert first.quiet


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("expected a number"), "config-invalid: expected a number"),
        (RuntimeError("odd"), "failed: cannot look: RuntimeError('odd'); the log says more"),
    ],
)
def test_a_fault_is_told_to_all_who_ask(error, told):
    """If finding raises, all clients get the error, and the next question works."""

    def find():
        raise error

    inquiry = SlowQuery("look", find)
    for _ in range(2):
        reply = Reply()
        inquiry.ask(reply, tell)
        assert reply.told == told


def test_who_has_waited_too_long_is_told_so_once(monkeypatch):
    """If an answer does not come, all waiting clients get an error once; later ones get the next answer."""
    monkeypatch.setattr("flaskd.slow_query.LIMIT", 0.0)
    slow = Slow()
    inquiry = SlowQuery("look", slow)
    first, second, third = Reply(), Reply(), Reply()
    inquiry.ask(first, tell)
    assert slow.entered.acquire(timeout=PATIENCE)
    inquiry.ask(second, tell)
    inquiry.look()
    assert [first.told, second.told] == ["failed: cannot look: no answer was found within 0s"] * 2
    monkeypatch.setattr("flaskd.slow_query.LIMIT", PATIENCE)
    inquiry.ask(third, tell)
    inquiry.look()
    slow.gate.release()
    slow.gate.release()
    assert third.told == 2
    assert first.quiet
    assert second.quiet


def test_without_a_thread_the_question_is_refused(monkeypatch):
    """Without a thread the client gets an error; the next question starts one."""

    def no_thread(_self):
        raise RuntimeError("can't start new thread")

    inquiry = SlowQuery("look", lambda: 1)
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(FlaskdError, match="cannot look: no thread can be had; raise TasksMax="):
            inquiry.ask(Reply(), tell)
    reply = Reply()
    inquiry.ask(reply, tell)
    assert reply.told == 1
