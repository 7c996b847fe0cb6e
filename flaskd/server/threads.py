"""The threads that serve: one leads, at most so many run the app, the others wait until they are to lead.

This is the pattern leader/followers (Schmidt and others, Pattern-Oriented Software Architecture 2). The thread that
leads waits for events, reads and parses. When a request is complete and a place is free, it lets another thread lead
and runs the app itself: the request changes no thread. There is one thread more than places, so that one always leads.
While quick requests are run the thread keeps the lead (`flaskd.server.lead`).
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
"""Where Waitress tells of it, and where people filter it."""

_INFINITE = float("inf")
_LEAST_WAIT = 0.1
"""Seconds that even an end in a hurry leaves to idle threads, so that they are not taken for stuck ones."""


class Task(Protocol):
    """What is run in a place of its own: a connection whose request is complete, or a function."""

    @property
    def kind(self) -> str:
        """What takes about as long as this one, by name; empty where nobody can say."""

    @property
    def waits_since(self) -> float:
        """Since when it waits, a time.monotonic() moment; infinity for what may wait as long as it takes."""

    def service(self) -> float:
        """Run it; gives how many seconds that took."""


class ThreadPool(Places):
    """The threads of one server, and the queue of what is complete and has no place yet, the oldest first."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.queue: deque[Any] = deque()
        """What waits for a place; while something does, all places are taken."""
        self.started: list[threading.Thread] = []
        self.leader: threading.Thread | None = None
        """The thread that leads, or led last."""
        self._turn: Callable[[], Task | None] | None = None
        """What the thread that leads does; None before `start`."""
        self._name = ""
        self._lead = Lead()
        self._last_ended: Callable[[], None] | None = None

    def start(self, turn: Callable[[], Task | None], wake: Callable[[], None], name: str) -> None:
        """Start the threads; RuntimeError where they cannot be had.

        `turn` handles events and returns what is to be run next, or None when the thread is to end; it is called by
        one thread at a time. `wake` makes it look at `queue` and `surplus` (any thread). `name` is that of the only
        thread where there are no places.
        """
        self._turn, self._wake, self._name = turn, wake, name
        with self._lock:
            self._fill()

    def _fill(self) -> None:
        if self._turn is None:  # the number changes before the start, too
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
            except RuntimeError:  # no thread can be had
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
                kind = task.kind
                if kind and lead.keep(kind):
                    leads = lead.still_kept(kind, self._run(task))
                    if leads:
                        with lock:
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
            last = self._forget(thread)  # before the next one leads, and counts whether it is one too many
            if leads:
                lead.pass_on()
            last()

    def _run(self, task: Task) -> float:
        """Run a task; gives how many seconds it took, infinity where it failed."""
        try:
            return task.service()
        except BaseException:  # no request and no function ends a thread
            log.exception("a task of %s failed", threading.current_thread().name)
            return _INFINITE

    def take_place(self) -> bool:
        """Take a place, if one is free and no task waits for it (the thread that leads)."""
        with self._lock:
            if self._running >= self._room or self.queue:
                return False
            self._running += 1
            return True

    def take(self) -> Task | None:
        """The oldest task, if there is a place for it (the thread that leads)."""
        with self._lock:
            if self.queue and self._running < self._room:
                self._running += 1
                task: Task = self.queue.popleft()
                return task
        return None

    def _next(self) -> Task | None:
        """The oldest task for the place that has become free, or None: then the place is given up."""
        with self._lock:
            if self.queue and self._running + self._back <= self._places and not self.ending:
                task: Task = self.queue.popleft()
                return task
            self._give_up()
        return None

    # --- how many -------------------------------------------------------------------------------------------------

    @property
    def _wanted(self) -> int:
        return 0 if self.ending else self._places + self._away + 1

    @property
    def surplus(self) -> bool:
        """Whether the thread that leads is one too many, and has to end."""
        return len(self._numbers) > self._wanted

    def resize(self, size: int) -> None:
        """Change how many places there are (any thread).

        Raises CannotCreateError where the threads for them cannot be had; the number is then what it was.
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
        """Have as many free threads as there should be, or as many of them as can be had."""
        with self._lock:
            self._replenish()

    def _replenish(self) -> None:
        try:
            self._fill()
        except RuntimeError as error:
            had = len(self._numbers) - 1 - len(self.lost) - self._away
            log.warning(f"{had} of {self.size} threads: {shortage(error)}")
        self._wake()

    # --- tasks ----------------------------------------------------------------------------------------------------

    def add_task(self, task: Task) -> None:
        """Queue a task, and warn as Waitress does when it has to wait.

        For the thread that leads, and for those that run something: each of them looks at the queue afterwards.
        """
        with self._lock:
            self.queue.append(task)
            depth = len(self.queue) - self._free
        if depth > 0:
            _queue_log.warning("Task queue depth is %d", depth)

    def crowded(self, most: int) -> bool:
        """Whether so many tasks wait for a place already, while none is free (any thread)."""
        return len(self.queue) - self._free >= most

    def take_late(self, late: Callable[[float], bool]) -> Any:
        """Take the oldest connection out of the queue, if it is late, by when it came there, and no place is free."""
        with self._lock:
            return self.queue.popleft() if self.queue and self.full and late(self.queue[0].waits_since) else None

    def run(self, function: Callable[[], None]) -> None:
        """Run a function in one of the places (any thread)."""
        self.add_task(_FunctionTask(function))
        self._wake()

    def take_back(self) -> list[Any]:
        """Take every connection whose request has not been begun out of the queue."""
        with self._lock:
            tasks = [task for task in self.queue if not isinstance(task, _FunctionTask)]
            for task in tasks:
                self.queue.remove(task)
        return tasks

    # --- the end --------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Let all threads end, each when it is done with what it runs (any thread)."""
        with self._lock:
            self.ending = True
            self._measure()
            self._returns.notify_all()
        self._lead.end()
        self._wake()

    def join(self, timeout: float) -> list[threading.Thread]:
        """After `end`, wait at most `timeout` seconds for all threads; those that have not ended."""
        until = time.monotonic() + max(timeout, _LEAST_WAIT)
        for thread in self.started:
            thread.join(max(0.0, until - time.monotonic()))
        self._lead.join(max(0.0, until - time.monotonic()))
        return [thread for thread in self.started if thread.is_alive()]

    def when_the_last_ends(self, function: Callable[[], None]) -> None:
        """Call `function` once, in the last of the threads that `join` left behind; at once if that is over by now."""
        with self._lock:
            if self._numbers:
                self._last_ended = function
                return
        function()

    def _forget(self, thread: threading.Thread) -> Callable[[], None]:
        """Count a thread no more; gives what it has to do as the last one."""
        with self._lock:
            del self._numbers[thread]
            self._measure()
            if not self.ending:  # it may be missed: since it found that it was one too many, another left its place
                self._replenish()
            return (None if self._numbers else self._last_ended) or (lambda: None)


class _FunctionTask:
    """A function in the shape of a task."""

    kind = ""
    waits_since = _INFINITE

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def service(self) -> float:
        """Run it."""
        self._function()
        return 0.0
