"""Who is at the other end of the control socket."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_SO_PEERGROUPS = 59
"""unix(7) does not name it yet: include/uapi/asm-generic/socket.h, Linux 4.13."""


_MOST_GROUPS = 256
"""What fits into the 1024 bytes that Python's getsockopt takes; of who is in more, the first group alone counts."""


@dataclass(frozen=True)
class Peer:
    """A client: its credentials at the moment it connected (SO_PEERCRED, unix(7)); uid -1 when there are none."""

    uid: int = -1
    pid: int = 0
    groups: frozenset[int] = frozenset()

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """The peer of a Unix socket."""
        size = struct.calcsize("3i")
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        groups = {gid}
        with contextlib.suppress(OSError):  # an older kernel, or too many
            more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
            groups |= {number for (number,) in struct.iter_unpack("I", more)}
        return cls(uid, pid, frozenset(groups))

    @cached_property
    def command(self) -> str:
        """The name of its program (proc_pid_comm(5)), which it may choose, in plain characters; "" when it is gone.

        Looked for when it is first asked for: few commands are logged, and the look takes ten system calls.
        """
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{self.pid}/comm").read_text(errors="replace").rstrip("\n")
            return re.sub(r"[^\w.+-]", "?", name, flags=re.ASCII)
        return ""

    @property
    def user(self) -> str:
        """Whose it is, without what changes from one connection to the next."""
        return f"uid={self.uid}" if self.uid >= 0 else "the FIFO"

    def __str__(self) -> str:
        if self.uid < 0:
            return "the FIFO"
        return f"uid={self.uid} pid={self.pid}" + (f" command={self.command}" if self.command else "")


FIFO_PEER = Peer()
"""Who writes into the FIFO, of whom it tells nothing."""
