"""Listeners: where to listen, binding without stealing anybody's place, and giving the place back."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import re
import select
import socket
import stat
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from urllib.parse import quote

from flaskd.errors import CannotCreateError

log = logging.getLogger("flaskd.sockets")

_EXPECTED = "expected HOST:PORT, [IPv6]:PORT, :PORT or unix:/path"
_MAX_PORT = 65535
_SO_BINDTOIFINDEX = 62
_NO_SUCH_INTERFACE = 0x7FFFFFF0
_MAX_UNIX_PATH = 107
"""``sun_path`` is 108 bytes with its terminating NUL: unix(7)."""


@dataclass(frozen=True)
class Address:
    """Where a listener stands: ``HOST:PORT``, ``[IPv6]:PORT``, ``:PORT`` (every IPv4 address) or ``unix:/path``."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address; raises ValueError with a message that says what was expected."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path.startswith("/") or "\0" in path:
                raise ValueError("expected unix: with an absolute path, such as unix:/run/shop/http.sock")
            if len(os.fsencode(path)) > _MAX_UNIX_PATH:
                raise ValueError(f"expected unix: with a path of at most {_MAX_UNIX_PATH} bytes")
            return cls(path=path)
        host, colon, port = text.rpartition(":")
        if not colon or not re.fullmatch(r"[0-9]{1,5}", port):
            raise ValueError(_EXPECTED)
        if int(port) > _MAX_PORT:
            raise ValueError(f"expected a port of at most {_MAX_PORT}")
        if host.startswith("[") and host.endswith("]"):
            return cls(_ip(host[1:-1], 6), int(port))
        if re.fullmatch(r"[0-9.]+", host):
            return cls(_ip(host, 4), int(port))
        if host and not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", host):
            raise ValueError(_EXPECTED)
        return cls(host or "0.0.0.0", int(port))  # noqa: S104 - asked for

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL that a client on this machine can use: for a wildcard address, the loopback address it includes."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared
        return replace(self, host=loopback).announced

    @property
    def announced(self) -> str:
        """The URL for people: a wildcard address stays one, for it is not of this machine alone."""
        return f"http+unix://{quote(self.path, safe='')}/" if self.path else f"http://{self}/"


def check_serving(host: object, port: object, threads: object) -> None:
    """Check what code asks a server for; raises TypeError for a wrong type, ValueError for a number out of range."""
    if not isinstance(host, str):
        raise TypeError(f"cannot serve on host {host!r}: expected a string, got {type(host).__name__}")
    for name, number, least, most in (("port", port, 0, _MAX_PORT), ("threads", threads, 1, None)):
        wanted = f"expected a whole number from {least} to {most}" if most else f"expected a whole number from {least}"
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"cannot serve with {name}={number!r}: {wanted}, got {type(number).__name__}")
        if number < least or (most and number > most):
            raise ValueError(f"cannot serve with {name}={number!r}: {wanted}, got {number}")


def _ip(text: str, version: int) -> str:
    try:
        right = ipaddress.ip_address(text).version == version
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"expected an IPv{version} address and a port")
    return text


