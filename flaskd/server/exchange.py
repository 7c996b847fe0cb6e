"""Werkzeug's development server on a listener of flaskd: its connections, and the one request on each."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from flaskd.ledger import Cut, InFlight, visible
from flaskd.process.threads import AppThread
from flaskd.sockets import Listener, closed_by_peer
from flaskd.stacks import stack_of

log = logging.getLogger("flaskd.server")

_OK = 200
"""The first status of an answer that is not interim (RFC 9110 §15.2)."""
_REST = 1 << 16
"""Most bytes of a request's rest that are thrown away at once."""


class _Rest:
    """A request's input. Werkzeug discards the rest of it in reads of 10 MB; here a read does not wait for so much."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, _: int = -1) -> bytes:
        """Return what has come; Werkzeug calls this when the socket is readable."""
        return bytes(self._file.read1(_REST))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Out:
    """The output for an answer; it counts the bytes written. With `mute`, further bytes are dropped."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.count, self.mute = 0, False

    def write(self, data: bytes) -> None:
        """Send and count all of `data`, unless `mute` is set."""
        if not self.mute:
            self._file.write(data)
            self.count += len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class ServingThread(Protocol):
    """The object that owns the server, to which it reports its connections and requests."""

    draining: threading.Event
    begun: dict[threading.Thread, Request]
    """The requests whose first line has come, by the thread of their connection."""

    def accepted(self, request: Request) -> None:
        """Count a request as in flight."""

    def retire(self, request: Request, fault: str) -> None:
        """Take a request out of flight; `fault` says why a client that stayed did not get all of the answer, or ""."""

    def ended(self, thread: threading.Thread) -> None:
        """Note that the connection of a thread is closed."""


class Request(WSGIRequestHandler):
    """One connection, and the one request on it."""

    server: Server
    id = 0
    began = 0.0
    phase = "receiving"
    gone = False
    thread: threading.Thread
    wfile: Any
    _code = 0
    _length: int | None = None
    _body_at: int | None = None
    _broke_off = False

    def setup(self) -> None:
        """Prepare the connection, with an output that counts."""
        super().setup()
        self.wfile = _Out(self.wfile)

    def parse_request(self) -> bool:
        """Parse the head, whose first line has come; from here on a drain waits for the rest."""
        self.began, self.thread = time.monotonic(), threading.current_thread()
        self.server.thread.begun[self.thread] = self
        return super().parse_request()

    def run_wsgi(self) -> None:
        """Answer the request; it is in flight from here on."""
        self.id, self.phase = next(self.server.ids), "running"
        self.server.thread.accepted(self)
        fault = "the app broke off its answer"
        try:
            super().run_wsgi()
            if self._body_at is None and not self.gone:
                self._fail()
            fault = self._fault()
        finally:
            self.close_connection = True  # Werkzeug sets it with the header, which may not have been sent
            self.phase = "over"
            self.server.thread.retire(self, "" if self.gone else fault)

    def _fail(self) -> None:
        """Answer 500: the app gave no valid header, and Werkzeug has sent nothing."""
        self._headers_buffer: list[bytes] = []
        try:
            self.send_error(500)
        except OSError:
            self.gone = True

    def send_response(self, code: int, message: str | None = None) -> None:
        """Note the status code, and send the status line."""
        self._code = code
        super().send_response(code, message)

    def send_header(self, keyword: str, value: str) -> None:
        """Send a header; note the Content-Length."""
        if keyword.lower() == "content-length":
            self._length = int(value)
        super().send_header(keyword, value)

    def end_headers(self) -> None:
        """Send the header; after it, drop the body where none is allowed (RFC 9112 §6.3)."""
        super().end_headers()
        self._body_at = self.wfile.count
        self.wfile.mute = self.command == "HEAD" or self._code in {204, 304} or self._code < _OK

    def break_off(self) -> None:
        """Note that the app raised, and send no more: Werkzeug would append its error page to the unfinished answer."""
        if self._body_at is not None:
            self._broke_off = not self.wfile.mute
            self.wfile.mute = True

    def _fault(self) -> str:
        """How the client can see that the answer is incomplete; empty if it is complete."""
        if self.wfile.mute and not self._broke_off:  # no body may follow
            return ""
        if self._length is None:
            return "the app broke off its answer" if self._broke_off else ""
        missing = self._length - (self.wfile.count - (self._body_at or 0))
        return f"its answer is {missing} bytes shorter than its Content-Length says" if missing > 0 else ""

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None:  # noqa: ARG002 - Werkzeug's names
        """Note that the client has left; Werkzeug calls this instead of raising."""
        self.gone = True

    def make_environ(self) -> Any:
        """Werkzeug's environ, and the event by which a stream learns that a drain began."""
        environ = super().make_environ()
        environ["flaskd.draining"] = self.server.thread.draining
        self.rfile: Any = _Rest(self.rfile)
        return environ

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Write no line for each request: flaskd's access log does that where it is configured."""

    def snapshot(self) -> InFlight:
        """A description of the request at this moment."""
        age = time.monotonic() - self.began
        method, path = visible(self.command or ""), visible(getattr(self, "path", "").partition("?")[0])
        client, gone = str(self.client_address[0]), closed_by_peer(self.connection)
        return InFlight(self.id, client, method, path, age, self.phase, self.thread.name, gone=gone)

    def cut(self, reason: str) -> Cut:
        """The ledger's entry for cutting the request now."""
        return Cut(**{**vars(self.snapshot()), "stack": stack_of(self.thread)}, reason=reason)


