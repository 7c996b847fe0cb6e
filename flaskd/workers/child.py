"""What runs inside of a `ServerProcess`: an app on a `ServerThread`, and two pipes to the process that started it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, BinaryIO

from flaskd.errors import EX_OK, FlaskdError
from flaskd.lifecycle import StopReason
from flaskd.process.bootstrap import undo_inherited
from flaskd.process.exit import Ending, Unfinished, leave
from flaskd.process.forks import AppCode, forgotten_by_children
from flaskd.process.signals import Escalation, SignalWatch

if TYPE_CHECKING:
    from flaskd.config import Config
    from flaskd.serving.embedded import ServerThread

_ASKED = StopReason("control", "ServerProcess.stop()")
_HURRIED = 1.0
"""Seconds that what the app left to the process' end still has after a second request to stop."""
_ALONE = StopReason("control", "the process that started it has ended")


class Child:
    """The whole process: it serves until a signal, its owner (which started it) or the owner's end stops it."""

    def __init__(self, orders: BinaryIO, words: BinaryIO, ending: Ending) -> None:
        self._orders, self._words = orders, words
        self._asked: queue.SimpleQueue[tuple[StopReason, float | None] | None] = queue.SimpleQueue()
        self._escalation = Escalation()
        self._server: ServerThread | None = None
        self._ending = ending
        self._lock = threading.Lock()

    def run(self) -> int:
        """Serve, stop, and return the exit code."""
        orders = json.loads(self._orders.readline())
        with contextlib.ExitStack() as stack:
            stack.enter_context(forgotten_by_children(self._forget))
            signals = stack.enter_context(SignalWatch(self._on_signal, wake=lambda: self._asked.put(None)))
            threading.Thread(target=self._listen, name="flaskd-owner", daemon=True).start()
            with AppCode() as code:  # a child that the app forks in this thread ends there, and sends nothing
                try:
                    server, config = self._start(orders, stack)
                except FlaskdError as error:
                    self._say({"failed": error.whole, "exit_code": error.exit_code})
                    return error.exit_code
                signals.reclaim()
                self._say({"url": server.url, "deadline": config.shutdown.deadline})
                while (asked := self._asked.get()) is None:
                    code.check()
                reason, timeout = asked
                report = server.stop(timeout, reason=reason)

                def conclude(unfinished: tuple[Unfinished, ...]) -> int:
                    whole = report.with_unfinished(unfinished)
                    self._say({"report": whole.as_json(), "policies": server.policies})
                    return EX_OK if whole.clean else config.shutdown.exit_codes.degraded

                def cut(unfinished: tuple[Unfinished, ...]) -> None:
                    try:
                        code = conclude(unfinished)
                    finally:
                        os._exit(code)

                self._ending.left = server.left_for_the_exit()
                self._ending.run(cut=cut)
                self._ending.late_code = config.shutdown.exit_codes.degraded
                return conclude(())
        raise AssertionError  # the stack suppresses nothing

    def _start(self, orders: dict[str, Any], stack: contextlib.ExitStack) -> tuple[ServerThread, Config]:
        # Imported here, because from now on a signal or the owner's end stops the process.
        from flaskd.log.setup import Logs  # noqa: PLC0415
        from flaskd.serving import launch  # noqa: PLC0415
        from flaskd.serving.configuration import read  # noqa: PLC0415
        from flaskd.serving.embedded import ServerThread  # noqa: PLC0415
        from flaskd.serving.patching import patching_refused  # noqa: PLC0415

        target = orders.pop("target")
        config = read(orders["config"]).values
        logs = stack.enter_context(Logs())
        level = config.log.level if "log" in config.model_fields_set else "warning"
        logs.apply(level=level, log_format=config.log.format, access="off")
        launch.change_directory(config.app)
        stack.enter_context(patching_refused())
        app = launch.find_app(config.app.model_copy(update={"target": target}), None, os.environ)
        logs.reclaim()
        app.tell()
        server = ServerThread(app.wsgi, own_process=True, **orders).start()
        with self._lock:
            self._server = server
        return server, config

    def _forget(self) -> None:
        """In a forked child: put /dev/null in the place of both pipes, which belong to this process and its owner.

        The file objects are not closed: `close` takes a lock that another thread of this process may hold, and that
        thread does not exist in the child.
        """
        nothing = os.open(os.devnull, os.O_RDWR)
        for pipe in (self._orders, self._words):
            os.dup2(nothing, pipe.fileno(), inheritable=False)
        os.close(nothing)
        self._asked.put(None)  # wakes the main thread of a child that a signal handler forked: see run()

    def _listen(self) -> None:
        """Read what the owner asks for, in a thread of its own; the pipe ends when the owner does."""
        for line in self._orders:
            order = json.loads(line)
            self._ask(_ASKED, order.get("stop"), press="hurry" in order)
        self._ask(_ALONE)

    def _on_signal(self, number: int) -> None:
        """In the signals' thread: the first signal begins the stop, the second cuts it short, the third ends all."""
        if not self._escalation.another(time.monotonic()):
            return
        if self._escalation.count > 2:  # noqa: PLR2004 - as said above
            os._exit(128 + number)
        self._ask(StopReason("signal", signal.Signals(number).name), press=self._escalation.count > 1)

    def _ask(self, reason: StopReason, timeout: float | None = None, *, press: bool = False) -> None:
        with self._lock:
            if self._server is None:
                os._exit(EX_OK)  # nothing is served yet, and the main thread may still import the app
            server = self._server
        if press:
            server.hurry()
            self._ending.hurry(_HURRIED)  # in case the stop is over already
        else:
            self._asked.put((reason, timeout))

    def _say(self, words: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the owner has ended
            self._words.write(json.dumps(words, default=str).encode() + b"\n")
            self._words.flush()


def main() -> None:
    """Run this process; the last two arguments of the command line are the descriptors of its pipes."""
    undo_inherited()
    orders, words = (_opened(name) for name in sys.argv[2:4])
    ending = Ending()
    ending.start()
    child = Child(os.fdopen(orders, "rb"), os.fdopen(words, "wb"), ending)
    leave(child.run(), ending)


def _opened(name: str) -> int:
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 - Windows only

        return msvcrt.open_osfhandle(int(name), os.O_BINARY)
    os.set_inheritable(int(name), False)
    return int(name)
