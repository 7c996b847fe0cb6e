"""A worker's end of the wire: what it does at each message."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pool_kit
import pytest

from flaskd.pool import messages as say
from flaskd.pool.wire import Wire
from flaskd.workers.link import Link


class Supervisor:
    """The supervisor's end; `daemon` is the part of the worker's daemon that the link uses."""

    def __init__(self) -> None:
        self.wire, theirs = Wire.pair()
        begin = say.Begin(pool_kit.configuration(), 0, 1, "flaskd", (), None, first=True)
        self.theirs = Wire(theirs)
        self.link = Link(self.theirs, begin)
        self.serving = SimpleNamespace()
        self.daemon = SimpleNamespace(serving=self.serving, configuration=begin.configuration)
        self.link.serve(self.daemon)  # type: ignore[arg-type]
        self.link.open(begin.configuration.values, ())

    def answer(self, number: int, what: str) -> say.Answer:
        """Send a question, and wait for the answer."""
        self.wire.send(say.Ask(number, what))
        answer = self.wire.receive()[0]
        assert isinstance(answer, say.Answer)
        return answer


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor()
    yield made
    made.link.close()
    made.theirs.close()
    made.wire.close()


@pytest.mark.parametrize("what", ["requests", "threads", "plan", "stop"])
@pytest.mark.parametrize("error", [LookupError, SystemExit, KeyboardInterrupt])
def test_a_question_that_breaks_is_answered(supervisor: Supervisor, what: str, error: type[BaseException]) -> None:
    """An exception of the app's objects becomes the answer, and the next question is answered."""

    def broken(*_: Any, **__: Any) -> Any:
        raise error("broken")

    name = {"stop": "describe_stop"}.get(what, what)
    setattr(supervisor.serving, name, broken)
    answer = supervisor.answer(7, what)
    assert answer.number == 7
    assert "broken" in str(answer.error)
    setattr(supervisor.serving, name, lambda *_, **__: "well")
    assert supervisor.answer(8, what) == say.Answer(8, "well")


@pytest.mark.parametrize("error", [LookupError, SystemExit])
def test_an_order_that_breaks_keeps_no_other(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    """An exception is logged, and the next message is handled."""

    def broken(_level: str) -> None:
        raise error("broken")

    supervisor.daemon.logs, supervisor.serving.requests = SimpleNamespace(set_level=broken), lambda **_: []
    supervisor.wire.send(say.LogLevel("debug"))
    assert supervisor.answer(1, "requests") == say.Answer(1, [])
    assert "cannot do what the supervisor asks for" in caplog.text


def test_an_announce_leaves_no_listener_alone(supervisor: Supervisor) -> None:
    """In a stop of the service the listeners are not shared any more, and that is set before the announce."""
    listener, events = SimpleNamespace(shared=True, kept=False), list[Any]()
    supervisor.daemon.holdings = SimpleNamespace(listeners=[listener])
    supervisor.daemon.inbox = SimpleNamespace(post=events.append)
    alone: list[bool] = []
    supervisor.serving.announce_stop = lambda: alone.append(not listener.shared)
    supervisor.serving.requests = lambda **_: []
    supervisor.wire.send(say.Announce())
    assert supervisor.answer(1, "requests") == say.Answer(1, [])
    assert alone == []  # which the thread of the events does
    for each in events:
        each.run()
    assert alone == [True]
