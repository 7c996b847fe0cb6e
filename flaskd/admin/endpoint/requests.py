"""Counts the requests that an app works on, for servers that do not tell: it wraps the app."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from flaskd.background_work import in_background, left_behind, tell_no_more, tell_of_ends
from flaskd.ledger import Cut, DrainReport, InFlight, visible
from flaskd.server import STREAM_GRACE, EndingStreams, in_thread_of_its_own
from flaskd.stacks import stack_of

log = logging.getLogger("flaskd.endpoint")

RETRY_AFTER = "5"
"""How many seconds a refused client is asked to wait."""


@dataclass(frozen=True, eq=False)
class _Request:
    id: int
    client: str
    method: str
    path: str
    began: float
    thread: threading.Thread

    def snapshot(self, now: float) -> InFlight:
        age = now - self.began
        return InFlight(self.id, self.client, self.method, self.path, age, "running", self.thread.name)


class Requests:
    """A WSGI app around another one that can be drained: new requests get a 503, and running ones are waited for.

    A stream ends at the first part that it gives after its grace. `clock` gives monotonic seconds.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = EndingStreams(app, lambda: clock() >= self._streams_until)
        self._clock = clock
        self._streams_until = float("inf")
        self._draining = threading.Event()
        self._changed = threading.Condition()
        self._in_hand: dict[int, _Request] = {}
        self._ids = itertools.count(1)
        self._completed = self._rejected = 0
        self._deadline = float("inf")

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the app. The request is over when the server closes what the app returned (PEP 3333)."""
        with self._changed:
            if self._draining.is_set():
                self._rejected += 1
                return _refusal(start_response)
            request = _Request(
                next(self._ids),
                str(environ.get("REMOTE_ADDR", "")),
                visible(environ["REQUEST_METHOD"]),
                quote((environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1", "replace")),
                self._clock(),
                threading.current_thread(),
            )
            self._in_hand[request.id] = request
        environ.setdefault("flaskd.draining", self._draining)  # flaskd's own server has set it
        try:
            answer = self._app(environ, start_response)
        except BaseException:
            self._over(request)
            raise
        from werkzeug.wsgi import ClosingIterator  # noqa: PLC0415 - loaded already, because Werkzeug serves

        return ClosingIterator(answer, lambda: self._over(request))

    def _over(self, request: _Request) -> None:
        with self._changed:
            if self._in_hand.pop(request.id, None) is not None and self._draining.is_set():
                self._completed += 1
            self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def in_flight(self) -> int:
        """How many requests the app works on."""
        return len(self._in_hand)

    dead = ""
    counted = (0, 0)
    """Completed and rejected requests before the drain: none, because counting begins with the drain."""

    def begin_drain(
        self,
        timeout: float,
        over: Callable[[DrainReport], object],
        *,
        announce: float = 0.0,  # noqa: ARG002 - the server accepts connections all the same
        counted_from: tuple[int, int] | None = None,  # noqa: ARG002
    ) -> None:
        """Refuse new requests and wait at most `timeout` seconds for running ones; `over` is called with the report.

        Work in the background (`flaskd.background`) is waited for, too.
        """
        in_thread_of_its_own(self, lambda: self.drain(timeout), over)

    def hasten_drain(self, timeout: float) -> None:
        """Give the running drain at most `timeout` more seconds."""
        with self._changed:
            self._deadline = min(self._deadline, self._clock() + timeout)
            self._changed.notify_all()

    def drain(self, timeout: float) -> DrainReport:
        """Do what `begin_drain` does in the calling thread, and return the report."""
        began = self._clock()
        self._deadline = began + timeout
        tell_of_ends(self._notify)
        try:
            with self._changed:
                self._draining.set()
                self._streams_until = min(self._streams_until, began + STREAM_GRACE)
                while (self._in_hand or in_background()) and (left := self._deadline - self._clock()) > 0:
                    self._changed.wait(left)
                cut = self.cut("the drain's time was over")
                completed, rejected = self._completed, self._rejected
        finally:
            tell_no_more(self._notify)
        report = DrainReport(completed, rejected, cut, self._clock() - began, left_behind())
        for each, told in Cut.all_with_stacks(report.cut):
            log.warning(told, extra={"fields": each.as_json()})
        return report

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """The running requests, as cut for `reason`."""
        with self._changed:
            now = self._clock()
            return tuple(
                Cut(**{**vars(each.snapshot(now)), "stack": stack_of(each.thread)}, reason=reason)
                for each in self._in_hand.values()
            )


def _refusal(start_response: Callable[..., Any]) -> list[bytes]:
    body = b"not now: this server is stopping\n"
    headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), ("Retry-After", RETRY_AFTER)]
    start_response("503 Service Unavailable", headers)
    return [body]
