"""The wire between the supervisor and one worker: a pair of Unix sockets that carries messages and descriptors.

A message is its length (4 bytes, network order), the number of descriptors with it (1 byte), and a pickle. Both ends
must run the same flaskd: so the worker first sends its version as plain text, before any pickle.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import threading
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

from flaskd.version import __version__

_VERSION = 1
"""The version of the messages; both ends must have the same."""
_HEAD = struct.Struct("!IB")
_HELLO = f"flaskd {__version__} wire {_VERSION}\n".encode()
_MOST = 1 << 26
"""Most bytes of one message."""
_BITE = 1 << 16
_MOST_FDS = 253
"""Most descriptors that the kernel passes at once (SCM_MAX_FD, unix(7))."""
_FD = array("i").itemsize
_ROOM = socket.CMSG_LEN(_MOST_FDS * _FD)


class WireClosedError(Exception):
    """The other end has closed the wire, or does not read."""


class Wire:
    """One end of a wire. `send` is for any thread, `receive` for one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._got = bytearray()
        self._descriptors: deque[int] = deque()

    @classmethod
    def pair(cls) -> tuple[Wire, socket.socket]:
        """Make a wire; returns one end, and the socket of the other end."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    def fileno(self) -> int:
        """The descriptor, for poll(2)."""
        return self._socket.fileno()

    def greet(self) -> None:
        """Send this flaskd's version (the worker's end, before any message)."""
        with self._lock:
            self._all(_HELLO, wait=True)

    def greeted(self) -> str:
        """Wait for the other end's greeting; returns what is wrong with it, empty if it is the same flaskd."""
        while not (end := self._got.find(b"\n") + 1):
            if len(self._got) > len(_HELLO) + 100:
                return "it does not send a worker's greeting"
            self.read()
        said = bytes(self._got[:end])
        del self._got[:end]
        if said == _HELLO:
            return ""
        words = said.decode("ascii", "replace").split()
        return f"it is flaskd {words[1] if len(words) > 1 else '?'}, and this is {__version__}: restart flaskd"

    def send(self, message: object, descriptors: Sequence[int] = (), *, wait: bool = True) -> None:
        """Send a message; raises WireClosedError if the other end has closed the wire.

        Without `wait`, also if there is no room because the other end does not read: it hangs, or was stopped.
        """
        data = pickle.dumps(message)
        with self._lock:
            self._all(_HEAD.pack(len(data), len(descriptors)) + data, descriptors, wait=wait)

    def _all(self, data: bytes, descriptors: Sequence[int] = (), *, wait: bool) -> None:
        flags = socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
        rest = memoryview(data)
        try:
            if descriptors:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))
                rest = rest[self._socket.sendmsg([rest], [rights], flags) :]
            while rest:
                rest = rest[self._socket.send(rest, flags) :]
        except OSError as error:  # after a part of a message no other one can be sent
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            raise WireClosedError(str(error)) from error

    @property
    def has_message(self) -> bool:
        """Whether `receive` does not have to wait: a whole message has come, or one that is too long."""
        if len(self._got) < _HEAD.size:
            return False
        length: int = _HEAD.unpack_from(self._got)[0]
        return length > _MOST or len(self._got) >= _HEAD.size + length

    def receive(self) -> tuple[Any, list[int]]:
        """Wait for the next message; returns it and its descriptors, which the caller must close.

        Raises WireClosedError at the end of the wire.
        """
        while len(self._got) < _HEAD.size:
            self.read()
        length, count = _HEAD.unpack_from(self._got)
        if length > _MOST:
            raise WireClosedError(f"a message of {length} bytes")
        while len(self._got) < _HEAD.size + length:
            self.read()
        data = bytes(self._got[_HEAD.size : _HEAD.size + length])
        del self._got[: _HEAD.size + length]
        if count > len(self._descriptors):
            raise WireClosedError(f"a message without {count} descriptors")
        return pickle.loads(data), [self._descriptors.popleft() for _ in range(count)]  # noqa: S301 - from flaskd itself

    def read(self) -> None:
        """Read what has come, or wait for some bytes; raises WireClosedError at the end of the wire."""
        try:
            # Not socket.recv_fds, which does not set close-on-exec: children of the app would inherit the listeners.
            data, others, _, _ = self._socket.recvmsg(_BITE, _ROOM, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise WireClosedError(str(error)) from error
        for level, kind, descriptors in others:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors += array("i", descriptors[: len(descriptors) // _FD * _FD])
        if not data:
            raise WireClosedError("the other end is gone")
        self._got += data

    def close(self) -> None:
        """Close the wire; threads that wait in `receive` or `send` get WireClosedError (any thread)."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:  # no message may be sent on a number that is reused
            self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def keep_open(self) -> None:
        """Keep the descriptor open until the process ends, which the other end sees by its closing."""
        self._socket.detach()

    def forget(self) -> None:
        """In a forked child, close its copy of the descriptor, and nothing else."""
        self._socket.close()
