"""What a client of the control plane may do."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flaskd.control.peer import FIFO_PEER, Peer
from flaskd.errors import ForbiddenError
from flaskd.verbs import VERBS, Role

if TYPE_CHECKING:
    from flaskd.config import ControlConfig
    from flaskd.control.commands import Command


class Access:
    """What `control.roles` and `control.fifo` mean on this machine.

    A name that this machine does not know has no effect. Without roles, every client that may open the socket is an
    admin. With roles, root and the daemon's own user are admins all the same, because they may send it signals anyway.
    """

    def __init__(self, control: ControlConfig) -> None:
        self.configured = control.roles
        self._roles = control.roles.members()
        self._users: dict[int, Role] = {0: Role.ADMIN, os.geteuid(): Role.ADMIN}
        self._groups: dict[int, Role] = {}
        for role, members in self._roles.items():
            self._admit(Role[role.upper()], members)
        self.fifo = frozenset(([] if self._roles else VERBS) if control.fifo is None else control.fifo)
        """The verbs that the FIFO accepts."""

    def _admit(self, role: Role, members: Iterable[str]) -> None:
        for member in members:
            known, name = (self._groups, member[1:]) if member.startswith("@") else (self._users, member)
            try:
                number = int(name) if name.isdecimal() else _number_of(name, group=known is self._groups)
            except KeyError:
                continue  # the check of the configuration warns of it
            known[number] = max(role, known.get(number, role))

    def role_of(self, peer: Peer) -> Role | None:
        """The highest role that a client has, or None."""
        if not self._roles:
            return Role.ADMIN
        roles = [self._groups[group] for group in peer.groups if group in self._groups]
        if peer.uid in self._users:
            roles.append(self._users[peer.uid])
        return max(roles, default=None)

    def check(self, command: Command) -> None:
        """Raise ForbiddenError if the peer may not give this command; every client may say "help"."""
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
