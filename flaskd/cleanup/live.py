"""Actions on live objects: pools, clients, schedulers, executors, threads, processes, telemetry.

Each ends the objects that its policy names, else all of its kind that discovery found. Several are ended side by side,
so that one that hangs keeps none of the others; every one may be ended twice. The calls are the libraries' own, found
on the objects: nothing is imported here for them.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import operator
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any

from flaskd.cleanup.context import StepContext, StepFailedError, StepTimedOutError
from flaskd.cleanup.discovery import discover
from flaskd.config import Duration, Fields, OneOrMany, Settings
from flaskd.config.kinds import checked
from flaskd.config.settings import field
from flaskd.objects import contents_of
from flaskd.process.forks import AppCode
from flaskd.process.threads import AppThread
from flaskd.stacks import stack_of

End = Callable[[Any, StepContext, Any], str | None]
"""Ends one object within the time of the context; returns a detail or None, raises to fail."""

TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""An object of the app, as a target is written."""
_AT_A_TIME = 8
_LOOK = 0.1
"""Seconds after which a wait looks whether the stop is in a hurry."""
_MOST_NAMED = 3
_NO_STORE = "flaskd: none"


def _target(text: str) -> str:
    if not TARGET.fullmatch(text):
        raise ValueError("expected MODULE:ATTRIBUTE, such as shop.db:pool")
    return text


Target = Annotated[str, checked(_target)]
"""An object of the app, as MODULE:ATTRIBUTE; dots lead on to attributes of it."""


class LiveFields(Settings):
    """Fields of the actions on live objects."""

    target: OneOrMany[Target] = field(
        default=[], description="What to end, as MODULE:ATTRIBUTE; none: all of the kind that discovery finds."
    )


class SchedulerFields(LiveFields):
    """Fields of ``apscheduler.stop``."""

    wait: bool = field(True, description="Wait for the jobs that run; false: leave them to themselves.")


class ThreadsFields(LiveFields):
    """Fields of ``threads.stop``."""

    stop: Target = field(
        description="What asks the threads to end, as MODULE:ATTRIBUTE: an Event to set, or a function."
    )


class ProcessesFields(LiveFields):
    """Fields of ``processes.stop``."""

    kill_grace: Duration = field(2.0, description="How long after SIGTERM a process gets SIGKILL.", ge=0)


def look_up(target: str) -> Any:
    """Import ``pkg.mod:attribute``; raises StepFailedError naming the target and what is wrong with it."""
    module, _, attribute = target.partition(":")
    try:
        with AppCode():
            return operator.attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        raise StepFailedError(f'cannot import target "{target}": {type(error).__name__}: {error}') from error


def look_up_targets(fields: Fields) -> None:
    """Make sure, before the stop, that what a policy names is there; what it is may still change."""
    for target in [*getattr(fields, "target", []), *filter(None, [getattr(fields, "stop", None)])]:
        look_up(target)


def targets(fields: Fields) -> list[tuple[str, Any]]:
    """The objects that a policy names, each with its name; a collection stands for what is in it, None for nothing."""
    return [(name, each) for name in getattr(fields, "target", []) for each in _each_in(look_up(name))]


def loaded(name: str) -> list[Any]:
    """The objects at MODULE:ATTRIBUTE, as far as it is one and they are there; imports and loads nothing."""
    if not TARGET.fullmatch(name):
        return []
    module, _, attributes = name.partition(":")
    try:
        first, *more = attributes.split(".")
        found = contents_of(module)[first]
        return list(_each_in(operator.attrgetter(".".join(more))(found) if more else found))
    except Exception:  # noqa: BLE001 - the app's own object was asked; its policy will tell what is wrong with it
        return []


def _each_in(value: Any) -> Iterable[Any]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return tuple(value.values())
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)


def _wanted(use: str, context: StepContext, fields: Fields) -> list[tuple[str, Any]]:
    if getattr(fields, "target", None):
        return targets(fields)
    found = discover(context.app) if context.found is None else context.found
    return [(each.name, thing) for each in found if each.use == use and (thing := each.object) is not None]


