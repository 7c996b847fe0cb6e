"""The listeners that the service manager keeps for the next flaskd (FDSTORE in sd_notify(3), systemd 236).

With ``systemd.fdstore`` each of flaskd's own listeners is stored under a name made of its address. After a restart or a
crash the next flaskd inherits it like the socket of a socket unit, together with the clients in its backlog.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
from collections.abc import Collection, Iterable
from dataclasses import replace
from urllib.parse import quote, unquote

from flaskd.sockets import Address, Listener
from flaskd.systemd.notify import Notifier

log = logging.getLogger("flaskd.store")

_PREFIX = "listen-"
_LONGEST = 255
"""The longest name, in bytes (FDNAME in sd_notify(3))."""


def name_of(address: str) -> str:
    """The name in the store for an address of `server.listen`; without colons, which separate names."""
    name = _PREFIX + quote(address, safe="/[]")
    return name if len(name) <= _LONGEST else _PREFIX + hashlib.sha256(address.encode()).hexdigest()


def stored(name: str) -> bool:
    """Whether a passed socket of that name comes from the store, and not from a socket unit."""
    return name.startswith(_PREFIX)


class Store:
    """flaskd's listeners in the service manager's store."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._found: dict[str, Listener] = {}

    def open(self, passed: dict[str, list[Listener]], wanted: Collection[str]) -> None:
        """Take stored listeners out of `passed`; those for addresses that are not `wanted` any more are dropped."""
        names = {name_of(address) for address in wanted}
        for name in list(filter(stored, passed)):
            first, *others = passed.pop(name)
            if name in names:
                self._found[name] = first
                _close(others)
            else:
                address = _unix_address(name) or first.address
                log.info(f"{address} is not listened on any more: taken out of the store")
                self._notifier.remove(name)
                if address.path and first.reached_at(address.path):
                    first.come_back(address, "")  # so that its node is removed as well
                _close([first, *others])

    def take(self, address: str) -> Listener | None:
        """The listener kept for `address`; None if there is none, or if clients could not reach it."""
        listener = self._found.pop(name_of(address), None)
        if listener is None:
            return None
        # getsockname(2) of a Unix socket gives the temporary name under which it was bound.
        where = replace(Address.parse(address), port=listener.address.port)
        if where.path and not listener.reached_at(where.path):
            log.warning(
                f"the listener kept for {where} cannot be reached there any more: bound anew; keep its node out of "
                "RuntimeDirectory=, which systemd deletes, or set RuntimeDirectoryPreserve=restart"
            )
            self._notifier.remove(name_of(address))
            _close([listener])
            return None
        listener.come_back(where, name_of(address))
        return listener

    def keep(self, listeners: Iterable[tuple[str, Listener]]) -> None:
        """Store listeners, each with its address in `server.listen`; they must listen already.

        Without a manager that stores them, nothing happens.
        """
        if not self._notifier.address:
            return
        for address, listener in listeners:
            if not listener.stored:
                listener.stored, listener.shared = name_of(address), True
                self._notifier.store(listener.stored, listener.socket.fileno())

    def let_go(self, listeners: Iterable[Listener]) -> None:
        """Remove listeners from the store, because no flaskd follows; from then on only this process has them."""
        for listener in listeners:
            if listener.stored:
                self._notifier.remove(listener.stored)
                listener.stored, listener.shared = "", False


def _unix_address(name: str) -> Address | None:
    """The Unix address from which a stored name was made; None if it is another address, or was too long."""
    text = unquote(name.removeprefix(_PREFIX))
    return Address.parse(text) if text.startswith("unix:") else None


def _close(listeners: Iterable[Listener]) -> None:
    """Shut listeners down, because the manager may still hold a copy while the address is needed again."""
    for each in listeners:
        with contextlib.suppress(OSError):
            each.socket.shutdown(socket.SHUT_RDWR)
        each.close()
