"""How many handshakes are under way at a listener: clients that connect and cannot be accepted yet (sock_diag(7))."""

from __future__ import annotations

import socket
import struct

from flaskd.process.descriptors import open_files

_SOCK_DIAG = 4
"""NETLINK_SOCK_DIAG; SOCK_DIAG_BY_FAMILY is 20. Python has no names for them."""
_BY_FAMILY = 20
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_SYN_RECV = 3
"""TCP_SYN_RECV: the first segment of the handshake was answered, and the last one has not come."""
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
_WANTED = struct.Struct("=BBBxI")
"""The beginning of struct inet_diag_req_v2: family, protocol, extensions, a bit for each state; an id follows."""
_ID = struct.Struct("!HH16s")
"""The beginning of struct inet_diag_sockid: our port, the peer's port, our address; 48 bytes in all."""
_TIMEOUT = 1.0
"""Seconds; the kernel answers at once."""


def under_way(listener: socket.socket) -> int:
    """How many clients have begun to connect to a listener and have not finished the handshake; 0 if that is not known.

    The kernel is asked over netlink, which takes about a millisecond. It is not known if AF_NETLINK is forbidden
    (RestrictAddressFamilies=), and on systems other than Linux.
    """
    if listener.family not in {socket.AF_INET, getattr(socket, "AF_INET6", None)} or not hasattr(socket, "AF_NETLINK"):
        return 0
    try:
        where, port, *_ = listener.getsockname()
        ours = socket.inet_pton(listener.family, where.partition("%")[0]).ljust(16, b"\0")
        found = _ask(listener.family, port)
    except OSError:  # netlink is forbidden, or the listener is closed
        return 0
    return sum(1 for address in found if address == ours or not any(ours))


def _ask(family: int, port: int) -> list[bytes]:
    """Our address of each connection to a port whose handshake is under way; raises OSError if that is not known."""
    wanted = _WANTED.pack(family, socket.IPPROTO_TCP, 0, 1 << _SYN_RECV) + _ID.pack(port, 0, b"").ljust(48, b"\0")
    message = _HEADER.pack(_HEADER.size + len(wanted), _BY_FAMILY, _REQUEST | _DUMP, 1, 0) + wanted
    found: list[bytes] = []
    with open_files.open(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _SOCK_DIAG)) as sock:
        sock.settimeout(_TIMEOUT)
        sock.send(message)
        while True:
            answer, at = sock.recv(1 << 16), 0
            while at < len(answer):
                length, kind, *_ = _HEADER.unpack_from(answer, at)
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", answer, at + _HEADER.size)[0], "cannot ask for sockets")
                source, _, address = _ID.unpack_from(answer, at + _HEADER.size + 4)  # after 4 other bytes
                if source == port:
                    found.append(address)
                at += (length + 3) & ~3
