"""The clients of the control socket: how many there may be, which make room for others, and when one is let go."""

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
"""Of these, those that wait for no outcome, so that who asks something short always gets in."""
_STOP_RESERVE = 8
"""How far into the reserve a stop that waits may go."""
_IDLE_TIMEOUT = 60.0
"""Seconds a client may leave a command unfinished, or an answer unread."""


class Clients:
    """The connections that there are; all of it is the control thread's.

    `execute` gets their commands, `wake` lets the control thread have another turn, `pause` accepts none for a while.
    """

    def __init__(
        self, selector: selectors.BaseSelector, *, execute: Execute, wake: Callable[[], None], pause: Callable[[], None]
    ) -> None:
        self.ending = False
        """Whether no more are admitted; may be set by any thread."""
        self._selector = selector
        self._execute, self._wake, self._pause = execute, wake, pause
        self._all: set[Connection] = set()

    @property
    def have_output(self) -> bool:
        """Whether something is still to be sent to any of them."""
        return any(client.has_output for client in self._all)

    # --- who gets in ---

    def accept(self, fd: int) -> None:
        """Accept one client, and hear what it has said already; where more wait, the selector says so again.

        So few system calls because each lets go of the interpreter, and waits for it again where the app is busy.
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
            if silent:  # who says nothing makes room for who may
                self._drop(min(silent, key=lambda each: each.last_heard))
        if self.ending or len(self._all) >= _MAX_CLIENTS:
            sock.close()
            return
        client = Connection(sock, self._execute, self._wake)
        self._all.add(client)
        client.read()

    def check_room(self, command: Command) -> None:
        """Raise NotNowError where too many wait for an outcome already: who asks something short must find room."""
        if not command.waits or command.peer is FIFO_PEER:
            return
        most = _MAX_CLIENTS - _RESERVE + (_STOP_RESERVE if command.name == "stop" else 0)
        if self._waiting > most:  # who asks is one of them
            self.drop_hung_up()
        if (waiting := self._waiting) > most:
            instead = ", or leave out wait" if not command.verb.lengthy else ""
            raise NotNowError(
                f"cannot {command.name}: {waiting - 1} clients wait for an outcome already; come back later{instead}"
            )

    @property
    def _waiting(self) -> int:
        return sum(bool(client.pending) for client in self._all)

    # --- who is served, and let go ---

    def settle(self) -> None:
        """Carry out and flush what there is, watch for more, and let go of who is done, idle or too slow."""
        now = time.monotonic()
        for client in list(self._all):
            if client not in self._all:  # it made room for another one
                continue
            try:
                more = client.work()
            except Exception:  # a command with a fault in it is no reason to leave the others alone
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
            # A client that shut its side down would be readable for ever.
            events = selectors.EVENT_READ if client.wants_to_read else 0
            try:
                self._watch(client, events | (selectors.EVENT_WRITE if client.has_output else 0))
            except OSError as error:  # no memory, no more watches: epoll_ctl(2)
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
        """Drop who waits for an outcome and has hung up; they are not read from, so it does not show by itself."""
        for client in [each for each in self._all if each.pending and each.gone]:
            self._drop(client)

    def _drop(self, client: Connection) -> None:
        self._all.discard(client)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.sock)
        client.sock.close()

    def close(self) -> None:
        """Drop them all."""
        for client in list(self._all):
            self._drop(client)

    def forget(self) -> None:
        """Close their descriptors, and nothing else: in a forked child they are not ours."""
        for client in self._all:
            client.sock.close()


def _serve(client: Connection) -> None:
    client.flush()
    if client.wants_to_read:
        client.read()


def _accepted(fd: int) -> socket.socket:
    """Accept a client from a listening descriptor that does not block. Raises OSError.

    An app may have called socket.setdefaulttimeout(), and Python would wait so long, for a client and for its words.
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
