"""What is a request, and where it ends (RFC 9112); what could be read in two ways is refused."""

import contextlib
import socket

import pytest
from server_kit import PATIENCE, answers, app, connect, get, no_thread_left, post, serve, until
from waitress.adjustments import Adjustments

from flaskd.server import parser
from flaskd.server.parser import Parser

HOST = "Host: test"
CHUNKED = "Transfer-Encoding: chunked"


def head(*lines):
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def read(data, *, bite=None, **settings):
    """A request after all data came in pieces of a given size, and the number of bytes that belong to it."""
    request, at = Parser(Adjustments(**settings)), 0
    while at < len(data) and not request.completed:
        at += request.received(data[at : at + (bite or len(data))])
    return request, at


def body_of(request):
    return request.get_body_stream().read()


def refusal(data, **settings):
    """The status of the refusal, which is the same in one piece and byte by byte; None if it is not refused."""
    statuses = set()
    for bite in (None, 1):
        request, _ = read(data, bite=bite, **settings)
        statuses.add(request.error and request.error.code)
        request.close()
    assert len(statuses) == 1
    return statuses.pop()


# --- framing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["POST / HTTP/1.1", HOST, CHUNKED, "Content-Length: 5"], 400),  # §6.1
        (["POST / HTTP/1.1", HOST, "Content-Length: 5", CHUNKED], 400),
        (["POST / HTTP/1.1", HOST, "Content-Length: 0", CHUNKED], 400),
        (["POST / HTTP/1.0", CHUNKED], 400),
        (["POST / HTTP/1.0", CHUNKED, "Content-Length: 5"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: chunked, chunked"], 400),
        (["POST / HTTP/1.1", HOST, CHUNKED, CHUNKED], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: chunked, gzip"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: gzip"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: identity"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding:"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: chunked,"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: chunked;q=1"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: xchunked"], 400),
        (["POST / HTTP/1.1", HOST, 'Transfer-Encoding: "chunked"'], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: chunked\xa0"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: \x0bchunked"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding : chunked"], 400),
        (["POST / HTTP/1.1", HOST, " Transfer-Encoding: chunked"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding:", " chunked"], 400),  # §5.2
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding\x00: chunked"], 400),
        (["POST / HTTP/1.1", HOST, "Transfer-Encoding: gzip, chunked"], 501),
        (["POST / HTTP/1.1", HOST, "Content-Length: 5", "Content-Length: 5"], 400),  # §6.3
        (["POST / HTTP/1.1", HOST, "Content-Length: 5", "Content-Length: 6"], 400),
        *[
            (["POST / HTTP/1.1", HOST, f"Content-Length: {value}"], 400)
            for value in ("", "+5", "-5", "5, 5", "5 5", "0x5", "5_0", "5.0", "\xb2", "\x0c5", "9" * 5000, "9" * 19)
        ],
        (["POST / HTTP/1.1", HOST, "Content-Length: 999999999999999999"], 413),
        (["GET / HTTP/1.1"], 400),  # §3.2
        (["GET / HTTP/1.1", HOST, HOST], 400),
        (["GET / HTTP/1.0", HOST, HOST], 400),
        *[
            (["GET / HTTP/1.1", f"Host: {value}"], 400)
            for value in ("a b", ":80", "a/b", "a?b", "a#b", "u@a", "a, b", "a:b", "a:80:80", "a:123456", "[::1", "[x]", "[:::]",
                          "[::1]x", "[fe80::1%eth0]", "\xe4", "a%zz", "<a>", "a\\b", "http://a")
        ],
        (["GET / HTTP/1.0", "Host: a/b"], 400),
        (["POST / HTTP/1.1", HOST, "Content-Type: text/plain", "Content-Type: text/html"], 400),  # RFC 9110 §5.3
        (["GET / HTTP/9.9", HOST], 505),
        (["GET / HTTP/2.0", HOST], 505),
        (["PRI * HTTP/2.0"], 505),
        (["GET / HTTP/0.9"], 505),
        *[
            ([f"GET /{rest}", HOST], 400)
            for rest in ("", " ", " HTTP/1", " HTTP/1.", " HTTP/1.10", " HTTP/01.1", " http/1.1", " HTTP/1.1 ", " HTTP /1.1",
                         "  HTTP/1.1", " HTTP/1.1 HTTP/1.1", " HTTPS/1.1", " HTTP/\xb9.1", "\tHTTP/1.1")
        ],
        *[
            ([f"{method} / HTTP/1.1", HOST], 400)
            for method in ("get", "GeT", "G(T", "G\x00T", "", " GET", "GET\t", "G\xc9T", "A" * 65, "{}")
        ],
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(lines, status):
    """Each of these violates RFC 9112, and is answered with the status that it demands."""
    assert refusal(head(*lines)) == status


@pytest.mark.parametrize(
    "line", ["Name", ": value", "Na me: value", "Na\xe4e: value", "Name : value", " Name: value", "Name: a\x00", "Name: \x7f",
             "Name: a\x01b", "Name: a\rb", "Name: a\nb", "Name: a\r\r\n b", "Na\x0bme: value", "(Name): value"]
)  # fmt: skip
def test_a_header_line_that_is_none_is_refused(line):
    """A malformed header line is refused (RFC 9112 §5.1, RFC 9110 §5.5 and §5.6.2)."""
    assert refusal(head("GET / HTTP/1.1", HOST, line)) == 400
    assert refusal(head("GET / HTTP/1.1", line, HOST)) == 400


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\n\r", b"\r\r\n"])
def test_lines_end_with_cr_lf(end):
    """A CR or an LF alone does not end a line; the request is refused."""
    assert refusal(head("GET / HTTP/1.1", HOST, "A: b").replace(b"\r\n", end)) == 400
    assert refusal(b"GET / HTTP/1.1" + end + head(HOST)) == 400
    assert refusal(head("GET / HTTP/1.1", HOST)[:-2] + end + b"\r\n") == 400


def test_what_is_refused_says_nothing_of_what_comes_behind():
    """A refused request takes all data that came with it, so nothing of that is read as another request."""
    data = head("POST / HTTP/1.1", HOST, CHUNKED, "Content-Length: 5") + get("/admin")
    request, taken = read(data)
    assert (request.completed, taken) == (True, len(data))


# --- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["foo/bar", "?q", "example.com:80", "example.com", "*", "a*", "\x00", "/\x00", "/a\tb", "/a\x0bb", "/a\x7fb", "/%00", "/a%00b",
     "/\xe4", "/a#b", "#", "http://", "http:///a", "http://:80/", "http://[::1/a", "http://[::1]x/", "http://u@h/", "http://a b/", "ftp://a/",
     "http:/a", "//h\\\x01", "https://?q", "http://h#f", "javascript:1"],
)  # fmt: skip
def test_a_target_that_is_none_is_refused(target):
    """RFC 9112 §3.2 has origin and absolute form, and * for OPTIONS; a path must not have a NUL (RFC 3986 §7.3)."""
    assert refusal(head(f"GET {target} HTTP/1.1", HOST)) == 400


@pytest.mark.parametrize("target", ["example.com:80", "/", "*", "http://a/"])
def test_nobody_connects_through_this_server(target):
    """CONNECT is refused: flaskd is not a proxy (RFC 9112 §3.2.3)."""
    assert refusal(head(f"CONNECT {target} HTTP/1.1", HOST)) == 400


@pytest.mark.parametrize(
    ("method", "target", "path", "query", "host"),
    [
        ("GET", "/", "/", "", "test"),
        ("GET", "/a%20b%2fc?d%20=e?f", "/a b/c", "d%20=e?f", "test"),
        ("GET", "//admin", "//admin", "", "test"),
        ("GET", "/a//b/../c/%2e%2e", "/a//b/../c/..", "", "test"),
        ("GET", "/?", "/", "", "test"),
        ("GET", "/%zz%", "/%zz%", "", "test"),
        ("GET", "/%E4", "/\xe4", "", "test"),
        ("GET", '/{}|^`"<>\\[]', '/{}|^`"<>\\[]', "", "test"),
        ("GET", "/http://x/", "/http://x/", "", "test"),
        ("OPTIONS", "*", "/", "", "test"),
        ("OPTIONS", "/", "/", "", "test"),
        ("GET", "http://other:80/a?q", "/a", "q", "other:80"),
        ("GET", "HTTPS://other/a", "/a", "", "other"),
        ("GET", "http://other", "/", "", "other"),
        ("GET", "http://other?q", "/", "q", "other"),
        ("GET", "http://[::1]:80//a", "//a", "", "[::1]:80"),
    ],
)  # fmt: skip
def test_a_target_is_taken_apart(method, target, path, query, host):
    """The path begins with a slash in every form of the target; an absolute target also gives the host (§3.2.2)."""
    request, _ = read(head(f"{method} {target} HTTP/1.1", HOST))
    assert (request.error, request.path, request.query, request.headers["HTTP_HOST"]) == (None, path, query, host)
    assert request.request_uri == target


def test_the_app_sees_a_path_as_it_was_sent(serve, connect):
    """//admin stays //admin: the app gets the path that a proxy has allowed."""
    seen = []

    def app(environ, start_response):
        seen.append((environ["PATH_INFO"], environ["REQUEST_URI"]))
        start_response("200 OK", [("Content-Length", "0")])
        return []

    client = connect(serve(app))
    for target in ("//admin", "///a//b", "/a", "http://x//b"):
        assert client.ask(get(target)).status == 200
    assert seen == [("//admin", "//admin"), ("///a//b", "///a//b"), ("/a", "/a"), ("//b", "http://x//b")]


# --- what is fine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["", "a", "a.b:80", "a_b", "127.0.0.1:8080", "[::1]", "[::ffff:1.2.3.4]:1", "a:", "xn--4ca", "a%20b", "a!$&'()*+,;=~"]
)  # fmt: skip
def test_a_host_as_rfc_3986_has_it(host):
    """A Host is a name or an address, with a port that may be empty; an empty Host is allowed (RFC 9112 §3.2)."""
    request, _ = read(head("GET / HTTP/1.1", f"Host:{host}"))
    assert (request.error, request.headers["HTTP_HOST"]) == (None, host)


def test_headers_as_an_app_gets_them():
    """Blanks around a value are removed, several lines are one list, and names with an underscore are left out."""
    lines = [HOST, "A-b:  c d\t", "A-B: e", "A_B: f", "Empty:", "Latin: \xe4", "Colon: a:b", "Content_Length: 7"]
    request, _ = read(head("GET / HTTP/1.1", *lines), bite=3)
    assert request.error is None
    assert request.headers == {
        "HTTP_HOST": "test", "HTTP_A_B": "c d, e", "HTTP_EMPTY": "", "HTTP_LATIN": "\xe4", "HTTP_COLON": "a:b"
    }  # fmt: skip


@pytest.mark.parametrize(("protocol", "version"), [("1.0", "1.0"), ("1.1", "1.1"), ("1.2", "1.1"), ("1.9", "1.1")])
def test_a_higher_minor_version_is_read_as_the_highest_known(protocol, version):
    """A higher minor version is read as HTTP/1.1 (RFC 9110 §2.5)."""
    request, _ = read(head(f"GET / HTTP/{protocol}", HOST))
    assert (request.error, request.version) == (None, version)


@pytest.mark.parametrize(
    ("version", "value", "kept"),
    [
        ("1.1", "close", False), ("1.1", "TE, close", False), ("1.1", "Close ,TE", False), ("1.1", "keep-alive, close", False),
        ("1.1", "keep-alive", True), ("1.1", "TE", True), ("1.1", "closed", True), ("1.1", "Upgrade, HTTP2-Settings", True),
        ("1.0", "keep-alive", True), ("1.0", "Keep-Alive, TE", True), ("1.0", "TE", False), ("1.0", "keep-alive, close", False),
    ],
)  # fmt: skip
def test_the_connection_header_is_a_list(version, value, kept, serve, connect):
    """In Connection, close and keep-alive count among other options, too (RFC 9110 §7.6.1, RFC 9112 §9.3)."""
    response = connect(serve()).ask(get("/", f"Connection: {value}", version=version))
    assert response.last is not kept


def test_two_connection_lines_are_one_list(serve, connect):
    """Two Connection lines are read as one list (RFC 9110 §5.3)."""
    client = connect(serve())
    assert client.ask(get("/", "Connection: TE", "Connection: close")).last
    assert client.ended()


@pytest.mark.parametrize("value", ["100-continue", "100-Continue, other", "other,100-continue", "100-continue;a=b"])
def test_an_expectation_is_met_among_others(value, serve, connect):
    """Expect is a list (RFC 9110 §10.1.1): 100-continue counts among other members."""
    client = connect(serve()).send(get("/echo", f"Expect: {value}", "Content-Length: 5", method="POST"))
    assert client.response().status == 100
    assert client.ask(b"12345").body == b"12345"


def test_an_expectation_of_http_1_0_is_ignored(serve, connect):
    """Expect is ignored in HTTP/1.0, whose clients do not know interim responses (RFC 9110 §10.1.1)."""
    client = connect(serve()).send(post("/echo", b"12345", "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert client.response().body == b"12345"


# --- bodies ------------------------------------------------------------------------------------------------------------


def chunked(data):
    return head("POST / HTTP/1.1", HOST, CHUNKED) + data


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"0\r\n\r\n", b""),
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"4\r\nWiki\r\n5\r\npedia\r\nE\r\n in\r\n\r\nchunks.\r\n0\r\n\r\n", b"Wikipedia in\r\n\r\nchunks."),
        (b"0000000000000005\r\nhello\r\n000\r\n\r\n", b"hello"),
        (b'a;n\r\n0123456789\r\n0;last="\\"q;"\r\n\r\n', b"0123456789"),
        (b'1 ; a = b;c="d e"\r\nx\r\n0\r\n\r\n', b"x"),
        (b"1\r\nx\r\n0\r\nTrailer: t\r\nMore:\r\n\r\n", b"x"),
    ],
)  # fmt: skip
def test_a_body_in_chunks(data, body):
    """The app gets the contents of the chunks, with their length; the next request begins after the trailers."""
    for bite in (None, 1, 2, 3, 7):
        request, taken = read(chunked(data) + get("/next"), bite=bite)
        assert (request.completed, request.error, taken) == (True, None, len(chunked(data)))
        assert (body_of(request), request.headers["CONTENT_LENGTH"]) == (body, str(len(body)))
        assert "TRANSFER_ENCODING" not in request.headers
        request.close()


@pytest.mark.parametrize(
    "data",
    [
        *[size + b"\r\ntest\r\n0\r\n\r\n" for size in (
            b"", b"0x4", b"+4", b"-4", b" 4", b"4 ", b"4\t", b"x", b"g", b"4_0", b"4,", b"4h", b"\xb4", b"4\x0b", b"garbage", b"4\r",
            b"1" * 17, b"f" * 5000, b"4;", b"4;\n", b"4;a=", b"4;a b", b'4;a="', b'4;a="b"c', b"4;\xe4", b"4;a=b\r;c", b"4;a\x00",
        )],
        b"4\r\ntest0\r\n\r\n", b"4\r\ntestx\r\n0\r\n\r\n", b"4\r\ntest\n0\r\n\r\n", b"4\r\ntest\rx0\r\n\r\n",
        b"4\r\ntest\r\n\r\n0\r\n\r\n", b"4\ntest\r\n0\r\n\r\n", b"4\r\ntest\r\n0\n\r\n", b"4\r\ntest\r\n0\r\n\n",
        b"0\r\nno trailer\r\n\r\n", b"0\r\nA: b\r\n folded\r\n\r\n", b"0\r\nA : b\r\n\r\n", b"0\r\nA: b\nC: d\r\n\r\n", b"0\r\nA: \x00\r\n\r\n",
    ],
)  # fmt: skip
def test_chunks_that_are_none_are_refused(data):
    """Malformed chunks are refused (RFC 9112 §7.1)."""
    assert refusal(chunked(data)) == 400


def test_exactly_the_limit_is_allowed():
    """A body of `max_request_body_size` is accepted; one byte more is refused before it is read."""
    assert refusal(post("/", b"x" * 10), max_request_body_size=10) is None
    assert refusal(post("/", b"x" * 11), max_request_body_size=10) == 413
    assert refusal(head("POST / HTTP/1.1", HOST, "Content-Length: 11"), max_request_body_size=10) == 413


def test_chunk_framing_does_not_count():
    """Ten chunks of one byte are a body of ten bytes; a chunk that exceeds the limit is refused at its first line."""
    assert refusal(chunked(b"1;extension=value\r\nx\r\n" * 10 + b"0\r\nT: x\r\n\r\n"), max_request_body_size=10) is None
    assert refusal(chunked(b"1\r\nx\r\n" * 10 + b"1\r\n"), max_request_body_size=10) == 413
    assert refusal(chunked(b"b\r\n"), max_request_body_size=10) == 413
    assert refusal(chunked(b"ffffffffffffffff\r\n")) == 413


def test_the_heads_limit():
    """A head of `max_request_header_size` is accepted; more is 431 (RFC 6585 §5), or 414 for a long target."""
    whole = head("GET / HTTP/1.1", HOST, "A: b")
    assert refusal(whole, max_request_header_size=len(whole)) is None
    assert refusal(whole, max_request_header_size=len(whole) - 1) == 431
    assert refusal(b"GET /" + b"a" * 100, max_request_header_size=100) == 414  # RFC 9112 §3
    assert refusal(whole[:-4] + b"b" * 100, max_request_header_size=100) == 431


def test_framing_has_limits():
    """Extensions and trailers, which the app does not get, are bounded for a whole body."""
    extension = b"1;" + b"e" * 1000 + b"\r\nx\r\n"
    assert refusal(chunked(extension * 16)) is None
    assert refusal(chunked(extension * 17)) == 400
    assert refusal(chunked(b"1;" + b"e" * 20_000)) == 400
    assert refusal(chunked(b"1" * 20_000)) == 400
    trailer = b"T: " + b"t" * 95 + b"\r\n"
    assert refusal(chunked(b"0\r\n" + trailer * 10 + b"\r\n"), max_request_header_size=1000) is None
    assert refusal(chunked(b"0\r\n" + trailer * 10 + b"T:\r\n"), max_request_header_size=1000) == 431
    assert refusal(chunked(b"0\r\nT: " + b"t" * 1001), max_request_header_size=1000) == 431


def test_whatever_a_parser_raises_is_a_400(monkeypatch, caplog, serve, connect):
    """An unexpected error of the parser is logged, and requests that were pipelined before it are answered."""

    def broken(*_args):
        raise LookupError("on purpose")

    client = connect(serve())
    monkeypatch.setattr(parser, "_members", broken)
    assert client.send(get("/", "Expect: nothing")).response().status == 400
    assert client.ended()
    assert "LookupError: on purpose" in caplog.text


# --- before a request --------------------------------------------------------------------------------------------------


def test_blank_lines_before_a_request():
    """Ten blank lines before a request are ignored (RFC 9112 §2.2 asks for one); more are refused."""
    for bite in (None, 1):
        request, _ = read(b"\r\n" * 10 + get("/"), bite=bite)
        assert (request.error, request.completed, request.path) == (None, True, "/")
    assert refusal(b"\r\n" * 11) == 400


@pytest.mark.parametrize("data", [b"", b"\r", b"\r\n", b"\r\n\r\n\r"])
def test_blank_lines_are_no_beginning(data):
    """A client that has sent only blank lines has no request in a drain."""
    request, _ = read(data)
    assert (request.begun, request.completed) == (False, False)
    assert read(data.removesuffix(b"\r") + b"G")[0].begun


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\x80\x2e\x01\x03\x01",  # SSL 2
        b"\x16",
        b"\x00",
        b"\x05\x01\x00",  # SOCKS 5
        b"\r\n\r\n\x00\r\nQUIT\n",  # PROXY protocol 2
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PRI * HTTP/2.0\r\n",
        b"SSH-2.0-client\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"stats\n",
        b'{"json":',
        b"hello",
        b"GET /\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n",
        b"A" * 65,
        b" ",
        b"\n",
    ],
)  # fmt: skip
def test_what_can_never_be_a_request_is_refused_at_once(data):
    """Bytes that cannot become a request are refused at once, also in a drain."""
    assert refusal(data) in {400, 505}


