"""The end of a process that is flaskd's own: what the app has left to it is done while there is time."""

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
from dataclasses import dataclass
from typing import Any, NoReturn

from flaskd.process.threads import name_of, waited_for

log = logging.getLogger("flaskd.leave")

_EXIT_WAIT = 5.0
"""Seconds that the app has where no stop says how long; the default of `shutdown.exit_wait`."""
_LAST_WORDS = 0.2
"""Seconds that standard output and standard error get; who reads them may have stalled."""
_LEAST = 0.1
"""Seconds that even an end in a hurry has: what needs no time at all is not cut."""
_FINALIZING = 0.4
"""Seconds that finalizers have, even at the deadline: an interpreter with many modules takes some of it for itself."""
_LOOK = 0.05
"""Seconds after which who watches looks again."""
_MOST_FRAMES = 30
_OTHERS = {"flaskd", "logging", "multiprocessing", "weakref"}
"""Packages whose own exit callbacks are no news: they do something if the app has given them something to do."""


@dataclass(frozen=True)
class Unfinished:
    """Work that was accepted, or left to the end of the process, and cut; `stack` is where it was."""

    name: str
    stack: str = ""

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `stack` is there when it is known."""
        return {"name": self.name, **({"stack": self.stack} if self.stack else {})}


def at_exit() -> list[str]:
    """What the end of the process would wait for now: the app's threads and children, and its exit callbacks.

    But no executor's: those are ended by a step of the cleanup.
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
    """The functions that the app has registered with `atexit`, in the order in which they will be called."""
    return [f"atexit/{_called(each)}" for each in _registered() if not _of_others(each)]


def _registered() -> list[Callable[..., object]]:
    """All registered functions, in the order in which they will be called: the last one first.

    `atexit.unregister` compares each with what it is given, and is given something here that is equal to none.
    """
    seen: list[Callable[..., object]] = []

    class Onlooker:
        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            seen.append(other)  # type: ignore[arg-type]  # it can be called, or atexit would not have taken it
            return False

    with contextlib.suppress(Exception):  # an object of the app's that cannot be compared: those before it are known
        atexit.unregister(Onlooker())  # type: ignore[arg-type]
    return seen if sys.version_info >= (3, 14) else seen[::-1]  # where they are kept the other way round


def _called(function: Any) -> str:
    function = getattr(function, "func", function)  # functools.partial
    return (
        f"{getattr(function, '__module__', None) or '?'}.{getattr(function, '__qualname__', type(function).__name__)}"
    )


def _of_others(function: Any) -> bool:
    return _called(function).partition(".")[0] in _OTHERS


class Ending:
    """What the app has left to the interpreter's end: threads that are no daemons, exit callbacks, children, `__del__`.

    The first three have their time while all of flaskd still works, in `run`, and the last in `leave`. What takes
    longer than `left` gives seconds is cut.
    """

    def __init__(self) -> None:
        self.left: Callable[[], float] = _for_seconds(_EXIT_WAIT)
        """Seconds that there still are for it."""
        self.late_code: int | None = None
        """The exit code where finalizers are cut; None: the same as without."""
        self.settle: Callable[[], object] | None = None
        """Called at the very end, if nothing is cut; it must use nothing but built-in functions that it holds."""
        self.unsettle: Callable[[], object] | None = None
        """Called instead where finalizers are cut while Python still runs."""
        self.begun = False
        self._done = threading.Event()
        self._deciding = threading.Lock()
        self._cut = False
        self._orders: queue.SimpleQueue[Callable[[tuple[Unfinished, ...]], object]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="flaskd-exit", daemon=True)

    def start(self) -> None:
        """Start the thread that keeps the time; at the end there may be none to be had. Raises RuntimeError."""
        if self._thread.ident is None:
            self._thread.start()

    def hurry(self, seconds: float) -> None:
        """Leave it at most so many seconds from now (any thread)."""
        before, now = self.left, _for_seconds(seconds)
        self.left = lambda: min(before(), now())

    def run(self, *, cut: Callable[[tuple[Unfinished, ...]], object]) -> None:
        """Wait for the app's threads and call its exit callbacks, as the interpreter would; main thread only.

        When time is up, `cut` is called in a thread of its own with what is not over, and has to end the process: this
        does not return then.
        """
        self.begun = True
        self._orders.put(cut)
        # Threads once more: begun by an exit callback, or left by what failed.
        for each in (threading._shutdown, _run_exit_callbacks, _join_threads):  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
            try:
                each()
            except BaseException:  # code of the app; what is left of it has its turn all the same
                log.exception("what the app has left to the process' end has failed")
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
    """What the end of the process would still wait for: threads, children, exit callbacks; for who cuts it."""
    frames = sys._current_frames()  # noqa: SLF001 - public in all but its name

    def stack(thread: threading.Thread) -> str:
        return "".join(traceback.format_stack(frames.get(thread.ident or 0), limit=_MOST_FRAMES))

    main = threading.main_thread()
    found = [Unfinished(f"thread/{name_of(each)}", stack(each)) for each in waited_for()]
    found += [Unfinished(each) for each in _waiting_jobs()]
    children = _children()
    found += [Unfinished(f"process/{each.name} (pid {each.pid})") for each in children]
    called, waiting = _callbacks(frames.get(main.ident or 0))
    if called and not (children and called.startswith("atexit/multiprocessing.")):
        found.append(Unfinished(called, stack(main).rpartition(f", in {_run_exit_callbacks.__name__}\n")[2]))
    return (*found, *map(Unfinished, waiting))


