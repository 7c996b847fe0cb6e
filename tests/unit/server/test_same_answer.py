"""The fast way and the slow way of answering, side by side: nothing that can be observed tells which one was taken.

$FLASKD_EXAMPLES sets how many conversations are tried, with new random ones in each run. A run that takes longer than
pytest's `faulthandler_timeout` also needs `-o faulthandler_timeout=3600`.
"""

import itertools
import logging
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, fields

import pytest
from answers_kit import (
    BODY_LIMIT,
    HEAD_LIMIT,
    IN_MEMORY,
    Answer,
    Side,
    Told,
    Xs,
    both_ways,
    frozen_date,
    slow_way,
    went_fast,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flaskd.config.model import ServerConfig
from flaskd.server import BehindProxies
from flaskd.sockets import Address, Listener

EXAMPLES = int(os.environ.get("FLASKD_EXAMPLES", "0"))
CI_EXAMPLES = 600
LEAST_FAST = 0.8
"""The least part of the common requests that must go the fast way."""


def mostly(good, *odd, times=8):
    """Usually one of the good values, sometimes an odd one; a good one is so many times as likely."""
    return st.sampled_from([*good * max(1, times * len(odd) // len(good)), *odd])


# --- common requests ------------------------------------------------------------------------------------------------

PATHS = [b"/", b"/index.html", b"/static/app.js?v=3", b"/a%20b/c%C3%A4?q=%20x&y=+", b"/search?q=a?b/c", b"/users/1/"]
BROWSER = [
    b"Accept: text/html,application/xhtml+xml,*/*;q=0.8",
    b"Accept-Encoding: gzip, deflate, br",
    b"Accept-Language: de,en-US;q=0.7,en;q=0.3",
    b"Cache-Control: max-age=0",
    b"Connection: keep-alive",
    b"Cookie: session=eyJ1c2VyIjoxfQ.Zk; theme=dark",
    b"DNT: 1",
    b'If-None-Match: "1-2"',
    b"Referer: http://localhost:8000/a?b",
    b"Sec-Fetch-Mode: navigate",
    b"Upgrade-Insecure-Requests: 1",
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:130.0) Gecko/20100101 Firefox/130.0",
    b"X-Forwarded-For: 192.0.2.7",
    b"X-Request-ID: 4bf92f35-77b3",
    b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
]  # fmt: skip
HOSTS = [b"Host: localhost:8000", b"Host: example.org", b"host: 127.0.0.1"]


@st.composite
def common_requests(draw):
    """A browser's GET or HEAD, or a posted form or JSON, in one piece with its head."""
    method = draw(st.sampled_from([b"GET", b"GET", b"GET", b"POST", b"HEAD"]))
    lines = [method + b" " + draw(st.sampled_from(PATHS)) + b" HTTP/1.1", draw(st.sampled_from(HOSTS))]
    lines += draw(st.lists(st.sampled_from(BROWSER), unique=True))
    body = b""
    if method == b"POST":
        body = draw(st.sampled_from([b"a=1&b=2", b'{"a": [1, 2]}', b"one\ntwo\n\nthree"]) | st.binary(max_size=200))
        lines += [b"Content-Type: application/x-www-form-urlencoded", b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, b"", body])


# --- requests that are right, and yet not common --------------------------------------------------------------------

UNUSUAL_TARGETS = [
    b"//a//b", b"///", b"/../a/./b", b"/%2F%2e%25", b"/%zz%4", b"/a;p=1", b"/?", b"/a??", b"/%E4%F6?%FC", b"http://h/a?b",
    b"HTTPS://h:8/%41", b"http://h?q", b"http://[::1]:80", b"/a", b"/a/", b"/a/b", b"/health", b"/ab",
]  # fmt: skip
UNUSUAL_FIELDS = [
    *BROWSER, b"A: b", b"a:\tc d ", b"X-Empty:", b"COOKIE: c=d", b"Cookie: e=f", b"If-Match: a", b"IF-match: b", b"A: \xe4\xff",
    b"X_Under: score", b"Content_Length: 3", b"Cookie_: a", b"Content-Type:", b"TE: trailers", b"Expect: more",
    b"Connection: Keep-Alive", b"Connection: close", b"Connection: a, Close", b"connection:", b"Connection: keep-alive, x",
    b"Connection: upgrade", b"Upgrade: websocket", b"Proxy-Connection: close", b"Keep-Alive: 5", b"X-Forwarded-Proto: https",
    b"X-Forwarded-For: , x", b"Forwarded: for=1", b"Wsgi.Input: x", b"Remote-Addr: x", b"Script-Name: /x", b"Http-Host: x",
    b"Path-Info: /y", b"EXPECT: 100-Continue", b"x-request-id:", b"X-Request-Id: a b", b"Traceparent: 00-x",
]  # fmt: skip


@st.composite
def unusual_requests(draw):
    """Correct requests that are rare."""
    method = draw(st.sampled_from([b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"X-Y!"]))
    version = draw(st.sampled_from([b"1.1", b"1.1", b"1.0", b"1.2"]))
    lines = [b"%s %s HTTP/%s" % (method, draw(st.sampled_from(UNUSUAL_TARGETS)), version)]
    lines += draw(st.permutations([b"Host: h", *draw(st.lists(st.sampled_from(UNUSUAL_FIELDS), max_size=5))]))
    body = draw(st.sampled_from([b"", b"one\ntwo", b"x" * IN_MEMORY]))
    framing = draw(st.sampled_from(["none", "length", "chunks"]))
    if framing == "none" or (framing == "chunks" and version == b"1.0"):
        body = b""
    elif framing == "length":
        lines.append(b"content-length: %04d" % len(body))
    else:
        lines.append(b"transfer-Encoding: Chunked")
        body = b"".join(b"%X;a\r\n%s\r\n" % (len(each), each) for each in (body[:3], body[3:]) if each)
        body += b"0\r\nTrailer: a\r\n\r\n"
    return b"\r\n".join([*lines, b"", body])


# --- requests that are wrong ----------------------------------------------------------------------------------------

EOL = mostly([b"\r\n"], b"\n", b"\r\r\n", times=60)
JUNK = st.sampled_from([bytes([each]) for each in b'\0\t \x0b\x7f\x85\xe4\r\n,;:_"0'])
METHOD = mostly([b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS"], b"get", b"X-Y", b"CONNECT", b"", b"G" * 65)
TARGET = mostly(
    PATHS,
    b"//a//b", b"///", b"/../a/./b", b"/%2F%2e%", b"/%zz%4", b"/%00", b"/a;p=1", b"/?", b"/a??", b"/%E4%F6?%FC", b"/\xe4", b"/a#b",
    b"*", b"http://h/a?b", b"HTTPS://user@h:8/%41", b"http://h?q", b"http://[::1]:80", b"http://[::1/a", b"http:///a", b"h:80", b"a", b"",
    b"/health",
)  # fmt: skip
PROTOCOL = mostly([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"], b"HTTP/1.2", b"HTTP/2.0", b"HTTP/1", b"http/1.1", b"")
HOST = mostly([b"Host: h"], b"Host:", b"Host: a b", b"Host: h, h", b"Host : h", b"HOST: h\r\nHost: h", b"A: b")
FIELD = mostly(
    [*BROWSER, b"Connection: close", b"connection: Keep-Alive", b"A: b", b"a:\tc d ", b"X-Empty:", b"COOKIE: c=d"],
    b"Connection: keep-alive, close", b"Connection: x,Close ;a", b"Connection: upgrade\r\nUpgrade: websocket",
    b"Connection:", b"Proxy-Connection: close", b"Keep-Alive: 5", b"Expect: 100-continue", b"EXPECT: a, 100-Continue",
    b"Expect: more", b"X_Under: score", b"Content_Length: 3", b"A: \xe4\xff", b"Content-Type: a\r\nContent-Type: a",
    b"Content-Type:", b"Content-Length: 3\r\nContent-Length: 3", b"TE: trailers", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding : chunked", b" folded: a", b"\tb", b": a", b"A", b"A\0: b", b"A: \0", b"A b: c",
    b"X-Forwarded-Proto: https", b"X-Forwarded-For: , x", b"Forwarded: for=1", b"If-Match: a\r\nIf-Match: b",
    b"Wsgi.Input: x", b"Remote-Addr: x", b"Script-Name: /x", b"Http-Host: x", b"Path-Info: /y",
    b"X-Request-ID: a\r\nX-Request-ID: a", b"X_Request_ID: a", b"X-Request-ID: " + b"x" * 129,
)  # fmt: skip
LENGTH = mostly([b"0", b"3", b"5", b"05"], b"+5", b"-1", b"5, 5", b"5 ", b"5_0", b"0x5", b"", b"\xb2", b"9" * 21)
SIZE = mostly([b"3", b"03", b"3;a=b"], b"3 ", b"+3", b"g", b"", b"3;", b"f" * 17, b"bb9")
CODING = mostly([b"chunked", b"Chunked"], b"gzip, chunked", b"chunked, chunked", b"identity", b"", b"\x0bchunked")
AROUND = st.integers(-2, 2)
"""Bytes more or less than a limit."""


@st.composite
def odd_requests(draw):
    """Requests or nearly requests: sometimes with an extra byte, or with a malformed part."""
    lines = [b" ".join([draw(METHOD), draw(TARGET), draw(PROTOCOL)]), draw(HOST)]
    lines += draw(st.lists(FIELD, max_size=4))
    body = []
    framing = draw(st.sampled_from(["none", "length", "wrong length", "long", "chunked", "many chunks"]))
    if framing == "length":
        body = [draw(st.binary(max_size=30) | st.sampled_from([b"one\ntwo", b"\n\n", b"no end"]))]
        lines.append(b"Content-Length: %d" % len(body[0]))
    elif framing == "wrong length":
        body = [draw(st.sampled_from([b"", b"abc", b"abcde", b"abcdefghij"]))]
        lines.append(b"Content-Length: " + draw(LENGTH))
    elif framing == "long":
        size = draw(st.sampled_from([IN_MEMORY, BODY_LIMIT])) + draw(AROUND)
        body = [b"line\n" * (size // 5) + b"x" * (size % 5)]
        lines.append(b"Content-Length: %d" % size)
    elif framing == "chunked":
        lines.append(b"Transfer-Encoding: " + draw(CODING))
        for _ in range(draw(st.integers(0, 2))):
            body += [draw(SIZE), b"\r\n", draw(mostly([b"abc"], b"ab", b"abcd", b"")), draw(EOL)]
        body += [b"0", draw(EOL), *(each + b"\r\n" for each in draw(st.lists(FIELD, max_size=1))), draw(EOL)]
    elif framing == "many chunks":
        size = draw(st.sampled_from([IN_MEMORY, BODY_LIMIT])) + draw(AROUND)
        lines.append(b"Transfer-Encoding: chunked")
        body = [b"%x\r\n" % (size // 2), b"y\n" * (size // 4) + b"z" * (size // 2 % 2), b"\r\n"]
        body += [b"%x\r\n" % (size - size // 2), b"z" * (size - size // 2), b"\r\n0\r\n\r\n"]
    if body and draw(st.integers(0, 3)) == 3:
        lines.append(b"Expect: 100-continue")
    if draw(st.integers(0, 7)) == 7:
        lines.append(b"X-Filler: ")
        lines[-1] += b"x" * (HEAD_LIMIT + draw(AROUND) - len(b"\r\n".join([*lines, b"", b""])))
    head = b"".join(line + draw(EOL) for line in [*lines, b""])
    data = draw(mostly([b""], b"\r\n", b"\r\n" * 11, times=20)) + head + b"".join(body)
    if draw(st.integers(0, 7)) == 7:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(JUNK) + data[at:]
    return data


# --- answers --------------------------------------------------------------------------------------------------------

PART = mostly(
    [b"hello", b"a", b"two\nlines"],
    b"", Xs(65535), Xs(65536), Xs(65537), Xs(100_000), "text", bytearray(b"array"), memoryview(b"view"), 5, None,
)  # fmt: skip
COMMON_HEADERS = [("Content-Type", "text/html; charset=utf-8"), ("Set-Cookie", "a=b; Path=/"), ("Vary", "Cookie")]
HEADER = mostly(
    [*COMMON_HEADERS, ("x-odd-CASE", "1"), ("Cache-Control", "no-store"), ("Location", "/a")],
    ("Date", "Mon, 01 Jan 2001 00:00:00 GMT"), ("date", ""), ("Server", "mine"), ("SERVER", ""), ("Via", "1.1 me"),
    ("x-request-ID", "own"), ("x-served-BY", "own"), ("Connection", "close"), ("Keep-Alive", "1"), ("Transfer-Encoding", "chunked"), ("te", "a"), ("Upgrade", "h2c"),
    ("Trailer", "X"), ("X-High", "\xe4\xff"), ("X-Euro", "\u20ac"), ("X-Line", "a\nb"), ("X-Line", "a\r\n b"), ("X-Nul", "\0"),
    ("X\nY", "a"), ("", "a"), ("A B", "c"), ("X:Y", "a"), ("X-Blank", " a "), ("X-Empty", ""), ("\u20ac", "a"), ("-", "a"),
    ("Content-Type", "text/event-stream"), ("content-type", "multipart/x-mixed-replace; boundary=x"),
    ("X-Int", 1), (1, "a"), (b"X-Bytes", b"a"), ("X-Three", "a", "b"), "ab", None,
)  # fmt: skip
CONTENT_LENGTH = mostly(
    ["exact", "exact", "absent"],
    "short", "long", "zero", "twice", "twice, unlike", "-1", "", "abc", "1.0", " 5", "+5", "5_0", "\xb2", 5,
)  # fmt: skip
STATUS = mostly(
    ["200 OK", "200 OK", "404 Not Found", "302 Found"],
    "204 No Content", "304 Not Modified", "204", "103 Early Hints", "100 Continue", "101 Switching Protocols", "500", "500 ", "200",
    "odd", "", " 200 OK", "2000 OK", "999 Far", "200 \xdcber", "200 \u20ac", "200 OK\r\nX: y", "200 a\nb", b"200 OK", 200, None,
)  # fmt: skip
SHAPE = mostly(
    ["list", "list with close", "generator", "iterator", "late generator"],
    "tuple", "one with close", "write", "write and list", "file", "file from middle", "pipe", "bytes", "text", "none",
    times=1,
)  # fmt: skip
READS = mostly(
    ["nothing", "whole"], "part", "in bits", "a line", "lines", "all lines", "by iteration", "too much", times=1
)
START = mostly(["once"], "never", "twice", "twice and caught", "again", "again and late", "with exc_info")
FAILS = mostly([""], "before", "after", "part", "end", "close")
ERROR = st.sampled_from([LookupError, LookupError, OSError, ConnectionResetError, SystemExit, KeyboardInterrupt, StopIteration])  # fmt: skip


def lengths(kind, size):
    """The Content-Length headers of a kind of answer with so many bytes."""
    values = {
        "absent": [], "exact": [size], "short": [size - 1], "long": [size + 3], "zero": [0], "twice": [size, size],
        "twice, unlike": [size, size + 1],
    }  # fmt: skip
    known = [("Content-Length", str(each)) for each in values.get(kind, [])]
    return known if kind in values else [("content-LENGTH", kind)]


def size_of(parts):
    """The number of bytes in all parts that have a length."""
    sizes = (each.size if isinstance(each, Xs) else len(each) for each in parts if not isinstance(each, int | None))
    return sum(sizes)


@st.composite
def common_answers(draw):
    """Answers as most Flask apps give them."""
    parts = tuple(draw(st.lists(st.sampled_from([b"hello", b"a" * 200, b"", Xs(10_000)]), min_size=1, max_size=2)))
    headers = draw(st.lists(st.sampled_from(COMMON_HEADERS), unique=True))
    given = draw(st.sampled_from(["exact", "exact", "absent"]))
    return Answer(
        draw(st.sampled_from(["200 OK", "200 OK", "404 NOT FOUND", "302 FOUND", "304 NOT MODIFIED", "204 NO CONTENT"])),
        (*headers, *lengths(given, size_of(parts))),
        parts,
        draw(st.sampled_from(["list", "list with close", "one with close", "iterator"])),
        reads=draw(st.sampled_from(["nothing", "whole"])),
    )


@st.composite
def odd_answers(draw):
    """Answers that violate a rule, or are rare."""
    parts = tuple(draw(st.lists(PART, max_size=3)))
    headers = [*draw(st.lists(HEADER, max_size=3)), *lengths(draw(CONTENT_LENGTH), size_of(parts))]
    return Answer(
        draw(STATUS),
        draw(mostly([tuple(draw(st.permutations(headers)))], None, {"a": "b"}, "ab")),
        parts,
        draw(SHAPE),
        draw(START),
        draw(READS),
        draw(FAILS),
        draw(ERROR),
    )


# --- conversations --------------------------------------------------------------------------------------------------


@dataclass
class Talk:
    """What a client sends, and what the app answers to each request."""

    requests: list[bytes]
    pieces: list[bytes]
    """The requests, as bytes."""
    answers: list[Answer]
    common: bool
    """Whether all of it is what most clients and apps do."""


@st.composite
def talks(draw):
    common = draw(st.sampled_from([True, True, False]))
    if common:
        requests = draw(st.lists(common_requests(), min_size=1, max_size=4))
    else:
        requests = draw(st.lists(odd_requests() | unusual_requests() | common_requests(), min_size=1, max_size=3))
    answers = draw(st.lists(common_answers() if draw(st.booleans()) else odd_answers(), min_size=1, max_size=3))
    pieces = requests
    if draw(mostly([not common], common)):
        stream = b"".join(requests)
        ends = [found.end() for found in re.finditer(rb"\r\n\r\n", stream)]
        cuts = sorted(draw(st.lists(st.integers(0, len(stream)) | st.sampled_from([0, *ends]), max_size=5)))
        pieces = [stream[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(stream)]) if begin < end]
    return Talk(requests, pieces, answers, common)


def behind_a_proxy(app):
    return BehindProxies(app, ServerConfig(trusted_proxy=["localhost"]))


def sides(directory):
    """Two servers for each kind of settings, not started."""
    for kind in ("usual", "alone", "all else"):
        for name in "fast", "slow":
            listener = [Listener.bind(Address(path=str(directory / name)))] if kind == "all else" else None
            all_else = {
                "url_prefix": "/a",
                "url_scheme": "https",
                "ident": "",
                "health": "/health",
                "ids": True,
                "served_by": "web-1%d",
            }
            yield (
                kind,
                Side(
                    behind_a_proxy if listener else lambda app: app,
                    listeners=listener,
                    threads=0 if kind == "alone" else 4,
                    **(all_else if listener else {}),
                ),
            )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two servers for each kind of settings: a normal one, and one with the slow way alone."""
    made = {}
    with ExitStack() as stack:
        stack.enter_context(frozen_date())
        stack.enter_context(both_ways())
        for kind, side in sides(tmp_path_factory.mktemp("sockets")):
            made.setdefault(kind, []).append(stack.enter_context(side))
        for _, slow in made.values():
            slow_way(slow.server)
        yield made


def talk(*pieces, kind="usual", **answer):
    """A conversation that random ones contain too rarely."""
    return example(Talk([b"".join(pieces)], list(pieces), [Answer(**answer)], common=False), kind)


POST = b"POST / HTTP/1.1\r\nHost: h\r\n"
PROFILE = settings(max_examples=EXAMPLES or CI_EXAMPLES, derandomize=not EXAMPLES, print_blob=bool(EXAMPLES))


@PROFILE
@given(talks(), mostly(["usual"], "alone", "all else"))
@talk(POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n", b"abc", reads="whole")
@talk(
    POST
    + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"
    + POST
    + b"Content-Length: 0\r\nExpect: 100-continue\r\n\r\n"
)
@talk(POST + b"Content-Length: %d\r\n\r\n" % (BODY_LIMIT + 1))
@talk(POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\n", b"abc\r\n0\r\n\r\n", reads="whole")
@talk(
    b"GET //a HTTP/1.1\r\nHost: h\r\nCookie: a=b\r\ncookie: c=d\r\nX_A: b\r\nX-A:\r\nX-a: \t c \r\n\r\n",
    b"GET http://a:8/%2F%e4?%2F HTTP/1.1\r\nHost: h\r\nReferer: a\r\nReferer: b\r\n\r\n",
)
@talk(b"GET / HTTP/2.0\r\n\r\n")
@talk(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
@talk(POST + b"\r\n", headers=(("Content-Type", "text/event-stream"),), parts=(b"data: 1\n\n",) * 2, shape="generator")
@talk(POST + b"\r\n", shape="file")
@talk(POST + b"\r\n", shape="write")
@talk(POST + b"\r\n", shape="write", fails="part")
@talk(POST + b"\r\n", shape="generator", headers=(), parts=(b"one", b"two"), fails="part")
@talk(POST + b"\r\n", shape="late generator", start="again and late")
@talk(POST + b"\r\n", start="again")
@talk(POST + b"A: " + b"x" * HEAD_LIMIT + b"\r\n\r\n")
@talk(b"GET /" + b"x" * HEAD_LIMIT, b"x HTTP/1.1\r\n\r\n")
@talk(POST + b"X-Request-ID: abc\r\n\r\n", POST + b"X-Request-ID: a b\r\n\r\n", POST + b"\r\n", kind="all else")
@talk(POST + b"X-Request-ID: abc\r\n\r\n", kind="all else", headers=(("X-Request-ID", "own"), ("Content-Length", "5")))
@talk(POST + b"X-Request-ID: abc\r\n\r\n", kind="all else", fails="before")
@talk(POST + b"\r\n", kind="all else", headers=(("X-Served-By", "own"), ("Content-Length", "5")))
@talk(POST + b"\r\n", parts=(Xs(65536), Xs(65537)), headers=(("Content-Length", "131073"),))
def test_both_ways_give_the_same_answer(pairs, talk, kind):
    """App, client, ledger, access log and warnings are the same with both ways."""
    fast, slow = (side.converse(talk.pieces, talk.answers) for side in pairs[kind])
    assert fast == slow


def test_common_requests_go_the_fast_way(pairs):
    """At least `LEAST_FAST` of the browsers' requests go the fast way; no request does where it is switched off."""
    (fast, slow), asked = pairs["usual"], []
    before = went_fast(fast.server)

    @settings(max_examples=30, database=None)
    @given(st.lists(common_requests(), min_size=1, max_size=3), common_answers())
    def ask(requests, answer):
        fast.converse(requests, [answer])
        asked.extend(requests)

    ask()
    assert went_fast(fast.server) - before >= max(1, LEAST_FAST * len(asked))
    assert went_fast(slow.server) == 0


def test_the_generator_makes_all_sorts(pairs):
    """At least every second conversation is a common one, and all frequent features occur in them."""
    side, shares, statuses, found = pairs["usual"][1], [], set(), set()

    @settings(max_examples=CI_EXAMPLES, database=None)
    @given(talks())
    def look(talk):
        told = side.converse(talk.pieces, talk.answers)
        shares.append(talk.common)
        statuses.update(re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", told.wire))
        found.update(name for name, count in told.ledger.items() if count)
        found.update({f"kept: {told.kept}", f"log: {bool(told.log)}"})
        found.update(what for what, _ in told.app)
        found.update({"chunked"} if b"chunked" in told.wire else ())

    look()
    assert sum(shares) >= len(shares) / 2
    assert {b"200", b"204", b"304", b"400", b"500"} <= statuses
    assert {"completed", "gone", "kept: True", "kept: False", "log: True", "log: False"} <= found
    assert {"chunked", "ended", "closed", "file closed", "start_response"} <= found


# --- that a difference is seen --------------------------------------------------------------------------------------


def other_environ(change):
    """Middleware that changes the app's environ with `change`."""
    return lambda app: lambda environ, start_response: app(change(environ) or environ, start_response)


def other_header(app):
    def run(environ, start_response):
        return app(environ, lambda status, headers: start_response(status, [*headers, ("X-More", "1")]))

    return run


def said_in_the_log(app):
    def run(environ, start_response):
        logging.getLogger("flaskd.server").warning("something is wrong")
        return app(environ, start_response)

    return run


def closed_behind_it(app):
    def run(environ, start_response):
        yield from app(environ, start_response)
        raise LookupError

    return run


class _Environ(dict):
    pass


def rejected(side):
    account = side.server.loop.account
    retire = account.retire
    account.retire = lambda request, outcome, *more: retire(request, "rejected", *more)


DIFFERENCES = {
    "a key more": ({"app"}, {"middleware": other_environ(lambda environ: environ.update(X="1"))}),
    "a key less": ({"app"}, {"middleware": other_environ(lambda environ: environ.pop("HTTP_ACCEPT", None) and None)}),
    "another value": ({"app"}, {"url_scheme": "https"}),
    "no dict": ({"app"}, {"middleware": other_environ(_Environ)}),
    "a body without its first byte": (
        {"app"},
        {"middleware": other_environ(lambda environ: environ["wsgi.input"].read(1) and None)},
    ),
    "other errors": ({"app"}, {"middleware": other_environ(lambda environ: environ.update({"wsgi.errors": None}))}),
    "a header": ({"wire"}, {"middleware": other_header}),
    "the end of the connection": ({"app", "wire", "kept", "ledger", "lines", "log"}, {"middleware": closed_behind_it}),
    "a status in the access log": ({"lines"}, {"on_line": lambda line: {**line, "status": 201}}),
    "a warning": ({"log"}, {"middleware": said_in_the_log}),
    "the ledger": ({"ledger"}, {}, rejected),
    "an id": ({"app", "wire", "lines"}, {"ids": True}),
    "who served it": ({"wire"}, {"served_by": "web-1"}),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_seen(pairs, name):
    """If one of two servers behaves differently, the comparison shows it in these places alone."""
    shows_in, options, *then = DIFFERENCES[name]
    request = b"POST /a HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nContent-Length: 3\r\n\r\nabc"
    with Side(**options) as other:
        for change in then:
            change(other)
        told, usual = (side.converse([request], [Answer(reads="whole")]) for side in (other, pairs["usual"][1]))
    assert {field.name for field in fields(Told) if getattr(told, field.name) != getattr(usual, field.name)} == shows_in
