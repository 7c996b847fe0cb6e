"""The end of a process that belongs to flaskd: what the app has left to the end runs first, within a time limit."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import io
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from flaskd.process.threads import name_of, waited_for
from flaskd.values import value

log = logging.getLogger("flaskd.leave")

_EXIT_WAIT = 5.0
"""Seconds for what the app has left to the end, if there was no stop; the default of `shutdown.exit_wait`."""
_LAST_WORDS = 0.2
"""Seconds for the last output on standard output and standard error, whose reader may have stalled."""
_LEAST = 0.1
"""Least seconds for the end, so that what needs almost no time is not cut."""
_FINALIZING = 0.4
"""Least seconds for finalizers, even at the deadline: an interpreter with many modules needs a part of it itself."""
_LOOK = 0.05
"""Seconds between two looks of the thread that watches the time."""
_MOST_FRAMES = 30
_OTHERS = {"flaskd", "logging", "multiprocessing", "weakref"}
"""Packages whose own exit callbacks are not listed: they matter only if the app has given them something to do."""


@value
class Unfinished:
    """Work that was cut: accepted by the app, or left to the process' end; `stack` is the thread's stack."""

    name: str
    stack: str = ""

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `stack` is left out if it is not known."""
        return {"name": self.name, **({"stack": self.stack} if self.stack else {})}


def at_exit() -> list[str]:
    """What the end of the process would wait for now: the app's threads and children, and its exit callbacks.

    Threads and children of executors are left out: a step of the cleanup ends them.
    """
    executors = vars(sys.modules.get("concurrent.futures.thread", object)).get("_threads_queues", {})
    threads = waited_for()
    of_processes = [each for each in threads if type(each).__module__ == "concurrent.futures.process"]
    theirs = {pid for each in of_processes for pid in getattr(each, "processes", None) or ()}
    return [
        *(f"thread/{name_of(each)}" for each in threads if each not in executors and each not in of_processes),
        *(f"process/{each.name}" for each in _children() if each.pid not in theirs),
        *_exit_callbacks(),
    ]


def _exit_callbacks() -> list[str]:
    """The names of the functions that the app has registered with `atexit`, in the order of their calls."""
    return [f"atexit/{_called(each)}" for each in _registered() if not _of_others(each)]


def _registered() -> list[Callable[..., object]]:
    """All functions that are registered with `atexit`, in the order of their calls: the last one first.

    `atexit.unregister` compares each function with its argument. The argument here notes them, and is equal to none.
    """
    seen: list[Callable[..., object]] = []

    class Onlooker:
        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            seen.append(other)  # type: ignore[arg-type]  # callable, or atexit would have refused it
            return False

    with contextlib.suppress(Exception):  # an object of the app that cannot be compared
        atexit.unregister(Onlooker())  # type: ignore[arg-type]
    return seen if sys.version_info >= (3, 14) else seen[::-1]  # 3.14 keeps them in the other order


def _called(function: Any) -> str:
    function = getattr(function, "func", function)  # functools.partial
    return (
        f"{getattr(function, '__module__', None) or '?'}.{getattr(function, '__qualname__', type(function).__name__)}"
    )


def _of_others(function: Any) -> bool:
    return _called(function).partition(".")[0] in _OTHERS


class Ending:
    """Runs what the app has left to the interpreter's end: non-daemon threads, exit callbacks, children, `__del__`.

    The first three run in `run`, while all of flaskd still works, and the last in `leave`. What takes longer than the
    seconds that `left` returns is cut.
    """

    def __init__(self) -> None:
        self.left: Callable[[], float] = _for_seconds(_EXIT_WAIT)
        """Returns how many seconds are left for it."""
        self.late_code: int | None = None
        """The exit code if finalizers are cut; None: the same code as otherwise."""
        self.settle: Callable[[], object] | None = None
        """Called as the last action, if nothing is cut; it may use only built-in functions that it refers to."""
        self.unsettle: Callable[[], object] | None = None
        """Called in its place if finalizers are cut while Python still runs."""
        self.begun = False
        self._done = threading.Event()
        self._deciding = threading.Lock()
        self._cut = False
        self._orders: queue.SimpleQueue[Callable[[tuple[Unfinished, ...]], object]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="flaskd-exit", daemon=True)

    def start(self) -> None:
        """Start the thread that watches the time; at the end it may be too late for that. Raises RuntimeError."""
        if self._thread.ident is None:
            self._thread.start()

    def hurry(self, seconds: float) -> None:
        """Allow at most `seconds` from now on (any thread)."""
        before, now = self.left, _for_seconds(seconds)
        self.left = lambda: min(before(), now())

    def run(self, *, cut: Callable[[tuple[Unfinished, ...]], object]) -> None:
        """Wait for the app's threads and call its exit callbacks, as the interpreter would; main thread only.

        When the time is over, `cut` is called in another thread with what has not finished. It has to end the process:
        this method does not return then.
        """
        self.begun = True
        self._orders.put(cut)
        # Threads are joined again at the end: an exit callback may have started some, or a failure left some.
        for each in (threading._shutdown, _run_exit_callbacks, _join_threads):  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
            try:
                each()
            except BaseException:  # from code of the app; the rest still runs
                log.exception("the app's threads or exit callbacks failed at the end of the process")
        with self._deciding:
            if not self._cut:
                self._done.set()
                return
        threading.Event().wait()

    def _watch(self) -> None:
        cut = self._orders.get()
        until = time.monotonic() + _LEAST
        while not self._done.wait(_LOOK):
            if self.left() <= 0 and time.monotonic() >= until:
                with self._deciding:
                    if self._done.is_set():
                        return
                    self._cut = True
                cut(unfinished())
                return


