"""HAProxy's agent-check: each connection gets one line that says whether flaskd wants requests, and is closed.

The words are those of HAProxy's configuration manual (``agent-check``). HAProxy keeps what the agent said last, so
every answer says the whole state again.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from flaskd.lifecycle import State
from flaskd.log.setup import bounded_by
from flaskd.process.descriptors import open_files
from flaskd.sockets import Address, Listener

log = logging.getLogger("flaskd.admin")

_LEAVING = frozenset({State.DRAINING, State.DRAINED, State.STOPPING, State.STOPPED})
"""In these states flaskd finishes the requests that it has, and wants no new ones."""
_BACKLOG = 128
_MOST_CLIENTS = 64
"""How many answered clients may stay connected; the oldest is closed for a new one."""
_LINGER = 1.0
"""Seconds for which each may stay: closing earlier could reset the connection before HAProxy has read the line."""
_MOST_HEARD = 4096
"""How many bytes such a client may send (HAProxy's ``agent-send``); flaskd ignores them."""
_PAUSE = 0.5
"""Seconds without accepting after a client could not be accepted."""
_REASON = 100
"""How many characters of a reason are sent."""
_JOIN = 1.0
"""How many seconds `close` waits for the thread to end."""


class Ready(Protocol):
    """What the agent reports about: the daemon."""

    def readiness(self) -> tuple[str, str]:
        """A status line and a word that say whether new requests are welcome; returns at once."""


def words(readiness: tuple[str, str]) -> bytes:
    """The line for the result of `Ready.readiness`.

    ``up ready`` also takes back what an earlier agent said, for example that of the process before a restart.
    """
    status, why = readiness
    if status.startswith("200"):
        return b"up ready\n"
    if why in _LEAVING:
        return b"drain\n"
    reason = "".join(char if " " <= char <= "~" else "?" for char in why)
    return b"down#%b\n" % reason[:_REASON].encode()


class Agent:
    """Answers agent checks from `open` to `close` in a thread of its own; does nothing without listeners."""

    def __init__(self, source: Ready) -> None:
        self._source = source
        self._listeners: Sequence[Listener] = ()
        self._ending = threading.Event()
        self._answered: deque[_Client] = deque()
        self._thread: threading.Thread | None = None

    def open(self, listeners: Sequence[Listener]) -> None:
        """Listen and answer; raises CannotCreateError."""
        if not listeners:
            return
        for each in listeners:
            each.listen(_BACKLOG)
            each.socket.setblocking(False)
        self._listeners = listeners
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        for sock in (self._woken, *(each.socket for each in listeners)):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._answer, name="flaskd-agent", daemon=True)
        self._thread.start()

    @property
    def addresses(self) -> list[Address]:
        """The addresses on which it answers."""
        return [listener.address for listener in self._listeners]

    def close(self) -> None:
        """Stop answering and free the addresses; a second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ending.set()
        self._wake.send(b"x")
        thread.join(_JOIN)
        self.forget()
        for each in self._listeners:
            each.close()
        self._listeners = ()

    def forget(self) -> None:
        """Close all descriptors except those of the listeners, and do nothing else; for a forked child."""
        if self._listeners:
            self._selector.close()
            for sock in (self._woken, self._wake, *(each.socket for each in self._answered)):
                sock.close()

    # --- its thread ---

    def _answer(self) -> None:
        listening = {each.socket for each in self._listeners}
        while not self._ending.is_set():
            until = self._answered[0].until if self._answered else None
            for key, _ in self._selector.select(None if until is None else max(0.0, until - time.monotonic())):
                if key.fileobj in listening:
                    self._accept(key.fileobj)
                elif isinstance(key.data, _Client) and key.data.has_ended():
                    self._drop(key.data)
            now = time.monotonic()
            while self._answered and (self._answered[0].until <= now or len(self._answered) > _MOST_CLIENTS):
                self._drop(self._answered[0])

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = open_files.open(listening.accept)
        except (BlockingIOError, ConnectionAbortedError):  # another process was faster, or the client is gone
            return
        except OSError as error:
            why = f"cannot accept an agent check: {error.strerror}"
            log.warning(why, extra=bounded_by("agent checks that cannot be accepted"))
            self._ending.wait(_PAUSE)
            return
        try:
            self._tell(sock)
        except OSError:  # the client has hung up
            sock.close()
        except Exception:  # the next client is answered all the same
            log.exception("cannot answer an agent check", extra=bounded_by("agent checks that cannot be answered"))
            sock.close()

    def _tell(self, sock: socket.socket) -> None:
        sock.setblocking(False)  # an app may have called socket.setdefaulttimeout()
        sock.send(words(self._source.readiness()))  # one line fits into an empty send buffer
        sock.shutdown(socket.SHUT_WR)
        client = _Client(sock)
        self._selector.register(sock, selectors.EVENT_READ, client)
        self._answered.append(client)

    def _drop(self, client: _Client) -> None:
        self._answered.remove(client)
        self._selector.unregister(client.socket)
        client.socket.close()


class _Client:
    """A client that has its answer, and has not hung up."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.until = time.monotonic() + _LINGER
        self._heard = 0

    def has_ended(self) -> bool:
        """Whether it has hung up, or has sent too much."""
        try:
            heard = len(self.socket.recv(_MOST_HEARD))
        except BlockingIOError:
            return False
        except OSError:
            return True
        self._heard += heard
        return not heard or self._heard > _MOST_HEARD