class _Ending:
    """Several objects being ended side by side, in threads of their own."""

    def __init__(self, end: End, things: list[tuple[str, Any]], context: StepContext, fields: Fields) -> None:
        self._end, self._context, self._fields = end, context, fields
        self._names = [name for name, _ in things]
        self._left: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._over: queue.SimpleQueue[tuple[int, str | BaseException | None] | None] = queue.SimpleQueue()
        self._at: dict[int, threading.Thread] = {}
        for place, (name, thing) in enumerate(things):
            self._left.put((place, name, thing))

    def _work(self) -> None:
        while True:
            try:
                place, _, thing = self._left.get_nowait()
            except queue.Empty:
                return
            self._at[place] = threading.current_thread()
            try:
                with AppCode():
                    outcome: str | BaseException | None = self._end(thing, self._context, self._fields)
            except BaseException as error:  # noqa: BLE001 - a driver may raise anything; it is the step's failure
                outcome = error
            self._over.put((place, outcome))

    def run(self) -> dict[int, str | BaseException | None]:
        """Give what became of each that was over in time, by its place."""
        self._context.on_hurry = lambda: self._over.put(None)
        threads: list[threading.Thread] = []
        for number in range(min(len(self._names), _AT_A_TIME)):
            name = f"flaskd-cleanup-{self._context.policy}-{number}"
            thread = AppThread(target=self._work, name=name)
            try:
                thread.start()
                threads.append(thread)
            except RuntimeError:  # no more threads: here, then
                self._work()
        ended: dict[int, str | BaseException | None] = {}
        while len(ended) < len(self._names):
            try:  # who watches the time itself is given a moment to say so
                word = self._over.get(timeout=self._context.remaining() + self._context.slack / 2)
            except queue.Empty:
                break
            if word is not None:
                ended[word[0]] = word[1]
        if len(ended) == len(self._names):
            for each in threads:  # their work is done, and they end
                each.join(1)
        return ended

    def stacks(self, silent: list[int], late: list[StepTimedOutError]) -> str:
        """Where those that hang are: the threads here, and what others have said of theirs."""
        threads = [self._at[place] for place in silent if place in self._at]
        return "\n".join([*(stack_of(each, below=__file__) for each in threads), *(each.trace for each in late)])


def _run(use: str, end: End, context: StepContext, fields: Fields) -> str | None:
    """End all that is wanted; one that fails or hangs is named, and the others are ended all the same."""
    things = _wanted(use, context, fields)
    if not things:
        return "there is nothing to end"
    names = [name for name, _ in things]
    ending = _Ending(end, things, context, fields)
    ended = ending.run()
    silent = [place for place in range(len(things)) if place not in ended]
    faults = [each for each in ended.values() if isinstance(each, BaseException)]
    late = [each for each in faults if isinstance(each, StepTimedOutError)]
    if len(things) == len(faults) == 1 and not late:
        raise faults[0]
    said = [f"{names[place]}: {_words(outcome)}" for place, outcome in sorted(ended.items()) if outcome]
    if silent or late:
        said += [f"not over: {_listed([names[place] for place in silent])}"] if silent else []
        cut = tuple(
            f"{names[place]}: {work}"
            for place, each in sorted(ended.items())
            if isinstance(each, StepTimedOutError)
            for work in each.cut
        )
        raise StepTimedOutError("; ".join([context.overrun(), *said]), ending.stacks(silent, late), cut)
    if faults:
        raise StepFailedError("; ".join(said))
    return "; ".join(said if len(said) == len(things) else [_listed(names), *said])


def _words(outcome: str | BaseException) -> str:
    if isinstance(outcome, (str, StepFailedError)):
        return str(outcome)
    return f"{type(outcome).__name__}: {outcome}"


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def ending(use: str, end: End) -> Callable[[StepContext, Any], str | None]:
    """Make what an action runs of what ends one object."""
    return partial(_run, use, end)


def _joined(thread: threading.Thread, until: Callable[[], float]) -> bool:
    """Wait for the thread while `until` gives seconds; whether it is over."""
    while thread.is_alive() and (left := until()) > 0:
        thread.join(min(left, _LOOK))
    return not thread.is_alive()


def dispose(engine: Any, _context: StepContext, _fields: LiveFields) -> None:
    """Close the engine's connections that are checked in (sqlalchemy.engine.Engine.dispose)."""
    engine.dispose()


def close_pool(pool: Any, context: StepContext, _fields: LiveFields) -> None:
    """Close a psycopg pool (psycopg_pool.ConnectionPool.close); it waits for its own threads at most so long."""
    pool.close(timeout=max(_LOOK, context.remaining() * 0.9))


def close_redis(client: Any, _context: StepContext, _fields: LiveFields) -> None:
    """Close a client, and its pool, which a client that was given one leaves open (redis.Redis.close); or a pool."""
    if hasattr(client, "close"):
        client.close()
    pool = getattr(client, "connection_pool", client)
    if hasattr(pool, "disconnect"):
        pool.disconnect()


def close_http(client: Any, _context: StepContext, _fields: LiveFields) -> None:
    """Close the connections that it keeps (httpx.Client.close, requests.Session.close)."""
    client.close()


def pause_scheduler(scheduler: Any, _context: StepContext, _fields: SchedulerFields) -> None:
    """Begin no more rounds (APScheduler 3: BaseScheduler.pause, which waits for nothing)."""
    if scheduler.running:
        scheduler.pause()


def stop_scheduler(scheduler: Any, context: StepContext, fields: SchedulerFields) -> None:
    """Shut it down (APScheduler 3: BaseScheduler.shutdown, which knows no timeout and refuses a second time).

    Paused first, should it not be, and then asked for the jobs of a store that it does not have: that waits for the
    round that its thread is at. A shutdown in the middle of one makes the thread raise.
    """
    pause_scheduler(scheduler, context, fields)
    if scheduler.running:
        scheduler.get_jobs(jobstore=_NO_STORE)
        _let_stop_again(scheduler)
        scheduler.shutdown(wait=fields.wait)