def test_a_handshake_keeps_no_drain_waiting(serve, connect, app):
    """A TLS client is answered and closed while all threads are busy, and its connection does not count as cut."""
    server = serve(threads=1)
    running = connect(server).send("/gate")
    app.entered(1)
    client = connect(server).send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    assert client.response().status == 400
    assert client.ended()
    app.released.set()
    assert running.response().status == 200
    report = server.drain(PATIENCE)
    assert report.cut == ()


# --- on a connection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refused",
    [
        head("POST /echo HTTP/1.1", HOST, CHUNKED, "Content-Length: 5") + b"0\r\n\r\n",
        head("POST /echo HTTP/1.0", CHUNKED, "Connection: keep-alive") + b"0\r\n\r\n",
        chunked(b"5\r\nhello0\r\n\r\n"),
        get("http://[::1/a"),
        get("/", "Content-Length: " + "9" * 5000),
        get("/", "Transfer-Encoding: gzip, chunked"),
        get("/", HOST),
        get("foo/bar"),
        get("/", version="2.0"),
        b"GET /\r\n",
        b"\x16\x03\x01",
    ],
)
def test_what_was_before_is_answered_and_what_is_behind_is_never_run(refused, serve, connect, app):
    """Earlier requests are answered, later ones are not run, because it is unclear where the next one begins."""
    server = serve()
    client = connect(server).send(get("/"), refused, get("/admin"))
    assert (client.response().body, client.response().status >= 400) == (b"hello", True)
    assert client.ended()
    assert app.entered(1) == {"/"}
    assert app.arrived.empty()
    until(server, lambda: server.in_flight == 0)


