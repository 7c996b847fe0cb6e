"""Acceptors: waitress' server objects on flaskd's listeners. They can be paused, gated, closed and reopened."""

from __future__ import annotations

import errno
import logging
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.buffers import ReadOnlyFileBasedBuffer
from waitress.server import TcpWSGIServer

from flaskd.process.descriptors import open_files
from flaskd.server.admission import Admission
from flaskd.server.board import Board
from flaskd.server.channel import Channel
from flaskd.server.context import Context
from flaskd.sockets import Address, Listener

try:
    from waitress.server import UnixWSGIServer
except ImportError:  # Windows
    UnixWSGIServer = None

log = logging.getLogger("flaskd.server")

_BATCH = 64
"""Most connections accepted in one turn of the loop; under load, accepting until none is left would never end."""
_NO_MORE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC}
"""Errors of accept(2) and epoll_ctl(2) that say that this process or the machine has no more descriptors or memory."""


class _Noted(dict[int, Channel]):
    """Waitress' map of the open connections, by descriptor; each change writes their number to the board."""

    def __init__(self, context: Context, board: Board) -> None:
        super().__init__()
        self._context, self._board = context, board

    def __setitem__(self, fd: int, channel: Channel) -> None:
        super().__setitem__(fd, channel)
        self._board.connect(self._context.connections)

    def __delitem__(self, fd: int) -> None:
        super().__delitem__(fd)
        self._board.connect(self._context.connections)


class Acceptor:
    """What TCP and Unix acceptors share. An acceptor outlives its listener: channels wake the loop through it."""

    channel_class = Channel
    admission: Admission
    context: Context
    listener: Listener
    environ: dict[str, Any]
    paused = False

    def readable(self) -> bool:
        """Whether it accepts. Waitress' own method also closes idle connections; flaskd's loop does that elsewhere."""
        return bool(self.accepting) and not self.paused

    def handle_accept(self) -> None:
        """Accept up to `_BATCH` connections.

        Where other workers accept from the same listener, accept one connection, or leave it to a worker that is idle.
        """
        if (aside := self.admission.aside) is None or not self.listener.copied or self.context.drains:
            self.accept_some(_BATCH)
        elif self.admission.paused:  # another thread found a free place and switched the listener on just now
            self.context.poller.listen(self, on=False)
        elif not self.context.poller.put_off(self) and not aside.steps():
            self.accept_some(1)

    def accept_some(self, most: int) -> int:
        """Accept up to `most` connections, and return how many there were."""
        accept = self.socket.accept  # type: ignore[attr-defined]
        for count in range(most):
            if self.admission.full:
                return count
            try:
                # In a drain, those that the gate let through are the last connections: they may use the reserve.
                conn, addr = open_files.open(accept) if self.admission.reserved or self.context.drains else accept()
            except OSError as error:
                if error.errno == errno.EMFILE and open_files.make_room():
                    continue
                if error.errno in _NO_MORE:
                    self.admission.out_of_files(error)
                elif not isinstance(error, BlockingIOError | ConnectionAbortedError):
                    log.warning(f"cannot accept a connection on {self.listener.address}: {error}")
                return count
            open_files.make_room(conn.fileno())
            try:
                conn.setblocking(False)
                self.set_socket_options(conn)  # type: ignore[attr-defined]
                Channel(self, conn, self.fix_addr(addr), self.adj, map=self._map)  # type: ignore[attr-defined]
            except OSError as error:
                conn.close()
                if error.errno in _NO_MORE:
                    self.admission.out_of_files(error)
                    return count
                # Any other error means that the client has closed the connection already.
        return most

    def reopen(self, listener: Listener) -> None:
        """Accept from a new listener."""
        listener.socket.setblocking(False)
        self.listener = listener
        self.set_socket(listener.socket, self._map)  # type: ignore[attr-defined]
        self.accepting = True

    def close_listener(self) -> None:
        """Close the listener alone: threads of the pool still use the trigger to wake the loop."""
        if self.accepting:
            self.accepting = False
            wasyncore.dispatcher.close(self)
        self.listener.close()


class _TcpAcceptor(Acceptor, TcpWSGIServer):  # type: ignore[misc]
    pass


if UnixWSGIServer is not None:

    class _UnixAcceptor(Acceptor, UnixWSGIServer):  # type: ignore[misc]
        pass


def _name(address: Address) -> str:
    """SERVER_NAME of the environ; empty for a wildcard address, where each connection's own local address is used."""
    if address.path:
        return "localhost"
    return "" if address.host in {"0.0.0.0", "::"} else address.host  # noqa: S104 - compared


def _environ(acceptor: Any, listener: Listener, context: Context) -> dict[str, Any]:
    """The part of the environ that is the same for every request of a listener (PEP 3333; waitress.task)."""
    return {
        "SERVER_PORT": str(acceptor.effective_port),
        "SERVER_SOFTWARE": acceptor.adj.ident,
        "SCRIPT_NAME": acceptor.adj.url_prefix,
        "wsgi.url_scheme": acceptor.adj.url_scheme,
        "wsgi.version": (1, 0),
        "wsgi.multithread": True,
        "wsgi.multiprocess": listener.copied,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": ReadOnlyFileBasedBuffer,
        "wsgi.input_terminated": True,
        "flaskd.draining": context.draining,
    }


def make_acceptor(admission: Admission, listener: Listener, app: Any, adjustments: Adjustments) -> Any:
    """Make waitress' server object for a listener, which is bound already."""
    context, sock = admission.context, listener.socket
    kind = _UnixAcceptor if listener.address.path else _TcpAcceptor
    acceptor = kind(
        app,
        context.poller,
        False,
        sock,
        dispatcher=context.pool,
        adj=adjustments,
        sockinfo=(sock.family, sock.type, sock.proto, sock.getsockname()),
        bind_socket=False,
    )
    if acceptor.server_name == Adjustments.server_name:  # waitress' default: no name was configured
        acceptor.server_name = _name(listener.address)
    if listener.address.path:  # the socket knows only the path at which it was bound
        acceptor.effective_port = listener.address.path
    acceptor.environ = _environ(acceptor, listener, context)
    acceptor.admission, acceptor.context = admission, context
    acceptor.listener = listener
    acceptor.accepting = True
    if context.board is not None:
        acceptor.active_channels = _Noted(context, context.board)
    return acceptor
