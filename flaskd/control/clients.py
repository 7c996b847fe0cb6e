"""The clients of the control socket: how many there may be, and when a client is dropped."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable

from flaskd.control.commands import Command
from flaskd.control.connection import Connection, Execute
from flaskd.control.peer import FIFO_PEER
from flaskd.control.replies import BROKEN_OFF
from flaskd.errors import NotNowError
from flaskd.log.setup import bounded_by
from flaskd.process.descriptors import open_files

log = logging.getLogger("flaskd.control")

_MAX_CLIENTS = 64
_RESERVE = 16
"""How many places of these are for clients that wait for no outcome, so that a short question is always answered."""
_STOP_RESERVE = 8
"""How many places of the reserve a waiting stop may use."""
_IDLE_TIMEOUT = 60.0
"""Seconds for which a client may leave a command unfinished or an answer unread."""


class Clients:
    """The open connections; only the control thread uses this object.

    `execute` is called with their commands, `wake` makes the control thread run its loop again, `pause` stops accepting
    clients for a while.
    """

    def __init__(
        self, selector: selectors.BaseSelector, *, execute: Execute, wake: Callable[[], None], pause: Callable[[], None]
    ) -> None:
        self.ending = False
        """Whether no more clients are admitted; any thread may set it."""
        self._selector = selector
        self._execute, self._wake, self._pause = execute, wake, pause
        self._all: set[Connection] = set()

    @property
    def have_output(self) -> bool:
        """Whether some client has output that is not sent."""
        return any(client.has_output for client in self._all)

    # --- accepting clients ---

    def accept(self, fd: int) -> None:
        """Accept one client and read what it has sent; if more clients wait, the selector reports the listener again.

        It makes few system calls, because each releases the interpreter's lock and waits for it again while the app is
        busy.
        """
        try:
            self._admit(open_files.open(lambda: _accepted(fd)))
        except BlockingIOError:  # a process that shares the listener was faster
            pass
        except OSError as error:
            log.warning(f"cannot accept a control client: {error.strerror}")
            self._pause()

    def _admit(self, sock: socket.socket) -> None:
        if len(self._all) >= _MAX_CLIENTS:
            self.drop_hung_up()
        if len(self._all) >= _MAX_CLIENTS:
            silent = [each for each in self._all if not each.pending]
            if silent:  # a client without a command is dropped for the new one
                self._drop(min(silent, key=lambda each: each.last_heard))
        if self.ending or len(self._all) >= _MAX_CLIENTS:
            sock.close()
            return
        client = Connection(sock, self._execute, self._wake)
        self._all.add(client)
        client.read()

    def check_room(self, command: Command) -> None:
        """Raise NotNowError if too many clients wait for an outcome, so that short questions find a place."""
        if not command.waits or command.peer is FIFO_PEER:
            return
        most = _MAX_CLIENTS - _RESERVE + (_STOP_RESERVE if command.name == "stop" else 0)
        if self._waiting > most:  # the client that asks is one of them
            self.drop_hung_up()
        if (waiting := self._waiting) > most:
            instead = ", or leave out wait" if not command.verb.lengthy else ""
            raise NotNowError(
                f"cannot {command.name}: {waiting - 1} clients wait for an outcome already; come back later{instead}"
            )

    @property
    def _waiting(self) -> int:
        return sum(bool(client.pending) for client in self._all)

    # --- serving and dropping clients ---

    def settle(self) -> None:
        """Carry out commands, send answers, choose what to watch, and drop clients that are done, idle or too slow."""
        now = time.monotonic()
        for client in list(self._all):
            if client not in self._all:  # it was dropped for a new one
                continue
            try:
                more = client.work()
            except Exception:  # a fault of one command must not harm the others
                log.exception("cannot carry out a control command", extra=BROKEN_OFF)
                more = False
                client.closing = True
            if client not in self._all:
                continue
            if more:
                self._wake()
            client.flush()
            idle = not client.pending and now - client.last_heard > _IDLE_TIMEOUT
            if client.done or client.overflowed or idle:
                self._drop(client)
                continue
            # The socket of a client that has shut down its sending side is readable for ever.
            events = selectors.EVENT_READ if client.wants_to_read else 0
            try:
                self._watch(client, events | (selectors.EVENT_WRITE if client.has_output else 0))
            except OSError as error:  # out of memory or of watches: epoll_ctl(2)
                why = f"cannot listen to a control client: {error.strerror}"
                log.warning(why, extra=bounded_by("control clients that cannot be listened to"))
                self._drop(client)

    def _watch(self, client: Connection, events: int) -> None:
        known = self._selector.get_map().get(client.sock)
        if known is None and events:
            self._selector.register(client.sock, events, lambda _fd: _serve(client))
        elif known is not None and not events:
            self._selector.unregister(client.sock)
        elif known is not None and known.events != events:
            self._selector.modify(client.sock, events, known.data)

    def drop_hung_up(self) -> None:
        """Drop clients that have hung up while they wait for an outcome; the selector does not report those."""
        for client in [each for each in self._all if each.pending and each.gone]:
            self._drop(client)

    def _drop(self, client: Connection) -> None:
        self._all.discard(client)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.sock)
        client.sock.close()

    def close(self) -> None:
        """Drop all clients."""
        for client in list(self._all):
            self._drop(client)

    def forget(self) -> None:
        """Close their descriptors, and do nothing else: in a forked child the connections belong to the parent."""
        for client in self._all:
            client.sock.close()


def _serve(client: Connection) -> None:
    client.flush()
    if client.wants_to_read:
        client.read()


def _accepted(fd: int) -> socket.socket:
    """Accept a client from a non-blocking listening descriptor; raises OSError.

    After an app's socket.setdefaulttimeout() Python would wait in accept() and in later calls; both timeouts are reset.
    """
    listening = socket.socket(fileno=fd)
    try:
        if listening.gettimeout():
            listening.settimeout(0)
        sock, _ = listening.accept()
        if sock.gettimeout():
            sock.settimeout(None)
        return sock
    finally:
        listening.detach()