def test_what_was_before_runs_on_while_the_refused_one_waits(serve, connect, app):
    """Answers keep the order of their requests, even if a refusal needs no thread."""
    client = connect(serve(threads=1)).send(get("/gate"), b"\x16\x03\x01")
    app.entered(1)
    app.released.set()
    assert (client.response().body, client.response().status) == (b"/gate", 400)
    assert client.ended()


def test_a_limit_names_its_key(serve, connect, caplog):
    """The log names the key of the exceeded limit; its lines are bounded, because clients decide how many there are."""
    server = serve(adjustments={"max_request_body_size": 4096, "max_request_header_size": 2048})
    assert connect(server).send(get("/up?load", "Content-Length: 4097", method="POST")).response().status == 413
    assert connect(server).send(get("/", "A: " + "a" * 2048)).response().status == 431
    assert connect(server).send(b"GET /" + b"a" * 2048).response().status == 414
    lines = [each for each in caplog.records if "refused" in each.getMessage()]
    assert [each.getMessage() for each in lines] == [
        "refused POST /up of 127.0.0.1 with 413: more than server.max_request_body_size (4KiB) allows",
        "refused GET / of 127.0.0.1 with 431: more than server.max_request_header_size (2KiB) allows",
        "refused a request line of 127.0.0.1 with 414: more than server.max_request_header_size (2KiB) allows",
    ]
    assert all(each.bounded for each in lines)


