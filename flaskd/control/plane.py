"""The control thread: it reads commands from the sockets and the FIFO and carries them out."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flaskd.control.access import Access
from flaskd.control.clients import Clients
from flaskd.control.commands import Command
from flaskd.control.fifo import FifoCommands
from flaskd.control.nodes import PAUSE, Nodes
from flaskd.control.replies import BROKEN_OFF
from flaskd.control.verbs import RUN
from flaskd.errors import CannotCreateError, FlaskdError
from flaskd.log.setup import bounded_by
from flaskd.protocol import Reply

if TYPE_CHECKING:
    from flaskd.config import Config, ControlConfig
    from flaskd.daemon import Daemon
    from flaskd.sockets import Listener

log = logging.getLogger("flaskd.control")

_FLUSH_TIMEOUT = 1.0
"""How many seconds `close` waits until the answers are sent."""


class ControlPlane:
    """Opens the nodes and answers until closed; the daemon calls `open` and `close`, its own thread does the rest."""

    def __init__(self, daemon: Daemon, name: str, environ: Mapping[str, str]) -> None:
        self._daemon = daemon
        self._selector = selectors.DefaultSelector()
        self._nodes = Nodes(name, environ, self._selector)
        self._clients = Clients(self._selector, execute=self.execute, wake=self._wake, pause=self._nodes.pause)
        self._fifo = FifoCommands(self.execute, self._nodes.reopen_fifo)
        self._thread = threading.Thread(target=self._run, name="flaskd-control", daemon=True)
        self._ending = False
        self._again = False
        """Whether the control thread is to run its loop again at once; only the control thread uses it."""
        self._next_look = 0.0
        self._access: Access
        self._access_of: ControlConfig

    @property
    def nodes(self) -> list[str]:
        """The paths of the nodes that were made, and of the sockets that were passed."""
        return self._nodes.paths

    def open(self, config: Config, passed: Sequence[Listener] = ()) -> None:
        """Lock the runtime directory, make both nodes and start to answer, also on sockets that the manager has passed.

        Raises NotNowError if another flaskd uses the directory, and CannotCreateError if `control.required` is set and
        a node cannot be made; without it, what cannot be made is logged.
        """
        self._access, self._access_of = Access(config.control), config.control
        read_fifo = self._fifo.read if self._access.fifo else None
        faults = self._nodes.open(config.control, passed, accept=self._clients.accept, read_fifo=read_fifo)
        if faults and config.control.required:
            self.close()
            raise CannotCreateError("; ".join(faults) + " (control.required is true)")
        for fault in faults:
            log.warning(f"control is not complete: {fault}; serving all the same")
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._selector.register(self._reader, selectors.EVENT_READ, self._woken)
        self._thread.start()

    def close(self) -> None:
        """Accept no more commands, send the answers (at most a second), remove our own nodes; again it does nothing."""
        self.remove_nodes()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._wake()
            self._thread.join(_FLUSH_TIMEOUT + 1)
        self.remove_nodes()  # once more, because the thread may just have made one again
        self._clients.close()
        self._selector.close()
        if hasattr(self, "_reader"):
            self._reader.close()
            self._writer.close()
        self._nodes.close()

    def forget(self) -> None:
        """Close all descriptors, and do nothing else: in a forked child the nodes belong to the parent."""
        self._selector.close()
        self._clients.forget()
        self._nodes.forget()

    def remove_nodes(self) -> None:
        """Remove our own nodes now; any thread may call it; also the last call before an immediate exit."""
        self._ending = self._clients.ending = True
        self._nodes.remove()

    def execute(self, command: Command, reply: Reply) -> None:
        """Carry out a command; its outcome goes to `reply`."""
        try:
            self._access_now().check(command)
            self._clients.check_room(command)
            if command.changes:
                kind = f"control commands of {command.peer.user}"
                log.info(f"control: {command} from {command.peer}", extra=bounded_by(kind))
            RUN[command.name](self._daemon, command, reply)
        except FlaskdError as error:
            if command.changes:
                kind = f"refused control commands of {command.peer.user}"
                log.warning(f"control: refused {command} from {command.peer}: {error}", extra=bounded_by(kind))
            reply.error(error.code, str(error))

    def _access_now(self) -> Access:
        configuration = self._daemon.configuration
        assert configuration is not None
        control = configuration.values.control
        if control is not self._access_of:  # after a reload
            self._access, self._access_of = Access(control), control
        return self._access

    # --- the control thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        until: float | None = None
        while True:
            if self._ending:
                until = until or time.monotonic() + _FLUSH_TIMEOUT
                if time.monotonic() >= until or not self._clients.have_output:
                    return
            pause = 0.0 if self._again else 0.1 if self._ending else PAUSE
            self._again = False
            for key, _ in self._selector.select(pause):
                try:
                    key.data(key.fd)
                except Exception:  # a fault with one client must not harm the others
                    log.exception("cannot answer a control client", extra=BROKEN_OFF)
            self._clients.settle()
            if (now := time.monotonic()) >= self._next_look and not self._ending:
                self._next_look = now + PAUSE
                try:
                    self._clients.drop_hung_up()
                    self._daemon.look()
                    self._nodes.look_after(now)
                except Exception:  # the connected clients are still answered
                    log.exception("cannot look after the control nodes")

    def _wake(self) -> None:
        """Make the control thread run its loop again; any thread may call it."""
        if threading.current_thread() is self._thread:
            self._again = True
            return
        with contextlib.suppress(OSError):  # full: it is awake; closed: there is no thread
            self._writer.send(b"x")

    def _woken(self, _fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
