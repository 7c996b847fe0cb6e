"""What the control plane listens on: two nodes in the runtime directory, remade when lost, and passed sockets."""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import selectors
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from flaskd.errors import CannotCreateError, FlaskdError
from flaskd.places.runtime import RuntimeDirectory
from flaskd.protocol import FIFO, SOCKET
from flaskd.sockets import Node, bind_unix, let_in, without_group

if TYPE_CHECKING:
    from flaskd.config import ControlConfig
    from flaskd.sockets import Listener

log = logging.getLogger("flaskd.control")

Read = Callable[[int], None]
"""Called with a descriptor when that has something to read."""

PAUSE = 1.0
"""Seconds between two checks of the nodes, and without new clients after the process ran out of files."""


class ControlNode:
    """One node and its descriptor; `make` gives both, or raises CannotCreateError or OSError."""

    def __init__(self, what: str, make: Callable[[int, int], tuple[int, Node]]) -> None:
        self.what = what
        self.fd = -1
        self.node: Node | None = None
        self._make = make
        self._told = ""

    def open(self, mode: int, gid: int) -> None:
        """Make the node; if that fails, `keep` tries again later."""
        try:
            self.fd, self.node = self._make(mode, gid)
        except (CannotCreateError, OSError) as error:
            self._told = str(error)
            raise

    def keep(self, mode: int, gid: int) -> int | None:
        """Make the node if it is missing, or another file stands there; returns the old descriptor, -1 for none.

        A file in its place that is no stale node stays, and there is one warning until it has gone.
        """
        if self.node is not None and self.node.is_ours():
            return None
        before, told, missed = self.fd, self._told, self.node is not None
        try:
            self.open(mode, gid)
        except (CannotCreateError, OSError) as error:
            if str(error) != told:
                lost = "was removed, and cannot be made again" if missed else "still cannot be made"
                log.warning(f"the {self.what} {lost}: {error}; flaskd tries again")
            return None
        self._told = ""
        log.warning(f"the {self.what} {'had been removed; it was made again' if missed else 'was made now'}")
        return before

    def anew(self) -> int | None:
        """Open the node again; returns the descriptor before, or None if that fails (`keep` then makes a new node).

        After all writers of a FIFO have closed it, its descriptor reports POLLHUP for ever (poll(2)); a descriptor that
        is opened after that does not (Linux, fs/pipe.c). The old one is closed later, so that the FIFO always has a
        reader.
        """
        before = self.fd
        try:
            self.fd = os.open(f"/proc/self/fd/{before}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            log.warning(f"cannot open the {self.what} again: {error.strerror}; flaskd makes a new one")
            self.node = None
            return None
        return before

    def remove(self) -> None:
        """Remove the node if it is still ours; the descriptor stays open."""
        if self.node is not None:
            with contextlib.suppress(OSError):
                self.node.remove()

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def socket_node(directory: RuntimeDirectory) -> ControlNode:
    """The control socket, listening."""

    def make(mode: int, gid: int) -> tuple[int, Node]:
        sock, node = bind_unix(directory.path / SOCKET, mode=mode, gid=gid)
        sock.setblocking(False)
        return sock.detach(), node

    return ControlNode("control socket", make)


def fifo_node(directory: RuntimeDirectory) -> ControlNode:
    """The FIFO, open for reading."""

    def make(mode: int, gid: int) -> tuple[int, Node]:
        path = directory.path / FIFO
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISFIFO(path.lstat().st_mode):
                raise CannotCreateError(f"cannot make the FIFO {path}: a file that is not a FIFO stands there")
        hidden = path.with_name(f".{FIFO}.{os.getpid()}")
        fd = -1
        try:
            with contextlib.suppress(FileNotFoundError):
                hidden.unlink()
            os.mkfifo(hidden, 0o600)
            let_in(hidden, mode=mode, gid=gid)
            fd = os.open(hidden, os.O_RDONLY | os.O_NONBLOCK)
            hidden.rename(path)
            return fd, Node.of(path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            with contextlib.suppress(OSError):
                hidden.unlink()
            raise CannotCreateError(f"cannot make the FIFO {path}: {error.strerror}") from error

    return ControlNode("FIFO", make)


def mode_and_group(control: ControlConfig) -> tuple[int, int]:
    """The mode and the group of the nodes: `control.mode` and the number of `control.group`, -1 for the process' own.

    If this machine does not know the group, the nodes keep the process' own group, which may then do no more than
    others; the check of the configuration warns of it.
    """
    mode, group = control.mode_bits, control.group
    if group is None:
        return mode, -1
    try:
        return mode, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        return without_group(mode), -1


class Nodes:
    """The control socket, the FIFO and the passed sockets: opens, checks and closes them.

    The `selector` tells which are ready to be read. Once the control thread runs, only that thread may use this object,
    except for `paths` and `remove`.
    """

    def __init__(self, name: str, environ: Mapping[str, str], selector: selectors.BaseSelector) -> None:
        self._directory = RuntimeDirectory(name, environ)
        self._socket, self._fifo = socket_node(self._directory), fifo_node(self._directory)
        self._wanted: dict[ControlNode, Read] = {}
        """The nodes that there should be, each with the function that reads from it."""
        self._passed: list[Listener] = []
        self._selector = selector
        self._accept: Read
        self._mode, self._gid = 0o600, -1
        self._accepting_again = 0.0
        """The time.monotonic() at which the pause without new clients ends; 0 if there is no pause."""
        self._told = ""
        """The last logged reason why there is no runtime directory."""

    @property
    def paths(self) -> list[str]:
        """The paths of the nodes that were made, and of the sockets that were passed."""
        made = [str(each.node.path) for each in self._wanted if each.node is not None]
        return made + [each.address.path for each in self._passed]

    def open(
        self, control: ControlConfig, passed: Sequence[Listener], *, accept: Read, read_fifo: Read | None
    ) -> list[str]:
        """Lock the runtime directory, make the nodes and listen, also on passed sockets; returns a list of faults.

        Without `read_fifo` there is no FIFO. A node that cannot be made now is tried again later. Raises NotNowError if
        another flaskd uses the directory.
        """
        self._accept = accept
        self._mode, self._gid = mode_and_group(control)
        if str(self._directory.path / SOCKET) not in {each.address.path for each in passed}:
            self._wanted[self._socket] = accept
        if read_fifo is not None:
            self._wanted[self._fifo] = read_fifo
        return [*self._make(), *self._take(passed)]

    def _make(self) -> list[str]:
        try:
            self._acquire()
        except CannotCreateError as error:
            self._told = str(error)
            return [self._told]
        faults = []
        for each, read in self._wanted.items():
            try:
                each.open(self._mode, self._gid)
            except (CannotCreateError, OSError) as error:
                faults.append(str(error))
            else:
                self._selector.register(each.fd, selectors.EVENT_READ, read)
        return faults

    def _acquire(self) -> None:
        self._directory.acquire(self._gid)
        if left := self._directory.tidy():
            log.info(f"removed what a flaskd that was killed had left in {self._directory.path}: {', '.join(left)}")

    def _take(self, passed: Sequence[Listener]) -> list[str]:
        faults = []
        for listener in passed:
            if listener.address.path:
                listener.socket.setblocking(False)
                self._passed.append(listener)
                self._selector.register(listener.socket, selectors.EVENT_READ, self._accept)
            else:
                listener.close()
                faults.append(
                    f"cannot take commands on {listener.address}: expected a Unix socket, which names its client's user"
                )
        return faults

    def look_after(self, now: float) -> None:
        """Make missing nodes again; accept clients again after a pause."""
        if self._accepting_again and now >= self._accepting_again:
            self._accepting_again = 0.0
            for fd in self._listening():
                self._selector.register(fd, selectors.EVENT_READ, self._accept)
        if self._wanted and not self._directory.stands:
            self._directory.forget()
            try:
                self._acquire()
            except FlaskdError as error:
                if str(error) != self._told:
                    self._told = str(error)
                    log.warning(f"there is no runtime directory: {error}; flaskd tries again")
                return
            self._told = ""
        for each in self._wanted:
            before = each.keep(self._mode, self._gid)
            if before is not None:
                self._replace(before, each)

    def pause(self) -> None:
        """Accept no clients for `PAUSE` seconds, because the process has no descriptors for them."""
        for each in self._listening():
            with contextlib.suppress(KeyError):  # the pause has already begun in this turn
                self._selector.unregister(each)
        self._accepting_again = time.monotonic() + PAUSE

    def reopen_fifo(self, fd: int) -> None:
        """Read on from the FIFO after all its writers have closed it; `fd` would be reported as readable for ever."""
        if (before := self._fifo.anew()) is not None:
            self._replace(before, self._fifo)
        else:  # `look_after` makes a new one
            self._selector.unregister(fd)

    def _replace(self, before: int, node: ControlNode) -> None:
        """Listen to the new descriptor of a node, and close the one `before`; -1 for none."""
        if before >= 0:
            with contextlib.suppress(KeyError):  # it is not registered during a pause
                self._selector.unregister(before)
            os.close(before)
        if node is not self._socket or not self._accepting_again:  # else it is registered after the pause
            self._selector.register(node.fd, selectors.EVENT_READ, self._wanted[node])

    def _listening(self) -> list[int]:
        own = [self._socket.fd] if self._socket in self._wanted and self._socket.fd >= 0 else []
        return own + [each.socket.fileno() for each in self._passed]

    def remove(self) -> None:
        """Remove our own nodes; any thread may call it. The descriptors stay open."""
        for each in self._wanted:
            each.remove()

    def close(self) -> None:
        """Close all descriptors and unlock the runtime directory."""
        for each in self._wanted:
            each.close()
        for listener in self._passed:
            listener.close()
        self._directory.release()

    def forget(self) -> None:
        """Close all descriptors, and do nothing else: in a forked child the nodes belong to the parent."""
        for each in self._wanted:
            each.close()
            each.node = None
        for listener in self._passed:
            listener.socket.close()
        self._directory.forget()