def _children() -> list[Any]:
    """The processes of multiprocessing that are alive."""
    module = sys.modules.get("multiprocessing")
    return list(module.active_children()) if module is not None else []


def _waiting_jobs() -> Iterator[str]:
    """Jobs that no thread of their executor has begun; taken out of its queue, so that none begins any more."""
    executors: Any = vars(sys.modules.get("concurrent.futures.thread", object)).get("_threads_queues")
    # The references are had at once, while the app may start threads of executors: items() would fail then.
    threads = [thread for each in executors.keyrefs() if (thread := each()) is not None] if executors else []
    found = {id(jobs): (thread, jobs) for thread in threads if (jobs := executors.get(thread)) is not None}
    for thread, jobs in found.values():
        count = 0
        with contextlib.suppress(queue.Empty):
            while True:
                count += jobs.get_nowait() is not None  # which is how it is told to end
        if count:
            yield f"executor/{thread.name.rpartition('_')[0]}: {count} {'job' if count == 1 else 'jobs'} not begun"


def _callbacks(frame: Any) -> tuple[str, list[str]]:
    """The exit callback that the main thread is in, if it is in one, and those of the app that come after it."""
    inner = None
    while frame is not None and frame.f_code is not _run_exit_callbacks.__code__:
        inner, frame = frame, frame.f_back
    ours = [(_called(each), _of_others(each)) for each in _registered()]
    if frame is None:  # the threads come first
        return "", [f"atexit/{name}" for name, others in ours if not others]
    running = f"{inner.f_globals.get('__name__', '?')}.{inner.f_code.co_qualname}" if inner is not None else ""
    names = [name for name, _ in ours]
    after = ours[names.index(running) + 1 :] if running in names else []
    return f"atexit/{running or 'a built-in function'}", [f"atexit/{name}" for name, others in after if not others]


def leave(code: int, ending: Ending) -> NoReturn:
    """End the process with `code`, once the app's objects are finalized, or the time of `ending` is up.

    The end is ``os._exit``: what cannot be written to the standard streams does not change the exit code then, as it
    does at the interpreter's own end (120, Py_FinalizeEx).
    """
    _heed_signals(lambda *_: os._exit(code))
    try:
        if not ending.begun:  # a start that failed: the app may have been imported
            ending.start()
            ending.left = _for_seconds(_EXIT_WAIT)
            ending.run(cut=lambda cut: _cut_short(cut, code))
        # From here on no handler of Python's is called, and what is ignored stays so: a second Ctrl-C that a wrapper
        # forwarded must not turn the exit code into a signal's.
        _heed_signals(signal.SIG_IGN)
        late_code = code if ending.late_code is None else ending.late_code
        if not _in_time(_flush):  # the interpreter would wait for it, and finalize nothing
            if ending.unsettle is not None:
                ending.unsettle()
            os._exit(late_code)
        _end_in_time(max(_FINALIZING, ending.left()), late_code)
    except RuntimeError:  # no thread can be had that keeps the time: nothing is waited for, finalizers neither
        if ending.settle is not None:
            ending.settle()
        os._exit(code)
    sys.flaskd_end = _End(code, ending.settle)  # type: ignore[attr-defined]
    sys.exit(code)


class _End:
    """Kept where the interpreter looks last; when it is dropped, all modules of the app have been."""

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
    """End the process with `code` after so many seconds, whatever it does: no Python runs any more by then.

    The stacks are written to standard error before. Where the C library cannot be asked, the code is 1.
    """
    by_the_library = _timer(seconds + _LOOK, code)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error
        faulthandler.dump_traceback_later(seconds, exit=not by_the_library, file=stacks_go_to())


def _timer(seconds: float, code: int) -> bool:
    """Have the C library call ``_exit(code)`` after so many seconds, in a thread of its own (timer_create(2))."""
    try:
        import ctypes  # noqa: PLC0415 - not everywhere; where memory cannot be made executable it may not load

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
"""<bits/sigevent-consts.h>, the same in musl; for others `_timer` finds no such call."""


@functools.cache
def stacks_go_to() -> int:
    """A descriptor for the last stacks that cannot block: standard error opened anew, where that can be done."""
    with contextlib.suppress(OSError, AttributeError):  # a socket, as in the journal; no /proc; Windows
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC)
    return 2


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, closed, or never there
            stream.flush()


def renew_standard_error() -> None:
    """Give the program a new standard error, on the same file, where what is in the old one's buffer cannot be written.

    That would fail once more at the program's end, and make its exit code 120 (Py_FinalizeEx).
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
    """Say something that may block, in a thread of its own; whether it was over within its time."""
    thread = threading.Thread(target=words, name="flaskd-last-words", daemon=True)
    thread.start()
    thread.join(_LAST_WORDS)
    return not thread.is_alive()