def _for_seconds(seconds: float) -> Callable[[], float]:
    until = time.monotonic() + seconds
    return lambda: until - time.monotonic()


def _join_threads() -> None:
    for thread in waited_for():
        thread.join()


def _run_exit_callbacks() -> None:
    atexit._run_exitfuncs()  # noqa: SLF001 - as multiprocessing does


def unfinished() -> tuple[Unfinished, ...]:
    """What the end of the process would still wait for: threads, jobs, children, exit callbacks. To be cut now."""
    main = threading.main_thread()
    found = [Unfinished(f"thread/{name_of(each)}", _stack(each)) for each in waited_for()]
    found += [Unfinished(each) for each in _waiting_jobs()]
    children = _children()
    found += [Unfinished(f"process/{each.name} (pid {each.pid})") for each in children]
    called, waiting = _callbacks(_frame(main))
    if called and not (children and called.startswith("atexit/multiprocessing.")):
        found.append(Unfinished(called, _stack(main).rpartition(f", in {_run_exit_callbacks.__name__}\n")[2]))
    return (*found, *map(Unfinished, waiting))


def _children() -> list[Any]:
    """The living child processes of multiprocessing."""
    module = sys.modules.get("multiprocessing")
    return list(module.active_children()) if module is not None else []


def _waiting_jobs() -> Iterator[str]:
    """Jobs that no thread of their executor has begun; takes them out of its queue, so that they cannot begin."""
    executors: Any = vars(sys.modules.get("concurrent.futures.thread", object)).get("_threads_queues")
    # keyrefs() is one step, and the app may start threads of executors meanwhile: items() would fail then.
    threads = [thread for each in executors.keyrefs() if (thread := each()) is not None] if executors else []
    found = {id(jobs): (thread, jobs) for thread in threads if (jobs := executors.get(thread)) is not None}
    for thread, jobs in found.values():
        count = 0
        with contextlib.suppress(queue.Empty):
            while True:
                count += jobs.get_nowait() is not None  # None tells a thread to end
        if count:
            yield f"executor/{thread.name.rpartition('_')[0]}: {count} {'job' if count == 1 else 'jobs'} not begun"


def _frame(thread: threading.Thread) -> Any:
    # The frames of all threads are not kept: this one's own is among them, and the cycle would keep the app's objects.
    return sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - a documented function


def _stack(thread: threading.Thread) -> str:
    frame = _frame(thread)
    return "".join(traceback.format_stack(frame, limit=_MOST_FRAMES)) if frame is not None else ""


def _callbacks(frame: Any) -> tuple[str, list[str]]:
    """The exit callback that the main thread is running ("" if none), and the app's callbacks that come after it."""
    inner = None
    while frame is not None and frame.f_code is not _run_exit_callbacks.__code__:
        inner, frame = frame, frame.f_back
    ours = [(_called(each), _of_others(each)) for each in _registered()]
    if frame is None:  # threads are still being joined
        return "", [f"atexit/{name}" for name, others in ours if not others]
    running = f"{inner.f_globals.get('__name__', '?')}.{inner.f_code.co_qualname}" if inner is not None else ""
    names = [name for name, _ in ours]
    after = ours[names.index(running) + 1 :] if running in names else []
    return f"atexit/{running or 'a built-in function'}", [f"atexit/{name}" for name, others in after if not others]