class Listener:
    """A bound socket that this process owns; `listen()` opens it, `close()` gives the place back."""

    def __init__(
        self, address: Address, sock: socket.socket, node: Node | None = None, *, shared: bool = False
    ) -> None:
        self.address = address
        self.socket = sock
        self.shared = shared
        """Whether somebody else holds it, too: its backlog belongs to the next owner, and closing it refuses nobody."""
        self.stored = ""
        """Its name in the service manager's store, which alone shares it; empty when it is not there."""
        self.last_batch = False
        """Whether its backlog is served at the end of a drain, because nobody knows whether there is a next owner."""
        self._node = node

    @classmethod
    def bind(cls, address: Address) -> Self:
        """Bind without listening yet; raises CannotCreateError when the place cannot be had.

        Port 0 becomes the port the kernel chose. IPv6 listeners take IPv6 only (RFC 3493 §5.3).
        """
        if address.path:
            sock, node = bind_unix(Path(address.path), mode=0o660)
            return cls(address, sock, node)
        try:
            infos = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
            )
        except (OSError, UnicodeError) as error:  # the latter from names that no DNS could have
            raise CannotCreateError(f"cannot listen on {address}: {getattr(error, 'strerror', error)}") from error
        # A name may stand for several addresses; IPv4 first, because that is what clients of "localhost" try.
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
        """Refuse new connections from now on, while handshakes under way complete; False where that cannot be had.

        Bound to a network interface that does not exist (SO_BINDTOIFINDEX, socket(7); Linux 5.7, no privilege needed),
        the listener matches no new SYN. The way back is to close it and bind anew.
        """
        if self.shared or self.address.path or sys.platform != "linux":
            return False
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_SUCH_INTERFACE)
        except OSError:
            return False
        return True

    def waiting(self) -> int:
        """How many connections wait to be accepted, where the system tells: for TCP on Linux; else 0."""
        if self.address.path or sys.platform != "linux":
            return 0
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
        except OSError:  # not TCP (an inherited listener may be anything), or closed
            return 0
        # tcpi_unacked of a listener is the length of its backlog (tcp_get_info() in Linux' net/ipv4/tcp.c).
        return int(struct.unpack_from("=I", info, 24)[0])

    def withdraw(self) -> None:
        """Remove a Unix listener's node if it is still ours, so that nobody new comes; connections made stay.

        The node of a stored listener stays for the next owner; where none comes, it is stale, and replaced some day.
        """
        if self._node is not None and not self.stored:
            self._node.remove()
            self._node = None  # once: a successor's node may get the same inode

    def reached_at(self, path: str) -> bool:
        """Whether who connects at a Unix path comes to this listener; its node may be gone, or another's by now."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                return False
            except OSError:  # a full backlog or a denied connect: nothing speaks against it
                return True
            # Both are the credentials of who called listen(2) (SO_PEERCRED in unix(7)).
            theirs, ours = (
                each.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                for each in (probe, self.socket)
            )
            return theirs == ours

    def come_back(self, address: Address, name: str) -> None:
        """Be the listener on `address` again, which came from the store under `name`."""
        self.address, self.stored = address, name
        if self.address.path:
            with contextlib.suppress(OSError):  # somebody removed it: then there is nothing to own
                self._node = Node.of(Path(self.address.path))

    def close(self) -> None:
        """Withdraw, and close the socket."""
        self.withdraw()
        self.socket.close()


def _why_not(address: Address, error: OSError) -> str:
    hints = {
        errno.EADDRINUSE: "; another process listens there: choose another address, or stop that process",
        errno.EACCES: "; ports below 1024 need CAP_NET_BIND_SERVICE",
        errno.EADDRNOTAVAIL: "; this machine has no such address",
        errno.EAFNOSUPPORT: "; this machine, or RestrictAddressFamilies= of the unit, has no such addresses",
    }
    return f"cannot listen on {address}: {error.strerror}{hints.get(error.errno or 0, '')}"


@dataclass(frozen=True)
class Node:
    """A file system node that this process made, known again by device and inode."""

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Remember the node that stands at `path` now."""
        found = path.lstat()
        return cls(path, found.st_dev, found.st_ino)

    def is_ours(self) -> bool:
        """Whether the node at the path is still the one that was made."""
        try:
            found = self.path.lstat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)

    def remove(self) -> None:
        """Unlink the node, if it is still ours; one that cannot be is stale, which is no reason to lose a request."""
        if self.is_ours():
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:  # the directory was given to somebody else meanwhile, or is read-only by now
                log.warning(f"cannot remove {self.path}: {error.strerror}; remove it by hand")


def let_in(path: Path, *, mode: int, gid: int = -1) -> None:
    """Give a node that nobody sees yet its group and its mode; `gid` -1 leaves it the process' own. Raises OSError.

    A group that this process may not give (chown(2)) costs a warning, and then the mode is `without_group`.
    """
    if gid != -1:
        try:
            os.chown(path, -1, gid)
        except (OSError, OverflowError) as error:  # the latter from a number that is none of a group's
            mode = without_group(mode)
            why = error.strerror if isinstance(error, OSError) else error
            log.warning(f"cannot give a node in {path.parent} to group {gid}: {why}; it keeps its own, mode {mode:04o}")
    path.chmod(mode)


def without_group(mode: int) -> int:
    """A mode in which the group may do no more than everybody: what was meant for one group is not another's."""
    return mode & ~0o070 | mode & (mode & 0o007) << 3


def bind_unix(path: Path, *, mode: int, gid: int = -1) -> tuple[socket.socket, Node]:
    """Bind a listening Unix stream socket at `path` with its final mode and group, and only then show it there.

    A stale socket is replaced; a live one, or anything that is not a socket, is refused with CannotCreateError.
    A group that cannot be given costs a warning; see `let_in`.
    The socket is bound under a temporary name and renamed, so nobody ever sees it with the wrong mode or not listening.
    """
    if len(os.fsencode(path)) > _MAX_UNIX_PATH:  # the hidden name might do, but nobody could connect to the final one
        raise CannotCreateError(f"cannot listen on unix:{path}: AF_UNIX path too long")
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            if _answers(path):
                raise CannotCreateError(f"cannot listen on unix:{path}: another process listens there")
        else:
            raise CannotCreateError(f"cannot listen on unix:{path}: a file that is not a socket stands there")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CannotCreateError(f"cannot listen on unix:{path}: {error.strerror}") from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    hidden = path.with_name(f".{os.getpid()}")  # short, for a path that is nearly as long as one can be
    try:
        with contextlib.suppress(FileNotFoundError):
            hidden.unlink()
        sock.bind(str(hidden))
        let_in(hidden, mode=mode, gid=gid)
        sock.listen(128)
        hidden.rename(path)
        return sock, Node.of(path)
    except OSError as error:
        sock.close()
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise CannotCreateError(f"cannot listen on unix:{path}: {error.strerror or error}") from error


