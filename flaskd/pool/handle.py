"""One worker as the supervisor sees it: its process, its wire, its board, and the phase of its life."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from flaskd.cleanup import StepResult
from flaskd.config import Configuration
from flaskd.errors import AppError, CannotCreateError, FlaskdError, shortage
from flaskd.ledger import Cut, DrainReport
from flaskd.pool.early import Early
from flaskd.pool.messages import Ask
from flaskd.pool.spawn import STACKS, Stacks, how, reap, send_signal, spawn
from flaskd.pool.template import Template
from flaskd.pool.wire import Wire, WireClosedError
from flaskd.server import Board
from flaskd.serving.api import Account
from flaskd.stacks import folded_dump

log = logging.getLogger("flaskd.pool")

_MOST_QUESTIONS = 16
"""A worker that has not answered this many questions yet is not asked another one."""


class Phase(StrEnum):
    """The phases of a worker's life."""

    LOADING = "loading"
    LOADED = "loaded"
    """It has loaded the app, and has no listeners yet."""
    STARTING = "starting"
    """It has listeners, does not accept yet, and has not answered its probe."""
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    LEAVING = "leaving"
    """It was told to stop."""
    GONE = "gone"


class Handle:
    """One worker. A thread of its own passes the worker's messages to `heard`, and its end to `gone`.

    All methods are for the thread of the daemon's events, except those under "any thread".
    """

    def __init__(self, slot: int, generation: int) -> None:
        self.slot, self.generation = slot, generation
        self.phase = Phase.LOADING
        self.born = time.monotonic()
        self.ready_at = 0.0
        self.pid = 0
        try:
            self.board = Board.make()
        except OSError as error:
            raise CannotCreateError(f"cannot start worker {slot}: {shortage(error) or error}") from error
        self.target: str | None = None
        self.configuration: Configuration | None = None
        """The configuration that is in force in the worker."""
        self.error: FlaskdError | None = None
        """Why it did not become ready."""
        self.report: DrainReport | None = None
        """The report of its drain; None before the drain is over, and after it was undone."""
        self.closed = False
        """Whether it has closed its copies of the listeners that no other process shares."""
        self.account: Account | None = None
        """The account of its stop."""
        self.code: int | None = None
        """Its exit code, once its process has ended."""
        self.results: list[StepResult] = []
        """The results of its cleanup steps so far."""
        self.running: tuple[str, ...] = ()
        """The names of its cleanup steps that run now."""
        self.step_until = 0.0
        """The time.monotonic() moment by which the present step of its stop is over."""
        self.exit_waits_for = ""
        """What the end of its process waits for, in words."""
        self.killed_for = ""
        """Why flaskd killed it; empty if it did not."""
        self.how = ""
        """How its process ended, in words; empty before."""
        self.cut: tuple[Cut, ...] = ()
        """The requests that were in flight in it when its process ended."""
        self.death: dict[str, Any] = {}
        """The description of its death, if it was not told to end."""
        self.deaf_since = 0.0
        """The time.monotonic() moment at which its wire ended; 0 before that."""
        self._stacks: Stacks | None = None
        self._pidfd = -1
        self._template: Template | None = None
        """The template that will fork its process; None without a template, and after the fork."""
        self._wire: Wire | None = None
        self._numbers: dict[int, Callable[[Any, FlaskdError | None], None]] = {}
        self._number = 0
        self._lock = threading.Lock()

    def __str__(self) -> str:
        pid = f"pid {self.pid}, " if self.pid else ""
        return f"worker {self.slot} ({pid}generation {self.generation})"

    def start(
        self,
        environ: Mapping[str, str],
        first: Callable[[], object],
        *,
        made: Callable[[Handle], None],
        heard: Callable[[Handle, Any, list[int]], None],
        gone: Callable[[Handle], None],
        template: Template | None = None,
        early: Early | None = None,
    ) -> None:
        """Start the worker's process, and send it the message that `first` returns; raises FlaskdError if it cannot.

        `early` is a process that was forked for it; without that and a template, a new process is made.

        In the handle's own thread, `made` is called when the process exists, and `first`, which may wait, when it has
        sent its greeting. With a template, that thread also waits for the fork, before which the app is imported.
        """
        name = f"flaskd-worker-{self.slot}.{self.generation}"
        mine = {"FLASKD_WORKER": str(self.slot), "FLASKD_GENERATION": str(self.generation)}
        self._template = template
        try:
            self._wire, theirs = Wire.pair()
            with contextlib.ExitStack() as stack:
                stack.enter_context(theirs)
                self._stacks = Stacks()
                if template is None:
                    self._make(theirs, self._stacks, {**environ, **mine}, early)

                def live() -> None:
                    if template is None or self._fork(theirs, {**environ, **mine}, gone):
                        made(self)
                        self._listen(first, heard, gone)

                threading.Thread(target=live, name=name, daemon=True).start()
                if template is not None:
                    stack.pop_all()  # that thread closes `theirs`
        except (OSError, RuntimeError, FlaskdError) as error:  # no descriptor, no memory, no process, no thread
            if self._pidfd >= 0:
                send_signal(self._pidfd, signal.SIGKILL)
                self.code = reap(self._pidfd)
            elif early is not None:
                early.end()
            self.close()
            if isinstance(error, FlaskdError):
                raise
            raise CannotCreateError(f"cannot start worker {self.slot}: {shortage(error) or error}") from error

    def _make(
        self, theirs: socket.socket, stacks: Stacks, environ: Mapping[str, str], early: Early | None = None
    ) -> None:
        """Have the process run a worker that was forked early, or fork it from the template, or else start it.

        Raises FlaskdError.
        """
        descriptors = [theirs.fileno(), self.board.fd, stacks.fileno()]
        made = None
        if early is not None:
            made = early.become(environ, descriptors)
        elif self._template is not None:
            made = self._template.fork(self.slot, descriptors, wanted=lambda: not self.killed_for)
        self.pid, self._pidfd = made or spawn(self.slot, self.generation, descriptors, environ)

    def _fork(self, theirs: socket.socket, environ: Mapping[str, str], gone: Callable[[Handle], None]) -> bool:
        """In the handle's thread, fork the process; if that fails, call `gone` and return False."""
        assert self._stacks is not None
        try:
            with theirs:
                self._make(theirs, self._stacks, environ)
        except FlaskdError as error:
            self.error, self.code = error, 0
            gone(self)
            return False
        finally:
            self._template = None
        if self.killed_for:  # `kill` was called meanwhile
            send_signal(self._pidfd, signal.SIGKILL)
        return True

    def _listen(
        self,
        first: Callable[[], object],
        heard: Callable[[Handle, Any, list[int]], None],
        gone: Callable[[Handle], None],
    ) -> None:
        """Pass its messages to `heard` until its process has ended (a thread of its own)."""
        wire = self._wire
        assert wire is not None
        try:
            if fault := wire.greeted():
                self.error = FlaskdError(f"cannot start {self}: {fault}")
                send_signal(self._pidfd, signal.SIGKILL)
            else:
                wire.send(first())
            poll = select.poll()
            poll.register(wire, select.POLLIN)
            poll.register(self._pidfd, select.POLLIN)
            # After the worker's end, a process that its app forked may hold the wire open, even inside of a message.
            while wire.has_message or wire.fileno() in dict(poll.poll()):
                if wire.has_message:
                    heard(self, *wire.receive())
                else:
                    wire.read()
        except WireClosedError:
            pass
        except Exception:  # not a message of this flaskd: the wire cannot be read any further
            log.exception(f"cannot understand a message of {self}: it is killed")
            self.kill("it sent a message that cannot be understood")
        self.deaf_since = time.monotonic()
        code = reap(self._pidfd)
        if code != -signal.SIGKILL:  # it ended in another way before it was killed
            self.killed_for = ""
        self.code = code
        gone(self)

    # --- any thread ---------------------------------------------------------------------------------------------------

    def send(self, message: object, descriptors: Sequence[int] = ()) -> bool:
        """Send it a message; False if it could not be sent. A worker that does not read its messages is killed."""
        assert self._wire is not None
        try:
            self._wire.send(message, descriptors, wait=False)
        except WireClosedError as error:
            if isinstance(error.__cause__, BlockingIOError):
                self.kill("it does not read its messages")
            return False
        return True

    def ask(self, question: Callable[[int], object], answered: Callable[[Any, FlaskdError | None], None]) -> None:
        """Ask it a question: `question` makes the message with a number; `answered` gets a value or an error."""
        with self._lock:
            room = len(self._numbers) < _MOST_QUESTIONS and self.code is None
            if room:
                self._number += 1
                number = self._number
                self._numbers[number] = answered
        if not room or not self.send(question(number)):
            if room:
                self._numbers.pop(number, None)
            answered(None, FlaskdError(f"{self} does not answer"))

    def ask_for(self, what: str, answered: Callable[[Any, FlaskdError | None], None], *, stacks: bool = False) -> None:
        """Ask it for one of the things that `messages.Ask` names; `answered` gets a value or an error."""
        self.ask(lambda number: Ask(number, what, stacks), answered)

    def answer(self, number: int, value: Any, error: FlaskdError | None) -> None:
        """Pass its answer to the function that waits for it."""
        with self._lock:
            answered = self._numbers.pop(number, None)
        if answered is not None:
            answered(value, error)

    def give_up_questions(self) -> None:
        """Answer all open questions with an error, because the process has ended."""
        with self._lock:
            left, self._numbers = list(self._numbers.values()), {}
        for answered in left:
            answered(None, FlaskdError(f"{self} is gone"))

    def kill(self, why: str) -> None:
        """End its process at once."""
        self.killed_for = self.killed_for or why
        send_signal(self._pidfd, signal.SIGKILL)
        if (template := self._template) is not None:
            template.wake()

    def ask_for_stacks(self) -> None:
        """Have it write the stacks of its threads, even if it hangs; `stacks` returns them a moment later."""
        if self._stacks is not None:
            self._stacks.clear()
            send_signal(self._pidfd, STACKS)

    def stacks(self) -> str:
        """The stacks that it has written, folded for people; empty if there are none."""
        return folded_dump(self._stacks.read()) if self._stacks is not None else ""

    @property
    def alive(self) -> bool:
        """Whether its process exists and has not been reaped."""
        return self.code is None and self.pid > 0

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.born

    @property
    def serves(self) -> bool:
        """Whether it takes new requests."""
        return self.phase is Phase.READY

    @property
    def is_coming(self) -> bool:
        """Whether it is being started."""
        return self.phase in {Phase.LOADING, Phase.LOADED, Phase.STARTING}

    @property
    def silent_for(self) -> float:
        """Seconds since its event loop last turned; a healthy loop turns every second."""
        return time.monotonic() - self.board.last_turn

    def why_gone(self) -> FlaskdError:
        """Why a worker whose process has ended did not become ready, or died within `pool.canary`."""
        assert self.code is not None
        how_ = self.how or how(self.code)
        if self.ready_at:
            lived = time.monotonic() - self.ready_at
            return AppError(f"{self} was ready, and died {lived:.1f}s later, within pool.canary: {how_}")
        return self.error or AppError(f"cannot start {self}: {how_} before it was ready")

    def hang_up(self) -> None:
        """Close the wire: no more messages are sent or received."""
        if self._wire is not None:
            self._wire.close()

    def close(self) -> None:
        """Close its descriptors, after its process has ended."""
        self.hang_up()
        self.board.close()
        if self._stacks is not None:
            self._stacks.close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def forget(self) -> None:
        """In a forked child, close its copy of the wire."""
        if self._wire is not None:
            self._wire.forget()
