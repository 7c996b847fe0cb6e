"""A template: it imports the app with one thread, and is forked into the workers of its generation.

It does nothing else. What its one thread cannot take along into a fork, other threads and connections, it looks for
after the import; where there is some, workers are started anew.
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
"""Seconds that threads have to end which the app has started on import: some are there for the import alone."""
_LOOK = 0.01
_SQLITE = b"SQLite format 3\0"
"""How the file of a database begins."""
_OF_WORKERS = "FLASKD_WORKER"
"""The variable that a template has not got."""


class _Environ(dict[bytes, bytes]):
    """What `os.environ` keeps its variables in: notes whether the app asks which worker it is."""

    asked = False

    def __missing__(self, name: bytes) -> bytes:
        if name != _OF_WORKERS.encode():
            raise KeyError(name)
        self.asked = True
        return b"0"


def main(wire: int, stacks: int) -> NoReturn:
    """Run one as a process of its own, on the descriptors that it was started with."""
    open_standard_streams()
    heed_as_template()
    look_for_garbage()
    for each in (wire, stacks):
        os.set_inheritable(each, False)
    end_with_parent()  # where the kernel does not do it, the end of the wire tells after the import
    faulthandler.register(STACKS, file=stacks, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (STACKS,))
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("flaskd-template", encoding="ascii")
    end = Wire(socket.socket(fileno=wire))

    def forget() -> None:
        """In a forked child: what is shared with the supervisor is not its own."""
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
    except WireClosedError:  # which is how a template ends
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    serve(*descriptors, app=app)


def _imported(order: say.Preload, end: Wire, stack: ExitStack) -> LoadedApp:
    """Import the app, and say what came of it; where that is an error, or a fork cannot be, wait for the end."""
    config = order.configuration.values
    before = _open_files()
    sys.path[:] = order.path
    stack.enter_context(patching_refused())
    environ = os.environ._data = _Environ(os.environ._data)  # type: ignore[attr-defined]  # noqa: SLF001 - where it looks
    try:
        launch.change_directory(config.app)
        app = launch.find_app(config.app, None, os.environ)
    except BaseException as error:  # noqa: BLE001 - the app's code; told
        end.send(say.NotReady(launch.fault_of(error)))
        _wait_for_end(end)
    finally:
        os.environ._data = dict(environ)  # type: ignore[attr-defined]  # noqa: SLF001
    heed_as_template()  # whatever the app has made of flaskd's signals
    keeps = [*(["asked for FLASKD_WORKER"] if environ.asked else []), *_threads(), *_connections(before)]
    for each in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # else each worker would say it once more
            each.flush()
    gc.collect()
    gc.freeze()  # so that no worker's collector writes to what is there, and the memory stays shared
    end.send(say.Preloaded(app.chosen, app.doubt, tuple(keeps)))
    return app


def _wait_for_end(end: Wire) -> NoReturn:
    while True:
        end.receive()


def _be_forked(end: Wire) -> tuple[int, int, int]:
    """Fork whenever that is asked for; returns in each worker, with its descriptors."""
    while True:
        order, descriptors = end.receive()
        os.environ[_OF_WORKERS] = str(order.slot)  # for what the app wants called after a fork
        answer = _fork()
        if answer is None:
            wire, board, stacks = descriptors
            return wire, board, stacks
        for each in descriptors:
            os.close(each)
        end.send(answer)


def _fork() -> say.Forked | None:
    """Fork twice, so that the second child is the supervisor's once the first has ended; None in that child."""
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
        pid, _, why = os.read(reader, 256).decode().partition(" ")  # it was written before that ended
        return say.Forked(int(pid or 0), why)
    except OSError as error:
        return say.Forked(0, f"the template cannot fork: {error.strerror}")
    finally:
        for each in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(each)


def _fork_again(writer: int) -> bool:
    """In the first child: fork, and write the second one's pid; whether this is the second."""
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
    """The threads that go on."""
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
    """What the descriptors of this process stand for."""
    found = {}
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the directory itself
            found[int(each.name)] = str(each.readlink())
    return found


def _connections(before: dict[int, str]) -> Iterator[str]:
    """The connections that were opened since, and what event loops are made of."""
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
    """Whether an open file is a database of SQLite's, whose connections must not be taken into a fork."""
    with contextlib.suppress(OSError):
        return os.pread(number, len(_SQLITE), 0) == _SQLITE
    return False


def _peer(number: int) -> str:
    """Whom a socket is connected to, in words; empty where it is not, or each datagram stands for itself."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as copy:
        peer = copy.getpeername()
        if copy.type == socket.SOCK_DGRAM:
            return ""
        if copy.family == socket.AF_UNIX:
            return f"opened a connection to {os.fsdecode(peer)}" if peer else "made a pair of sockets"
        return f"opened a connection to {peer[0]}:{peer[1]}"
    return ""
