"""Long bodies and answers in temporary files, when the disk is full, or there is no directory for them."""

import errno
import io
import os
import tempfile

import pytest
from server_kit import BIG, PATIENCE, answers, app, connect, descriptors, get, no_thread_left, post, serve, until

from flaskd.server.buffers import AnswerBuffer, BodyBuffer

pytestmark = pytest.mark.usefixtures("no_thread_left")


class _Small(io.FileIO):
    """A file on a disk with so many bytes left; a write takes what there is room for, as write(2) does."""

    def __init__(self, file, room):
        super().__init__(os.dup(file.fileno()), "w+b")
        self.room = room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(bytes(data[: self.room]))
        self.room -= written
        return written


@pytest.fixture(params=["full", "nearly full", "nowhere"])
def no_room(request, monkeypatch):
    """Temporary files cannot be made, or cannot be written to their end."""
    real = tempfile.TemporaryFile

    def small(mode="w+b", buffering=-1):
        if request.param == "nowhere":
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
        with real(mode, buffering=0) as file:
            return _Small(file, 0 if request.param == "full" else 1_500_000)

    monkeypatch.setattr(tempfile, "TemporaryFile", small)


def chunked(path, body, size=100_000):
    """A POST in chunks."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    head = get(path, "Transfer-Encoding: chunked", method="POST")
    return head + b"".join(b"%X\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("make", [post, chunked])
def test_a_body_that_cannot_be_kept_is_told_so(make, serve, connect, caplog, answers):
    """The client gets 507 (RFC 4918 §11.5), the log has the reason and advice, and the connection ends."""
    server = serve()
    before = descriptors()
    client = connect(server)
    client.send(make("/echo?q", b"x" * BIG))
    response = client.response()
    assert (response.status, response.last) == (507, True)
    assert client.ended()
    assert answers.get(timeout=PATIENCE)["status"] == 507
    assert "cannot keep the body of POST /echo (receiving" in caplog.text
    assert "TMPDIR" in caplog.text
    assert connect(server).ask(post("/echo", b"short")).body == b"short"
    client.close()
    until(server, lambda: server.connections <= 1)
    assert len(descriptors()) <= len(before) + 2  # the second client's connection


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("parts", [1, 100], ids=["in one piece", "in parts"])
def test_an_answer_that_cannot_be_kept_in_a_file_is_whole(parts, serve, connect, caplog):
    """The answer stays in memory, which is bounded, and the log says so; the client gets every byte."""
    body = os.urandom(BIG)

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", str(BIG))])
        return [body[at : at + BIG // parts] for at in range(0, BIG - BIG % parts, BIG // parts)] + (
            [body[BIG - BIG % parts :]] if BIG % parts else []
        )

    server = serve(app)
    client = connect(server, receive_buffer=4096).send("/")
    until(server, lambda: server.requests() and server.requests()[0].phase == "sending")
    assert client.response().body == body
    assert "cannot keep an answer in a temporary file" in caplog.text
    until(server, lambda: server.completed == 1)


def test_a_client_that_goes_on_sending_reads_that_it_was_refused(serve, connect, monkeypatch):
    """The connection is not closed at once: that would reset it, and the answer could be lost (RFC 9112 §9.6)."""
    monkeypatch.setattr("flaskd.server.output._LINGER", PATIENCE)  # only this test looks at the connections
    server = serve(adjustments={"max_request_body_size": 1000})
    client = connect(server).send(get("/echo", f"Content-Length: {BIG}", method="POST"))
    until(server, lambda: any(each.half_closed for each in server.loop.connections.channels()))
    [channel] = server.loop.connections.channels()
    client.send(b"x" * BIG)
    until(server, lambda: channel._heard_at > 0)
    for seconds, connected in [(0, True), (3, False)]:
        server.loop.call(lambda seconds=seconds: channel.linger(channel._heard_at + seconds))
        assert server.turns(PATIENCE)
        assert channel.connected is connected
    assert client.response().status == 413


@pytest.mark.parametrize("kind", [BodyBuffer, AnswerBuffer])
@pytest.mark.parametrize("size", [1, 700, 5000])
def test_what_went_into_a_buffer_comes_out(kind, size, tmp_path):
    """Bytes come out of a buffer in order and once, wherever they are kept meanwhile."""
    buffer, data = kind(2000), os.urandom(9000)
    for at in range(0, len(data), size):
        buffer.append(data[at : at + size])
    assert len(buffer) == len(data)
    assert buffer.overflowed
    out = b""
    while part := buffer.get(1234):
        out += part
        buffer.skip(len(part), True)
    assert (out, len(buffer)) == (data, 0)
    buffer.close()


@pytest.mark.usefixtures("no_room")
def test_what_went_into_an_answers_buffer_comes_out_though_the_disk_is_full():
    """This holds, too, if the disk fills up in the middle of a part of which some was sent before."""
    buffer, data = AnswerBuffer(500_000), os.urandom(3_000_000)
    out = b""
    for at in range(0, len(data), 300_000):
        buffer.append(data[at : at + 300_000])
        out += buffer.get(100_000)[:100_000]
        buffer.skip(100_000, True)
    out += buffer.get()
    assert out == data
    buffer.close()


def test_a_long_body_is_read_by_line(serve, connect):
    """The app can read a body from a temporary file by bytes, by lines, and by iteration (PEP 3333)."""

    def app(environ, start_response):
        body = environ["wsgi.input"]
        told = b"|".join([body.read(3), body.readline(), b"%d" % len(body.readlines(10)), b"%d" % len(list(body))])
        start_response("200 OK", [("Content-Length", str(len(told)))])
        return [told]

    line = b"x" * 99 + b"\n"
    assert connect(serve(app)).ask(post("/", b"abcd\n" + line * 10_000)).body == b"abc|d\n|1|9999"
