"""The daemon's events in each of its states, with an object that only pretends to serve."""

import itertools
import queue
import threading
import time
from types import SimpleNamespace

import pytest
from patience import PATIENCE

from flaskd.cleanup import Fate, Plan, StepResult
from flaskd.config import load_mapping
from flaskd.daemon import Daemon
from flaskd.errors import AppError, CannotCreateError, NotNowError
from flaskd.inbox import (
    DrainAsked,
    ExitBegan,
    ExitOver,
    FileChanged,
    IdleOver,
    InboxEvent,
    PulseDue,
    Raised,
    ReadingLate,
    ReloadAsked,
    ResumeAsked,
    ScaleAsked,
    StopAsked,
    Tick,
)
from flaskd.ledger import DrainReport
from flaskd.lifecycle import TABLE, Event, State, StopReason
from flaskd.readings import Reading, ReadingOver
from flaskd.serving.api import (
    CleanupOver,
    Died,
    Drained,
    Failed,
    Ready,
    Renewed,
    ServingSnapshot,
    StepBegan,
    StepEnded,
    TroubleChanged,
    WorkersStart,
)

REASON = StopReason("control", "a test")


class Drain:
    """A drain that is over when the test says so."""

    looked_at = float("inf")
    left = 1.0

    def __init__(self):
        self.report = None

    def account(self):
        return (self.report or DrainReport()).as_json()

    def look(self):
        return False


class Serving:
    """Notes the calls of its methods."""

    target, in_flight, left, step_left, policies, silent_for = "shop:app", 2, 25.0, 5.0, Plan(), 0.0
    unready = ""

    renews = False
    may_resume = True

    def __init__(self):
        self.asked = []
        self.drain = None
        self.idle = None
        self.trouble = ""

    def __getattr__(self, name):
        def note(*given, **named):
            self.asked.append(name)

        return note

    def begin_drain(self, timeout, *, announce):
        self.asked.append("begin_drain")
        self.drain = Drain()
        return self.drain

    def resume(self):
        self.asked.append("resume")
        self.drain = None
        return []

    def begin_stop(self, reason, configuration, state):
        self.asked.append("begin_stop")
        return "plan"

    def prepare(self, configuration):
        return Plan()

    def snapshot(self):
        return ServingSnapshot(idle=self.idle, trouble=self.trouble)


class Reply:
    """Keeps what it was called with."""

    def __init__(self):
        self.said = queue.SimpleQueue()

    def progress(self, fields):
        self.said.put("progress")

    def ok(self, word, fields=None, **_):
        self.said.put(word)

    def error(self, code, message, *, detail=None):
        self.said.put(f"{code}: {message}")

    @property
    def all(self):
        found = []
        while not self.said.empty():
            found.append(self.said.get())
        return found


class Living:
    """A daemon whose events the test carries out."""

    def __init__(self):
        self.may_read = threading.Event()
        self.may_read.set()
        configuration = load_mapping({"shutdown": {"idle": {"after": "1m"}}}, actions={})
        start = SimpleNamespace(breakable=False, asked=lambda: None)
        self.serving = Serving()

        def load():
            assert self.may_read.wait(PATIENCE)
            return configuration

        self.daemon = Daemon(
            load, serving=lambda _: self.serving, plane=lambda _: None, name="flaskd-test", environ={}, start=start
        )
        self.daemon.logs = SimpleNamespace(apply=lambda **_: None, reclaim=lambda: None, level="info", always={})
        self.daemon.configured(configuration)

    def on(self, *events):
        for event in events:
            self.daemon.carry_out(event)

    @property
    def state(self):
        return self.daemon.state


