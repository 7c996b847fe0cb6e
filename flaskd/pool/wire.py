"""The wire between the supervisor and one worker: a Unix socket pair that carries messages, and descriptors with them.

A message is its length (4 bytes, network order), how many descriptors come with it (1 byte), and a pickle. Both ends
run the same flaskd: that is the first thing that a worker says, as plain text, before any pickle.
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
"""Of the messages; another one cannot be understood."""
_HEAD = struct.Struct("!IB")
_HELLO = f"flaskd {__version__} wire {_VERSION}\n".encode()
_MOST = 1 << 26
"""Bytes of one message; what is longer is no message."""
_BITE = 1 << 16
_MOST_FDS = 253
"""Descriptors that the kernel passes at once (SCM_MAX_FD, unix(7))."""
_FD = array("i").itemsize
_ROOM = socket.CMSG_LEN(_MOST_FDS * _FD)


class WireClosedError(Exception):
    """The other end is gone, or does not read."""


class Wire:
    """One end of it. `send` is for any thread, `receive` for one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._got = bytearray()
        self._descriptors: deque[int] = deque()

    @classmethod
    def pair(cls) -> tuple[Wire, socket.socket]:
        """A wire, and the socket of its other end."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    def fileno(self) -> int:
        """The descriptor, to wait on."""
        return self._socket.fileno()

    def greet(self) -> None:
        """Say which flaskd this is (the worker's end, first of all)."""
        with self._lock:
            self._all(_HELLO, wait=True)

    def greeted(self) -> str:
        """Wait for the other end's greeting; what is wrong with it, empty where it is the same flaskd."""
        while not (end := self._got.find(b"\n") + 1):
            if len(self._got) > len(_HELLO) + 100:
                return "it does not speak as a worker does"
            self.read()
        said = bytes(self._got[:end])
        del self._got[:end]
        if said == _HELLO:
            return ""
        words = said.decode("ascii", "replace").split()
        return f"it is flaskd {words[1] if len(words) > 1 else '?'}, and this is {__version__}: restart flaskd"

    def send(self, message: object, descriptors: Sequence[int] = (), *, wait: bool = True) -> None:
        """Send a message; raises WireClosedError where the other end is gone.

        Without `wait` also where it has not read so much that there is no room: it hangs, or is stopped.
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
        except OSError as error:  # after a part of a message nothing more can be said
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            raise WireClosedError(str(error)) from error

    @property
    def has_message(self) -> bool:
        """Whether `receive` does not wait: a whole message has come, or what is none."""
        if len(self._got) < _HEAD.size:
            return False
        length: int = _HEAD.unpack_from(self._got)[0]
        return length > _MOST or len(self._got) >= _HEAD.size + length

    def receive(self) -> tuple[Any, list[int]]:
        """Wait for the next message, and the descriptors that come with it, which are then the caller's.

        Raises WireClosedError at the end.
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
        return pickle.loads(data), [self._descriptors.popleft() for _ in range(count)]  # noqa: S301 - of our own worker

    def read(self) -> None:
        """Take what has come, or wait for something; raises WireClosedError at the end."""
        try:
            # Not socket.recv_fds, which forgets the flag: children of the app would inherit the listeners.
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
        """Close it; who waits in `receive`, or in `send`, finds its end (any thread)."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:  # the descriptor may be another file's at once: no message goes there
            self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def keep_open(self) -> None:
        """Leave the descriptor to the process, at whose end the other end finds it closed."""
        self._socket.detach()

    def forget(self) -> None:
        """Close the descriptor, and nothing else: in a forked child it is not ours."""
        self._socket.close()
