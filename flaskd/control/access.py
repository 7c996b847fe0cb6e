"""Who is at the other end of the control socket, and what they may do."""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import pwd
import re
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flaskd.errors import ForbiddenError
from flaskd.verbs import VERBS, Role

if TYPE_CHECKING:
    from flaskd.config import ControlConfig
    from flaskd.control.commands import Command

log = logging.getLogger("flaskd.control")

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
"""Whoever writes into the FIFO, which tells nothing of them."""


class Access:
    """What `control.roles` and `control.fifo` come to on this machine.

    Names that this machine does not know give nothing, and are a warning: a configuration may be written for another
    one. Without roles, whoever may open the socket is admin. With them, root and the daemon's own user still are:
    they may send it signals anyway.
    """

    def __init__(self, control: ControlConfig) -> None:
        self.configured = control.roles
        self._roles = control.roles.members()
        self._users: dict[int, Role] = {0: Role.ADMIN, os.geteuid(): Role.ADMIN}
        self._groups: dict[int, Role] = {}
        for role, members in self._roles.items():
            self._admit(Role[role.upper()], members)
        self.fifo = frozenset(([] if self._roles else VERBS) if control.fifo is None else control.fifo)
        """The verbs that the FIFO takes."""

    def _admit(self, role: Role, members: Iterable[str]) -> None:
        for member in members:
            known, name = (self._groups, member[1:]) if member.startswith("@") else (self._users, member)
            try:
                number = int(name) if name.isdecimal() else _number_of(name, group=known is self._groups)
            except KeyError:
                kind = "group" if known is self._groups else "user"
                log.warning(f'control.roles.{role}: this machine has no {kind} "{name}"; it gives nobody a role')
                continue
            known[number] = max(role, known.get(number, role))

    def role_of(self, peer: Peer) -> Role | None:
        """The highest role that a client has; None for none."""
        if not self._roles:
            return Role.ADMIN
        roles = [self._groups[group] for group in peer.groups if group in self._groups]
        if peer.uid in self._users:
            roles.append(self._users[peer.uid])
        return max(roles, default=None)

    def check(self, command: Command) -> None:
        """Raise ForbiddenError when the peer may not say that; "help" is for everybody."""
        name, peer = command.name, command.peer
        if peer is FIFO_PEER:
            if name not in self.fifo:
                takes = ", ".join(each for each in VERBS if each in self.fifo) or "nothing"
                raise ForbiddenError(f"{name} is not for the FIFO, which takes {takes} (control.fifo); use the socket")
            return
        role = self.role_of(peer)
        if name != "help" and (role is None or role < command.role):
            has = f"has the role {role}" if role else "has no role"
            raise ForbiddenError(f"{name} needs the role {command.role}; uid {peer.uid} {has} (control.roles)")


def _number_of(name: str, *, group: bool) -> int:
    return grp.getgrnam(name).gr_gid if group else pwd.getpwnam(name).pw_uid