def lead_to(state):
    """A daemon that events have led into a state."""
    living = Living()
    if state is State.STARTING:
        return living
    living.on(Ready())
    if state is State.RELOADING:
        living.may_read.clear()
        living.on(ReloadAsked())
    elif state in {State.DRAINING, State.DRAINED}:
        living.on(DrainAsked())
        if state is State.DRAINED:
            living.serving.drain.report = DrainReport()
            living.on(Drained(living.serving.drain))
    elif state is State.STOPPING:
        living.on(StopAsked(REASON))
    assert living.state is state
    return living


STATES = [State.STARTING, State.READY, State.RELOADING, State.DRAINING, State.DRAINED, State.STOPPING]
STEP = StepResult("mark", "close", "command", Fate.OK)
EVENTS = {
    # Each event, and the life cycle's event that it causes; None: none by itself.
    "drain": (DrainAsked, Event.DRAIN),
    "resume": (ResumeAsked, Event.RESUME),
    "reload": (ReloadAsked, Event.RELOAD),
    "stop": (lambda reply: StopAsked(REASON, reply=reply), Event.STOP),
    "stop now": (lambda reply: StopAsked(REASON, now=True, reply=reply), Event.STOP),
    "stop wait": (lambda reply: StopAsked(REASON, wait=True, reply=reply), Event.STOP),
    "ready": (lambda _: Ready(), Event.STARTED),
    "not ready": (lambda _: Failed(AppError("no")), None),
    "an old drain over": (lambda _: Drained(Drain()), None),
    "died": (lambda _: Died(OSError("gone")), Event.STOP),
    "a step began": (lambda _: StepBegan(), None),
    "a step ended": (lambda _: StepEnded(STEP), None),
    "the exit began": (lambda _: ExitBegan(lambda: 1.0), None),
    "an old reading": (lambda _: ReadingOver(Reading(lambda: None, print)), None),
    "a reading late": (lambda _: ReadingLate(), None),
    "an edit": (lambda _: FileChanged("digest"), None),
    "idle, and asked meanwhile": (lambda _: IdleOver(), None),
    "an exception": (lambda _: Raised(ValueError("in a signal handler")), None),
    "SystemExit": (lambda _: Raised(SystemExit(3)), Event.STOP),
    "a pulse": (lambda _: PulseDue(), None),
    "a tick": (lambda _: Tick(), None),
}
# These events come in a stop alone.
ONLY_STOPPING = {"a step began", "a step ended", "the exit began"}


CELLS = [
    (state, name)
    for state, name in itertools.product(STATES, EVENTS)
    if state is State.STOPPING or name not in ONLY_STOPPING
]


@pytest.mark.parametrize(("state", "name"), CELLS)
def test_each_event_in_each_state(state, name, caplog):
    """Each event leads where the table says or is refused, its method does not raise, and its reply is called."""
    living, reply = lead_to(state), Reply()
    make, event = EVENTS[name]
    made = make(reply=reply) if isinstance(make, type) else make(reply)
    following = TABLE.get((state, event)) if event is not None else state
    if name == "not ready" and state is State.STARTING:
        following = State.STOPPING
    if name in {"died", "SystemExit", "stop", "stop now", "stop wait"}:
        following = State.STOPPING
    living.on(made)
    assert living.state is (following or state)
    assert "cannot carry out" not in caplog.text
    assert "cannot tell of" not in caplog.text
    said = reply.all
    if isinstance(made, DrainAsked | ResumeAsked | ReloadAsked | StopAsked):
        refused = f"not-now: cannot {event}: flaskd is {state}"
        waits = isinstance(made, ReloadAsked) and following is not None
        assert said == ([] if waits else [refused] if following is None else said)
        assert waits or said
    living.may_read.set()


def test_every_event_is_known():
    """The inbox takes only events that have a method."""
    from flaskd.daemon import _METHODS

    assert set(InboxEvent.__args__) == set(_METHODS)


