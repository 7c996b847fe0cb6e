"""A worker's handle in the supervisor, tested with a process that is no worker, and with none."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flaskd.errors import CannotCreateError, FlaskdError
from flaskd.pool import handle as module
from flaskd.pool.deaths import Deaths
from flaskd.pool.handle import Handle
from flaskd.pool.messages import Answer
from flaskd.pool.wire import Wire
from flaskd.version import __version__

PATIENCE = 20.0
HELLO = f"flaskd {__version__} wire 1\n".encode()


class Started:
    """A handle whose process is `cat`, or another program; the test sends messages for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.gone = threading.Event()
        self.process: subprocess.Popen[bytes]

        def spawn(_slot: int, _generation: int, descriptors: list[int], _environ: Any) -> tuple[int, int]:
            self.end = socket.socket(fileno=os.dup(descriptors[0]))
            self.pid = os.posix_spawnp(command[0], command, os.environ)
            return self.pid, os.pidfd_open(self.pid)

        monkeypatch.setattr(module, "spawn", spawn)
        self.handle = Handle(0, 1)
        self.handle.start(
            {},
            lambda: "first",
            made=lambda _: None,
            heard=lambda _, message, fds: self.heard.put((message, fds)),
            gone=lambda _: self.gone.set(),
        )

    def says(self, data: bytes) -> None:
        self.end.sendall(data)

    def hears(self) -> Any:
        return self.heard.get(timeout=PATIENCE)

    def ends(self) -> None:
        assert self.gone.wait(PATIENCE)

    def close(self) -> None:
        if self.handle.code is None:
            self.handle.kill("the test is over")
        self.ends()
        self.handle.close()
        self.end.close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Started]]:
    made: list[Started] = []

    def begin(*command: str) -> Started:
        made.append(Started(monkeypatch, list(command) or ["sleep", "60"]))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def packed(message: object) -> bytes:
    data = pickle.dumps(message)
    return struct.pack("!IB", len(data), 0) + data


def test_what_it_says_is_heard_to_its_end(start: Callable[..., Started]) -> None:
    """All messages of a worker are received in order, also those before a kill; then its end, and how it ended."""
    worker = start()
    worker.says(HELLO)
    worker.says(packed("one") + packed("two"))
    assert [worker.hears()[0] for _ in range(2)] == ["one", "two"]
    other = Wire(worker.end.dup())
    assert other.receive() == ("first", [])
    other.forget()
    worker.says(packed("three"))
    worker.handle.kill("a test")
    worker.ends()
    assert worker.hears()[0] == "three"
    assert (worker.handle.code, worker.handle.killed_for) == (-signal.SIGKILL, "a test")
    assert not worker.handle.alive


def test_a_wire_that_a_forked_process_holds_open(start: Callable[..., Started]) -> None:
    """When the process ends, the worker is gone, even if a child holds the wire open in the middle of a message."""
    worker = start()
    worker.says(HELLO)
    worker.says(packed("whole") + packed("half")[:-1])
    os.kill(worker.pid, signal.SIGKILL)
    worker.ends()  # the test's own copy of the other end is still open
    assert worker.handle.code == -signal.SIGKILL
    assert worker.hears()[0] == "whole"
    assert worker.heard.empty()


def test_another_flaskd_is_killed(start: Callable[..., Started]) -> None:
    """A worker of another flaskd gets no message, and its error says what to do."""
    worker = start()
    worker.says(b"flaskd 0.0.1 wire 1\n")
    worker.ends()
    assert "it is flaskd 0.0.1" in str(worker.handle.why_gone())
    assert str(worker.handle.why_gone()).endswith("restart flaskd")


def test_what_cannot_be_understood_ends_it(start: Callable[..., Started], caplog: pytest.LogCaptureFixture) -> None:
    """A worker that sends an unknown message is killed, and the log says why."""
    worker = start()
    worker.says(HELLO + struct.pack("!IB", 3, 0) + b"???")
    worker.ends()
    assert "cannot understand a message of worker 0" in caplog.text
    assert worker.handle.killed_for == "it sent a message that cannot be understood"


