"""``webhook`` and ``consul.deregister``: one HTTP request each, within the step's time.

Proxies from the environment are not used, and redirections are not followed. Neither what was sent nor the URL is
logged, because the URL of many services is a secret.
"""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import closing, suppress
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from flaskd.cleanup.context import StepContext, StepFailedError, StepTimedOutError
from flaskd.cleanup.model import ANYWHERE, Action
from flaskd.config import Phase, Settings
from flaskd.config.fields import HeaderText, Hidden, SomeText
from flaskd.config.kind import checked, described, exampled, matching, text_schema
from flaskd.config.kinds import SecretText
from flaskd.config.settings import field
from flaskd.text import MASK, printable, quoted

if TYPE_CHECKING:
    import http.client
    from collections.abc import Mapping
    from urllib.parse import SplitResult

_LARGEST_ANSWER = 4096
"""How many bytes of an answer are read."""
_CONSUL = "http://127.0.0.1:8500"
_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
"""The name of a header (RFC 9110 §5.6.2)."""


def _url(text: str) -> str:
    try:
        _parts(text)
    except ValueError:
        userinfo = "@" in text.partition("://")[2].partition("/")[0]
        without = ", without user and password (headers can have Authorization)" if userinfo else ""
        raise ValueError(f"expected a URL such as https://hooks.example.com/stopped{without}") from None
    return text


def _host_alone(url: str) -> str:
    """A URL as it may be shown: without path and query."""
    parts = _parts(url)
    return f"{parts.scheme}://{parts.netloc}/{MASK if parts.path.strip('/') or parts.query else ''}"


def _parts(url: str) -> SplitResult:
    parts = urlsplit(url)
    if not re.fullmatch(r"[!-~]+", url) or parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("not an HTTP URL")
    if parts.username is not None or parts.port == 0:  # `port` raises ValueError if it is not a number
        raise ValueError("neither userinfo nor port 0 can be used")
    return parts


