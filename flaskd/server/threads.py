"""The threads that serve: one leads, others run the app, one in each place, and the rest wait for the lead.

This is the leader/followers pattern (Schmidt and others, Pattern-Oriented Software Architecture 2). The leading thread
waits for events, reads and parses. When a request is complete and a place is free, it passes the lead on to another
thread and runs the app itself, so a request stays in one thread. There is one more thread than places, so that one can
always lead. A thread keeps the lead while it runs a quick request (`flaskd.server.lead`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from flaskd.errors import CannotCreateError, shortage
from flaskd.process.threads import AppThread
from flaskd.server.lead import Lead
from flaskd.server.thread_places import Places

log = logging.getLogger("flaskd.server")
_queue_log = logging.getLogger("waitress.queue")
"""Waitress' logger for its queue, whose lines existing log filters may name."""

_INFINITE = float("inf")
_LEAST_WAIT = 0.1
"""Least seconds that `join` waits, so that idle threads can end and are not taken for stuck ones."""


class Task(Protocol):
    """What runs in a place: a connection whose request is complete, or a function."""

    @property
    def kind(self) -> str:
        """The name of all tasks that take about as long as this one; empty if that is not known."""

    @property
    def waits_since(self) -> float:
        """Since when it waits, a time.monotonic() moment; infinity for a task that may wait without limit."""

    def service(self) -> float:
        """Run it; returns how many seconds that took."""


