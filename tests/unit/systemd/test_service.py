"""The watchdog's pulse and requests for more time, with a manager that only listens."""

import os
import threading
from types import SimpleNamespace

import pytest
from fake_notify import receiving
from patience import until

from flaskd.cleanup import Plan
from flaskd.config import CleanupConfig, DrainConfig, ShutdownConfig
from flaskd.lifecycle import State, StopReason
from flaskd.notices import StatusChanged, WorkersStart
from flaskd.serving.stop import Stop
from flaskd.sockets import Address, Listener
from flaskd.systemd.notify import Notifier
from flaskd.systemd.service import Service

PERIOD = 0.02


class Server:
    """A server that answers as the test sets it."""

    def __init__(self):
        self.well = True
        self.at = None
        self.asked = threading.Semaphore(0)
        self.gates_closed = False

    def turns(self, timeout):
        self.asked.release()
        return self.well

    def answers(self, timeout):
        self.asked.release()
        return self.well

    def all_are_at(self):
        return self.at

    def moved(self):
        return self.at

    def close_gates(self):
        self.gates_closed = True

    def wait_until_asked(self, times=3):
        for _ in range(times):
            assert self.asked.acquire(timeout=10)


@pytest.fixture
def manager(tmp_path):
    with receiving(tmp_path / "notify") as receiver:
        yield receiver


@pytest.fixture
def make(manager):
    """Makes services whose main thread is this test; at the end none of their threads is left."""
    threads = set(threading.enumerate())
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})

    def make(due=lambda service: service.pulse(), **environ):
        environ.setdefault("WATCHDOG_USEC", str(int(PERIOD * 2_000_000)))
        service = Service(notifier, environ, lambda: due(service))
        attended = service.attended()
        attended.__enter__()
        made.append(attended)
        return service

    made = []
    yield make
    for each in made:
        each.__exit__(None, None, None)
    notifier.close()
    for each in set(threading.enumerate()) - threads:
        each.join(10)
        assert not each.is_alive()


def pulses(manager):
    return [each for each in manager.messages() if each == b"WATCHDOG=1"]


def test_the_pulse_is_given_while_the_server_answers(make, manager):
    """WATCHDOG=1 is sent regularly while the loop answers, and not when it does not."""
    service, server = make(), Server()
    service.ready("ready", server, lambda: State.READY)
    assert manager.message() == b"READY=1\nSTATUS=ready"
    for _ in range(3):
        assert manager.message() == b"WATCHDOG=1"
    server.well = False
    server.wait_until_asked(6)
    manager.messages()
    server.wait_until_asked()
    assert pulses(manager) == []
    server.well = True
    assert manager.message() == b"WATCHDOG=1"


def test_a_pulse_that_failed_is_tried_again_in_time(make, manager, caplog):
    """If the loop was busy for a moment, a second try comes before WATCHDOG_USEC is over."""
    service, now, tries = make(WATCHDOG_USEC="2000000"), 0.0, []

    class Busy(Server):
        def answers(self, timeout):
            nonlocal now
            now += 0 if tries else timeout
            tries.append(now)
            return len(tries) == 2

    def ended(seconds):
        nonlocal now
        now += seconds
        return len(tries) == 2

    service.watch(Busy(), lambda: State.READY, ended)
    assert len(tries) == 2
    assert tries[-1] < 2.0  # since the last pulse
    assert pulses(manager) == [b"WATCHDOG=1"]
    assert [each.levelname for each in caplog.records] == ["ERROR", "WARNING"]


