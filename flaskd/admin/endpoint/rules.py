"""The rules of the shutdown endpoint, as a small WSGI app.

The rules are checked in a fixed order. A client without the right token learns only two things, whatever else is right
or wrong in its request: ``/shutdown`` takes POST (405 for other methods), and 404, the same answer for every other
path, for a query string, for no token and for a wrong one. (Waitress refuses earlier what is no HTTP or too large.)
Only a client with the right token learns what else is wrong:

403  the request has an `Origin` or `Sec-Fetch-Site` header, so a browser sent it for some web page; or its `Host` is
     not allowed (another name was made to lead to this address: DNS rebinding)
415  a content type that a form or a page may send without a preflight (Fetch standard, "CORS-safelisted")
400  a body with content, although there is nothing to choose

The number of wrong tokens is limited: above the limit no token is compared, not even the right one.
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
"""How many wrong tokens are compared at once; after that, one each second."""
_LINES = 20
"""How many refusals are logged at once; after that, one each second."""

_NOT_FOUND = b"not found\n"
_ONLY_POST = b"method not allowed\n"


class _RateLimit:
    """Permits a number at once, then one each second (a token bucket)."""

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
        """Use one permit; False if there is none."""
        if self:
            self._left -= 1
            return True
        return False


class EndpointRules:
    """Lets a client with the token ask for the stop, and answers with the plan; its server then begins the stop.

    `plan` gives the content of the 202 answer. Only one thread calls it.
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
        # Bytes, because compare_digest accepts only ASCII text.
        right = hmac.compare_digest(given.strip(" ").encode("latin-1", "replace"), self._token)
        if right and scheme.lower() == "bearer":  # RFC 9110 §11.1: case does not matter
            return None
        if not given:
            return "no token"  # no guess: a web page can send this, and must not use up the permitted guesses
        self._guesses.take()
        return "a wrong token"

    def _wrong_request(self, environ: dict[str, Any]) -> tuple[str, str]:
        """The status and what is wrong with the request; two empty texts if nothing is."""
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
        """Log a refusal, without anything from the request, because the token may be anywhere in it."""
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
