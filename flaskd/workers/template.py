"""A template: a process that imports the app with one thread, and is forked into the workers of its generation.

It does nothing else. After the import it looks for what a fork cannot take along: other threads, and connections. If
it finds any, it forks no workers, and each worker is started as a new process that imports the app itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from flaskd.pool import messages as say
from flaskd.pool.spawn import STACKS
from flaskd.pool.wire import Wire, WireClosedError
from flaskd.process.bootstrap import heed_as_template, open_standard_streams
from flaskd.process.forks import forgotten_by_children
from flaskd.process.orphans import end_with_parent
from flaskd.process.threads import name_of
from flaskd.serving import launch
from flaskd.serving.loading import LoadedApp
from flaskd.serving.patching import patching_refused
from flaskd.workers.worker import look_for_garbage, serve

_ENDING = 0.5
"""Seconds that threads which the app has started on import have to end; some exist for the import alone."""
_LOOK = 0.01
_SQLITE = b"SQLite format 3\0"
"""The first bytes of a database file."""
_OF_WORKERS = "FLASKD_WORKER"
"""The variable with a worker's slot, which a template does not have."""


class _Environ(dict[bytes, bytes]):
    """The dictionary behind `os.environ`; it notes whether the app asks for its worker's slot."""

    asked = False

    def __missing__(self, name: bytes) -> bytes:
        if name != _OF_WORKERS.encode():
            raise KeyError(name)
        self.asked = True
        return b"0"


def main(wire: int, stacks: int) -> NoReturn:
    """Run a template in this process, on the descriptors that it was started with."""
    open_standard_streams()
    heed_as_template()
    look_for_garbage()
    for each in (wire, stacks):
        os.set_inheritable(each, False)
    end_with_parent()  # if the kernel does not do it, the end of the wire ends the template after the import
    faulthandler.register(STACKS, file=stacks, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (STACKS,))
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("flaskd-template", encoding="ascii")
    end = Wire(socket.socket(fileno=wire))

    def forget() -> None:
        """In a forked child, close what the template shares with the supervisor."""
        faulthandler.unregister(STACKS)
        os.close(stacks)
        end.forget()

    try:
        end.greet()
        order, _ = end.receive()
        with ExitStack() as stack:
            stack.enter_context(forgotten_by_children(forget))
            app = _imported(order, end, stack)
            descriptors = _be_forked(end)
    except WireClosedError:  # the supervisor is gone, or ends the template
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    serve(*descriptors, app=app)


def _imported(order: say.Preload, end: Wire, stack: ExitStack) -> LoadedApp:
    """Import the app and report the outcome; after an error, wait until the supervisor ends this process."""
    config = order.configuration.values
    before = _open_files()
    sys.path[:] = order.path
    stack.enter_context(patching_refused())
    environ = os.environ._data = _Environ(os.environ._data)  # type: ignore[attr-defined]  # noqa: SLF001 - its variables
    try:
        launch.change_directory(config.app)
        app = launch.find_app(config.app, None, os.environ)
    except BaseException as error:  # noqa: BLE001 - from the app's code; reported
        end.send(say.NotReady(launch.fault_of(error)))
        _wait_for_end(end)
    finally:
        os.environ._data = dict(environ)  # type: ignore[attr-defined]  # noqa: SLF001
    heed_as_template()  # again, because the app may have set signal handlers
    keeps = [*(["asked for FLASKD_WORKER"] if environ.asked else []), *_threads(), *_connections(before)]
    for each in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # otherwise each worker would write it again
            each.flush()
    gc.collect()
    gc.freeze()  # the collectors of workers do not write to these objects, so their memory stays shared
    end.send(say.Preloaded(app.chosen, app.doubt, tuple(keeps)))
    return app


def _wait_for_end(end: Wire) -> NoReturn:
    while True:
        end.receive()


def _be_forked(end: Wire) -> tuple[int, int, int]:
    """Fork whenever the supervisor asks for it; returns in each worker, with the worker's descriptors."""
    while True:
        order, descriptors = end.receive()
        os.environ[_OF_WORKERS] = str(order.slot)  # for functions of the app that run after a fork
        answer = _fork()
        if answer is None:
            wire, board, stacks = descriptors
            return wire, board, stacks
        for each in descriptors:
            os.close(each)
        end.send(answer)


def _fork() -> say.Forked | None:
    """Fork twice: the first child ends, and so the second becomes the supervisor's child. Returns None in that one."""
    reader, writer = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            if _fork_again(writer):
                os.close(reader)
                return None
            os._exit(0)
        os.waitpid(between, 0)
        os.set_blocking(reader, False)
        pid, _, why = os.read(reader, 256).decode().partition(" ")  # the first child has written it before it ended
        return say.Forked(int(pid or 0), why)
    except OSError as error:
        return say.Forked(0, f"the template cannot fork: {error.strerror}")
    finally:
        for each in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(each)


def _fork_again(writer: int) -> bool:
    """In the first child: fork, and write the second child's pid; returns True in the second child."""
    try:
        pid = os.fork()
    except OSError as error:
        os.write(writer, f"0 the template's child cannot fork: {error.strerror}".encode())
        return False
    if pid:
        os.write(writer, str(pid).encode())
    return pid == 0


# --- what cannot be forked --------------------------------------------------------------------------------------------


def _threads() -> Iterator[str]:
    """The threads that still run beside this one, described for the log."""
    until = time.monotonic() + _ENDING
    while len(tasks := _tasks()) > 1 and time.monotonic() < until:
        time.sleep(_LOOK)
    others = [each for each in threading.enumerate() if each is not threading.main_thread()]
    yield from (f'started the thread "{name_of(each)}"' for each in others)
    known = {os.getpid(), *(each.native_id for each in others)}
    for number in [each for each in tasks if each not in known]:
        yield f"started a thread that Python's threading does not know ({_comm(number)})"


def _tasks() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(each) for each in os.listdir("/proc/self/task")]  # noqa: PTH208
    return []


def _comm(task: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{task}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return "?"


def _open_files() -> dict[int, str]:
    """What each descriptor of this process refers to."""
    found = {}
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor with which the directory is read
            found[int(each.name)] = str(each.readlink())
    return found


def _connections(before: dict[int, str]) -> Iterator[str]:
    """The connections, databases and event loops that were opened since `before`, described for the log."""
    for number, what in _open_files().items():
        if before.get(number) == what:
            continue
        if what == "anon_inode:[eventpoll]":
            yield "made an event loop (epoll)"
        elif what.startswith("socket:") and (peer := _peer(number)):
            yield peer
        elif what.startswith("/") and _is_sqlite(number):
            yield f"opened the SQLite database {what}"


def _is_sqlite(number: int) -> bool:
    """Whether an open file is an SQLite database, whose connections must not be used after a fork."""
    with contextlib.suppress(OSError):
        return os.pread(number, len(_SQLITE), 0) == _SQLITE
    return False


def _peer(number: int) -> str:
    """What a socket is connected to, described for the log; empty if it is not connected, or sends datagrams."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as copy:
        peer = copy.getpeername()
        if copy.type == socket.SOCK_DGRAM:
            return ""
        if copy.family == socket.AF_UNIX:
            return f"opened a connection to {os.fsdecode(peer)}" if peer else "made a pair of sockets"
        return f"opened a connection to {peer[0]}:{peer[1]}"
    return ""
