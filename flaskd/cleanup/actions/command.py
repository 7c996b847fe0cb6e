"""``command``: runs a program in a process group of its own, and ends the whole group.

POSIX only. Every wait has a limit: for the program, for a pipe that a grandchild keeps open, and for a group that
ignores SIGTERM.
"""

from __future__ import annotations

import operator
import os
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flaskd.cleanup.context import ENDING_PATIENCE, ENDING_SLACK, StepContext, StepFailedError, StepTimedOutError
from flaskd.cleanup.model import ANYWHERE, Action
from flaskd.config import Duration, Phase, Settings
from flaskd.config.fields import Hidden
from flaskd.config.kind import bounded, checked, matching
from flaskd.config.settings import field
from flaskd.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

KEPT_OUTPUT = 8 * 1024
"""How many bytes of output are kept: the last ones."""
_SHOWN_OUTPUT = 2000
_CHUNK = 64 * 1024
_LAST_CHUNKS = 4
_GROUP_POLL = 0.05
_PROC = Path("/proc")
_NOT_INHERITED = frozenset({
    "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES",
    "WATCHDOG_USEC", "WATCHDOG_PID",
})  # fmt: skip


def _with_a_program(argv: list[str]) -> list[str]:
    if not argv[0].strip():
        raise ValueError("expected the program as the first item")
    return argv


Variable = Annotated[str, matching("[^=]+", "expected the name of an environment variable")]


class CommandFields(Settings):
    """Fields of ``command``."""

    argv: Annotated[list[str], bounded(min_length=1), checked(_with_a_program)] = field(
        description="The program and its arguments, one list item each; no shell is involved."
    )
    env: dict[Variable, Annotated[str, Hidden]] = field(
        default={}, description="Environment variables to add to flaskd's own."
    )
    cwd: Path | None = field(None, description="Its working directory; flaskd's own when not given.")
    kill_grace: Duration = field(
        default=2.0, description="How long after SIGTERM its process group gets SIGKILL.", ge=0
    )


