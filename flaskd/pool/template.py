"""Templates as the supervisor sees them: for each generation, one process that imports the app and forks the workers.

A template does nothing else, and has one thread, so a fork copies it completely. It forks twice, so that a worker is a
child of the supervisor (`flaskd.process.orphans`), and lives on after the template's end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flaskd.config import Configuration
from flaskd.errors import AppError, CannotCreateError, FlaskdError, shortage
from flaskd.pool.messages import Fork, Forked, NotReady, Preload, Preloaded
from flaskd.pool.spawn import STACKS, STACKS_WITHIN, Stacks, how, reap, send_signal, spawn
from flaskd.pool.wire import Wire, WireClosedError
from flaskd.process.orphans import orphans
from flaskd.process.usage import cpu_seconds, pss

log = logging.getLogger("flaskd.pool")

_FORK = 10.0
"""Most seconds that a template may take for a fork, which usually takes some milliseconds."""


class Template:
    """One template; all methods except `start` are for any thread."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.pid = 0
        self.born = time.monotonic()
        self.code: int | None = None
        """Its exit code, once its process has ended."""
        self.loaded: Preloaded | None = None
        """What it has imported; None before that, and if the import failed."""
        self._error: FlaskdError | None = None
        """Why the import failed."""
        self._killed_for = ""
        self._pidfd = -1
        self._stacks: Stacks
        self._wire: Wire
        self._changed = threading.Condition()
        self._forking = threading.Lock()
        self._closing = threading.Lock()
        """Held while the process is sent a signal, and while its pidfd is closed: the number may be reused then."""

    def __str__(self) -> str:
        return f"the template of generation {self.generation} (pid {self.pid})"

    def start(self, environ: Mapping[str, str], order: Preload) -> None:
        """Start its process; raises FlaskdError. Call this in a thread that lives as long as flaskd."""
        thread = threading.Thread(
            target=self._listen, args=(order,), name=f"flaskd-template-{self.generation}", daemon=True
        )
        try:
            with contextlib.ExitStack() as undo:
                self._stacks = Stacks()
                undo.callback(self._stacks.close)
                self._wire, theirs = Wire.pair()
                undo.callback(self._wire.close)
                with theirs:
                    descriptors = [theirs.fileno(), self._stacks.fileno()]
                    mine = {"FLASKD_GENERATION": str(self.generation)}
                    self.pid, self._pidfd = spawn(None, self.generation, descriptors, {**environ, **mine})
                undo.callback(os.close, self._pidfd)
                undo.callback(reap, self._pidfd)
                undo.callback(send_signal, self._pidfd, signal.SIGKILL)
                thread.start()
                undo.pop_all()
        except (OSError, RuntimeError) as error:  # no descriptor, no memory, no thread
            raise CannotCreateError(f"cannot start a template: {shortage(error) or error}") from error

    def _listen(self, order: Preload) -> None:
        """Wait for the outcome of the import, and for the end of the process (a thread of its own)."""
        loaded: Preloaded | None = None
        try:
            loaded = self._load(order)
        except WireClosedError:
            pass
        except Exception:  # not a message of this flaskd
            log.exception(f"cannot understand a message of {self}: it is killed")
        if loaded is not None:
            self._tell(loaded)
        if loaded is None or loaded.keeps:  # it ends before workers start, so that its ports are free
            send_signal(self._pidfd, signal.SIGKILL)
        else:
            self._set(loaded)
        self.code = reap(self._pidfd)
        words = f"flaskd killed it ({self._killed_for})" if self._killed_for else how(self.code)
        if loaded is None:
            self._error = self._error or AppError(
                f"cannot start {self}: {words} before the app was imported", self._stacks.read()
            )
            self._set(None)
        elif loaded.keeps:
            self._set(loaded)
        elif not self._killed_for:
            log.error(f"{self} is gone: {words}; the next worker imports the code that is on disk then")
        self._close()

    def _load(self, order: Preload) -> Preloaded | None:
        if fault := self._wire.greeted():
            self._error = FlaskdError(f"cannot start {self}: {fault}")
            return None
        self._wire.send(order)
        poll = select.poll()
        poll.register(self._wire, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        while not self._wire.has_message:
            if self._wire.fileno() not in dict(poll.poll()):
                return None  # it has ended, while a process that the app forked holds the wire
            self._wire.read()
        message, _ = self._wire.receive()
        if isinstance(message, NotReady):
            self._error = message.error
            return None
        assert isinstance(message, Preloaded)
        return message

    def _tell(self, loaded: Preloaded) -> None:
        if loaded.told:
            took = time.monotonic() - self.born
            log.info(f"{loaded.told} (imported once for generation {self.generation}, in {took:.1f}s)")
        if loaded.doubt:
            log.warning(loaded.doubt)
        if loaded.keeps:
            log.warning(
                f"pool.preload: the app cannot be forked, because on import it {'; it '.join(loaded.keeps)}: "
                "each worker imports the app itself; let the app start and open such things at their first use"
            )

    def _set(self, loaded: Preloaded | None) -> None:
        with self._changed:
            self.loaded = loaded
            self._changed.notify_all()

    def _close(self) -> None:
        with self._forking:
            self._wire.close()
            self._stacks.close()
        with self._closing:
            if self._pidfd >= 0:
                os.close(self._pidfd)
            self._pidfd = -1

    # --- any thread ---------------------------------------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether it can fork workers, or has found out that this app cannot be forked."""
        return (self.code is None and not self._killed_for) or (self.loaded is not None and bool(self.loaded.keeps))

    def fork(self, slot: int, descriptors: Sequence[int], *, wanted: Callable[[], bool]) -> tuple[int, int] | None:
        """Fork a worker, once the app is imported; returns its pid and a pidfd, or None if the app cannot be forked.

        Raises FlaskdError if the import failed, the template has ended, or the worker is not `wanted` any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.loaded is not None or self._error is not None or not wanted())
        if self._error is not None:
            raise self._error
        if self.loaded is None or not wanted():
            raise FlaskdError(f"cannot start worker {slot}: it is not wanted any more")
        if self.loaded.keeps:
            return None
        with self._forking, orphans.expected() as known:
            try:
                self._wire.send(Fork(slot), descriptors)
                answer = self._answer()
            except (WireClosedError, OSError) as error:
                raise CannotCreateError(f"cannot start worker {slot}: {self} does not answer: {error}") from error
            if not answer.pid:
                raise CannotCreateError(f"cannot start worker {slot}: {answer.why}")
            known.add(answer.pid)
            try:
                return answer.pid, os.pidfd_open(answer.pid)
            except OSError as error:
                known.discard(answer.pid)
                os.kill(answer.pid, signal.SIGKILL)  # it was not reaped, so no other process has this pid
                raise CannotCreateError(f"cannot watch worker {slot}: {error.strerror}") from error

    def _answer(self) -> Forked:
        poll = select.poll()
        poll.register(self._wire, select.POLLIN)
        if not poll.poll(_FORK * 1000):
            self.kill(f"it did not fork within {_FORK:g}s")
            raise WireClosedError(f"not within {_FORK:g}s")
        answer, _ = self._wire.receive()
        assert isinstance(answer, Forked)
        return answer

    def wake(self) -> None:
        """Have the threads that wait in `fork` check again whether their worker is wanted."""
        with self._changed:
            self._changed.notify_all()

    def kill(self, why: str) -> None:
        """Kill its process, which has nothing to clean up."""
        self._killed_for = self._killed_for or why
        with self._closing:
            send_signal(self._pidfd, signal.SIGKILL)

    @property
    def loads(self) -> bool:
        """Whether it is importing the app."""
        return self.loaded is None and self.code is None

    def ask_for_stacks(self) -> None:
        """Have it write its stack, which becomes part of the error at its end."""
        self._stacks.clear()
        with self._closing:
            send_signal(self._pidfd, STACKS)

    def shown(self) -> dict[str, Any]:
        """Its description, with the stable keys of a worker's."""
        return {
            "slot": None, "pid": self.pid, "generation": self.generation, "state": "template",
            "age": round(time.monotonic() - self.born, 3), "in_flight": 0, "answered": 0, "busy": 0, "queued": 0,
            "connections": 0, "silent": None, "memory": pss(self.pid), "cpu": cpu_seconds(self.pid),
        }  # fmt: skip


class Templates:
    """The templates of all generations of which workers may be started.

    Methods run in the thread of the daemon's events, except `shown` and `end`. `later` calls a function after a time.
    """

    def __init__(self, later: Callable[[float, Callable[[], None]], None]) -> None:
        self._later = later
        self._all: dict[int, Template] = {}
        self._ended = self._told = False

    def of(
        self, generation: int, configuration: Configuration, environ: Mapping[str, str], path: Sequence[str]
    ) -> Template | None:
        """The template of a generation, which may still import the app; None if workers are not forked.

        Starts it if needed; raises CannotCreateError if it cannot be started.
        """
        pool = configuration.values.pool
        if not pool.preload or self._ended:
            return None
        template = self._all.get(generation)
        if template is None or not template.usable:
            if not orphans.adopt():
                if not self._told:
                    log.warning(
                        "pool.preload: each worker imports the app itself: this system, or this Python without ctypes, "
                        "cannot make one process the parent of what another one forks (PR_SET_CHILD_SUBREAPER)"
                    )
                self._told = True
                return None
            template = Template(generation)
            template.start(environ, Preload(configuration, generation, path))
            self._all[generation] = template
            self._give_time(template, pool.start_timeout)
        return template

    def _give_time(self, template: Template, seconds: float) -> None:
        def late() -> None:
            if template.loads:
                template.ask_for_stacks()
                self._later(STACKS_WITHIN, end)

        def end() -> None:
            if template.loads:
                template.kill(f"the app was not imported after {seconds:g}s (pool.start_timeout)")

        self._later(seconds, late)

    def keep_only(self, generation: int) -> None:
        """End the templates of all other generations, which are over, or did not become ready."""
        for each in [each for each in self._all if each != generation]:
            self._all.pop(each).kill("its generation is over")

    def end(self) -> None:
        """End all templates, because no more workers are started (any thread)."""
        self._ended = True
        for each in list(self._all.values()):
            each.kill("flaskd stops")

    def shown(self) -> list[dict[str, Any]]:
        """The descriptions of the templates that are alive (any thread)."""
        return [each.shown() for each in list(self._all.values()) if each.code is None]
