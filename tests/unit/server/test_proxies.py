"""Whose headers are trusted: peers by address, network and name; and an app whose ProxyFix gets no headers."""

import pytest
from flask import Flask, request
from werkzeug.middleware.proxy_fix import ProxyFix

from flaskd.config import ServerConfig
from flaskd.server import BehindProxies, missed_by_proxy_fix
from flaskd.server.proxies import peers


def app(environ, start_response):
    """Answer with what the app sees of its client."""
    start_response("200 OK", [])
    seen = (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"], environ.get("HTTP_X_FORWARDED_HOST"))
    return [repr(seen).encode()]


def seen(server, peer):
    """What the app sees of a client of this peer."""
    environ = {"REMOTE_ADDR": peer, "wsgi.url_scheme": "http", "HTTP_X_FORWARDED_FOR": "192.0.2.7",
               "HTTP_X_FORWARDED_PROTO": "https", "HTTP_X_FORWARDED_HOST": "evil.example",
               "SERVER_NAME": "x", "SERVER_PORT": "80"}  # fmt: skip
    return eval(b"".join(BehindProxies(app, server)(environ, lambda *_: None)))


@pytest.mark.parametrize(
    ("trusted", "believed", "doubted"),
    [
        (["10.0.0.1"], ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.2", "::1", "localhost", ""]),
        (["10.0.0.0/8", "fd00::/8"], ["10.1.2.3", "::ffff:10.1.2.3", "fd12::1"], ["11.0.0.1", "fe80::1", "localhost"]),
        (["0:0:0:0:0:0:0:1"], ["::1"], ["127.0.0.1", "localhost"]),
        (["fe80::/10"], ["fe80::1%eth0"], ["fd00::1%eth0"]),
        (["::ffff:10.0.0.1"], ["::ffff:10.0.0.1"], ["10.0.0.2"]),
        (["localhost"], ["localhost", "127.0.0.1", "::1", "::ffff:127.0.0.1"], ["10.0.0.1"]),
        (["*"], ["10.0.0.1", "::1", "localhost", "fe80::1%eth0"], []),
        (["127.0.0.1", "*"], ["10.0.0.1"], []),
    ],
)
def test_peers_that_are_believed(trusted, believed, doubted):
    """A peer is trusted if its address is named or in a named network, however it is written."""
    contains = peers(trusted)
    assert [peer for peer in (*believed, *doubted) if contains(peer)] == believed


def test_only_a_trusted_proxy_speaks_for_its_clients():
    """The configured headers of a trusted proxy count; all other such headers are removed."""
    server = ServerConfig(trusted_proxy=["10.0.0.0/8", "192.0.2.0/24"])
    assert seen(server, "10.9.9.9") == ("192.0.2.7", "https", None)
    assert seen(server, "11.9.9.9") == ("11.9.9.9", "http", None)
    assert seen(ServerConfig(), "127.0.0.1") == ("127.0.0.1", "http", None)


def in_place(made, **reads):
    made.wsgi_app = ProxyFix(made.wsgi_app, **reads)
    return made


def outside(made, **reads):
    return ProxyFix(made, **reads)


def by_closure(made, **reads):
    inner = in_place(made, **reads).wsgi_app

    def traced(environ, start_response):
        return inner(environ, start_response)

    made.wsgi_app = traced
    return made


@pytest.mark.parametrize("wrap", [in_place, outside, by_closure])
@pytest.mark.parametrize(
    ("reads", "server", "missed"),
    [
        ({}, {}, "x-forwarded-for, x-forwarded-proto, which flaskd removes: set server.trusted_proxy "),
        ({"x_for": 0, "x_proto": 0, "x_host": 1}, {}, "x-forwarded-host, which"),
        ({"x_host": 1}, {"trusted_proxy": ["*"]}, "x-forwarded-host, which flaskd removes: set server.trusted_proxy_"),
        ({}, {"trusted_proxy": ["*"], "trusted_proxy_headers": ["forwarded"]}, "x-forwarded-for, x-forwarded-proto, w"),
        ({}, {"trusted_proxy": ["*"]}, ""),
        ({"x_for": 0, "x_proto": 0, "x_prefix": 1}, {}, ""),
    ],
)
def test_what_proxy_fix_never_sees_is_told(wrap, reads, server, missed):
    """If an app's ProxyFix reads removed headers, the log names the key to set; otherwise it says nothing."""
    said = missed_by_proxy_fix(wrap(Flask("shop"), **reads), ServerConfig(**server))
    assert (missed in said) if missed else said == ""


def test_an_app_without_proxy_fix_is_not_looked_through_for_long():
    """The search for ProxyFix runs no code of the app; an app without one causes no warning."""

    class Trap:
        def __call__(self, *_):
            raise AssertionError

        def __getattr__(self, name):
            raise AssertionError(name)

    made = Flask("shop")
    made.trap = Trap()
    made.me = request  # an unbound proxy object raises for every attribute
    made.wsgi_app = made.me_again = made
    assert missed_by_proxy_fix(made, ServerConfig()) == ""
