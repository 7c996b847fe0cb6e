"""`ServerProcess`: an app served in a process of its own, as its owner (the program that starts it) sees it.

The process is a new interpreter, never a fork: threads and locks do not survive a fork. The owner tells it everything
over one pipe. Over a second pipe the process sends one line when it is ready, and one when it has stopped; the pipe
ends with the process. When the owner ends, the first pipe ends, and the process stops in good order. No signal is
needed, so this works in the same way on every system.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from flaskd import errors
from flaskd.background_work import Background
from flaskd.errors import FlaskdError
from flaskd.ledger import Cut, DrainReport
from flaskd.process.exit import Unfinished
from flaskd.process.forks import forgotten_by_children
from flaskd.sockets import check_serving

_START_TIMEOUT = 30.0
_LOOK = 0.1
"""Seconds after which `wait_ready` checks again whether the process is alive."""
_PATIENCE = 1.0
"""Seconds after its own deadline at which a process that has not ended is terminated; as long again until a kill."""
_HURRIED = 3.0
"""Seconds for a stop that is cut short: one for the cleanup, one for threads that do not end, and a reserve."""
_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from flaskd.workers.child import main; main()"


class ServerProcess:
    """Serves the app named by `target` (``shop.wsgi:app``, ``shop:create_app()``) in a process of its own.

    ``start()`` starts the process, ``wait_ready()`` waits until it serves, ``stop()`` lets it finish the requests in
    flight and run its cleanup; as a context manager it does all three. It stops when the program that started it ends.
    After its end it can be started again.

    `host`, `port`, `threads`, `server` and `config` mean the same as for `flaskd.ServerThread`. A mapping may hold only
    what YAML can express; its ``app.chdir`` and ``log`` are used here, too. Without ``log``, only warnings are logged.
    `env` replaces the environment, and `chdir` is the working directory, in which the app is looked for first.
    """

    def __init__(
        self,
        target: str,
        host: str = "127.0.0.1",
        port: int = 0,
        threads: int = 4,
        server: Literal["waitress", "werkzeug"] = "waitress",
        *,
        config: Mapping[str, object] | str | os.PathLike[str] | None = None,
        chdir: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(target, str):
            raise TypeError(
                f'cannot serve {target!r} in another process: expected its name, such as "shop.wsgi:app"; '
                "use ServerThread for an app object"
            )
        check_serving(host, port, threads)
        self._orders = {
            "target": target, "host": host, "port": port, "threads": threads, "server": server,
            "config": str(Path(config).absolute()) if isinstance(config, str | os.PathLike) else config,
        }  # fmt: skip
        self._chdir = chdir
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self._words: _Words | None = None
        self._orders_out: BinaryIO | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Start the process and return at once; raises FlaskdError if it runs already, OSError if it cannot start."""
        if self.is_alive():
            raise FlaskdError(
                f"cannot start: this process runs already, pid {self.pid}; stop it first, or make another"
            )
        self._close()
        try:
            orders = json.dumps(self._orders, default=_plain).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise errors.ConfigError(f"cannot pass the configuration to the process: {error}") from error
        with contextlib.ExitStack() as theirs:
            orders_in, orders_out = os.pipe()
            theirs.callback(os.close, orders_in)
            self._orders_out = os.fdopen(orders_out, "wb", buffering=0)
            self._resources.callback(self._orders_out.close)
            words_in, words_out = os.pipe()
            theirs.callback(os.close, words_out)
            words = os.fdopen(words_in, "rb")
            # If a child that this program forks kept a copy, the process would live on after this program.
            self._resources.enter_context(forgotten_by_children(self._orders_out.close))
            try:
                self._process = _spawn([orders_in, words_out], cwd=self._chdir, env=self._env)
            except BaseException:
                words.close()
                self._resources.close()
                raise
        self._words = _Words(words)
        self._send(orders)
        return self

    def wait_ready(self, timeout: float = _START_TIMEOUT) -> Self:
        """Wait at most `timeout` seconds until it serves.

        Raises the error with which its start failed (ConfigError, AppError, CannotCreateError …), and FlaskdError if it
        ended without a message or is not ready in time.
        """
        words, until = self._heard, time.monotonic() + timeout
        # Its pipe ends a moment after the process, or later, if a child of the process has a copy.
        while not words.first.wait(max(0.0, min(_LOOK, until - time.monotonic()))):
            if not self.is_alive():
                words.first.wait(_PATIENCE)
                break
            if time.monotonic() >= until:
                raise FlaskdError(
                    f"cannot get ready: pid {self.pid} does not serve within {timeout:g}s; it goes on trying"
                )
        if "failed" in words.said:
            self.join(_PATIENCE)
            raise _kind_of(words.said["exit_code"])(words.said["failed"])
        if "url" not in words.said:
            self.join()
            raise FlaskdError(f"cannot get ready: the process ended with exit code {self.exitcode} before it served")
        return self

    @property
    def url(self) -> str:
        """The URL that it serves, ending in a slash; raises FlaskdError while it is not ready."""
        url = self._words.said.get("url") if self._words is not None else None
        if url is None:
            raise FlaskdError("cannot tell the URL: the process is not ready; wait_ready() waits for that")
        return str(url)

    @property
    def pid(self) -> int | None:
        """Its process ID; None before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def exitcode(self) -> int | None:
        """Its exit code, negative for the signal that killed it; None while it runs, and before the start."""
        return self._process.poll() if self._process is not None else None

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """The outcome of each cleanup step, by name, once the process has stopped."""
        return dict(self._words.said.get("policies", {})) if self._words is not None else {}

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout: float | None = None) -> DrainReport | None:
        """Let it drain, clean up and exit within `timeout` seconds, default ``shutdown.deadline`` of its configuration.

        If it does not, it is terminated, and then killed. Returns its report; None if it ended without one. A second
        call changes nothing. If the wait is interrupted, for example by Ctrl-C, the stop is cut short: requests in
        flight are cut, and all remaining cleanup has one second.
        """
        if self._process is None:
            return None
        if self.is_alive():
            try:
                # The end of the pipe means the same to the process; it comes by itself when this program ends.
                self._send(json.dumps({"stop": timeout}).encode() + b"\n")
                self._end_within(None if timeout is None else timeout + _PATIENCE)
            except BaseException:
                self._send(json.dumps({"hurry": True}).encode() + b"\n")
                self._end_within(_HURRIED)
                raise
        self.join()
        words = self._heard
        words.last.wait(_PATIENCE)
        report = words.said.get("report")
        self._close()
        return _report(report) if report is not None else None

    def _end_within(self, seconds: float | None) -> None:
        """Wait for the end, then terminate, then kill; `seconds` None: wait for the deadline that the process named."""
        process, words = self._process, self._heard
        assert process is not None
        if seconds is None and words.first.wait(_START_TIMEOUT):
            seconds = words.said.get("deadline", 0.0) + _PATIENCE
        for give_up in (process.terminate, process.kill):
            try:
                process.wait(seconds or 0.0)
            except subprocess.TimeoutExpired:
                give_up()
                seconds = _PATIENCE
            else:
                return

    def terminate(self) -> None:
        """Send SIGTERM, which also drains and cleans up; a second one cuts that short. On Windows this kills it."""
        if self.is_alive():
            assert self._process is not None
            self._process.terminate()

    def kill(self) -> None:
        """Kill it: requests in flight are lost, and nothing is cleaned up."""
        if self.is_alive():
            assert self._process is not None
            self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds for its end (None: without limit); then `exitcode` is set if it has ended."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)

    @property
    def _heard(self) -> _Words:
        if self._words is None:
            raise FlaskdError("cannot do that: this process has not been started")
        return self._words

    def _send(self, line: bytes) -> None:
        assert self._orders_out is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended already, which its owner sees elsewhere
            self._orders_out.write(line)

    def _close(self) -> None:
        self._resources.close()
        if self._words is not None:
            self._words.close()


class _Words:
    """The messages of the process, read by a thread: that it is ready, then its report, then the end of the pipe."""

    def __init__(self, pipe: BinaryIO) -> None:
        self.said: dict[str, Any] = {}
        self.first = threading.Event()
        self.last = threading.Event()
        self._pipe = pipe
        self._thread = threading.Thread(target=self._read, name="flaskd-process", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._pipe:
                self.said.update(json.loads(line))
                self.first.set()
        except ValueError:  # a line that was cut off by a kill
            pass
        finally:
            self.first.set()
            self.last.set()

    def close(self) -> None:
        """Join the thread after the end of the process; not for long, because a child of that may hold the pipe."""
        self._thread.join(_PATIENCE)
        if not self._thread.is_alive():
            self._pipe.close()


@contextlib.contextmanager
def _inheritable(fds: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The options with which `Popen` passes on these descriptors alone, and their numbers in the new process."""
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 - Windows only

        handles = [msvcrt.get_osfhandle(fd) for fd in fds]
        for handle in handles:
            os.set_handle_inheritable(handle, True)
        yield {"startupinfo": subprocess.STARTUPINFO(lpAttributeList={"handle_list": handles})}, handles
    else:
        yield {"pass_fds": fds}, list(fds)


def _spawn(fds: Sequence[int], **options: Any) -> subprocess.Popen[bytes]:
    with _inheritable(fds) as (passing, names):
        command = [sys.executable, "-c", _BOOT, json.dumps([path or str(Path.cwd()) for path in sys.path])]
        return subprocess.Popen([*command, *map(str, names)], stdin=subprocess.DEVNULL, **passing, **options)


def _plain(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"expected what YAML can hold, got a value of type {type(value).__name__}")


def _kind_of(exit_code: int) -> type[FlaskdError]:
    kinds: list[type[FlaskdError]] = [
        errors.ConfigError,
        errors.AppError,
        errors.CannotCreateError,
        errors.NotNowError,
        errors.UsageError,
    ]
    return next((kind for kind in kinds if kind.exit_code == exit_code), FlaskdError)


def _report(told: Mapping[str, Any]) -> DrainReport:
    cut = tuple(Cut(**each) for each in told["cut"])
    background = tuple(Background(**each) for each in told.get("background", ()))
    unfinished = tuple(Unfinished(**each) for each in told.get("unfinished", ()))
    unaccepted = told.get("unaccepted", 0)
    return DrainReport(told["completed"], told["rejected"], cut, told["took"], background, unaccepted, unfinished)
