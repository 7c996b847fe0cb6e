"""What the kernel knows of a connection: whether its peer has closed it, and how many bytes are under way."""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Sequence


def closed_by_peer(sock: socket.socket | None) -> bool:
    """Whether the peer has closed its side and all that it sent was read; False if that is not known."""
    if sock is None or not hasattr(socket, "MSG_DONTWAIT"):
        return False
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:  # reset, or closed here meanwhile
        return True


def each_closed_by_peer(socks: Sequence[socket.socket | None]) -> list[bool]:
    """`closed_by_peer` for each; only one system call if no peer has closed anything (POLLRDHUP: poll(2)).

    Each system call releases the interpreter's lock, and waits for it again while the app is busy.
    """
    if not hasattr(select, "POLLRDHUP"):
        return [closed_by_peer(sock) for sock in socks]
    numbers = [-1 if sock is None else sock.fileno() for sock in socks]
    poll = select.poll()
    for number in numbers:
        if number >= 0:
            poll.register(number, select.POLLRDHUP)
    closed = {-1, *(number for number, _ in poll.poll(0))}
    return [number in closed and closed_by_peer(sock) for sock, number in zip(socks, numbers, strict=True)]


def unread(sock: socket.socket | None) -> int:
    """How many bytes were received and not read (FIONREAD, ioctl_tty(2))."""
    return _ask(sock, "FIONREAD")


def unacknowledged(sock: socket.socket | None) -> int:
    """How many sent bytes the peer has not acknowledged; on a Unix socket, not read (SIOCOUTQ, tcp(7), unix(7))."""
    return _ask(sock, "TIOCOUTQ")


def _ask(sock: socket.socket | None, what: str) -> int:
    if sock is None:
        return 0
    try:
        import fcntl  # noqa: PLC0415 - Windows has neither module
        import termios  # noqa: PLC0415
    except ImportError:
        return 0
    try:
        answer = fcntl.ioctl(sock.fileno(), getattr(termios, what), b"\0\0\0\0")
    except (OSError, ValueError):  # the socket was closed meanwhile
        return 0
    return int.from_bytes(answer, sys.byteorder)