def environment(context: StepContext, extra: dict[str, str]) -> dict[str, str]:
    """The environment of a command: flaskd's own, without the variables that systemd set for flaskd alone.

    They are listed in sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3).
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    about = {"FLASKD_REASON": context.reason, "FLASKD_PHASE": str(context.phase), "FLASKD_POLICY": context.policy}
    return {**inherited, **about, **extra}


def prepare_command(_fields: object) -> None:
    """Import what starts a program now, because a deploy may replace the files under a running daemon."""
    import subprocess  # noqa: F401, PLC0415 - 0.3 MiB, for this action alone


def run_command(context: StepContext, fields: CommandFields) -> str | None:
    """Run the command; returns the last line that it wrote.

    Raises StepFailedError if it cannot be started or its exit code is not 0, and StepTimedOutError if it had to be
    ended; both messages end with the last lines of its output.
    """
    if sys.platform == "win32":
        raise StepFailedError("cannot run a command: this platform has no process groups")
    wake, alarm = socket.socketpair()
    with wake, alarm, selectors.DefaultSelector() as selector:
        wake.setblocking(False)
        alarm.setblocking(False)
        child = _Child(context, fields, selector, alarm)
        context.last_resort = child.kill
        context.on_hurry = child.ring
        selector.register(wake, selectors.EVENT_READ)
        try:
            on_time = child.watch(lambda: context.ends_with(fields.kill_grace), child.has_exited)
            how = child.end_group(fields.kill_grace)
        finally:
            child.close()
    if not on_time:
        raise StepTimedOutError(_join(": ", f"{context.overrun()}; {how or 'it ended by itself'}", child.tail()))
    if fault := child.fault():
        raise StepFailedError(_join(": ", fault, child.tail()))
    return _join("; ", how, child.tail(lines=1)) or None


def _join(between: str, *parts: str) -> str:
    return between.join(part for part in parts if part)


def _anyone_in(group: int) -> bool:
    """Whether a process group has a member that is not a zombie.

    The fields after the name in brackets are state, parent and group (proc_pid_stat(5)). True if there is no /proc.
    """
    found = False
    for entry in _PROC.glob("[0-9]*/stat"):
        found = True
        with suppress(OSError, ValueError):  # the process has ended in the meantime
            state, _, its_group = entry.read_bytes().rpartition(b")")[2].split()[:3]
            if int(its_group) == group and state not in {b"Z", b"X"}:
                return True
    return not found


class _Child:
    """The running program with its process group and its output."""

    def __init__(
        self, context: StepContext, fields: CommandFields, selector: selectors.BaseSelector, alarm: socket.socket
    ) -> None:
        import subprocess  # noqa: PLC0415 - `prepare_command` has loaded it

        self._context = context
        self._selector = selector
        self._alarm = alarm
        self._output = bytearray()
        self._stolen = False
        self._group_gone = False
        self.exited = threading.Event()
        try:
            self._process = subprocess.Popen(
                fields.argv,
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=fields.cwd,
                env=environment(context, fields.env),
                start_new_session=True,
            )
        except OSError as error:
            named = f": {error.filename}" if error.filename else ""
            raise StepFailedError(f'cannot run "{fields.argv[0]}": {error.strerror}{named}') from error
        assert self._process.stdout is not None
        self._pipe = self._process.stdout
        os.set_blocking(self._pipe.fileno(), False)
        selector.register(self._pipe, selectors.EVENT_READ)
        self._reaper = threading.Thread(target=self._reap, name=f"flaskd-cleanup-{context.policy}-wait", daemon=True)
        self._polled = False
        try:
            self._reaper.start()
        except RuntimeError:  # no thread can be had: `watch` polls
            self._polled = True

    def has_exited(self) -> bool:
        """Whether the program has exited."""
        if self._polled and not self.exited.is_set():
            self._reap(os.WNOHANG)
        return self.exited.is_set()

    def _reap(self, how: int = 0) -> None:
        # os.waitpid, because Popen.wait reports exit code 0 if other code of this process has reaped the child.
        try:
            pid, status = os.waitpid(self._process.pid, how)
            if not pid:
                return
            self._process.returncode = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            self._stolen = True
            self._process.returncode = 0
        self.exited.set()
        self.ring()

    def ring(self) -> None:
        """Wake `watch`; may be called in any thread."""
        with suppress(OSError):  # the socket is full of wake-ups, or closed
            self._alarm.send(b"!")

    def watch(self, until: Callable[[], float], done: Callable[[], bool], poll: float = 3600.0) -> bool:
        """Read output until `done()` is true (returns True) or the moment `until()` has come (returns False).

        Both are called again at each wake-up and at least every `poll` seconds.
        """
        while not done():
            left = until() - self._context.budget.now()
            if left <= 0:
                return False
            for key, _ in self._selector.select(min(left, _GROUP_POLL if self._polled else poll)):
                if key.fileobj is self._pipe:
                    self._read()
                else:
                    with suppress(BlockingIOError):
                        key.fileobj.recv(_CHUNK)  # type: ignore[union-attr]  # the socket that `ring` writes to
        return True

    def _read(self) -> bool:
        """Read one piece of output; False if there is none now, or none will come."""
        try:
            piece = self._pipe.read(_CHUNK)
        except OSError:
            piece = b""
        if piece:
            self._output += piece
            del self._output[:-KEPT_OUTPUT]
        elif piece == b"":
            self._selector.unregister(self._pipe)
            self._pipe.close()
        return bool(piece)

    def end_group(self, grace: float) -> str:
        """End the rest of the process group: SIGTERM, then SIGKILL `grace` seconds later or at the limit.

        Returns what was done, empty if no process was left.
        """
        if self._over():
            return ""
        left_behind = "processes it left behind were " if self.exited.is_set() else ""
        now = self._context.budget.now
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # a stopped process acts on SIGTERM only when it continues
        kill_at = now() + grace
        if self.watch(lambda: min(kill_at, self._context.limit), self._over, _GROUP_POLL):
            return f"{left_behind}ended by SIGTERM"
        self.kill()
        given_up_at = min(now() + ENDING_PATIENCE / 2, self._context.limit + self._context.slack / 2)
        if self.watch(lambda: given_up_at, self._over, _GROUP_POLL):
            return f"{left_behind}ended by SIGKILL"
        return f"{left_behind}sent SIGKILL and not seen to end"

    def kill(self) -> None:
        """Send SIGKILL to the whole group."""
        if not self._group_gone:
            self._signal(signal.SIGKILL)

    def _over(self) -> bool:
        """Whether the program has exited and its group is empty."""
        if self.has_exited() and not self._group_gone:
            self._group_gone = not self._signal(0) or not _anyone_in(self._process.pid)
        return self._group_gone

    def _signal(self, number: int) -> bool:
        """Send a signal to the group; False if it has no process any more."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # the processes run as another user now
            return True
        return True

    def close(self) -> None:
        """Read what is still in the pipe, without waiting for processes that keep it open, and close it."""
        for _ in range(_LAST_CHUNKS):
            if self._pipe.closed or not self._read():
                break
        self._pipe.close()
        if self.exited.is_set() and not self._polled:
            self._reaper.join(ENDING_SLACK)

    def fault(self) -> str:
        """Why the program's exit is a failure; empty if it is none."""
        code = self._process.returncode
        if self._stolen:
            if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # wait(2): then the kernel keeps no exit code
                return "its exit code is not known: SIGCHLD is ignored in this process"
            return "its exit code is not known: something else in this process has reaped it"
        if code < 0:
            with suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
            return f"killed by signal {-code}"
        return f"exit code {code}" if code else ""

    def tail(self, lines: int = 20) -> str:
        """The last lines of its output as one line, without control characters."""
        text = self._context.redact(self._output.decode(errors="replace"))  # before the text is cut
        shown = (printable(line, " ").strip() for line in text.splitlines())
        return " | ".join([line for line in shown if line][-lines:])[-_SHOWN_OUTPUT:]


ACTIONS = (
    Action(
        "command",
        CommandFields,
        Phase.FINAL,
        run_command,
        prepare=prepare_command,
        grace=operator.attrgetter("kill_grace"),
        scopes=ANYWHERE,
        summary=("Runs a program, without a shell. The step fails when the program exits with anything but 0."),
    ),
)
