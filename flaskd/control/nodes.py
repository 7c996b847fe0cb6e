"""What the control plane listens on: two nodes in the runtime directory, made and put back, and passed sockets."""

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
"""What is done when a descriptor, the argument, has something to read."""

PAUSE = 1.0
"""Seconds between two looks at the nodes, and without new clients after the process ran out of files."""


class ControlNode:
    """One node, and the descriptor behind it; `make` gives both, or raises CannotCreateError or OSError."""

    def __init__(self, what: str, make: Callable[[int, int], tuple[int, Node]]) -> None:
        self.what = what
        self.fd = -1
        self.node: Node | None = None
        self._make = make
        self._told = ""

    def open(self, mode: int, gid: int) -> None:
        """Make it; where that fails, `keep` goes on trying."""
        try:
            self.fd, self.node = self._make(mode, gid)
        except (CannotCreateError, OSError) as error:
            self._told = str(error)
            raise

    def keep(self, mode: int, gid: int) -> int | None:
        """Make it if it is not there, or not ours any more; then returns the descriptor before, -1 for none.

        What stands in its place and is no stale node stays, with one warning, until it is gone.
        """
        if self.node is not None and self.node.is_ours():
            return None
        before, told, missed = self.fd, self._told, self.node is not None
        try:
            self.open(mode, gid)
        except (CannotCreateError, OSError) as error:
            if str(error) != told:
                lost = "was taken away, and cannot be put back" if missed else "still cannot be made"
                log.warning(f"the {self.what} {lost}: {error}; it is tried again")
            return None
        self._told = ""
        log.warning(f"the {self.what} {'had been taken away: it is back' if missed else 'could be made now'}")
        return before

    def anew(self) -> int | None:
        """Open the node once more; returns the descriptor before, None where that fails: `keep` makes another.

        A FIFO whose writers have all gone says POLLHUP for ever (poll(2)), but not to a descriptor opened since then
        (Linux, fs/pipe.c). The one before is still open, so that who writes meanwhile finds a reader.
        """
        before = self.fd
        try:
            self.fd = os.open(f"/proc/self/fd/{before}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            log.warning(f"cannot open the {self.what} once more: {error.strerror}; it is made anew")
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
    """What the nodes get: `control.mode`, and the number of `control.group`, -1 for the process' own.

    Of a group that this machine does not know nothing is left, also of what the mode gives a group; the check of the
    configuration warns of it.
    """
    mode, group = control.mode_bits, control.group
    if group is None:
        return mode, -1
    try:
        return mode, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        return without_group(mode), -1


class Nodes:
    """The control socket, the FIFO and the passed sockets: opened, looked after, and closed.

    What is ready to be read is told by the `selector`. Once the control thread runs, all but `paths` and `remove` is
    its own.
    """

    def __init__(self, name: str, environ: Mapping[str, str], selector: selectors.BaseSelector) -> None:
        self._directory = RuntimeDirectory(name, environ)
        self._socket, self._fifo = socket_node(self._directory), fifo_node(self._directory)
        self._wanted: dict[ControlNode, Read] = {}
        """Each with what reads from it."""
        self._passed: list[Listener] = []
        self._selector = selector
        self._accept: Read
        self._mode, self._gid = 0o600, -1
        self._accepting_again = 0.0
        """When (time.monotonic) the pause without new clients is over; 0 while there is none."""
        self._told = ""
        """Why there is no runtime directory, as the log has it."""

    @property
    def paths(self) -> list[str]:
        """The paths of what was made, and of what was passed."""
        made = [str(each.node.path) for each in self._wanted if each.node is not None]
        return made + [each.address.path for each in self._passed]

    def open(
        self, control: ControlConfig, passed: Sequence[Listener], *, accept: Read, read_fifo: Read | None
    ) -> list[str]:
        """Lock the runtime directory, make the nodes, and listen, also to passed sockets; returns what is wrong.

        Without `read_fifo` there is no FIFO. What cannot be made now is tried again. Raises NotNowError when another
        flaskd lives in the directory.
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
                    f"cannot take commands on {listener.address}: expected a Unix socket, which tells who speaks"
                )
        return faults

    def look_after(self, now: float) -> None:
        """Put back what was taken away; begin to accept again after a pause."""
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
                    log.warning(f"there is no runtime directory: {error}; it is tried again")
                return
            self._told = ""
        for each in self._wanted:
            before = each.keep(self._mode, self._gid)
            if before is not None:
                self._replace(before, each)

    def pause(self) -> None:
        """Accept no clients for a while: the process has no descriptors for them."""
        for each in self._listening():
            with contextlib.suppress(KeyError):  # in this very turn another one could not be accepted, either
                self._selector.unregister(each)
        self._accepting_again = time.monotonic() + PAUSE

    def reopen_fifo(self, fd: int) -> None:
        """Go on with the FIFO after its writers have all gone; `fd` would be readable for ever."""
        if (before := self._fifo.anew()) is not None:
            self._replace(before, self._fifo)
        else:  # it is made anew at the next look
            self._selector.unregister(fd)

    def _replace(self, before: int, node: ControlNode) -> None:
        """Listen to the new descriptor of a node, and close the one before; -1 for none."""
        if before >= 0:
            with contextlib.suppress(KeyError):  # no client is accepted for a moment
                self._selector.unregister(before)
            os.close(before)
        if node is not self._socket or not self._accepting_again:  # else with the others, after the pause
            self._selector.register(node.fd, selectors.EVENT_READ, self._wanted[node])

    def _listening(self) -> list[int]:
        own = [self._socket.fd] if self._socket in self._wanted and self._socket.fd >= 0 else []
        return own + [each.socket.fileno() for each in self._passed]

    def remove(self) -> None:
        """Remove our own nodes (any thread); the descriptors stay open."""
        for each in self._wanted:
            each.remove()

    def close(self) -> None:
        """Close all descriptors, and let go of the runtime directory."""
        for each in self._wanted:
            each.close()
        for listener in self._passed:
            listener.close()
        self._directory.release()

    def forget(self) -> None:
        """Close all descriptors, and nothing else: in a forked child they are not ours."""
        for each in self._wanted:
            each.close()
            each.node = None
        for listener in self._passed:
            listener.socket.close()
        self._directory.forget()
