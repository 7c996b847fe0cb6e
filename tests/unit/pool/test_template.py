"""Templates in the supervisor; the test sends the messages of their processes."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE, until
from pool_kit import configuration

from flaskd.errors import AppError, CannotCreateError, FlaskdError
from flaskd.pool import messages as say
from flaskd.pool import template as module
from flaskd.pool.spawn import reap
from flaskd.pool.template import Template, Templates
from flaskd.pool.wire import Wire

PRELOAD = configuration(pool={"preload": True})
ORDER = say.Preload(PRELOAD, 1, [])
FREE = say.Preloaded("serving shop:app", "")


def sleeper() -> int:
    """A process that does nothing."""
    return os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})


class Process:
    """A template's process: the other end of its wire, and a process that can be killed."""

    def __init__(self) -> None:
        self.wires: list[Wire] = []
        self.pid = 0

    @property
    def wire(self) -> Wire:
        """The wire of the last one."""
        return self.wires[-1]

    def spawn(self, _slot: Any, _generation: int, descriptors: list[int], _environ: Any) -> tuple[int, int]:
        self.wires.append(Wire(socket.socket(fileno=os.dup(descriptors[0]))))
        self.pid = sleeper()
        self.wire.greet()
        return self.pid, os.pidfd_open(self.pid)

    def loads(self, answer: object = FREE) -> None:
        """Report that the app was imported, or the error."""
        assert self.wire.receive()[0] == ORDER
        self.wire.send(answer)

    def forks(self, answer: say.Forked) -> list[int]:
        """Answer an order to fork; returns the descriptors that came with it."""
        order, descriptors = self.wire.receive()
        assert order == say.Fork(3)
        self.wire.send(answer)
        return descriptors

    def dies(self) -> None:
        """Kill the process."""
        os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    made = Process()
    monkeypatch.setattr(module, "spawn", made.spawn)
    yield made
    for each in made.wires:
        each.close()


@pytest.fixture(autouse=True)
def _adopts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process does not adopt orphans, which could not be undone, and other tests have orphans."""
    monkeypatch.setattr(module.orphans, "adopt", lambda: True)


@pytest.fixture
def template(process: Process) -> Iterator[Template]:
    made = Template(1)
    made.start({}, ORDER)
    yield made
    made.kill("the test is over")
    until(lambda: made.code is not None)


@pytest.mark.parametrize("lacks", ["process", "thread"])
def test_one_that_cannot_be_started_leaves_nothing(
    process: Process, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed start leaves no process and no descriptor; the next worker tries again."""

    def fails(*_: Any) -> None:
        raise OSError("there is no memory") if lacks == "process" else RuntimeError("can't start new thread")

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(*((module, "spawn") if lacks == "process" else (threading.Thread, "start")), fails)
        templates = Templates(Later())
        with pytest.raises(CannotCreateError, match="cannot start a template"):
            templates.of(1, PRELOAD, {}, [])
    for each in process.wires:
        each.close()
    assert os.listdir("/proc/self/fd") == before
    assert templates.shown() == []
    if process.pid:
        assert not Path(f"/proc/{process.pid}").exists()


class Forking(threading.Thread):
    """A worker's thread that waits for its process."""

    def __init__(self, template: Template, descriptors: list[int] | None = None) -> None:
        super().__init__(daemon=True)
        self.template, self.descriptors = template, descriptors or []
        self.wanted = True
        self.made: tuple[int, int] | None = None
        self.error: FlaskdError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.made = self.template.fork(3, self.descriptors, wanted=lambda: self.wanted)
        except FlaskdError as error:
            self.error = error

    def over(self) -> Forking:
        self.join(PATIENCE)
        assert not self.is_alive()
        return self


def test_a_worker_waits_for_the_import(process: Process, template: Template) -> None:
    """A worker's process is forked when the app is imported, with the worker's descriptors."""
    with Path(os.devnull).open("rb") as file:
        forking = Forking(template, [file.fileno()])
        process.loads()
        pid = sleeper()
        [given] = process.forks(say.Forked(pid))
        assert os.fstat(given).st_rdev == os.fstat(file.fileno()).st_rdev
        os.close(given)
    assert forking.over().made is not None
    made, pidfd = forking.made or (0, 0)
    assert made == pid
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert reap(pidfd) == -signal.SIGKILL
    os.close(pidfd)


def test_one_that_is_not_wanted_any_more_waits_no_longer(process: Process, template: Template) -> None:
    """Nothing is forked for a worker that is not wanted any more, before or after the import."""
    forking = Forking(template)
    forking.wanted = False
    template.wake()
    assert "not wanted" in str(forking.over().error)
    process.loads()
    until(lambda: template.loaded)
    with pytest.raises(FlaskdError, match="not wanted"):
        template.fork(3, [], wanted=lambda: False)


