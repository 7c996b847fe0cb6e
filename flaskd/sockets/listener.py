"""Listeners: bind without taking the address of another process, close the gate, free the address."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from flaskd.errors import CannotCreateError
from flaskd.sockets.address import Address
from flaskd.sockets.handshakes import under_way
from flaskd.sockets.unix import Node, bind_unix

_SO_BINDTOIFINDEX = 62
_NO_SUCH_INTERFACE = 0x7FFFFFF0


class Listener:
    """A bound socket that this process owns; `listen()` opens it, `close()` frees the address."""

    def __init__(
        self,
        address: Address,
        sock: socket.socket,
        node: Node | None = None,
        *,
        shared: bool = False,
        copied: bool = False,
    ) -> None:
        self.address = address
        self.socket = sock
        self.shared = shared
        """Whether another process holds it, too; that one serves its backlog, so closing it here refuses no client."""
        self.copied = copied
        """Whether other workers have copies of it and accept from it as well. Closing the gate closes it for all of
        them. The listener is closed when the last copy is; the supervisor then counts the clients in its backlog."""
        self.stored = ""
        """Its name in the service manager's store, if only the store shares it; empty if it is not stored."""
        self.kept = shared
        """Whether another program shares it. If it is `shared` but not `kept`, only workers of this flaskd share it."""
        self.last_batch = False
        """Whether its backlog is served at the end of a drain, because another process may not serve it."""
        self._node = node

    @classmethod
    def bind(cls, address: Address) -> Self:
        """Bind without listening yet; raises CannotCreateError if the address cannot be bound.

        With port 0 the kernel chooses the port. IPv6 listeners accept only IPv6 (RFC 3493 §5.3).
        """
        if address.path:
            sock, node = bind_unix(Path(address.path), mode=0o660)
            return cls(address, sock, node)
        # A str makes Python import the codec of internationalized names (0.3 MiB), which only such names need.
        host = address.host.encode() if address.host.isascii() else address.host
        try:
            infos = socket.getaddrinfo(
                host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
            )
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that DNS cannot have
            raise CannotCreateError(f"cannot listen on {address}: {getattr(error, 'strerror', error)}") from error
        # A name may have several addresses; IPv4 comes first, because clients of "localhost" try that first.
        family, kind, proto, _, where = min(infos, key=lambda info: info[0] != socket.AF_INET)
        try:
            sock = socket.socket(family, kind, proto)
        except OSError as error:
            raise CannotCreateError(_why_not(address, error)) from error
        try:
            if sys.platform != "win32":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(where)
        except OSError as error:
            sock.close()
            raise CannotCreateError(_why_not(address, error)) from error
        return cls(replace(address, port=sock.getsockname()[1]), sock)

    def listen(self, backlog: int) -> None:
        """Start listening; `backlog` is a number of connections. Raises CannotCreateError."""
        try:
            self.socket.listen(backlog)
        except OSError as error:
            raise CannotCreateError(_why_not(self.address, error)) from error

    def gate(self) -> bool:
        """Refuse new connections from now on, while handshakes under way complete; False if that is not possible.

        A listener that is bound to a network interface that does not exist matches no new SYN (SO_BINDTOIFINDEX,
        socket(7); Linux 5.7, no privilege needed). To accept again, close it and bind a new one.
        """
        if self.shared or self.address.path or sys.platform != "linux":
            return False
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_SUCH_INTERFACE)
        except OSError:
            return False
        return True

    def waiting(self) -> int:
        """How many connections wait to be accepted, if the system tells (TCP on Linux); else 0."""
        if self.address.path or sys.platform != "linux":
            return 0
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
        except OSError:  # not TCP, as an inherited listener may be, or closed
            return 0
        # The tcpi_unacked of a listener is the length of its backlog (tcp_get_info() in Linux' net/ipv4/tcp.c).
        return int(struct.unpack_from("=I", info, 24)[0])

    def callers(self) -> int:
        """How many connections wait to be accepted; 1 if only some are known to wait, 0 if nothing is known."""
        if not hasattr(select, "poll"):
            return 0
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return max(1, self.waiting()) if poll.poll(0) else 0

    def handshakes(self) -> int:
        """How many clients connect and cannot be accepted yet, if the system tells; closing it resets them."""
        return under_way(self.socket)

    def withdraw(self) -> None:
        """Remove a Unix listener's node if it is still ours, so that no new client comes; open connections stay.

        The node of a stored listener stays for the next flaskd; if none comes, it is stale, and is replaced later.
        """
        if self._node is not None and not self.stored:
            self._node.remove()
            self._node = None  # only once, because a later node may get the same inode

    def reached_at(self, path: str) -> bool:
        """Whether clients that connect to a path reach this listener; the node may be removed or replaced by now."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                return False
            except OSError:  # a full backlog or a denied connect is no proof that they do not
                return True
            # Both are the credentials of the process that called listen(2) (SO_PEERCRED in unix(7)).
            theirs, ours = (
                each.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                for each in (probe, self.socket)
            )
            return theirs == ours

    def come_back(self, address: Address, name: str) -> None:
        """Be the listener on `address` again; it came from the store under `name`."""
        self.address, self.stored = address, name
        if self.address.path:
            with contextlib.suppress(OSError):  # the node was removed
                self._node = Node.of(Path(self.address.path))

    def close(self) -> None:
        """Withdraw, and close the socket."""
        self.withdraw()
        self.socket.close()


def bound_anew(listeners: Sequence[Listener], backlog: int) -> list[Listener]:
    """New listeners in place of closed ones, listening; shared ones stay as they are. Raises CannotCreateError."""
    again: list[Listener] = []
    try:
        for each in listeners:
            if each.shared:
                again.append(each)
            else:
                again.append(Listener.bind(each.address))
                again[-1].listen(backlog)
    except BaseException:
        for each in again:
            if not each.shared:
                each.close()
        raise
    return again


def _why_not(address: Address, error: OSError) -> str:
    hints = {
        errno.EADDRINUSE: "; another process listens there: choose another address, or stop that process",
        errno.EACCES: "; ports below 1024 need CAP_NET_BIND_SERVICE",
        errno.EADDRNOTAVAIL: "; this machine has no such address",
        errno.EAFNOSUPPORT: "; this machine, or RestrictAddressFamilies= of the unit, has no such addresses",
    }
    return f"cannot listen on {address}: {error.strerror}{hints.get(error.errno or 0, '')}"