def test_one_that_does_not_read_is_killed(start: Callable[..., Started]) -> None:
    """A worker that does not read is killed once the kernel has no room for messages; questions get an error."""
    worker = start()
    worker.says(HELLO)
    answers: list[Any] = []
    while worker.handle.send("x" * 10_000):
        pass
    worker.handle.ask(lambda number: number, lambda value, error: answers.append(error))
    worker.ends()
    assert worker.handle.killed_for == "it does not read its messages"
    assert isinstance(answers[0], FlaskdError)


def test_who_killed_it_is_told_as_it_was(start: Callable[..., Started]) -> None:
    """The cause of death is the real one: not "flaskd killed it" if the process had ended before."""
    worker = start()
    worker.says(HELLO)
    worker.end.shutdown(socket.SHUT_RDWR)
    while worker.handle.send("x"):
        pass
    assert worker.handle.killed_for == ""
    worker.handle.killed_for = "flaskd ends"
    os.kill(worker.pid, signal.SIGTERM)
    worker.ends()
    assert (worker.handle.code, worker.handle.killed_for) == (-signal.SIGTERM, "")


def test_questions(start: Callable[..., Started]) -> None:
    """Each question gets one answer, or an error when the worker is gone; at most 16 may be open."""
    worker = start()
    worker.says(HELLO)
    answers: list[tuple[int, Any, Any]] = []

    def ask(name: int) -> None:
        worker.handle.ask(Answer, lambda value, error: answers.append((name, value, error)))

    for name in range(16):
        ask(name)
    assert answers == []
    ask(16)
    [(name, _, error)] = answers
    assert (name, "does not answer" in str(error)) == (16, True)
    worker.handle.answer(2, "yes", None)
    worker.handle.answer(2, "again", None)
    assert answers[1:] == [(1, "yes", None)]
    worker.handle.kill("a test")
    worker.ends()
    worker.handle.give_up_questions()
    assert sorted(name for name, *_ in answers) == list(range(17))
    ask(17)
    assert answers[-1][0] == 17


@pytest.mark.parametrize("what", ["socketpair", "memfd_create", "spawn", "thread"])
def test_where_there_is_nothing_for_it(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """If there is no socket, memory, process or thread, CannotCreateError says so, and nothing is left open."""

    def no_more(*_: object, **__: object) -> Any:
        raise OSError(24, "Too many open files") if what != "thread" else RuntimeError("can't start new thread")

    handle = Handle(3, 1)
    started: list[int] = []

    def spawn(*_: object) -> tuple[int, int]:
        started.append(os.posix_spawnp("sleep", ["sleep", "60"], os.environ))
        return started[0], os.pidfd_open(started[0])

    monkeypatch.setattr(module, "spawn", spawn)
    with monkeypatch.context() as patch:
        if what == "socketpair":
            patch.setattr(socket, "socketpair", no_more)
        elif what == "memfd_create":
            patch.setattr(os, "memfd_create", no_more)
        elif what == "spawn":
            patch.setattr(module, "spawn", no_more)
        else:
            patch.setattr(threading.Thread, "start", no_more)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CannotCreateError, match="cannot start worker 3: (more open files|no thread) .*; raise "):
            handle.start({}, lambda: "first", made=lambda _: None, heard=lambda *_: None, gone=lambda _: None)
    assert len(os.listdir("/proc/self/fd")) == before - 2, "its board (mmap has a copy) is given back, too"
    if started:
        with pytest.raises(ChildProcessError):
            os.waitpid(started[0], 0)


