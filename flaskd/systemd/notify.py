"""sd_notify(3) through the sdnotify package, in one place.

sdnotify connects once, encodes as latin-1, blocks without a timeout and hides errors; this wrapper reconnects, sends
UTF-8, bounds the wait and says once when nobody listens. Without NOTIFY_SOCKET every call does nothing.
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
"""Seconds; the manager's socket holds about 11 unread datagrams, then a send would block."""
_MAX_STATUS = 1024
"""Bytes; a datagram over 4096 bytes is ignored whole (systemd, manager_dispatch_notify_fd)."""


class Notifier:
    """Tells the service manager about state; made from an environment, cheap and harmless without a manager."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self.address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
        self._connection: _Connection | None = None
        self._complained = False
        self._lock = threading.Lock()

    def ready(self, status: str) -> None:
        """Service start-up, or a reload, is over."""
        self._send("READY=1", _status(status))

    def status(self, status: str) -> None:
        """A line worth reading in ``systemctl status``; dropped when the manager is behind: a newer one follows."""
        self._send(_status(status), wait=False)

    def extend(self, seconds: float) -> bool:
        """Ask that the start or stop under way gets at least `seconds` from now (EXTEND_TIMEOUT_USEC).

        False when the manager is behind, and was not told.
        """
        return self._send(*_extension(seconds), wait=False)

    def alive(self) -> None:
        """All is well (WATCHDOG=1)."""
        self._send("WATCHDOG=1", wait=False)

    def reloading(self, since: float) -> None:
        """Tell that a reload began; `since` is a time.monotonic() moment taken after the request arrived."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(since * 1_000_000)}", _status("reloading"))

    def stopping(self, status: str, *, extend: float = 0.0) -> None:
        """Tell that the stop began, and that it takes at least `extend` seconds; it cannot be taken back."""
        self._send("STOPPING=1", _status(status), *_extension(extend))

    def failed(self, status: str, error_number: int) -> None:
        """Say why the start failed; `error_number` is an errno."""
        self._send(_status(status), f"ERRNO={error_number}")

    def store(self, name: str, fd: int) -> None:
        """Give a descriptor into the manager's store (FDSTORE); it comes back as an inherited one at the next start."""
        self._send("FDSTORE=1", f"FDNAME={name}", fd=fd)

    def remove(self, name: str) -> None:
        """Take all descriptors of that name out of the store."""
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.socket.close()
        self._connection = None

    def forget(self) -> None:
        """In a forked child: tell nobody anything; it is not the service."""
        self.address = ""
        self.close()

    def _send(self, *lines: str, wait: bool = True, fd: int | None = None) -> bool:
        if self.address and lines:
            with self._lock:
                return self._send_one("\n".join(lines), wait, fd)
        return True

    def _send_one(self, message: str, wait: bool, fd: int | None) -> bool:
        """False when there was no room for it."""
        try:
            try:
                self._connected(wait).give(message, fd)
            except ConnectionError:  # the receiver was made anew: connect again, once
                self.close()
                self._connected(wait).give(message, fd)
        except BlockingIOError:
            return False  # there is no room, and no wish to wait for it
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
    """sdnotify's notifier on a socket of ours: its own constructor knows os.environ only, and leaks when it fails."""

    def __init__(self, address: str) -> None:
        self.debug = True  # raise what goes wrong
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self.socket.connect("\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            self.socket.close()
            raise

    def give(self, message: str, fd: int | None) -> None:
        """Send a message, with a descriptor if there is one (SCM_RIGHTS, unix(7); sdnotify has no word for that)."""
        if fd is None:
            self.notify(message)
        else:
            socket.send_fds(self.socket, [message.encode("latin-1")], [fd])


def _extension(seconds: float) -> list[str]:
    return [f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}"] if seconds > 0 else []


def _status(text: str) -> str:
    """One STATUS line: no control characters, bounded, and in an encoding that survives sdnotify's latin-1."""
    whole = printable(text, " ").encode("utf-8", "replace")[:_MAX_STATUS].decode("utf-8", "ignore")
    return "STATUS=" + whole.encode("utf-8").decode("latin-1")
