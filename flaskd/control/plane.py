"""The socket and the FIFO, and the thread that reads commands from them."""

from __future__ import annotations

import contextlib
import functools
import grp
import json
import logging
import os
import selectors
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flaskd.control.replies import JsonReply, LogReply, TextReply
from flaskd.control.verbs import find_verb
from flaskd.errors import CannotCreateError, FlaskdError, UsageError
from flaskd.protocol import FIFO, MAX_LINE, SOCKET, Reply
from flaskd.runtime import RuntimeDirectory
from flaskd.sockets import Node, bind_unix

if TYPE_CHECKING:
    from flaskd.config import Config
    from flaskd.daemon import Daemon

log = logging.getLogger("flaskd.control")

_MAX_CLIENTS = 64
_IDLE_TIMEOUT = 60.0
"""Seconds a client may leave a command unfinished."""
_FLUSH_TIMEOUT = 1.0
_ACCEPT_PAUSE = 1.0
"""Seconds without new clients after the process ran out of files; also the longest sleep."""
_MAX_OUTPUT = 1 << 20
"""Bytes of unread answers after which a client is given up."""


@dataclass(eq=False)
class _Client:
    """A connection to the control socket; `out` is guarded by the plane's lock."""

    sock: socket.socket
    peer: str
    inbox: bytearray = field(default_factory=bytearray)
    out: bytearray = field(default_factory=bytearray)
    last_heard: float = field(default_factory=time.monotonic)
    json: bool = False
    pending: int = 0
    closing: bool = False
    ended: bool = False