def test_an_app_that_is_not_imported_fails_all_workers(process: Process, template: Template) -> None:
    """If the import fails, all workers get its error, and the template ends."""
    waiting = [Forking(template), Forking(template)]
    error = AppError("cannot load shop:app", "Traceback")
    process.loads(say.NotReady(error))
    assert [str(each.over().error) for each in waiting] == ["cannot load shop:app"] * 2
    assert not template.usable


def test_one_that_dies_at_the_import_says_how(process: Process, template: Template) -> None:
    """A template that dies during the import is reported with its signal, or with why flaskd killed it."""
    forking = Forking(template)
    process.dies()
    assert "it was killed by SIGKILL" in str(forking.over().error)
    assert not template.usable


def test_one_that_is_killed_at_the_import_says_why(process: Process, template: Template) -> None:
    """A template that flaskd kills during the import is reported with the reason, such as pool.start_timeout."""
    forking = Forking(template)
    template.kill("it was late")
    assert "flaskd killed it (it was late)" in str(forking.over().error)


def test_an_app_that_cannot_be_forked_has_no_template(
    process: Process, template: Template, caplog: pytest.LogCaptureFixture
) -> None:
    """If the app cannot be forked, the log says why, and the template ends before workers import the app."""
    forking = Forking(template)
    process.loads(say.Preloaded("serving shop:app", "", ("made an event loop", "started a thread")))
    assert forking.over().made is None
    assert template.code == -signal.SIGKILL
    assert template.usable
    assert "on import it made an event loop; it started a thread" in caplog.text
    assert template.fork(3, [], wanted=lambda: True) is None


def test_a_fork_that_fails_says_why(process: Process, template: Template) -> None:
    """A failed fork is an error with its reason, and the template goes on."""
    forking = Forking(template)
    process.loads()
    process.forks(say.Forked(0, "there is no memory"))
    assert "there is no memory" in str(forking.over().error)
    assert template.usable


def test_one_that_does_not_fork_in_time_is_killed(
    process: Process, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that does not fork in time is killed, and the next worker gets another one."""
    monkeypatch.setattr(module, "_FORK", 0.01)
    process.loads()
    with pytest.raises(CannotCreateError, match="does not answer"):
        template.fork(3, [], wanted=lambda: True)
    until(lambda: template.code == -signal.SIGKILL)
    assert not template.usable


def test_one_that_dies_later_is_told(process: Process, template: Template, caplog: pytest.LogCaptureFixture) -> None:
    """If a template dies later, its workers go on, and the next worker imports the code on the disk."""
    process.loads()
    until(lambda: template.loaded)
    process.dies()
    until(lambda: template.code is not None)
    until(lambda: "imports the code that is on disk then" in caplog.text)


class Later:
    """Functions that the test calls later."""

    def __init__(self) -> None:
        self.works: list[Callable[[], None]] = []

    def __call__(self, _seconds: float, work: Callable[[], None]) -> None:
        self.works.append(work)


def test_a_generation_has_one(process: Process) -> None:
    """A generation has one template, started for its first worker and ended with the generation."""
    templates = Templates(Later())
    first = templates.of(1, PRELOAD, {}, [])
    assert first is not None
    assert templates.of(1, PRELOAD, {}, []) is first
    assert [each["state"] for each in templates.shown()] == ["template"]
    templates.keep_only(1)
    assert first.usable
    templates.keep_only(2)
    until(lambda: first.code is not None)
    assert templates.shown() == []


def test_one_that_died_has_a_successor(process: Process) -> None:
    """After a template's death the next worker starts another one; after the end none is started."""
    templates = Templates(Later())
    first = templates.of(1, PRELOAD, {}, [])
    assert first is not None
    process.dies()
    until(lambda: first.code is not None)
    second = templates.of(1, PRELOAD, {}, [])
    assert second is not None
    assert second is not first
    templates.end()
    until(lambda: second.code is not None)
    assert templates.of(2, PRELOAD, {}, []) is None


def test_an_import_has_the_time_of_a_start(process: Process) -> None:
    """At pool.start_timeout a template is asked for its stack and killed, unless it has imported the app."""
    later = Later()
    templates = Templates(later)
    made = templates.of(1, PRELOAD, {}, [])
    assert made is not None
    forking = Forking(made)
    later.works.pop()()
    later.works.pop()()
    assert "pool.start_timeout" in str(forking.over().error)
    again = templates.of(1, PRELOAD, {}, [])
    assert again is not None
    process.loads()
    until(lambda: again.loaded)
    later.works.pop()()
    assert later.works == []
    templates.end()


def test_without_preload_there_is_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without pool.preload there is no template; also not where orphans are not supported, which is logged once."""
    templates = Templates(Later())
    assert templates.of(1, configuration(), {}, []) is None
    monkeypatch.setattr(module.orphans, "adopt", lambda: False)
    assert templates.of(1, PRELOAD, {}, []) is None
    assert templates.of(1, PRELOAD, {}, []) is None
    assert caplog.text.count("PR_SET_CHILD_SUBREAPER") == 1
