"""The process at the other end of a control connection: its user, groups and program."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from functools import cached_property
from pathlib import Path

from flaskd.values import value

_SO_PEERGROUPS = 59
"""Python's socket module has no SO_PEERGROUPS (unix(7)): include/uapi/asm-generic/socket.h, Linux 4.13."""


_MOST_GROUPS = 256
"""Python's getsockopt reads at most 1024 bytes; of a user in more groups, only the first group counts."""


@value
class Peer:
    """A client's credentials when it connected (SO_PEERCRED, unix(7)); uid -1 if there are none."""

    uid: int = -1
    pid: int = 0
    groups: frozenset[int] = frozenset()

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """The peer of a Unix socket."""
        size = struct.calcsize("3i")
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        groups = {gid}
        with contextlib.suppress(OSError):  # an older kernel, or too many groups
            more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
            groups |= {number for (number,) in struct.iter_unpack("I", more)}
        return cls(uid, pid, frozenset(groups))

    @cached_property
    def command(self) -> str:
        """The name of its program (proc_pid_comm(5)), which the program may choose, escaped; "" if it has ended.

        It is read when first asked for, because few commands are logged and reading it takes ten system calls.
        """
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{self.pid}/comm").read_text(errors="replace").rstrip("\n")
            return re.sub(r"[^\w.+-]", "?", name, flags=re.ASCII)
        return ""

    @property
    def user(self) -> str:
        """Its user as text; the same for all connections of a user."""
        return f"uid={self.uid}" if self.uid >= 0 else "the FIFO"

    def __str__(self) -> str:
        if self.uid < 0:
            return "the FIFO"
        return f"uid={self.uid} pid={self.pid}" + (f" command={self.command}" if self.command else "")


FIFO_PEER = Peer()
"""Stands for the writer of the FIFO, about whom the kernel says nothing."""