class Server(ThreadedWSGIServer):
    """Werkzeug's server on a listener of flaskd; it keeps the threads of its connections."""

    thread: ServingThread

    def __init__(self, listener: Listener, app: Callable[..., Any], thread: ServingThread) -> None:
        self.thread = thread
        self.ids = itertools.count(1)
        self.connections: dict[threading.Thread, socket.socket] = {}
        host = f"unix://{listener.address.path}" if listener.address.path else listener.address.host
        super().__init__(host, listener.address.port, app, Request, fd=listener.socket.fileno())
        self.socket.setblocking(False)

    def accept_one(self) -> None:
        """Accept one waiting connection, as ``socketserver.BaseServer.serve_forever`` does."""
        self._handle_request_noblock()  # type: ignore[attr-defined]  # typeshed leaves it out

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own; if that hangs, the interpreter can exit all the same."""
        thread = AppThread(target=self._serve, args=(request, client_address), name=f"flaskd-werkzeug-{next(self.ids)}")
        self.connections[thread] = request
        try:
            thread.start()
        except RuntimeError:
            del self.connections[thread]
            raise

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        except SystemExit as leaving:  # it ends this connection alone
            log.error(f"the app raised {leaving!r} while answering")  # noqa: TRY400 - its traceback says nothing more
        finally:
            self.thread.ended(threading.current_thread())


class _AppFailedError(RuntimeError):
    """The app raised an error that Werkzeug would take for the sign of a client that left."""


class OwnErrors:
    """A WSGI app around another: a TimeoutError or ConnectionError of the app is answered like any other error.

    Such an error may come from the app's database; Werkzeug would take it for the client's leaving. SystemExit, too, is
    answered. What violates PEP 3333 is found before Werkzeug sends it. `broke_off` is called when the app raised.
    """

    def __init__(self, app: Callable[..., Any], broke_off: Callable[[], None]) -> None:
        self._app, self._broke_off = app, broke_off

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Run the app; errors come out as Werkzeug answers them."""

        def started(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            int(status.split(None, 1)[0])
            for name, value in headers:
                f"{name}: {value}".encode("latin-1")
            return start_response(status, headers, *more)

        with self._told():
            return _Told(self._app(environ, started), self._told)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._broke_off()
            if isinstance(error, ConnectionError | TimeoutError | SystemExit | KeyboardInterrupt):
                raise _AppFailedError(f"the app raised {type(error).__name__} while answering") from error
            raise


class _Told:
    """The body that the app of `OwnErrors` returned; errors while it is read are treated in the same way."""

    def __init__(self, parts: Any, told: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._parts, self._told = parts, told

    def __iter__(self) -> Iterator[bytes]:
        with self._told():
            parts = iter(self._parts)
        end = object()
        while True:
            with self._told():
                part = next(parts, end)
                if part is end:
                    return
                if not isinstance(part, bytes):
                    raise TypeError(f"cannot answer with {type(part).__name__}: an app gives bytes (PEP 3333)")
            yield part

    def close(self) -> None:
        """Close the app's body, if it has a `close` (PEP 3333)."""
        if hasattr(self._parts, "close"):
            with self._told():
                self._parts.close()