def _answers(path: Path) -> bool:
    """Whether somebody listens at a Unix socket path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # a full backlog or a denied connect: somebody is there
        return True


def closed_by_peer(sock: socket.socket | None) -> bool:
    """Whether the peer has closed its side and all that it sent was read; False where that cannot be looked at."""
    if sock is None or not hasattr(socket, "MSG_DONTWAIT"):
        return False
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:  # reset, or closed here meanwhile
        return True


def each_closed_by_peer(socks: Sequence[socket.socket | None]) -> list[bool]:
    """`closed_by_peer` of each, for one system call where no peer has closed anything (POLLRDHUP: poll(2)).

    Each one lets go of the interpreter, and waits for it again where the app is busy.
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
    """Bytes received and not read yet (FIONREAD, ioctl_tty(2))."""
    return _ask(sock, "FIONREAD")


def unacknowledged(sock: socket.socket | None) -> int:
    """Bytes sent that the peer has not acknowledged; on a Unix socket, not read (SIOCOUTQ, tcp(7), unix(7))."""
    return _ask(sock, "TIOCOUTQ")


def _ask(sock: socket.socket | None, what: str) -> int:
    if sock is None:
        return 0
    try:
        import fcntl  # noqa: PLC0415 - neither is on Windows
        import termios  # noqa: PLC0415
    except ImportError:
        return 0
    try:
        answer = fcntl.ioctl(sock.fileno(), getattr(termios, what), b"\0\0\0\0")
    except (OSError, ValueError):  # it was closed meanwhile
        return 0
    return int.from_bytes(answer, sys.byteorder)


def inherited(environ: Mapping[str, str]) -> dict[str, list[Listener]]:
    """The listeners that the service manager passed, by name (sd_listen_fds(3)); none when they are not for us.

    They are marked close-on-exec, and shared: whoever passed them holds them, too. A name that was not given is
    ``unknown``. Raises CannotCreateError for what is not a listening stream socket.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = _passed(environ)
    if count < 0:
        raise CannotCreateError(f"cannot use the sockets passed: LISTEN_FDS is {environ['LISTEN_FDS']!r}, not a number")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[Listener]] = {}
    for index in range(count):
        name = names[index] if index < len(names) and names[index] else "unknown"
        fd = 3 + index
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise CannotCreateError(f"cannot use the inherited descriptor {fd} ({name}): {error.strerror}") from error
        if not listening or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise CannotCreateError(
                f"cannot use the inherited descriptor {fd} ({name}): it does not listen for streams"
            )
        where = sock.getsockname()
        unix = sock.family == socket.AF_UNIX
        address = Address(path=os.fsdecode(where)) if unix else Address(host=where[0], port=where[1])
        found.setdefault(name, []).append(Listener(address, sock, shared=True))
    return found


def _passed(environ: Mapping[str, str]) -> int:
    """How many descriptors were passed; -1 where that cannot be read."""
    text = environ.get("LISTEN_FDS", "0")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1


def passed_to_another(environ: Mapping[str, str]) -> str:
    """To whom sockets were passed that are not for us (sd_listen_fds(3)), and what to do; empty when none were.

    A shell that starts flaskd and stays is such a process: what is in the environment is for it alone.
    """
    count, pid = _passed(environ), environ.get("LISTEN_PID", "")
    if count <= 0 or pid == str(os.getpid()):
        return ""
    sockets = f"{count} sockets were" if count > 1 else "1 socket was"
    whom = "to no process (LISTEN_PID says none)"
    if re.fullmatch(r"[0-9]{1,9}", pid):
        name = "which is gone"
        with contextlib.suppress(OSError):
            name = Path("/proc", pid, "comm").read_text(errors="replace").strip()
        whom = f"to pid {pid} ({name})"
    return (
        f"{sockets} passed {whom}, and this is pid {os.getpid()}: start flaskd without a shell around it, "
        "or with exec in it"
    )
