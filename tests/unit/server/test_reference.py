"""The parser beside a strict reference, h11: it refuses what h11 calls invalid, and reads all else as h11 does."""

import h11
from hypothesis import example, given, settings
from hypothesis import strategies as st
from waitress.adjustments import Adjustments

from flaskd.server.parser import Parser


def mostly(good, *odd):
    """Usually one of the good values, sometimes an odd one."""
    return st.integers(0, 11).flatmap(lambda number: st.sampled_from(odd if number == 0 else good))


EOL = mostly([b"\r\n"], b"\n", b"\r", b"\r\r\n", b"\n\r")
JUNK = st.sampled_from([bytes([each]) for each in b'\0\t \x0b\x7f\x85\xa0\xe4\r\n,;:_"0'])
METHOD = mostly([b"GET", b"POST", b"OPTIONS", b"PUT"], b"get", b"G ET", b"X-Y", b"")
TARGET = mostly(
    [b"/", b"/a?b", b"//a", b"http://h/a"],
    b"*",
    b"http://h",
    b"http://[::1/a",
    b"h:80",
    b"a/b",
    b"?q",
    b"/a#b",
    b"/\xe4",
    b"",
)
PROTOCOL = mostly([b"HTTP/1.1"], b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1", b"http/1.1", b"")
HOST = mostly([b"Host: h"], b"Host:", b"Host: a b", b"Host: h, h", b"Host : h", b"host:h\r\nHost: h", b"A: b")
LENGTH = mostly(
    [b"0", b"3", b"5", b"05"],
    b"+5", b"-1", b"5,5", b"3, 5", b"5 ", b" 5", b"5_0", b"0x5", b"", b"\xb2", b"9" * 21, b"9" * 5000, b"5\r\nContent-Length: 3",
)  # fmt: skip
CODING = mostly(
    [b"chunked", b"Chunked"],
    b"chunked, chunked", b"gzip, chunked", b"chunked, gzip", b"identity", b"", b"xchunked", b"chunked;a", b",chunked", b"\x0bchunked",
    b"chunked\xa0", b"chunked\r\nContent-Length: 3", b"chunked\r\nTransfer-Encoding: chunked",
)  # fmt: skip
FRAMING = st.one_of(
    st.just(b"B: c"), LENGTH.map(b"Content-Length: ".__add__), CODING.map(b"Transfer-Encoding: ".__add__)
)
HEADER = mostly(
    [b"A: b", b"A:", b"a:\tb", b"Connection: close", b"Expect: 100-continue"],
    b"Transfer_Encoding: chunked", b"Content_Length: 3", b"Transfer-Encoding : chunked", b"A", b": a", b" a: b", b"\tb", b"A\0: b",
    b"A: \0", b"Content-Length: 3", b"Transfer-Encoding: chunked",
)  # fmt: skip
SIZE = mostly(
    [b"3", b"03", b"3;a", b"3;a=b", b'3;a="b"'],
    b"3 ", b" 3", b"+3", b"0x3", b"g", b"", b"3;", b"-3", b"3_", b"f" * 21, b"3\xa0", b"3,3",
)  # fmt: skip
CHUNK = mostly([b"abc"], b"ab", b"abcd", b"")


@st.composite
def streams(draw):
    """Requests or nearly requests: sometimes with an extra byte, or with a malformed part."""
    framing = draw(FRAMING)
    lines = [
        b" ".join([draw(METHOD), draw(TARGET), draw(PROTOCOL)]),
        draw(HOST),
        framing,
        *draw(st.lists(HEADER, max_size=2)),
        b"",
    ]
    if b"hunked" in framing:
        for _ in range(draw(st.integers(0, 2))):
            lines += [draw(SIZE), draw(CHUNK)]
        lines += [b"0", *draw(st.lists(HEADER, max_size=2)), b""]
    else:
        lines.append(draw(st.sampled_from([b"", b"abc", b"abcde", b"abcdefghij"])))
    data = b"".join(line + draw(EOL) for line in lines)
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(JUNK) + data[at:]
    return data


def by_reference(data):
    """Method, target, body and rest as h11 reads them; "invalid", or None if it waits for more."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    request, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                return None
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return request.method, request.target, body, connection.trailing_data[0]
    except h11.RemoteProtocolError:
        return "invalid"


def by_parser(data, bite):
    """The same as flaskd reads it."""
    request, at = Parser(Adjustments()), 0
    while at < len(data) and not request.completed:
        at += request.received(data[at : at + bite])
    try:
        if request.error:
            return "invalid"
        if not request.completed:
            return None
        return request.command.encode(), request.request_uri.encode(), request.get_body_stream().read(), data[at:]
    finally:
        request.close()


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(streams(), st.sampled_from([1, 2, 5, 1 << 20]))
@example(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 1)
@example(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;a\r\nabc\r\n0\r\nA: b\r\n\r\nGET", 3)
def test_what_the_reference_calls_invalid_is_refused(data, bite):
    """What h11 calls invalid is refused. flaskd refuses more than h11, and earlier."""
    ours, theirs = by_parser(data, bite), by_reference(data)
    if ours != "invalid":
        assert ours == theirs


def test_the_generator_makes_both():
    """Enough of the generated data is read as requests with bodies."""
    found = set()

    @settings(max_examples=1000, deadline=None, derandomize=True, database=None)
    @given(streams())
    def look(data):
        ours = by_parser(data, 1 << 20)
        found.add(ours if isinstance(ours, str) else ours and (ours[0], bool(ours[2])))

    look()
    assert {"invalid", None, (b"POST", True), (b"GET", False)} <= found
