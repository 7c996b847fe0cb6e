"""sd_notify(3) through the sdnotify package, in one place.

sdnotify connects once, encodes as latin-1, blocks without a timeout and hides errors; this wrapper reconnects, sends
UTF-8, bounds the wait and says once when nobody listens. Without NOTIFY_SOCKET every call does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

import sdnotify

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

    def ready(self, status: str) -> None:
        """Service start-up, or a reload, is over."""
        self._send("READY=1", _status(status))

    def status(self, status: str) -> None:
        """A line worth reading in ``systemctl status``; dropped when the manager is behind: a newer one follows."""
        self._send(_status(status), wait=False)

    def reloading(self, since: float) -> None:
        """Tell that a reload began; `since` is a time.monotonic() moment taken after the request arrived."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(since * 1_000_000)}", _status("reloading"))

    def stopping(self, status: str) -> None:
        """Tell that the stop began; it cannot be taken back."""
        self._send("STOPPING=1", _status(status))

    def failed(self, status: str, error_number: int) -> None:
        """Say why the start failed; `error_number` is an errno."""
        self._send(_status(status), f"ERRNO={error_number}")

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.socket.close()
        self._connection = None

    def _send(self, *lines: str, wait: bool = True) -> None:
        if not self.address:
            return
        message = "\n".join(lines)
        try:
            try:
                self._connected(wait).notify(message)
            except ConnectionError:  # the receiver was made anew: connect again, once
                self.close()
                self._connected(wait).notify(message)
        except BlockingIOError:
            pass  # there is no room, and no wish to wait for it
        except OSError as error:
            self.close()
            if not self._complained:
                log.warning(f"cannot notify the service manager at {self.address}: {error}")
            self._complained = True
        else:
            self._complained = False

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


def _status(text: str) -> str:
    """One STATUS line: no control characters, bounded, and in an encoding that survives sdnotify's latin-1."""
    clean = "".join(char if char.isprintable() else " " for char in text)
    whole = clean.encode("utf-8", "replace")[:_MAX_STATUS].decode("utf-8", "ignore")
    return "STATUS=" + whole.encode("utf-8").decode("latin-1")
