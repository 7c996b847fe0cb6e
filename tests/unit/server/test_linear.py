"""However a request is made up, reading twice as many bytes takes about twice as long."""

import time

import pytest
from waitress.adjustments import Adjustments

from flaskd.server.parser import Parser

GET = b"GET / HTTP/1.1\r\nHost: test\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZE = 1 << 17
"""Bytes of the smaller of two requests; the larger one has what `max_request_header_size` allows by default."""
BITE = 8192
"""Bytes that come at once (waitress' `recv_bytes`)."""

SHAPES = {
    "digits of a host in the target": lambda size: b"GET http://" + b"1" * size + b" X",
    "a target": lambda size: b"GET /" + b"a" * size,
    "percents": lambda size: b"GET /" + b"%41" * (size // 3) + b" HTTP/1.1\r\n",
    "a bad escape in a host": lambda size: b"GET http://" + b"%4" * (size // 2) + b"/ HTTP/1.1\r\n",
    "slashes": lambda size: b"GET " + b"/" * size + b" HTTP/1.1\r\n",
    "blanks in the request line": lambda size: b"GET" + b" " * size + b"/ HTTP/1.1\r\n",
    "blanks before a bad byte": lambda size: GET + b"X:" + b" " * size + b"\x01\r\n\r\n",
    "blanks after a value": lambda size: GET + b"X: a" + b" " * size + b"\r\n\r\n",
    "blanks in a value": lambda size: GET + b"X: " + b"a \t" * (size // 3) + b"\x7f\r\n\r\n",
    "a name": lambda size: GET + b"x" * size + b"\r\n\r\n",
    "one name again and again": lambda size: GET + b"x:\r\n" * (size // 4) + b"\r\n",
    "many names": lambda size: GET + b"".join(b"x%d:\r\n" % number for number in range(size // 10)) + b"\r\n",
    "folded lines": lambda size: GET + b"x: a\r\n" + b" a\r\n" * (size // 4) + b"\r\n",
    "a Host": lambda size: b"GET / HTTP/1.1\r\nHost: " + b"a" * size + b"/\r\n\r\n",
    "an escaped Host": lambda size: b"GET / HTTP/1.1\r\nHost: " + b"%41" * (size // 3) + b"%\r\n\r\n",
    "an address as Host": lambda size: b"GET / HTTP/1.1\r\nHost: [" + b"1:" * (size // 2) + b"]\r\n\r\n",
    "digits of a length": lambda size: GET + b"Content-Length: " + b"9" * size + b"\r\n\r\n",
    "a list of codings": lambda size: GET + b"Transfer-Encoding: " + b"a," * (size // 2) + b"chunked\r\n\r\n",
    "a list of options": lambda size: GET + b"Connection: " + b"a;," * (size // 3) + b"close\r\n\r\n",
    "a list of expectations": lambda size: GET + b"Expect: " + b",;" * (size // 2) + b"\r\n\r\n",
    "blank lines": lambda size: b"\r\n" * (size // 2),
    "CRs": lambda size: GET + b"X: " + b"\r" * size,
    "chunks of one byte": lambda size: CHUNKED + b"1\r\nx\r\n" * (size // 6) + b"0\r\n\r\n",
    "the size of a chunk": lambda size: CHUNKED + b"0" * size + b"1\r\n",
    "an extension": lambda size: CHUNKED + b"1;" + b"a" * size + b"\r\n",
    "extensions": lambda size: CHUNKED + b"1" + b";a=b" * (size // 4) + b"\x01\r\n",
    "blanks of extensions": lambda size: CHUNKED + b"1" + b" " * size + b"x\r\n",
    "a quoted extension": lambda size: CHUNKED + b'1;a="' + b"\\\\" * (size // 2) + b"\r\n",
    "a trailer": lambda size: CHUNKED + b"0\r\nT:" + b" " * size + b"\x01\r\n\r\n",
    "trailers": lambda size: CHUNKED + b"0\r\n" + b"T:\r\n" * (size // 4) + b"\r\n",
}


def seconds(data, bite):
    """The CPU time that reading takes in seconds, the least of some tries."""
    least = float("inf")
    for _ in range(4):
        request, at = Parser(Adjustments(max_request_header_size=4 * SIZE)), 0
        began = time.thread_time()
        while at < len(data) and not request.completed:
            at += request.received(data[at : at + bite])
        least = min(least, time.thread_time() - began)
        request.close()
    return least


@pytest.mark.parametrize("shape", SHAPES)
def test_twice_the_bytes_take_twice_the_time(shape):
    """No pattern goes back over what it has read: a quadratic one would take four times as long."""
    once, twice = (seconds(SHAPES[shape](size), BITE) for size in (SIZE, 2 * SIZE))
    assert twice < 3 * once + 0.005
    assert twice < 1


@pytest.mark.parametrize(
    "shape", ["a target", "a name", "blanks after a value", "one name again and again", "a trailer"]
)
def test_byte_by_byte_as_well(shape):
    """A partial line is not read again with each new byte."""
    once, twice = (seconds(SHAPES[shape](size), 1) for size in (SIZE // 4, SIZE // 2))
    assert twice < 3 * once + 0.005
