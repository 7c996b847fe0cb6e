"""The rules of the shutdown endpoint, as a small WSGI app.

The order of the rules is one of them. Who does not show the token learns two things only, whatever else is right or
wrong with the request: that ``/shutdown`` takes POST (405 to all else), and 404, the same one for every other path, for
a query string, for no token and for each wrong one. (What is no HTTP, or too large, waitress refuses before.) Only who
shows the token is told what else is wrong:

403  an `Origin` or `Sec-Fetch-Site` header (a browser sent it, for some page), or a `Host` that is not allowed
     (a name that was made to lead here: DNS rebinding)
415  a content type that a form or a page could send without asking first (Fetch standard, "CORS-safelisted")
400  a body that asks for something: there is nothing to be asked for

Wrong tokens are limited in number; while there are too many, none is compared, the right one neither.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flaskd.admin.page import Page, send_page

log = logging.getLogger("flaskd.endpoint")

PATH = "/shutdown"

_GUESSES = 10
"""Wrong tokens at once; then one a second."""
_LINES = 20
"""Refusals logged at once; then one a second."""

_NOT_FOUND = b"not found\n"
_ONLY_POST = b"method not allowed\n"


class _RateLimit:
    """So many at once, then one a second (a token bucket)."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = float(most)
        self._clock = clock
        self._left = self._most
        self._counted = clock()

    def _count(self) -> None:
        now = self._clock()
        self._left = min(self._most, self._left + now - self._counted)
        self._counted = now

    def __bool__(self) -> bool:
        self._count()
        return self._left >= 1

    def take(self) -> bool:
        """Take one; False when there is none."""
        if self:
            self._left -= 1
            return True
        return False


class EndpointRules:
    """Lets who has the token ask for the stop, and answers with the plan; the stop itself is begun by its server.

    `plan` gives what the 202 tells. One thread calls it.
    """

    def __init__(
        self,
        token: bytes,
        allowed_hosts: Iterable[str],
        plan: Callable[[], Mapping[str, Any]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._token = token
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._plan = plan
        self._guesses = _RateLimit(_GUESSES, clock)
        self._lines = _RateLimit(_LINES, clock)
        self._unsaid = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        return send_page(environ, start_response, self._answer(environ))

    def _answer(self, environ: dict[str, Any]) -> Page:
        wrong = self._wrong_place(environ)
        if wrong is None and environ["REQUEST_METHOD"] != "POST":
            self._tell(environ, f"{environ['REQUEST_METHOD'][:16]!r} instead of POST")
            return "405 Method Not Allowed", "text/plain", _ONLY_POST, [("Allow", "POST")]
        wrong = wrong or self._wrong_token(environ)
        if wrong is not None:
            self._tell(environ, wrong)
            return "404 Not Found", "text/plain", _NOT_FOUND, []
        status, fault = self._wrong_request(environ)
        if fault:
            self._tell(environ, fault)
            return status, "application/json", _json({"error": f"cannot stop: {fault}"}), []
        log.info(f"shutdown endpoint: asked to stop by {_peer(environ)}")
        return status, "application/json", _json(self._plan()), []

    @staticmethod
    def _wrong_place(environ: dict[str, Any]) -> str | None:
        if environ.get("PATH_INFO") != PATH:
            return "another path"
        return "a query string" if environ.get("QUERY_STRING") else None

    def _wrong_token(self, environ: dict[str, Any]) -> str | None:
        if not self._guesses:
            return "too many wrong tokens; none is compared now"
        scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        # Bytes: of text, compare_digest takes ASCII only.
        right = hmac.compare_digest(given.strip(" ").encode("latin-1", "replace"), self._token)
        if right and scheme.lower() == "bearer":  # RFC 9110 §11.1: without regard to case
            return None
        if not given:
            return "no token"  # and so no guess: a web page can send this, and must not use up what guesses are allowed
        self._guesses.take()
        return "a wrong token"

    def _wrong_request(self, environ: dict[str, Any]) -> tuple[str, str]:
        """The status, and what is wrong; nothing is for 202."""
        for header, name in (("HTTP_ORIGIN", "Origin"), ("HTTP_SEC_FETCH_SITE", "Sec-Fetch-Site")):
            if header in environ:
                return "403 Forbidden", f"the request has a header {name}, as browsers send it; expected a program"
        if environ.get("HTTP_HOST", "").lower() not in self._hosts:
            return "403 Forbidden", f"expected a Host header of {', '.join(sorted(self._hosts))}, got another"
        if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
            return "415 Unsupported Media Type", "expected Content-Type: application/json, got another"
        body = environ["wsgi.input"].read()
        if body.strip() not in {b"", b"{}"}:
            return "400 Bad Request", "expected {} or nothing as the body, got something else"
        return "202 Accepted", ""

    def _tell(self, environ: dict[str, Any], why: str) -> None:
        """Log a refusal; never what was in the request, for the token may be anywhere in it."""
        if not self._lines.take():
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more were not logged)" if self._unsaid else ""
        self._unsaid = 0
        log.warning(f"shutdown endpoint: refused {_peer(environ)}: {why}{more}")


def _peer(environ: dict[str, Any]) -> str:
    return str(environ.get("REMOTE_ADDR") or "unix")


def _json(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"