def test_stacks_are_the_last_ones(start: Callable[..., Started]) -> None:
    """A second dump of stacks replaces the first, wherever the worker's file position is."""
    script = (
        "import faulthandler, os, signal, sys, time\n"
        "faulthandler.register(int(sys.argv[1]), file=int(sys.argv[2]), all_threads=True)\n"
        "print('armed', flush=True)\n"
        "time.sleep(60)\n"
    )
    worker = start()
    worker.says(HELLO)
    stacks = worker.handle._stacks  # noqa: SLF001 - as it is given to a worker
    assert stacks is not None
    descriptor = stacks.fileno()
    os.set_inheritable(descriptor, True)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(int(module.STACKS)), str(descriptor)],
        stdout=subprocess.PIPE, pass_fds=[descriptor],
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == b"armed\n"
    for _ in range(2):
        worker.handle.ask_for_stacks()  # the signal kills `sleep`; the child is what answers
        os.kill(child.pid, module.STACKS)
        until = 0
        while "in <module>" not in worker.handle.stacks():
            until += 1
            assert until < 10**7
    assert worker.handle.stacks().startswith("Current thread")
    child.kill()
    child.wait()
    child.stdout.close()


# --- why a worker died --------------------------------------------------------------------------------------------------


class Dead(Handle):
    """A worker that has ended with a given code."""

    def __init__(self, code: int, killed_for: str = "") -> None:
        super().__init__(1, 1)
        self.code, self.killed_for = code, killed_for
        self.board.close()


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """A memory.events file that shows two OOM kills from before."""
    path = tmp_path / "memory.events"
    path.write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 2\noom_group_kill 0\n")
    return path


def kills(path: Path, count: int) -> None:
    path.write_text(f"low 0\nmax 9\noom 3\noom_kill {count}\n")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "it left with the exit code 0"),
        (3, "it left with the exit code 3"),
        (-9, "it was killed by SIGKILL"),
        (-11, "it was killed by SIGSEGV"),
        (-signal.SIGRTMAX + 3, f"it was killed by signal {signal.SIGRTMAX - 3}"),
    ],
)
def test_how_it_died(events: Path, code: int, text: str) -> None:
    """The exit code or the signal is named; OOM kills from before explain nothing."""
    assert Deaths(events).how(Dead(code)) == text


def test_for_want_of_memory(events: Path) -> None:
    """Only SIGKILL is explained by an OOM kill, one kill explains one death, and two may come at once."""
    deaths = Deaths(events)
    kills(events, 3)
    assert "no memory" not in deaths.how(Dead(-11))
    assert "no memory left" in deaths.how(Dead(-9))
    assert "no memory" not in deaths.how(Dead(-9))
    kills(events, 5)
    assert all("no memory left" in deaths.how(Dead(-9)) for _ in range(2))
    assert "no memory" not in deaths.how(Dead(-9))


def test_what_flaskd_killed_was_not_killed_for_want_of_memory(events: Path) -> None:
    """If flaskd killed the worker, its reason is named, not an OOM kill."""
    deaths = Deaths(events)
    kills(events, 3)
    assert deaths.how(Dead(-9, killed_for="it hung")) == "flaskd killed it (it hung)"


def test_an_oom_kill_of_long_ago_explains_nothing(events: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OOM kill that no worker's death followed, perhaps of the app's child, does not explain a later death."""
    deaths, ahead = Deaths(events), 0.0
    kills(events, 4)
    assert "no memory left" in deaths.how(Dead(-9))
    now = module.time.monotonic
    ahead = 60.0
    monkeypatch.setattr("time.monotonic", lambda: now() + ahead)
    assert "no memory" not in deaths.how(Dead(-9))


@pytest.mark.parametrize("text", [None, "", "oom_kill"])
def test_without_memory_events(tmp_path: Path, text: str | None) -> None:
    """Without a memory.events file, or with an empty one, the signal alone is named."""
    path = tmp_path / "memory.events"
    if text is not None:
        path.write_text(text)
    assert Deaths(path).how(Dead(-9)) == "it was killed by SIGKILL"
