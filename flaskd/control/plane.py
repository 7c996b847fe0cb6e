"""The thread that reads commands from the socket and the FIFO, and what bounds their writers."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from flaskd.control.access import Access
from flaskd.control.clients import Client
from flaskd.control.commands import Command, from_words
from flaskd.control.fifo import Lines
from flaskd.control.nodes import Place, accept, fifo_place, mode_and_group, socket_place
from flaskd.control.peer import FIFO_PEER
from flaskd.control.replies import LogReply
from flaskd.control.verbs import RUN
from flaskd.errors import CannotCreateError, FlaskdError, NotNowError
from flaskd.log.setup import bounded_by
from flaskd.places.runtime import RuntimeDirectory
from flaskd.process.descriptors import open_files
from flaskd.protocol import SOCKET, Reply

if TYPE_CHECKING:
    from flaskd.config import Config, ControlConfig
    from flaskd.daemon import Daemon
    from flaskd.sockets import Listener

log = logging.getLogger("flaskd.control")

_Read = Callable[[int], None]
"""What is done when a descriptor, the argument, has something to read."""

_MAX_CLIENTS = 64
_RESERVE = 16
"""Of these, those in which nobody waits for an outcome, so that who asks something short always gets in."""
_STOP_RESERVE = 8
"""How far into the reserve a stop that waits may go."""
_IDLE_TIMEOUT = 60.0
"""Seconds a client may leave a command unfinished, or an answer unread."""
_FLUSH_TIMEOUT = 1.0
_BROKEN = "control commands that broke off"
"""What they are called in the log, where there are too many to list them."""
_PAUSE = 1.0
"""Seconds without new clients after the process ran out of files, between two looks at the nodes; the longest sleep."""


class ControlPlane:
    """Opens the nodes, answers until closed; `open` and `close` are the daemon's, the rest runs in its own thread."""

    def __init__(self, daemon: Daemon, name: str, environ: Mapping[str, str]) -> None:
        self._daemon = daemon
        self._directory = RuntimeDirectory(name, environ)
        self._socket, self._fifo = socket_place(self._directory), fifo_place(self._directory)
        self._places: dict[Place, _Read] = {}
        """Those that are wanted, each with what reads from it."""
        self._selector = selectors.DefaultSelector()
        self._passed: list[Listener] = []
        self._clients: set[Client] = set()
        self._fifo_lines = Lines(self._fifo_line)
        self._thread = threading.Thread(target=self._run, name="flaskd-control", daemon=True)
        self._ending = False
        self._again = False
        """Whether another turn is wanted at once; the control thread's."""
        self._accepting_again = 0.0
        self._next_look = 0.0
        self._told = ""
        self._mode, self._gid = 0o600, -1
        self._access: Access
        self._access_of: ControlConfig

    @property
    def nodes(self) -> list[str]:
        """The paths of what was made, and of what was passed."""
        made = [str(place.node.path) for place in self._places if place.node is not None]
        return made + [each.address.path for each in self._passed]

    def open(self, config: Config, passed: Sequence[Listener] = ()) -> None:
        """Lock the runtime directory, make both nodes, start answering, also on sockets that the manager has passed.

        Raises NotNowError when another flaskd lives there, and CannotCreateError if `control.required`; otherwise what
        cannot be made is told in the log.
        """
        self._access, self._access_of = Access(config.control), config.control
        self._mode, self._gid = mode_and_group(config.control)
        if str(self._directory.path / SOCKET) not in {each.address.path for each in passed}:
            self._places[self._socket] = self._accept
        if self._access.fifo:
            self._places[self._fifo] = self._read_fifo
        faults = [*self._make_nodes(), *self._take(passed)]
        if faults and config.control.required:
            self.close()
            raise CannotCreateError("; ".join(faults) + " (control.required is true)")
        for fault in faults:
            log.warning(f"control is not complete: {fault}; serving all the same")
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._selector.register(self._reader, selectors.EVENT_READ, self._woken)
        self._thread.start()

    def _make_nodes(self) -> list[str]:
        """Have the directory and the nodes in it; returns what is wrong. What cannot be made now is tried again."""
        try:
            self._acquire()
        except CannotCreateError as error:
            self._told = str(error)
            return [self._told]
        faults = []
        for place, read in self._places.items():
            try:
                place.open(self._mode, self._gid)
            except (CannotCreateError, OSError) as error:
                faults.append(str(error))
            else:
                self._selector.register(place.fd, selectors.EVENT_READ, read)
        return faults

    def _acquire(self) -> None:
        self._directory.acquire(self._gid)
        if left := self._directory.tidy():
            log.info(f"removed what a flaskd that was killed had left in {self._directory.path}: {', '.join(left)}")

    def _take(self, passed: Sequence[Listener]) -> list[str]:
        """Answer on passed sockets, too; returns what is wrong with them."""
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

    def close(self) -> None:
        """Take no more commands, flush the answers (bounded), remove our own nodes; a second call does nothing."""
        self.remove_nodes()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._ending = True
            self._wake()
            self._thread.join(_FLUSH_TIMEOUT + 1)
        self.remove_nodes()  # once more: it may have put one back in this moment
        for client in list(self._clients):
            self._drop(client)
        self._selector.close()
        for place in self._places:
            place.close()
        for listener in self._passed:
            listener.close()
        if hasattr(self, "_reader"):
            self._reader.close()
            self._writer.close()
        self._directory.release()

    def forget(self) -> None:
        """Close all descriptors, and nothing else: in a forked child they are not ours."""
        self._selector.close()
        for client in self._clients:
            client.sock.close()
        for place in self._places:
            place.close()
            place.node = None
        for listener in self._passed:
            listener.socket.close()
        self._directory.forget()

    def remove_nodes(self) -> None:
        """Remove our own nodes now (any thread; the last thing before an exit in a hurry)."""
        self._ending = True
        for place in self._places:
            place.remove()

    def execute(self, command: Command, reply: Reply) -> None:
        """Carry out a command; its outcome goes to `reply`."""
        try:
            self._access_now().check(command)
            self._check_room(command)
            if command.changes:
                kind = f"control commands of {command.peer.user}"
                log.info(f"control: {command} from {command.peer}", extra=bounded_by(kind))
            RUN[command.name](self._daemon, command, reply)
        except FlaskdError as error:
            if command.changes:
                kind = f"refused control commands of {command.peer.user}"
                log.warning(f"control: refused {command} from {command.peer}: {error}", extra=bounded_by(kind))
            reply.error(error.code, str(error))

    def _check_room(self, command: Command) -> None:
        """Refuse to wait with too many others, who would then leave no room for who asks something short."""
        if not command.waits or command.peer is FIFO_PEER:
            return
        most = _MAX_CLIENTS - _RESERVE + (_STOP_RESERVE if command.name == "stop" else 0)
        if self._waiting > most:  # who asks is one of them
            self._let_go_of_the_gone()
        if (waiting := self._waiting) > most:
            instead = ", or leave out wait" if not command.verb.lengthy else ""
            raise NotNowError(
                f"cannot {command.name}: {waiting - 1} clients wait for an outcome already; come back later{instead}"
            )

    @property
    def _waiting(self) -> int:
        return sum(bool(client.pending) for client in self._clients)

    def _let_go_of_the_gone(self) -> None:
        """Drop who waits for an outcome and has hung up; they are not read from, so it does not show by itself."""
        for client in [each for each in self._clients if each.pending and each.gone]:
            self._drop(client)

    def _access_now(self) -> Access:
        configuration = self._daemon.configuration
        assert configuration is not None
        control = configuration.values.control
        if control is not self._access_of:  # reloaded
            self._access, self._access_of = Access(control), control
        return self._access

    # --- the control thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        until: float | None = None
        while True:
            if self._ending:
                until = until or time.monotonic() + _FLUSH_TIMEOUT
                if time.monotonic() >= until or not any(client.has_output for client in self._clients):
                    return
            pause = 0.0 if self._again else 0.1 if self._ending else _PAUSE
            self._again = False
            for key, _ in self._selector.select(pause):
                try:
                    key.data(key.fd)
                except Exception:  # one client's trouble is not the next one's
                    log.exception("cannot answer a control client", extra=bounded_by(_BROKEN))
            self._settle()
            if (now := time.monotonic()) >= self._next_look and not self._ending:
                self._next_look = now + _PAUSE
                try:
                    self._let_go_of_the_gone()
                    self._daemon.checking.look()
                    self._daemon.planning.look()
                    self._look_after_nodes(now)
                except Exception:  # the clients that there are can do without
                    log.exception("cannot look after the control nodes")

    def _wake(self) -> None:
        """Let the control thread have another turn (any thread)."""
        if threading.current_thread() is self._thread:
            self._again = True
            return
        with contextlib.suppress(OSError):  # full: it is awake anyway; closed: nobody is there to wake
            self._writer.send(b"x")

    def _woken(self, _fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def _look_after_nodes(self, now: float) -> None:
        """Put back what was taken away; begin to accept again after a pause."""
        if self._accepting_again and now >= self._accepting_again:
            self._accepting_again = 0.0
            for fd in self._listening():
                self._selector.register(fd, selectors.EVENT_READ, self._accept)
        if self._places and not self._directory.stands:
            self._directory.forget()
            try:
                self._acquire()
            except FlaskdError as error:
                if str(error) != self._told:
                    self._told = str(error)
                    log.warning(f"there is no runtime directory: {error}; it is tried again")
                return
            self._told = ""
        for place, read in self._places.items():
            before = place.keep(self._mode, self._gid)
            if before is not None:
                self._replace(before, place, read)

    def _replace(self, before: int, place: Place, read: _Read) -> None:
        """Listen to the new descriptor of a place, and close the one before; -1 for none."""
        if before >= 0:
            with contextlib.suppress(KeyError):  # nobody was accepted for a moment
                self._selector.unregister(before)
            os.close(before)
        if place is not self._socket or not self._accepting_again:  # else with the others, after the pause
            self._selector.register(place.fd, selectors.EVENT_READ, read)

    def _listening(self) -> list[int]:
        own = [self._socket.fd] if self._socket in self._places and self._socket.fd >= 0 else []
        return own + [each.socket.fileno() for each in self._passed]

    def _accept(self, fd: int) -> None:
        """Accept one client, and hear what it has said already; where more wait, the selector says so again.

        So few system calls because each lets go of the interpreter, and waits for it again where the app is busy.
        """
        try:
            self._admit(open_files.open(lambda: accept(fd)))
        except BlockingIOError:  # a process that shares the listener was faster
            pass
        except OSError as error:
            log.warning(f"cannot accept a control client: {error.strerror}")
            for each in self._listening():
                with contextlib.suppress(KeyError):  # in this very turn another one could not be accepted, either
                    self._selector.unregister(each)
            self._accepting_again = time.monotonic() + _PAUSE

    def _admit(self, sock: socket.socket) -> None:
        if len(self._clients) >= _MAX_CLIENTS:
            self._let_go_of_the_gone()
        if len(self._clients) >= _MAX_CLIENTS:
            waiting = [each for each in self._clients if not each.pending]
            if waiting:  # who says nothing makes room for who may
                self._drop(min(waiting, key=lambda each: each.last_heard))
        if self._ending or len(self._clients) >= _MAX_CLIENTS:
            sock.close()
            return
        client = Client(sock, self.execute, self._wake)
        self._clients.add(client)
        client.read()

    @staticmethod
    def _serve(client: Client) -> None:
        client.flush()
        if client.wants_to_read:
            client.read()

    def _settle(self) -> None:
        """Carry out and flush what there is, watch for more, and let go of who is done, idle or too slow."""
        now = time.monotonic()
        for client in list(self._clients):
            if client not in self._clients:  # it made room for another one
                continue
            try:
                more = client.work()
            except Exception:  # a command with a fault in it is no reason to leave the others alone
                log.exception("cannot carry out a control command", extra=bounded_by(_BROKEN))
                more = False
                client.closing = True
            if client not in self._clients:
                continue
            if more:
                self._wake()
            client.flush()
            idle = not client.pending and now - client.last_heard > _IDLE_TIMEOUT
            if client.done or client.hopeless or idle:
                self._drop(client)
                continue
            # A client that shut its side down would be readable for ever.
            events = selectors.EVENT_READ if client.wants_to_read else 0
            try:
                self._watch(client, events | (selectors.EVENT_WRITE if client.has_output else 0))
            except OSError as error:  # no memory, no more watches: epoll_ctl(2)
                why = f"cannot listen to a control client: {error.strerror}"
                log.warning(why, extra=bounded_by("control clients that cannot be listened to"))
                self._drop(client)

    def _watch(self, client: Client, events: int) -> None:
        known = self._selector.get_map().get(client.sock)
        if known is None and events:
            self._selector.register(client.sock, events, lambda _fd: self._serve(client))
        elif known is not None and not events:
            self._selector.unregister(client.sock)
        elif known is not None and known.events != events:
            self._selector.modify(client.sock, events, known.data)

    def _drop(self, client: Client) -> None:
        self._clients.discard(client)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.sock)
        client.sock.close()

    def _read_fifo(self, fd: int) -> None:
        if self._fifo_lines.read(fd):
            return
        if (before := self._fifo.anew()) is not None:
            self._replace(before, self._fifo, self._read_fifo)
        else:  # it is made anew at the next look; until then it would be readable for ever
            self._selector.unregister(fd)

    def _fifo_line(self, line: str) -> None:
        reply = LogReply(line[:80])
        try:
            self.execute(from_words(line.split(), FIFO_PEER), reply)
        except FlaskdError as error:
            reply.error(error.code, str(error))
        except Exception as error:  # as for a socket's client (Client._run); the lines behind it are carried out
            log.exception("cannot carry out a control command", extra=bounded_by(_BROKEN))
            reply.error(FlaskdError.code, f"cannot carry out the command: {type(error).__name__}")