def test_a_limit_that_is_no_setting_names_none(serve, connect, caplog):
    """The limits of the admin listener and the shutdown endpoint are fixed, so the log names no key."""
    server = serve(adjustments={"max_request_body_size": 4}, fixed_limits=True)
    assert connect(server).send(get("/", "Content-Length: 5", method="POST")).response().status == 413
    assert "max_request_body_size" not in caplog.text


def test_a_body_of_exactly_the_limit_arrives(serve, connect):
    """A body of exactly the limit arrives, in one piece and in chunks; one byte more is refused."""
    server = serve(adjustments={"max_request_body_size": 100_000})
    client = connect(server)
    assert client.ask(post("/echo", b"x" * 100_000)).body == b"x" * 100_000
    whole = head("POST /echo HTTP/1.1", HOST, CHUNKED) + b"c350\r\n" + b"x" * 50_000 + b"\r\n"
    assert client.ask(whole + b"c350\r\n" + b"y" * 50_000 + b"\r\n0\r\n\r\n").body == b"x" * 50_000 + b"y" * 50_000
    assert client.ask(whole + b"c351\r\n").status == 413
    with contextlib.suppress(OSError):
        client.socket.shutdown(socket.SHUT_WR)
    assert client.ended()


@pytest.mark.parametrize("more", [[], ["Connection: close"]], ids=["1.0", "close"])
@pytest.mark.parametrize("path", ["/echo", "/chunks"])
def test_what_follows_the_last_request_is_thrown_away(path, more, serve, connect, app):
    """Bytes beyond the Content-Length are thrown away if the connection ends with the answer."""
    request = get(path, "Content-Length: 5", *more, method="POST", version="1.1" if more else "1.0")
    client = connect(serve()).send(request + b"a" * 5 + b"b" * 300_000)
    answer = client.file.read()
    assert answer.startswith(b"HTTP/1.1 200" if more else b"HTTP/1.0 200")
    assert answer.count(b"HTTP/1.") == 1
    assert app.entered(1) == {path}
    assert app.arrived.empty()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_what_follows_a_body_is_the_next_request(version, serve, connect, app):
    """Bytes after the body are read as the next request if the connection is kept; endless letters are refused."""
    kept = ["Connection: keep-alive"] if version == "1.0" else []
    client = connect(serve()).send(
        get("/echo", "Content-Length: 5", *kept, method="POST", version=version) + b"12345" + b"x" * 300_000
    )
    assert (client.response().body, client.response().status) == (b"12345", 400)
    assert client.ended()
    assert app.entered(1) == {"/echo"}
    assert app.arrived.empty()