class ControlPlane:
    """Opens the nodes, answers until closed; `open` and `close` are the daemon's, the rest runs in its own thread."""

    def __init__(self, daemon: Daemon, name: str, environ: Mapping[str, str]) -> None:
        self._daemon = daemon
        self._directory = RuntimeDirectory(name, environ)
        self._selector = selectors.DefaultSelector()
        self._clients: set[_Client] = set()
        self._lock = threading.Lock()
        self._nodes: list[Node] = []
        self._fifo = -1
        self._fifo_inbox = bytearray()
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="flaskd-control", daemon=True)
        self._ending = False
        self._accepting_again = 0.0

    @property
    def nodes(self) -> list[str]:
        """The paths of what was made."""
        return [str(node.path) for node in self._nodes]

    def open(self, config: Config) -> None:
        """Lock the runtime directory, make both nodes, start answering.

        Raises NotNowError when another flaskd lives there, and CannotCreateError if `control.required`; otherwise what
        cannot be made is told in the log.
        """
        mode, faults = config.control.mode_bits, []
        try:
            self._directory.acquire()
        except CannotCreateError as error:
            faults.append(str(error))
        else:
            if left := self._directory.tidy():
                log.info(f"removed what a flaskd that was killed had left in {self._directory.path}: {', '.join(left)}")
            gid = _gid(config.control.group)
            for make in (self._make_socket, self._make_fifo):
                try:
                    make(mode, gid)
                except (CannotCreateError, OSError) as error:
                    faults.append(str(error))
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

    def _make_socket(self, mode: int, gid: int) -> None:
        sock, node = bind_unix(self._directory.path / SOCKET, mode=mode, gid=gid)
        self._nodes.append(node)
        sock.setblocking(False)
        self._socket = sock
        self._selector.register(sock, selectors.EVENT_READ, self._accept)

    def _make_fifo(self, mode: int, gid: int) -> None:
        path = self._directory.path / FIFO
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISFIFO(path.lstat().st_mode):
                raise CannotCreateError(f"cannot make the FIFO {path}: a file that is not a FIFO stands there")
        hidden = path.with_name(f".{FIFO}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            hidden.unlink()
        os.mkfifo(hidden)
        hidden.chmod(mode)
        if gid != -1:
            os.chown(hidden, -1, gid)
        hidden.rename(path)
        self._nodes.append(Node.of(path))
        # O_RDWR: an O_RDONLY reader spins on POLLHUP once the first writer is gone (poll(2)).
        self._fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._selector.register(self._fifo, selectors.EVENT_READ, self._read_fifo)

    def close(self) -> None:
        """Take no more commands, flush the answers (bounded), remove our own nodes; a second call does nothing."""
        self.remove_nodes()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._ending = True
            self._wake()
            self._thread.join(_FLUSH_TIMEOUT + 1)
        for client in list(self._clients):
            self._drop(client)
        self._selector.close()
        for sock in (self._socket, *((self._reader, self._writer) if hasattr(self, "_reader") else ())):
            if sock is not None:
                sock.close()
        if self._fifo >= 0:
            os.close(self._fifo)
            self._fifo = -1
        self._directory.release()

    def forget(self) -> None:
        """Close all descriptors, and nothing else: in a forked child they are not ours."""
        self._selector.close()
        for sock in (self._socket, *(client.sock for client in self._clients)):
            if sock is not None:
                sock.close()
        if self._fifo >= 0:
            os.close(self._fifo)
        self._directory.forget()

    def remove_nodes(self) -> None:
        """Remove our own nodes now (any thread; the last thing before an exit in a hurry)."""
        for node in self._nodes:
            with contextlib.suppress(OSError):
                node.remove()

    # --- the control thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        until: float | None = None
        while True:
            if self._ending:
                until = until or time.monotonic() + _FLUSH_TIMEOUT
                if time.monotonic() >= until or not any(client.out for client in self._clients):
                    return
            if self._accepting_again and self._socket and time.monotonic() >= self._accepting_again:
                self._accepting_again = 0.0
                self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
            for key, _ in self._selector.select(0.1 if self._ending else _ACCEPT_PAUSE):
                try:
                    key.data()
                except Exception:  # one client's trouble is not the next one's
                    log.exception("cannot answer a control client")
            self._settle()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake anyway; closed: nobody is there to wake
            self._writer.send(b"x")

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            sock, _ = self._socket.accept()
        except OSError as error:
            log.warning(f"cannot accept a control client: {error.strerror}")
            self._selector.unregister(self._socket)
            self._accepting_again = time.monotonic() + _ACCEPT_PAUSE
            return
        if len(self._clients) >= _MAX_CLIENTS:
            waiting = [each for each in self._clients if not each.pending]
            if waiting:  # who says nothing makes room for who may
                self._drop(min(waiting, key=lambda each: each.last_heard))
        if self._ending or len(self._clients) >= _MAX_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        client = _Client(sock, _peer(sock))
        self._clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._serve(client))

    def _serve(self, client: _Client) -> None:
        self._flush(client)
        if client.closing or client.ended:
            return
        try:
            data = client.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            client.ended = client.closing = True
            return
        client.last_heard = time.monotonic()
        client.inbox += data
        client.ended = not data
        self._read_commands(client)

    def _read_commands(self, client: _Client) -> None:
        if client.ended and client.inbox:  # ``printf drain | nc -U``: a last line needs no newline
            client.inbox += b"\n"
        while not client.closing:
            line, newline, rest = bytes(client.inbox).partition(b"\n")
            if len(line) > MAX_LINE:
                client.pending += 1
                TextReply(self._sender(client)).error("usage", f"a command has at most {MAX_LINE} bytes")
                client.closing = True
            elif not newline:
                break
            else:
                client.inbox[:] = rest
                self._command(client, line.strip())

    def _command(self, client: _Client, line: bytes) -> None:
        client.json = client.json or line.startswith(b"{")
        if client.json and not line:
            return
        client.pending += 1
        if client.json:
            self._json_command(client, line)
        else:
            reply = TextReply(self._sender(client))
            self.execute(line.decode("utf-8", "replace").split(), client.peer, reply)

    def _json_command(self, client: _Client, line: bytes) -> None:
        reply = JsonReply(self._sender(client), None)
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise UsageError("expected a JSON object")
            reply.id = request.pop("id", None)
            verb = request.pop("cmd", None)
            if not isinstance(verb, str):
                raise UsageError('expected "cmd" with a verb; try {"cmd":"help"}')
            for flag, value in request.items():
                if not isinstance(value, bool):
                    raise UsageError(f'{verb}: "{flag}" must be true or false')
            self.execute([verb, *(flag for flag, value in request.items() if value)], client.peer, reply)
        except (ValueError, RecursionError) as error:
            reply.error("usage", f"expected a JSON object on one line: {error}")
        except FlaskdError as error:
            reply.error(error.code, str(error))

    def execute(self, words: Sequence[str], peer: str, reply: Reply) -> None:
        """Carry out a command given as words; its outcome goes to `reply`."""
        try:
            if not words:
                raise UsageError('expected a command; try "help"')
            name, flags = words[0], frozenset(words[1:])
            verb = find_verb(name)
            if unknown := flags - verb.flags:
                known = f"it knows {', '.join(sorted(verb.flags))}" if verb.flags else "it takes none"
                raise UsageError(f'{name} does not know "{min(unknown)}"; {known}')
            if verb.changes:
                log.info(f"control: {' '.join(words)} from {peer}")
            verb.run(self._daemon, flags, peer, reply)
        except FlaskdError as error:
            reply.error(error.code, str(error))

    def _read_fifo(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._fifo_inbox += os.read(self._fifo, 65536)
        while b"\n" in self._fifo_inbox:
            line, _, rest = bytes(self._fifo_inbox).partition(b"\n")
            self._fifo_inbox[:] = rest
            if line.strip():
                self.execute(
                    line.decode("utf-8", "replace").split(), "the FIFO", LogReply(line[:80].decode("utf-8", "replace"))
                )
        if len(self._fifo_inbox) > MAX_LINE:
            log.warning(f"the FIFO got {len(self._fifo_inbox)} bytes without a newline; they are dropped")
            self._fifo_inbox.clear()

    def _sender(self, client: _Client) -> Callable[..., None]:
        return functools.partial(self._send, client)

    def _send(self, client: _Client, data: bytes, *, last: bool) -> None:
        """Queue output for a client (any thread)."""
        with self._lock:
            client.out += data
            if last:
                client.pending -= 1
                client.closing = client.closing or not client.json
        self._wake()

    def _flush(self, client: _Client) -> None:
        with self._lock:
            if client.out:
                try:
                    sent = client.sock.send(client.out)
                    del client.out[:sent]
                except BlockingIOError:
                    pass
                except OSError:
                    client.out.clear()
                    client.ended = client.closing = True

    def _settle(self) -> None:
        """Flush what was queued, watch what is not flushed, and let go of who is done, idle or too slow."""
        now = time.monotonic()
        for client in list(self._clients):
            self._flush(client)
            done = client.closing or (client.ended and not client.pending)
            idle = not client.pending and now - client.last_heard > _IDLE_TIMEOUT
            if (done and not client.out) or idle or len(client.out) > _MAX_OUTPUT:
                self._drop(client)
                continue
            # A client that shut its side down would be readable for ever.
            events = (0 if client.ended else selectors.EVENT_READ) | (selectors.EVENT_WRITE if client.out else 0)
            self._watch(client, events)

    def _watch(self, client: _Client, events: int) -> None:
        known = self._selector.get_map().get(client.sock)
        if known is None and events:
            self._selector.register(client.sock, events, lambda: self._serve(client))
        elif known is not None and not events:
            self._selector.unregister(client.sock)
        elif known is not None and known.events != events:
            self._selector.modify(client.sock, events, known.data)

    def _drop(self, client: _Client) -> None:
        self._clients.discard(client)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.sock)
        client.sock.close()


def _peer(sock: socket.socket) -> str:
    """Who is at the other end: SO_PEERCRED, unix(7)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return "somebody"
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return f"uid={uid} pid={pid}"


def _gid(group: str | None) -> int:
    if group is None:
        return -1
    try:
        return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        log.warning(f'control.group: there is no group "{group}"; the nodes keep the process\'s own')
        return -1