class ThreadPool(Places):
    """The threads of one server, and the queue of tasks that wait for a place, the oldest first."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.queue: deque[Any] = deque()
        """The tasks that wait for a place; while there are any, all places are taken."""
        self.started: list[threading.Thread] = []
        self.leader: threading.Thread | None = None
        """The thread that leads or led last."""
        self._turn: Callable[[], Task | None] | None = None
        """The function that the leading thread calls; None before `start`."""
        self._name = ""
        self._lead = Lead(self._lock)
        self._keeps, self._kind = False, ""
        """Whether the leading thread is to keep the lead while it runs the task that has just got a place; its kind."""
        self._last_ended: Callable[[], None] | None = None

    def start(self, turn: Callable[[], Task | None], wake: Callable[[], None], name: str) -> None:
        """Start the threads; raises RuntimeError if they cannot be started.

        `turn` handles events and returns the next task to run, or None when the thread is to end; one thread at a time
        calls it. `wake` makes it look at `queue` and `surplus` (any thread). `name` is the name of the only thread, if
        there are no places.
        """
        self._turn, self._wake, self._name = turn, wake, name
        with self._lock:
            self._fill()

    def _fill(self) -> None:
        if self._turn is None:  # `resize` may be called before `start`
            return
        while len(self._numbers) < self._wanted:
            taken = set(self._numbers.values())
            number = next(each for each in range(len(taken) + 1) if each not in taken)
            thread: threading.Thread
            if self.size:
                thread = AppThread(target=self._work, args=(self._turn,), name=f"flaskd-thread-{number}")
            else:
                thread = threading.Thread(target=self._work, args=(self._turn,), name=self._name, daemon=True)
            self._numbers[thread] = number
            try:
                thread.start()
            except RuntimeError:  # no thread can be started
                del self._numbers[thread]
                raise
            finally:
                self._measure()
            self.started = [each for each in self.started if each.is_alive()]
            self.started.append(thread)

    # --- what each thread does ------------------------------------------------------------------------------------

    def _work(self, turn: Callable[[], Task | None]) -> None:
        thread, lead, lock = threading.current_thread(), self._lead, self._lock
        leads = False
        try:
            while True:
                if not leads:
                    lead.take()
                    leads, self.leader = True, thread
                task = turn()
                if task is None:
                    return
                if self._keeps:
                    kind, seconds = self._kind, self._run(task)
                    with lock:
                        leads = lead.still_kept(kind, seconds)
                        if leads:
                            self._give_up()
                            continue
                    task = self._next()
                else:
                    leads = False
                    lead.pass_on()
                while task is not None:
                    kind = task.kind
                    seconds = self._run(task)
                    if kind:
                        lead.note(kind, seconds, kept=False)
                    task = self._next()
        finally:
            last = self._forget(thread)  # before another thread leads, and checks `surplus`
            if leads:
                lead.pass_on()
            last()

    def _run(self, task: Task) -> float:
        """Run a task; gives how many seconds it took, infinity where it failed."""
        try:
            return task.service()
        except BaseException:  # a task must not end its thread
            log.exception("a task of %s failed", threading.current_thread().name)
            return _INFINITE

    def take_place(self, kind: str) -> bool:
        """Take a place for a task of this kind, if one is free and no other task waits for it (the leading thread)."""
        with self._lock:
            if self._running >= self._room or self.queue:
                return False
            self._running += 1
            self._kind = kind
            self._keeps = self._lead.keep(kind)
            return True

    def take(self) -> Task | None:
        """The oldest task, if there is a place for it (the leading thread)."""
        with self._lock:
            if self.queue and self._running < self._room:
                self._running += 1
                task: Task = self.queue.popleft()
                self._kind = task.kind
                self._keeps = bool(self._kind) and self._lead.keep(self._kind)
                return task
        return None

    def _next(self) -> Task | None:
        """The oldest task for this thread's place; if there is none, give up the place and return None."""
        with self._lock:
            if self.queue and self._running + self._back <= self._places and not self.ending:
                task: Task = self.queue.popleft()
                return task
            self._give_up()
        return None

    # --- how many -------------------------------------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """Change the number of places (any thread).

        Raises CannotCreateError if the threads for them cannot be started; the number then stays as it was.
        """
        with self._lock:
            before = self.size
            try:
                self._set(size)
                self._fill()
            except RuntimeError as error:
                had = len(self._numbers) - 1 - len(self.lost)
                self._set(before)
                lack = shortage(error)
                raise (CannotCreateError(f"server.threads: {had} of {size}: {lack}") if lack else error) from error
            finally:
                self._wake()

    def _set(self, size: int) -> None:
        self.size = size
        self._count_places()

    def replenish(self) -> None:
        """Start the threads that are missing, or as many as can be started (any thread)."""
        with self._lock:
            self._replenish()

    def _replenish(self) -> None:
        try:
            self._fill()
        except RuntimeError as error:
            had = len(self._numbers) - 1 - len(self.lost) - self._away
            log.warning(f"only {had} of {self.size} threads run the app: {shortage(error)}")
        self._wake()

    # --- tasks ----------------------------------------------------------------------------------------------------

    def add_task(self, task: Task) -> None:
        """Queue a task; if it has to wait, warn as Waitress does.

        For the leading thread and for threads that run a task: each of them looks at the queue afterwards.
        """
        with self._lock:
            self.queue.append(task)
            depth = len(self.queue) - self._free
        if depth > 0:
            _queue_log.warning("Task queue depth is %d", depth)

    def crowded(self, most: int) -> bool:
        """Whether at least `most` tasks wait, and no place is free (any thread)."""
        return len(self.queue) - self._free >= most

    def take_late(self, late: Callable[[float], bool]) -> Any:
        """Take the oldest task out of the queue, if no place is free and `late` is true for its `waits_since`."""
        with self._lock:
            return self.queue.popleft() if self.queue and self.full and late(self.queue[0].waits_since) else None

    def run(self, function: Callable[[], None]) -> None:
        """Run a function in one of the places (any thread)."""
        self.add_task(_FunctionTask(function))
        self._wake()

    def take_back(self) -> list[Any]:
        """Take all connections out of the queue; their requests have not begun."""
        with self._lock:
            tasks = [task for task in self.queue if not isinstance(task, _FunctionTask)]
            for task in tasks:
                self.queue.remove(task)
        return tasks

    # --- the end --------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Let all threads end, each after the task that it runs (any thread)."""
        with self._lock:
            self.ending = True
            self._measure()
            self._returns.notify_all()
        self._lead.end()
        self._wake()

    def join(self, timeout: float) -> list[threading.Thread]:
        """After `end`, wait at most `timeout` seconds for all threads; returns those that have not ended."""
        until = time.monotonic() + max(timeout, _LEAST_WAIT)
        for thread in self.started:
            thread.join(max(0.0, until - time.monotonic()))
        self._lead.join(max(0.0, until - time.monotonic()))
        return [thread for thread in self.started if thread.is_alive()]

    def when_the_last_ends(self, function: Callable[[], None]) -> None:
        """Call `function` in the last thread when that ends; now, if all threads have ended."""
        with self._lock:
            if self._numbers:
                self._last_ended = function
                return
        function()

    def _forget(self, thread: threading.Thread) -> Callable[[], None]:
        """Remove a thread that ends; returns what it has to call: for the last thread, `_last_ended`."""
        with self._lock:
            del self._numbers[thread]
            self._measure()
            if not self.ending:  # another thread may have left its place since this one found `surplus` true
                self._replenish()
            return (None if self._numbers else self._last_ended) or (lambda: None)


class _FunctionTask:
    """A task that calls a function."""

    kind = ""
    waits_since = _INFINITE

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def service(self) -> float:
        """Call the function."""
        self._function()
        return 0.0