def _sayable(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("expected a value that JSON has, so neither .nan nor .inf") from None  # RFC 8259 §6
    return value


def _address(text: str) -> str:
    try:
        _consul_url(text)
    except ValueError:
        raise ValueError(f"expected an address such as {_CONSUL}") from None
    return text


Url = Annotated[
    str,
    checked(_url),
    described(text_schema("[Hh][Tt][Tt][Pp][Ss]?://[!-~]+")),
    exampled("https://hooks.example.com/stopped"),
    partial(Hidden, shown=_host_alone),
]
"""The URL of many services is a secret: a fault shows nothing of it, and the configuration only its host."""
HeaderName = Annotated[str, matching(_HEADER_NAME, "expected the name of an HTTP header")]


class WebhookFields(Settings):
    """Fields of ``webhook``."""

    url: Url = field(description="Where to, http or https.")
    method: Literal["POST", "PUT", "PATCH", "GET", "DELETE"] = field("POST", description="The HTTP method.")
    json_: Annotated[Any, checked(_sayable)] = field(
        default=None, alias="json", description="What to send, as JSON; default: no body."
    )
    headers: dict[HeaderName, Annotated[HeaderText, Hidden]] = field(
        default={}, description="Headers to add, such as Authorization."
    )


class ConsulFields(Settings):
    """Fields of ``consul.deregister``."""

    service_id: SomeText = field(description="The ID under which the service was registered at this agent.")
    address: Annotated[str, checked(_address)] | None = field(
        default=None, description=f"The agent; default: $CONSUL_HTTP_ADDR, else {_CONSUL}."
    )
    token: SecretText | None = field(None, description="The ACL token; default: $CONSUL_HTTP_TOKEN, else none.")


def prepare_web(_fields: object) -> None:
    """Import what a request needs now, because a deploy may replace the files under a running daemon."""
    import http.client  # noqa: F401, PLC0415 - 3 MiB with ssl and email; only web actions need it

    "localhost".encode("idna")  # http.client would import this codec at its first use


def call_webhook(context: StepContext, fields: WebhookFields) -> str:
    """Make the request; returns the status. Raises StepFailedError for a status of 400 and above or no answer."""
    body = b"" if fields.json_ is None else json.dumps(fields.json_).encode()
    headers = {"Content-Type": "application/json"} if body else {}
    # Names of headers are the same in any case (RFC 9110 §5.1); configured headers replace the usual ones.
    given = {name.title(): value for name, value in fields.headers.items()}
    status, reason, _ = _ask(context, fields.method, _parts(fields.url), body, {**headers, **given})
    if status >= 400:  # noqa: PLR2004 - RFC 9110 §15.5: client errors, and server errors above
        raise StepFailedError(f"answered with {status} {reason}".rstrip())
    followed = "; redirections are not followed" if 300 <= status < 400 else ""  # noqa: PLR2004 - RFC 9110 §15.4
    return f"{status} {reason}".rstrip() + followed


def deregister(context: StepContext, fields: ConsulFields) -> str:
    """Remove the service from the catalogue: ``PUT /v1/agent/service/deregister/<id>`` (Consul's HTTP API).

    It is no failure if the agent does not know the service, for example when this runs a second time.
    """
    given = fields.address or os.environ.get("CONSUL_HTTP_ADDR") or _CONSUL
    try:
        agent = _consul_url(given)
    except ValueError:
        raise StepFailedError(
            f"cannot use $CONSUL_HTTP_ADDR {quoted(given)}: expected an address such as {_CONSUL}"
        ) from None
    token = fields.token.get_secret_value() if fields.token else os.environ.get("CONSUL_HTTP_TOKEN", "")
    path = f"/v1/agent/service/deregister/{quote(fields.service_id, safe='')}"
    url = agent._replace(path=agent.path.rstrip("/") + path)
    status, reason, answer = _ask(context, "PUT", url, b"", {"X-Consul-Token": token} if token else {})
    if status == HTTPStatus.NOT_FOUND and b"Unknown service" in answer:
        return "was not registered"
    if status != HTTPStatus.OK:
        raise StepFailedError(f"Consul answered with {status} {reason}".rstrip())
    return f"deregistered {fields.service_id}"


def _consul_url(address: str) -> SplitResult:
    """An agent's address as the consul command takes it; if it has no scheme, $CONSUL_HTTP_SSL chooses one."""
    if "://" not in address:
        secure = os.environ.get("CONSUL_HTTP_SSL", "").lower() in {"1", "true"}
        address = f"{'https' if secure else 'http'}://{address}"
    return _parts(address)


def _ask(
    context: StepContext, method: str, url: SplitResult, body: bytes, headers: Mapping[str, str]
) -> tuple[int, str, bytes]:
    """Make a request; returns the status, the reason and the beginning of the answer.

    The messages of a StepFailedError show nothing of the request. The socket's timeout ends a connection on which
    nothing moves; if an answer keeps coming slowly, the runner abandons the step and closes the connection.
    """
    import http.client  # noqa: PLC0415 - see prepare_web
    import ssl  # noqa: PLC0415

    assert url.hostname is not None
    secure = url.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(url.hostname, url.port, timeout=max(0.01, context.remaining()))
    context.last_resort = lambda: _break_off(connection)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    with closing(connection):
        try:
            connection.request(method, target, body=body or None, headers={"User-Agent": "flaskd", **headers})
            answer = connection.getresponse()
            beginning = answer.read(_LARGEST_ANSWER)
        except TimeoutError as error:
            raise StepTimedOutError(f"no answer; {context.overrun()}") from error
        except ssl.SSLCertVerificationError as error:
            raise StepFailedError(f"cannot trust the server: {error.verify_message}") from error
        except OSError as error:
            if context.remaining() <= 0:
                raise StepTimedOutError(f"no answer; {context.overrun()}") from error
            raise StepFailedError(f"cannot reach it: {error.strerror or type(error).__name__}") from error
        except (http.client.HTTPException, ValueError) as error:  # an impossible host name is a ValueError
            raise StepFailedError(f"got no HTTP answer: {type(error).__name__}") from error
        return answer.status, _safe(answer.reason), beginning


def _break_off(connection: http.client.HTTPConnection) -> None:
    with suppress(OSError, AttributeError):  # the connection is closed, or has not been made
        connection.sock.shutdown(socket.SHUT_RDWR)


def _safe(reason: str) -> str:
    """The reason phrase without control characters and cut to 100, because a server may send anything."""
    return printable(reason, " ")[:100]


ACTIONS = (
    Action(
        "consul.deregister",
        ConsulFields,
        Phase.ANNOUNCE,
        deregister,
        prepare=prepare_web,
        scopes=ANYWHERE,
        summary="Takes the service out of Consul's catalogue.",
    ),
    Action(
        "webhook",
        WebhookFields,
        Phase.FINAL,
        call_webhook,
        prepare=prepare_web,
        scopes=ANYWHERE,
        summary="Makes an HTTP request. A status of 400 or more is a failure.",
    ),
)