def _let_stop_again(scheduler: Any) -> None:
    """Make further shutdowns harmless: the app's own, at exit (atexit) or in a function of its own, would raise."""
    shutdown = scheduler.shutdown

    class OfThisScheduler:
        """Equal to all callbacks at exit that are its shutdown: the method, or a partial of it."""

        __hash__ = None  # type: ignore[assignment]  # it is compared alone

        def __eq__(self, callback: object) -> bool:
            return callback == shutdown or (type(callback) is partial and self == callback.func)

    def shut_down_if_running(*args: Any, **kwargs: Any) -> None:
        if scheduler.running:
            shutdown(*args, **kwargs)

    atexit.unregister(OfThisScheduler())  # type: ignore[arg-type]  # which compares its callbacks with it
    scheduler.shutdown = shut_down_if_running


def stop_executor(executor: Any, context: StepContext, _fields: LiveFields) -> str | None:
    """Take no more jobs, and finish those it has until the timeout; then cancel what has not begun.

    (concurrent.futures.Executor.shutdown.) Its threads and its queue are private (Python 3.11 to 3.14); without a look
    at them there is no waiting with a timeout, and no telling what was cancelled.
    """
    inside = vars(executor)
    pending = dict(inside.get("_pending_work_items") or {})  # of processes; forgotten by the shutdown
    threads = [*filter(None, [inside.get("_executor_manager_thread")])]  # likewise
    executor.shutdown(wait=False)
    threads += inside.get("_threads", ())  # none is added any more
    busy = [thread for thread in threads if not _joined(thread, context.remaining)]
    if not busy:
        return None
    cancelled = _cancel_waiting(inside.get("_work_queue")) + sum(each.future.cancel() for each in pending.values())
    said = [f"{len(busy)} still busy", f"{cancelled} cancelled" if cancelled else ""]
    cut = (f"{cancelled} {'job' if cancelled == 1 else 'jobs'} not begun",) if cancelled else ()
    raise StepTimedOutError(", ".join(filter(None, said)), "".join(stack_of(thread) for thread in busy), cut)


def _cancel_waiting(jobs: queue.SimpleQueue[Any] | None) -> int:
    """Cancel the jobs in the queue of an executor of threads, as its shutdown does, but count them."""
    count = 0
    with contextlib.suppress(queue.Empty):
        while jobs is not None:
            if (job := jobs.get_nowait()) is not None:  # which is the word to end
                count += job.future.cancel()
    if jobs is not None:
        jobs.put(None)
    return count


def stop_threads(context: StepContext, fields: ThreadsFields) -> str | None:
    """Ask the threads to end, once, and wait for each."""
    ask = look_up(fields.stop)
    if isinstance(ask, threading.Event):
        ask.set()
    elif callable(ask):
        ask()
    else:
        raise StepFailedError(f'target "{fields.stop}": expected an Event or a function, got {type(ask).__name__}')
    return _run("threads.stop", _join_thread, context, fields)


def _join_thread(thread: Any, context: StepContext, _fields: ThreadsFields) -> None:
    if not _joined(thread, context.remaining):
        raise StepTimedOutError("still running", stack_of(thread))


def stop_process(process: Any, context: StepContext, fields: ProcessesFields) -> str | None:
    """Terminate, wait, kill, wait: a multiprocessing.Process or a subprocess.Popen."""
    if _over(process, 0):
        return None
    process.terminate()
    kill_at = context.budget.now() + fields.kill_grace
    if _ends(process, lambda: min(kill_at - context.budget.now(), context.remaining() - 2 * _LOOK)):
        return None
    process.kill()
    if _ends(process, context.remaining):
        return "killed"
    raise StepTimedOutError(f"pid {process.pid} was killed and is not gone")


def _ends(process: Any, until: Callable[[], float]) -> bool:
    """Wait for the process while `until` gives seconds; whether it is over."""
    while not (over := _over(process, max(0.0, min(until(), _LOOK)))) and until() > 0:
        pass
    return over


def _over(process: Any, timeout: float) -> bool:
    library = sys.modules.get("subprocess")  # whose Popen only an app has that has imported it
    if library is not None and isinstance(process, library.Popen):
        try:
            process.wait(timeout)
        except library.TimeoutExpired:
            return False
        return True
    process.join(timeout)
    return process.exitcode is not None


def flush_sentry(client: Any, context: StepContext, _fields: LiveFields) -> None:
    """Send what is queued (sentry_sdk.Client.flush); it keeps its timeout, and does not say whether that was enough."""
    timeout = context.remaining()
    began = time.monotonic()
    client.flush(timeout=timeout)
    if time.monotonic() - began >= timeout:
        raise StepTimedOutError("events may be lost")


def shut_down_telemetry(provider: Any, _context: StepContext, _fields: LiveFields) -> None:
    """Export what is buffered, and end (OpenTelemetry: TracerProvider, MeterProvider, LoggerProvider .shutdown).

    It knows no timeout that it keeps, so the step's own is the one that counts.
    """
    provider.shutdown()
