"""sd_notify(3) through the package sdnotify.

sdnotify connects once, encodes as latin-1, blocks without a timeout and hides errors. This wrapper reconnects, sends
UTF-8, limits the wait, and logs once if no manager listens. Without NOTIFY_SOCKET every call does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping

import sdnotify

from flaskd.text import printable

log = logging.getLogger("flaskd.notify")

_SEND_TIMEOUT = 1.0
"""Seconds. The manager's socket holds about 11 unread datagrams; after that, a send blocks."""
_MAX_STATUS = 1024
"""Bytes. systemd ignores a datagram of more than 4096 bytes (manager_dispatch_notify_fd)."""


class Notifier:
    """Tells the service manager about the state; made from an environment. Without a manager it does nothing."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self.address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
        self._connection: _Connection | None = None
        self._complained = False
        self._lock = threading.Lock()

    def ready(self, status: str) -> None:
        """Tell that the start, or a reload, is over (READY=1)."""
        self._send("READY=1", _status(status))

    def status(self, status: str) -> None:
        """Set the status line of ``systemctl status``; dropped if the manager is behind, because newer ones follow."""
        self._send(_status(status), wait=False)

    def extend(self, seconds: float) -> bool:
        """Ask that the running start or stop gets at least `seconds` from now (EXTEND_TIMEOUT_USEC).

        False if it was not sent because the manager is behind.
        """
        return self._send(*_extension(seconds), wait=False)

    def alive(self) -> None:
        """Tell that all is well (WATCHDOG=1)."""
        self._send("WATCHDOG=1", wait=False)

    def reloading(self, since: float) -> None:
        """Tell that a reload began; `since` is a time.monotonic() moment after the request arrived."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(since * 1_000_000)}", _status("reloading"))

    def stopping(self, status: str, *, extend: float = 0.0) -> None:
        """Tell that the stop began and takes at least `extend` seconds; this cannot be taken back."""
        self._send("STOPPING=1", _status(status), *_extension(extend))

    def failed(self, status: str, error_number: int) -> None:
        """Tell why the start failed; `error_number` is an errno."""
        self._send(_status(status), f"ERRNO={error_number}")

    def store(self, name: str, fd: int) -> None:
        """Put a descriptor into the manager's store (FDSTORE); the next start inherits it."""
        self._send("FDSTORE=1", f"FDNAME={name}", fd=fd)

    def remove(self, name: str) -> None:
        """Remove all descriptors of that name from the store."""
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.socket.close()
        self._connection = None

    def forget(self) -> None:
        """To be called in a forked child: from now on nothing is sent, because the child is not the service."""
        self.address = ""
        self.close()

    def _send(self, *lines: str, wait: bool = True, fd: int | None = None) -> bool:
        if self.address and lines:
            with self._lock:
                return self._send_one("\n".join(lines), wait, fd)
        return True

    def _send_one(self, message: str, wait: bool, fd: int | None) -> bool:
        """Send one message; False if the manager's socket has no room for it."""
        try:
            try:
                self._connected(wait).give(message, fd)
            except ConnectionError:  # the manager has restarted: connect again, once
                self.close()
                self._connected(wait).give(message, fd)
        except BlockingIOError:
            return False  # the socket is full, and `wait` is false
        except OSError as error:
            self.close()
            if not self._complained:
                log.warning(f"cannot notify the service manager at {self.address}: {error}")
            self._complained = True
        else:
            self._complained = False
        return True

    def _connected(self, wait: bool) -> _Connection:
        if self._connection is None:
            self._connection = _Connection(self.address)
        self._connection.socket.settimeout(_SEND_TIMEOUT if wait else 0)
        return self._connection


class _Connection(sdnotify.SystemdNotifier):  # type: ignore[misc]  # sdnotify is untyped
    """sdnotify's notifier with a socket made here: its constructor reads only os.environ, and leaks if it fails."""

    def __init__(self, address: str) -> None:
        self.debug = True  # raise errors
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self.socket.connect("\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            self.socket.close()
            raise

    def give(self, message: str, fd: int | None) -> None:
        """Send a message, and a descriptor if there is one (SCM_RIGHTS, unix(7)), which sdnotify cannot send."""
        if fd is None:
            self.notify(message)
        else:
            socket.send_fds(self.socket, [message.encode("latin-1")], [fd])


def _extension(seconds: float) -> list[str]:
    return [f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}"] if seconds > 0 else []


def _status(text: str) -> str:
    """One STATUS line without control characters, cut to a length, encoded so that sdnotify's latin-1 gives UTF-8."""
    whole = printable(text, " ").encode("utf-8", "replace")[:_MAX_STATUS].decode("utf-8", "ignore")
    return "STATUS=" + whole.encode("utf-8").decode("latin-1")
