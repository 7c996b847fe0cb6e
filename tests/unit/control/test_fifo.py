"""The lines that are read from real FIFOs, without a daemon."""

import os
import select

import pytest

from flaskd.control.fifo import Lines
from flaskd.control.nodes import fifo_node
from flaskd.places.runtime import RuntimeDirectory
from flaskd.protocol import MAX_LINE


class Fifo:
    """A FIFO and its lines, read when the test asks for it."""

    def __init__(self, directory):
        self.place = fifo_node(directory)
        self.place.open(0o600, -1)
        self.taken = []
        self.lines = Lines(self.taken.append)

    def writer(self, data=b""):
        writer = self.place.node.path.open("wb", buffering=0)
        writer.write(data)
        return writer

    def read(self):
        """Read once, as the control thread does; returns whether there are writers."""
        if self.lines.read(self.place.fd):
            return True
        os.close(self.place.anew())
        return False

    @property
    def calls(self):
        """Whether poll(2) reports it as readable."""
        poll = select.poll()
        poll.register(self.place.fd, select.POLLIN)
        return bool(poll.poll(0))


@pytest.fixture
def fifo(tmp_path):
    directory = RuntimeDirectory("flaskd", {"RUNTIME_DIRECTORY": str(tmp_path / "run")})
    directory.acquire()
    fifo = Fifo(directory)
    yield fifo
    fifo.place.remove()
    fifo.place.close()
    directory.release()


def test_an_unfinished_line_is_not_the_next_writers(fifo, caplog):
    """An unfinished line is dropped with a warning when its writer leaves; the next writer's command is read whole."""
    fifo.writer(b"status\ndra").close()
    assert not fifo.read()
    fifo.writer(b"stop\n").close()
    assert not fifo.read()
    assert fifo.taken == ["status", "stop"]
    assert caplog.messages == ["the FIFO got 3 bytes without a newline, and their writer left; they are dropped"]


def test_a_line_may_come_in_pieces(fifo, caplog):
    """A line may come in pieces as long as its writer has the FIFO open."""
    with fifo.writer(b"dra") as writer:
        assert fifo.read()
        writer.write(b"in\n")
        assert fifo.read()
    assert not fifo.read()
    assert fifo.taken == ["drain"]
    assert not caplog.messages


def test_a_fifo_without_writers_is_quiet(fifo):
    """The FIFO is reported as readable after a write, and not after its writers have left."""
    assert not fifo.calls
    for _ in range(3):
        with fifo.writer():
            assert not fifo.calls
        assert fifo.calls
        assert not fifo.read()
        assert not fifo.calls
        fifo.writer(b"status\n").close()
        assert fifo.calls
        assert not fifo.read()
        assert not fifo.calls
    assert fifo.taken == ["status"] * 3


def test_a_writer_that_comes_while_it_is_opened_once_more_is_heard(fifo):
    """While the FIFO is opened again it always has a reader, and nothing that was written is lost."""
    fifo.writer(b"status\n").close()
    assert not fifo.lines.read(fifo.place.fd)
    with fifo.writer(b"drain\n"):
        os.close(fifo.place.anew())
    assert fifo.calls
    assert not fifo.read()
    assert fifo.taken == ["status", "drain"]
    assert not fifo.calls


def test_the_end_of_a_line_that_is_too_long_is_no_command(fifo, caplog):
    """A line that is too long is dropped up to its newline or its writer's end; the next one is read."""
    for end in (b" stop\n", b""):
        with fifo.writer(b"x" * (MAX_LINE + 1)) as writer:
            assert fifo.read()
            if end:
                writer.write(b"x" * MAX_LINE)
                assert fifo.read()
                writer.write(end)
        assert not fifo.read()
        fifo.writer(b"drain\n").close()
        assert not fifo.read()
    assert fifo.taken == ["drain"] * 2
    assert caplog.messages == [f"the FIFO got {MAX_LINE + 1} bytes without a newline; they are dropped"] * 2


def test_where_it_cannot_be_opened_once_more_it_is_made_anew(fifo, monkeypatch, caplog):
    """If the FIFO cannot be opened again, the next look makes a new one."""

    def refuse(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        assert fifo.place.anew() is None
    assert caplog.messages == ["cannot open the FIFO again: Too many open files; flaskd makes a new one"]
    before = fifo.place.keep(0o600, -1)
    assert before is not None
    os.close(before)
    fifo.writer(b"status\n").close()
    assert not fifo.read()
    assert fifo.taken == ["status"]