def test_the_main_thread_gives_it(make, manager, caplog):
    """If the main thread does not run, the pulse stops and that is logged once; it goes on when it runs again."""
    posts, server = [], Server()
    service = make(posts.append)
    service.ready("ready", server, lambda: State.READY)
    manager.messages()
    until(lambda: caplog.records)
    assert pulses(manager) == []
    (asked,) = posts
    asked.pulse()
    assert pulses(manager) == [b"WATCHDOG=1"]
    until(lambda: len(posts) > 1)
    assert [each.getMessage().partition(",")[0].partition(":")[0] for each in caplog.records[:2]] == [
        "the thread of the events does not respond", "all is well again",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "environ",
    [{"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "18446744073709551615"}, {"WATCHDOG_PID": "1"}],
)
def test_no_pulse_unless_it_is_wanted_of_us(make, manager, environ):
    """Without a valid WATCHDOG_USEC, or with another WATCHDOG_PID, there is no pulse (sd_watchdog_enabled(3))."""
    service = make(**environ)
    service.ready("ready", Server(), lambda: State.READY)
    assert manager.messages() == [b"READY=1\nSTATUS=ready"]
    assert not any(each.name == "flaskd-watchdog" for each in threading.enumerate())


def test_our_own_pid_is_ours(make, manager):
    """With this process' pid in WATCHDOG_PID there is a pulse."""
    make(WATCHDOG_PID=str(os.getpid())).ready("ready", Server(), lambda: State.READY)
    assert manager.message() == b"READY=1\nSTATUS=ready"
    assert manager.message() == b"WATCHDOG=1"


def test_hanging_threads_stop_the_pulse_only_when_that_is_wanted(make, manager, caplog):
    """The same work in all threads for `stuck_after` stops the pulse; progress, a free thread or a drain restarts it."""
    service, server, state = make(), Server(), [State.READY]
    server.at = "the same"
    service.ready("ready", server, lambda: state[0])
    for _ in range(3):
        manager.message()
    service.stuck_after = 2 * PERIOD
    assert any("all threads have hung" in each.getMessage() for each in until(lambda: caplog.records))
    server.wait_until_asked(2)
    manager.messages()
    server.wait_until_asked()
    assert pulses(manager) == []
    state[0] = State.DRAINED
    assert manager.message() == b"WATCHDOG=1"
    state[0] = State.READY
    server.at = None
    server.wait_until_asked()
    manager.messages()
    assert manager.message() == b"WATCHDOG=1"


def test_a_start_at_work_gets_more_time(make, manager, monkeypatch):
    """EXTEND_TIMEOUT_USEC is sent while the main thread uses the CPU, not while it sleeps or after the start."""
    monkeypatch.setattr("flaskd.systemd.service._LOOK", 0.05)
    service = make()
    service.starting()
    assert manager.message() == b"STATUS=starting"
    while not (messages := manager.messages()):
        pass
    assert messages[0] == b"EXTEND_TIMEOUT_USEC=5000000"
    asleep = threading.Event()
    asleep.wait(0.2)
    manager.messages()
    asleep.wait(0.2)  # only time shows that nothing is sent
    assert len(manager.messages()) <= 1
    service.probing(2.0)
    assert manager.messages() == [b"EXTEND_TIMEOUT_USEC=3000000"]
    until(lambda: not any(each.name == "flaskd-starting" for each in threading.enumerate()))
    assert manager.messages() == []


@pytest.mark.parametrize(
    ("takes", "left", "usec"), [(0, 25, 5_000_000), (8, 25, 9_000_000), (8, 3, 3_000_000), (8, 0, 0)]
)
def test_a_step_gets_what_it_may_take(make, manager, takes, left, usec):
    """A step asks for slightly more than flaskd gives it, and never past the deadline."""
    service = make()
    service.step(takes, left)
    assert manager.messages() == ([f"EXTEND_TIMEOUT_USEC={usec}".encode()] if usec else [])


@pytest.mark.parametrize(
    ("deadline", "reserve", "ends"), [(25, 3, (24.5, 2.5)), (25, 0, (24.5, 0)), (1, 0.5, (0.9, 0.4))]
)
def test_the_steps_of_a_stop_end_before_what_the_manager_was_told(monkeypatch, deadline, reserve, ends):
    """If the last step hangs, there is still time for the record and the exit, from the reserve if there is one."""
    given = {}

    def runner(_plan, **those):
        given.update(those)
        return SimpleNamespace(kept=those["reserve"])

    monkeypatch.setattr("flaskd.serving.stop.Runner", runner)
    shutdown = ShutdownConfig(deadline=deadline, reserve=reserve, drain=DrainConfig(timeout=deadline))
    monkeypatch.setattr("flaskd.serving.stop.time.monotonic", lambda: 0.0)
    stop = Stop(
        StopReason("signal", "SIGTERM"),
        plan=Plan(),
        app=None,
        shutdown=shutdown,
        cleanup=CleanupConfig(),
        begin_drain=lambda: None,
    )
    assert (given["deadline"], given["reserve"]) == pytest.approx((ends[0], ends[1]))
    assert stop.drain_time <= ends[0] - ends[1]


@pytest.mark.parametrize(("left", "usec"), [(25.0, 5_000_000), (3.0, 3_000_000)])
def test_a_stop_gets_time_for_what_moves(make, manager, left, usec):
    """When a request has moved, a stop asks for time up to its deadline; else not, and not outside of a stop."""
    service, server = make(), Server()
    service.stopping("stopping", left, StopReason("signal", "SIGTERM"), [], server)
    service.progress("the same", server, left)
    server.at = "a byte more"
    service.progress("going on", server, left)
    service.progress("the same", server, left)
    server.at = "two bytes more"
    service.progress("only draining", server, None)
    service.progress("the same", server, left)
    assert manager.messages() == [
        f"STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC={usec}".encode(),
        b"STATUS=the same",
        b"STATUS=going on",
        f"EXTEND_TIMEOUT_USEC={usec}".encode(),
        b"STATUS=the same",
        b"STATUS=only draining",
        b"STATUS=the same",
    ]


def test_what_a_manager_that_was_behind_has_missed_is_asked_again(make, manager):
    """A request for time that failed because the manager's socket was full is repeated when there is room."""
    service, server = make(), Server()
    flood = Notifier({"NOTIFY_SOCKET": manager.address})
    while flood.extend(1):
        pass
    flood.close()
    service.step(60, 90)
    assert b"EXTEND_TIMEOUT_USEC=1000000" in set(manager.messages())
    service.progress("the same", server, 90)
    status, asked = manager.messages()
    assert status == b"STATUS=the same"
    assert 50_000_000 < int(asked.removeprefix(b"EXTEND_TIMEOUT_USEC=")) <= 61_000_000
    service.progress("the same", server, 90)
    assert manager.messages() == [b"STATUS=the same"]


@pytest.mark.parametrize(
    ("reason", "kept", "last_batch"),
    [
        (StopReason("signal", "SIGTERM"), True, True),
        (StopReason("failure", "the serving thread died"), True, False),
        (StopReason("reload", "generation 2"), True, False),
        (StopReason("recycle", "restart"), True, False),
        (StopReason("signal", "SIGINT"), False, False),
        (StopReason("control", "uid=0"), False, False),
        (StopReason("endpoint", "/shutdown"), False, False),
        (StopReason("idle", "30m"), False, False),
    ],
)
def test_the_reason_of_a_stop_says_what_becomes_of_stored_listeners(make, manager, reason, kept, last_batch):
    """After SIGTERM or a failure stored listeners are kept for a successor; after flaskd's own stop they are removed."""
    service, server, listener = make(), Server(), Listener.bind(Address.parse("127.0.0.1:0"))
    service.store.keep([("127.0.0.1:0", listener)])
    service.stopping("stopping", 1.0, reason, [listener], server)
    removed = b"FDSTOREREMOVE=1\nFDNAME=listen-127.0.0.1%3A0" in manager.messages()
    assert (removed, server.gates_closed) == (not kept, not kept)
    assert (bool(listener.stored), listener.shared, listener.last_batch) == (kept, kept, last_batch)
    listener.close()


def test_children_do_not_inherit_what_is_ours(make, monkeypatch):
    """The manager's variables are read, and removed from the environment of children."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, "1")
    make()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()


@pytest.mark.parametrize(
    ("state", "extended"),
    [(State.STARTING, True), (State.RELOADING, True), (State.READY, False), (State.DRAINED, False)],
)
def test_workers_that_start_have_the_manager_wait(manager, make, state, extended):
    """More time is asked for while a start or reload waits for workers, but not if the manager does not wait."""
    make().heard(WorkersStart(state))
    assert [each.startswith(b"EXTEND_TIMEOUT_USEC=") for each in manager.messages()] == [True] * extended


def test_what_is_wrong_while_it_serves_is_its_status(manager, make):
    """A trouble while flaskd serves is shown as its status; the state does not change."""
    make().heard(StatusChanged("ready: 0 in flight; worker 0 reached pool.max_age"))
    assert manager.messages() == [b"STATUS=ready: 0 in flight; worker 0 reached pool.max_age"]