def leave(code: int, ending: Ending) -> NoReturn:
    """End the process with `code`, after the app's objects were finalized, or when the time of `ending` is over.

    The last call is ``os._exit``. The interpreter's own end would change the exit code to 120 if the standard streams
    cannot be written (Py_FinalizeEx).
    """
    _heed_signals(lambda *_: os._exit(code))
    try:
        if not ending.begun:  # a start that failed: the app may have been imported
            ending.start()
            ending.left = _for_seconds(_EXIT_WAIT)
            ending.run(cut=lambda cut: _cut_short(cut, code))
        # From here on Python calls no signal handlers, so signals are ignored: a second Ctrl-C, forwarded by a wrapper,
        # must not kill the process and so change its exit code.
        _heed_signals(signal.SIG_IGN)
        late_code = code if ending.late_code is None else ending.late_code
        # The interpreter would wait for the streams, too. And for the threads that are left it calls pthread_exit(3),
        # for which the C library opens libgcc_s: without a descriptor for that the process would abort.
        if not _in_time(_flush) or not _can_open_a_file():
            if ending.unsettle is not None:
                ending.unsettle()
            os._exit(late_code)
        _end_in_time(max(_FINALIZING, ending.left()), late_code)
    except RuntimeError:  # no thread can be started to watch the time: wait for nothing, and run no finalizers
        if ending.settle is not None:
            ending.settle()
        os._exit(code)
    sys.flaskd_end = _End(code, ending.settle)  # type: ignore[attr-defined]
    sys.exit(code)


def _can_open_a_file() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    return True


class _End:
    """Ends the process in its `__del__`. The interpreter drops it last, after all modules of the app."""

    def __init__(self, code: int, settle: Callable[[], object] | None) -> None:
        self._code, self._settle, self._exit = code, settle, os._exit

    def __del__(self) -> None:
        try:
            if self._settle is not None:
                self._settle()
        finally:
            self._exit(self._code)


def _heed_signals(how: Any) -> None:
    for number in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, number):
            signal.signal(getattr(signal, number), how)


def _cut_short(cut: tuple[Unfinished, ...], code: int) -> NoReturn:
    try:
        words = f"flaskd: leaving without waiting for {', '.join(each.name for each in cut) or 'exit callbacks'}\n"
        _in_time(lambda: sys.stderr.write(words))
    finally:
        os._exit(code)


def _end_in_time(seconds: float, code: int) -> None:
    """End the process with `code` after `seconds`, whatever it does; by then no Python code can do it.

    Before that, the stacks are written to standard error. If the C library cannot set the timer, the code is 1.
    """
    by_the_library = _timer(seconds + _LOOK, code)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error
        faulthandler.dump_traceback_later(seconds, exit=not by_the_library, file=stacks_go_to())


def _timer(seconds: float, code: int) -> bool:
    """Have the C library call ``_exit(code)`` after `seconds`, in a thread of its own (timer_create(2))."""
    try:
        import ctypes  # noqa: PLC0415 - may be missing, or fail where memory must not be executable

        class SigEvent(ctypes.Structure):
            _fields_ = (
                ("value", ctypes.c_void_p),
                ("signo", ctypes.c_int),
                ("notify", ctypes.c_int),
                ("function", ctypes.c_void_p),
                ("rest", ctypes.c_void_p * 8),
            )

        class ITimerSpec(ctypes.Structure):
            _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))

        library = ctypes.CDLL(None)
        event = SigEvent(code, 0, _SIGEV_THREAD, ctypes.cast(library["_exit"], ctypes.c_void_p))
        timer, whole = ctypes.c_void_p(), int(seconds)
        length = ITimerSpec((0, 0), (whole, int((seconds - whole) * 1e9)))
        if library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
            return False
        return not library.timer_settime(timer, 0, ctypes.byref(length), None)
    except (ImportError, AttributeError, TypeError, OSError, MemoryError):
        return False


_SIGEV_THREAD = 2
"""From <bits/sigevent-consts.h>; musl has the same value, and on other systems `_timer` fails before it is used."""


@functools.cache
def stacks_go_to() -> int:
    """A descriptor for the last stacks: standard error, opened again without blocking if that is possible."""
    with contextlib.suppress(OSError, AttributeError):  # a socket, as in the journal; no /proc; Windows
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC)
    return 2


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never open
            stream.flush()


def renew_standard_error() -> None:
    """Replace standard error by a new object on the same file, if the buffer of the old one cannot be written.

    Otherwise the write would fail again at the program's end, and change its exit code to 120 (Py_FinalizeEx).
    """
    old, failed = sys.stderr, []

    def flush() -> None:
        try:
            old.flush()
        except OSError as error:
            failed.append(error)

    if isinstance(old, io.TextIOWrapper) and _in_time(flush) and failed:
        sys.stderr = os.fdopen(old.fileno(), "w", buffering=1, encoding=old.encoding, errors=old.errors, closefd=False)


def _in_time(words: Callable[[], object]) -> bool:
    """Call `words`, which may block, in a thread of its own; returns whether it ended within `_LAST_WORDS` seconds."""
    thread = threading.Thread(target=words, name="flaskd-last-words", daemon=True)
    thread.start()
    thread.join(_LAST_WORDS)
    return not thread.is_alive()
