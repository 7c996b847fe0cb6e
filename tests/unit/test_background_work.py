import os
import threading
import time

import pytest
from patience import PATIENCE

import flaskd
from flaskd.background_work import background_work, in_background
from flaskd.ledger import DrainReport
from flaskd.server import WaitressThread


def app(_environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


@pytest.fixture
def worker():
    """Give a function that starts a thread with a function, and waits for its end afterwards."""
    threads = []

    def start(function):
        threads.append(threading.Thread(target=function, name="exporter"))
        threads[-1].start()
        return threads[-1]

    yield start
    for each in threads:
        each.join(PATIENCE)
        assert not each.is_alive()
    assert not in_background()


@pytest.fixture
def export(worker):
    """Work in the background of another thread: `begun` says that it runs; `set` lets it end."""
    begun, may_end = threading.Event(), threading.Event()

    def work():
        with flaskd.background("export"):
            begun.set()
            may_end.wait(PATIENCE)

    worker(work)
    assert begun.wait(PATIENCE)
    yield may_end
    may_end.set()


def test_what_is_marked_is_shown(export):
    """Running work is shown with name, age and thread, and with its stack if asked for."""
    (found,) = background_work(stacks=True)
    assert (found.name, found.thread) == ("export", "exporter")
    assert 0 <= found.age < PATIENCE
    assert "may_end.wait" in found.stack
    assert background_work()[0].as_json().keys() == {"name", "age", "thread"}
    export.set()


def test_a_name_stays_on_its_line():
    """A name that a client chose cannot forge a line of a log or an answer, or control a terminal."""
    with flaskd.background("export \x1b[31m\nOK ready é"):
        (found,) = background_work()
    assert found.name == "export ?[31m?OK ready é"


def test_a_decorated_function_is_marked_while_it_runs():
    """Each call, nested ones included, is work of its own; its result or exception is passed on."""

    @flaskd.background("job")
    def job(depth):
        if depth == 0:
            raise ValueError(len(background_work()))
        return job(depth - 1)

    with pytest.raises(ValueError, match="3"):
        job(2)
    assert job.__name__ == "job"
    assert not in_background()


def test_one_mark_can_be_used_again_and_within_itself():
    """One mark object may be entered several times, also nested; each entry counts."""
    mark = flaskd.background("again")
    for _ in range(2):
        with mark, mark:
            assert len(background_work()) == 2
        assert not in_background()


def test_threads_share_a_mark(worker):
    """If threads share a mark, each removes its own entry, whichever ends first."""
    mark, begun, may_end = flaskd.background("shared"), threading.Event(), threading.Event()

    def work():
        with mark:
            begun.set()
            may_end.wait(PATIENCE)

    with mark:
        thread = worker(work)
        assert begun.wait(PATIENCE)
        here = threading.current_thread().name
        assert [each.thread for each in background_work()] == [here, "exporter"]
    assert [each.thread for each in background_work()] == ["exporter"]
    may_end.set()
    thread.join(PATIENCE)
    assert not in_background()


def test_what_is_not_done_when_it_returns_is_refused():
    """A coroutine or generator function cannot be decorated, because its mark would end before its work begins."""

    async def later():
        pass

    def lazily():
        yield

    for each in (later, lazily):
        with pytest.raises(TypeError, match=f'cannot mark ".*{each.__name__}" as background work'):
            flaskd.background("job")(each)


@pytest.mark.parametrize("server", ["waitress", "werkzeug"])
def test_a_drain_waits_for_it(export, server):
    """Without requests a drain is over, and clean, at the moment when the work ends."""
    with flaskd.ServerThread(app, server=server) as serving:
        reports = []
        draining = threading.Thread(target=lambda: reports.append(serving.drain(PATIENCE)))
        draining.start()
        draining.join(0.2)  # without the work it would be over by now
        assert draining.is_alive()
        before = time.monotonic()
        export.set()
        draining.join(PATIENCE)
        assert time.monotonic() - before < 0.5
    assert (reports[0].background, reports[0].clean) == ((), True)


@pytest.mark.parametrize("server", ["waitress", "werkzeug"])
def test_the_deadline_leaves_it_behind(export, caplog, server):
    """Work that still runs at the deadline is in the report and, with its stack, in the log; the drain is not clean."""
    with flaskd.ServerThread(app, server=server) as serving:
        report = serving.drain(0.1)
        (left,) = report.background
        assert (left.name, report.clean) == ("export", False)
        assert "background=1" in str(report)
        assert report.as_json()["background"][0]["thread"] == "exporter"
    (record,) = [each for each in caplog.records if "in the background there is still" in each.getMessage()]
    assert "export (for 0." in record.getMessage()
    assert "may_end.wait" in record.getMessage()
    export.set()


def test_resume_forgets_the_wait(export):
    """A drain that is undone stops waiting, and the next one waits again."""
    with WaitressThread(app) as server:
        server.begin_drain(PATIENCE, lambda _report: None)
        assert server.turns(PATIENCE)
        server.resume()
        export.set()
        assert server.drain(PATIENCE).clean


def test_a_report_without_it_is_as_ever():
    """Without background work the report does not mention any."""
    assert str(DrainReport()) == "completed=0 rejected=0 cut=0 took=0s"
    assert "background" not in DrainReport().as_json()


@pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning"
)  # from 3.12 on: forking with threads is what is tested
def test_a_forked_child_has_none_of_it(export):
    """A forked child has no background work, because it does not have the threads."""
    child = os.fork()
    if child == 0:
        os._exit(1 if in_background() else 0)
    export.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