def test_a_body_that_comes_without_being_asked_for(serve, connect):
    """A client may send its body without waiting for 100 (RFC 9110 §10.1.1)."""
    client = connect(serve()).send(post("/echo", b"I have expectations", "Expect: 100-continue", "Connection: close"))
    response = client.response()
    if response.status == 100:  # the 100, which may be left out then
        response = client.response()
    assert (response.status, response.body, response.last) == (200, b"I have expectations", True)
    assert client.ended()


def test_chunks_in_pieces_of_their_own(serve, connect):
    """However the chunks are cut into pieces, the app reads one body, and gets its length."""
    seen = []

    def app(environ, start_response):
        seen.append(
            (environ["CONTENT_LENGTH"], environ.get("HTTP_TRANSFER_ENCODING"), environ["wsgi.input_terminated"])
        )
        body = environ["wsgi.input"].read()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    client = connect(serve(app)).send(head("GET / HTTP/1.1", HOST, CHUNKED))
    line = b"This string has 32 characters.\r\n"
    for _ in range(12):
        client.send(b"20\r\n").send(line).send(b"\r\n")
    response = client.send(b"0\r\n\r\n").response()
    assert (response.body, response.headers["Transfer-Encoding"]) == (line * 12, None)
    assert client.ask(head("GET / HTTP/1.1", HOST, CHUNKED) + b"0\r\n\r\n").body == b""
    assert seen == [("384", None, True), ("0", None, True)]


@pytest.mark.parametrize("data", [b"20;invalid=\r\n", b"0x20\r\n", b"5\r\nhellogarbage", b"5\r\nhello\r\ngarbage\r\n"])
def test_a_refusal_is_a_plain_answer(data, serve, connect):
    """A refusal is a text with its length, and says that the connection ends; the app does not run."""
    client = connect(serve(adjustments={"ident": "shop"})).send(chunked(data))
    response = client.response()
    assert (response.status, response.last, response.headers["Server"]) == (400, True, "shop")
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert client.ended()


def test_a_refusal_of_head_has_no_body(serve, connect):
    """A refusal of HEAD has no body (RFC 9110 §9.3.2), if the method could be read."""
    client = connect(serve()).send(get("http://[::1/a", method="HEAD"))
    answer = client.file.read()
    assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1
