"""In how many pieces data is sent and read: an answer's header with its body, an upload in large reads."""

import socket

import pytest
from server_kit import BIG, answers, app, connect, get, post, serve


@pytest.fixture
def sent(monkeypatch):
    """What is handed to the kernel, piece by piece."""
    pieces = []
    original = socket.socket.send  # clients have sendall()
    monkeypatch.setattr(
        socket.socket, "send", lambda self, data, *flags: pieces.append(bytes(data)) or original(self, data, *flags)
    )
    return pieces


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [
        ("/", "GET", b"hello"),
        ("/", "HEAD", b""),
        ("/odd", "GET", None),
        ("/short", "GET", b"short"),
        ("/boom", "GET", None),
    ],
)
def test_a_small_answer_is_sent_in_one_piece(path, method, body, sent, serve, connect):
    """Header and body are sent together, with and without a body, also when the app fails."""
    client = connect(serve()).send(get(path, "Connection: close", method=method))
    received = b"".join(iter(lambda: client.socket.recv(65536), b""))
    (piece,) = sent
    assert received == piece
    header, _, rest = piece.partition(b"\r\n\r\n")
    assert header.startswith(b"HTTP/1.1 ")
    assert body is None or rest == body


def test_the_first_part_of_a_stream_goes_out_at_once(sent, serve, app, connect):
    """A stream's header and first chunk are sent together, at once."""
    client = connect(serve()).send(get("/stream"))
    assert client.socket.recv(65536, socket.MSG_PEEK).endswith(b"5\r\nfirst\r\n")
    assert len(sent) == 1
    app.released.set()
    assert client.response().body == b"firstlast"


def test_a_large_answer_is_whole(serve, connect):
    """A large body is sent after its header, without a copy."""
    assert connect(serve()).send(get("/big")).response().body == b"x" * BIG


def test_a_body_that_its_length_leaves_no_room_for(sent, serve, connect):
    """If the body is not sent because the Content-Length is 0, the header is sent all the same."""

    def app(environ, start_response):
        start_response("204 No Content", [("Content-Length", "0")])
        return [b"too much"]

    client = connect(serve(app)).send(get("/", "Connection: close"))
    received = b"".join(iter(lambda: client.socket.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 204 ")
    assert received.endswith(b"\r\n\r\n")
    assert sent == [received]


def test_an_upload_is_read_in_large_bites(monkeypatch, serve, app, connect):
    """A body is read in pieces of 64 KiB; waitress reads 8 KiB at once."""
    bites = []
    original = socket.socket.recv
    monkeypatch.setattr(socket.socket, "recv", lambda self, size: bites.append(size) or original(self, size))
    body = bytes(range(256)) * 2048
    assert connect(serve()).send(post("/echo", body)).response().body == body
    assert bites[0] == 8192
    assert set(bites[1:]) == {65536}