def test_who_waits_for_a_drain_hears_of_its_end():
    """A drain's replies get progress first, then the account; a second request is answered at once."""
    living, first, second = lead_to(State.READY), Reply(), Reply()
    living.on(DrainAsked(wait=True, reply=first))
    living.serving.drain.report = DrainReport(completed=2)
    living.on(Drained(living.serving.drain), DrainAsked(reply=second))
    assert (first.all, second.all, living.state) == (["progress", "drained"], ["drained"], State.DRAINED)


def test_progress_is_told_once_a_second_however_often_it_drained(monkeypatch):
    """Progress is reported once a second; a tick of an earlier drain does not count."""
    now = [100.0]
    monkeypatch.setattr("flaskd.daemon.time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0))
    living, reply = lead_to(State.READY), Reply()
    for _ in range(3):
        living.on(DrainAsked(), ResumeAsked())
        now[0] += 0.25
    living.on(DrainAsked(wait=True, reply=reply))
    living.on(Tick(), Tick())
    assert reply.all == ["progress"]  # the answer
    now[0] += 1.0
    living.on(Tick(), Tick())
    assert reply.all == ["progress"]


def test_a_resume_tells_who_waits_for_the_drain():
    """A resume answers the replies that wait for the drain with an error."""
    living, waiting, asking = lead_to(State.READY), Reply(), Reply()
    living.on(DrainAsked(wait=True, reply=waiting), ResumeAsked(reply=asking))
    assert waiting.all == ["progress", "not-now: the drain was undone by resume"]
    assert (asking.all, living.state) == (["ready"], State.READY)


def test_a_drain_comes_after_a_resume_that_waits_for_workers():
    """A drain after a resume that waits for workers comes after it, and the service drains again."""
    living, resuming, draining = lead_to(State.DRAINING), Reply(), Reply()
    living.serving.may_resume = False
    living.on(ResumeAsked(reply=resuming), DrainAsked(reply=draining))
    assert (resuming.all, draining.all) == ([], [])
    living.serving.may_resume = True
    while not draining.said.qsize():
        living.on(living.daemon.inbox.take())
    assert (resuming.all, draining.all, living.state) == (["ready"], ["draining"], State.DRAINING)
    assert living.serving.asked[-2:] == ["resume", "begin_drain"]


@pytest.mark.parametrize("end", [StopAsked(REASON), Tick()], ids=["by a stop", "by an error"])
def test_a_resume_that_waits_may_be_refused(end, monkeypatch):
    """If a waiting resume is refused, the requests behind it are carried out."""
    living, resuming, draining = lead_to(State.DRAINING), Reply(), Reply()
    living.serving.may_resume = False
    living.on(ResumeAsked(reply=resuming), DrainAsked(reply=draining), end)
    living.serving.may_resume = True

    def refuse():
        raise CannotCreateError("cannot listen")

    monkeypatch.setattr(living.serving, "resume", refuse)
    while not (draining.said.qsize() and resuming.said.qsize()):
        living.on(living.daemon.inbox.take())
    assert resuming.all[0].startswith(("not-now: cannot resume", "cannot-bind: cannot listen"))
    assert draining.all[0] in {"draining", "not-now: cannot drain: flaskd is stopping"}


def test_a_stop_overtakes_a_reload():
    """A stop answers the replies of a reload with an error, and a late reading is not put into force."""
    living, reply = lead_to(State.RELOADING), Reply()
    living.on(ReloadAsked(reply=reply), StopAsked(REASON))
    assert reply.all == ["not-now: the reload was broken off by a stop"]
    living.may_read.set()
    deadline = time.monotonic() + PATIENCE
    while not isinstance(event := living.daemon.inbox.take(), ReadingOver):
        assert time.monotonic() < deadline
    living.on(event)
    assert (living.state, "apply" in living.serving.asked) == (State.STOPPING, False)


def test_a_reload_that_was_asked_for_meanwhile_reads_again():
    """If a reload is asked for during a reading, it reads again, and all replies are answered after that."""
    living, reply = lead_to(State.RELOADING), Reply()
    living.on(ReloadAsked(reply=reply))
    living.may_read.set()
    for _ in range(2):
        assert living.state is State.RELOADING
        while not isinstance(event := living.daemon.inbox.take(), ReadingOver):
            pass
        living.on(event)
    assert (living.state, reply.all, living.serving.asked.count("apply")) == (State.READY, ["reloaded"], 2)


def test_sighup_during_the_start_is_a_reload_after_it():
    """A SIGHUP during the start leads to a reload after it."""
    living = lead_to(State.STARTING)
    living.on(ReloadAsked(signalled=True))
    assert living.state is State.STARTING
    living.on(Ready())
    assert living.state is State.RELOADING


def test_an_idle_time_that_is_over_is_a_stop():
    """When no request that counts has come for the idle time, flaskd stops."""
    living = lead_to(State.READY)
    living.serving.idle = (60.0, 0.0)
    living.on(IdleOver())
    assert (living.state, living.daemon.snapshot().reason) == (State.STOPPING, "idle: no request for 1m")


def test_the_first_reason_of_a_stop_is_kept():
    """A second request to stop keeps the first reason; with `now`, it cuts the stop short."""
    living = lead_to(State.READY)
    living.on(StopAsked(REASON), StopAsked(StopReason("signal", "SIGTERM"), now=True))
    assert living.daemon.snapshot().reason == "control: a test"
    assert (living.serving.asked.count("begin_stop"), living.serving.asked.count("hurry")) == (1, 1)


@pytest.mark.parametrize("cut", [False, True])
def test_the_stop_is_over_with_its_last_step(cut):
    """After the last step the daemon handles no more events; what was cut at the exit is in the account."""
    living = lead_to(State.STOPPING)
    living.on(ExitOver(cut=True) if cut else CleanupOver())
    assert (living.state, living.daemon.stopping.main_is_lost) == (State.STOPPED, cut)
    living.daemon.turn()


@pytest.mark.parametrize("error", [LookupError, SystemExit])
def test_an_event_that_breaks_off_leaves_no_state_for_ever(error, caplog):
    """A failed event is answered; a drain that cannot begin leads to a stop, a failed reload changes nothing."""
    living, reply = lead_to(State.READY), Reply()

    def broken(*_, **__):
        raise error

    living.serving.begin_drain = broken
    living.on(DrainAsked(reply=reply))
    assert reply.all[0].startswith("failed: cannot do that: ")
    assert (living.state, living.daemon.failure is not None) == (State.STOPPING, True)
    assert "cannot carry out an event" in caplog.text


# --- a reload where there are workers ---


def renewing(reply=None):
    """A daemon whose workers are getting a new configuration; returns it and that configuration."""
    living, got = lead_to(State.READY), []
    living.serving.renews = True
    living.serving.renew = lambda configuration, **_: got.append(configuration)
    living.on(ReloadAsked(reply=reply or Reply()))
    living.on(reading_over(living))
    return living, got[0]


def reading_over(living):
    """The event at the end of a reading."""
    while not isinstance(event := living.daemon.inbox.take(), ReadingOver):
        pass
    return event


def test_what_workers_have_is_in_force_when_they_say_so():
    """A reload is answered when all workers have the configuration, not before."""
    living, configuration = renewing(reply := Reply())
    assert (living.state, reply.all, living.serving.asked.count("apply")) == (State.RELOADING, [], 0)
    living.on(Renewed(configuration, None, 2))
    assert (living.state, reply.all, living.serving.asked.count("apply")) == (State.READY, ["reloaded"], 1)


def test_workers_that_do_not_come_up_change_nothing():
    """If workers do not become ready, the old configuration stays, and the reply has the app's traceback."""
    living, configuration = renewing(reply := Reply())
    living.on(Renewed(configuration, AppError("cannot load it", "ValueError: no")))
    assert reply.all == ["app-failed: cannot load it; keeping the old configuration and workers\nValueError: no"]
    assert (living.state, living.serving.asked.count("apply")) == (State.READY, 0)


def test_where_some_workers_are_new_the_new_configuration_is_in_force():
    """If some workers are new, the new configuration is in force, and the reply says that the reload failed."""
    living, configuration = renewing(reply := Reply())
    living.on(Renewed(configuration, AppError("cannot load it"), 1))
    assert reply.all == ["app-failed: cannot load it; the new configuration is in force"]
    assert (living.state, living.daemon.configuration) == (State.READY, configuration)
    assert living.serving.asked.count("apply") == 1


@pytest.mark.parametrize(("replaced", "applied"), [(0, 0), (1, 1)])
def test_a_drain_that_ends_a_reload_half_way_keeps_what_new_workers_have(replaced, applied):
    """If a drain ends such a reload, the configuration of the new workers is in force."""
    living, configuration = renewing(reply := Reply())
    living.on(DrainAsked(), Renewed(configuration, NotNowError("a drain"), replaced))
    assert (reply.all, living.state) == (["not-now: the reload was broken off by a drain"], State.DRAINING)
    assert living.serving.asked.count("apply") == applied


def test_code_whose_reload_was_overtaken_is_brought_after_the_resume(tmp_path):
    """Code that was saved before a drain broke its reload off is loaded after the resume."""
    file = tmp_path / "shop.py"
    file.write_text("one")
    living, looked = Living(), threading.Event()

    def source_files():
        looked.set()
        return [str(file)]

    def next_reload():
        while not isinstance(event := living.daemon.inbox.take(), ReloadAsked):
            living.on(event)
        return event

    living.serving.source_files = source_files
    living.daemon.reload.follows_code = True
    living.may_read.clear()
    living.on(Ready())
    try:
        assert looked.wait(PATIENCE)
        file.write_text("other")
        living.on(next_reload())
        assert living.state is State.RELOADING
        living.on(DrainAsked(), ResumeAsked())
        assert living.state is State.READY
        living.on(next_reload())
        assert living.state is State.RELOADING
    finally:
        living.may_read.set()
        living.daemon.reload.close()


def test_what_an_earlier_reload_came_to_does_not_end_the_next():
    """The outcome of an earlier reload does not end the next one, which is still being read."""
    living, configuration = renewing()
    living.on(DrainAsked(), ResumeAsked(), ReloadAsked(reply=(reply := Reply())), Renewed(configuration, None, 2))
    assert (living.state, reply.all) == (State.RELOADING, [])


def test_who_waits_for_workers_hears_that_they_start():
    """Replies to a reload or a scale get progress every few seconds until there is an answer."""
    living, configuration = renewing(reloading := Reply())
    living.serving.scale = lambda count, told: scaled.append(told)
    scaled = []
    living.on(ScaleAsked(3, reply=(scaling := Reply())), WorkersStart(1, 0.5, 59.5))
    assert (reloading.all, scaling.all) == (["progress"], ["progress"])
    scaled[0](None)
    living.on(Renewed(configuration, None, 2), WorkersStart(1, 5.5, 54.5))
    assert (reloading.all, scaling.all) == (["reloaded"], ["scaled"])


def test_what_is_wrong_while_it_serves_is_told_at_once():
    """Trouble is reported to systemd at once, and its end, too; not during a drain or a stop."""
    living, _ = renewing()
    living.on(Renewed(living.daemon.configuration, None))
    said = []
    living.daemon.notices = living.daemon.workforce._notices = SimpleNamespace(tell=said.append)  # noqa: SLF001
    living.serving.trouble = "worker 0 grows"
    living.on(TroubleChanged())
    living.serving.trouble = ""
    living.on(TroubleChanged())
    assert [each.status for each in said] == ["ready: 0 in flight; worker 0 grows", "ready: 0 in flight"]
    living.on(DrainAsked())
    said.clear()
    living.on(TroubleChanged())
    assert said == []
