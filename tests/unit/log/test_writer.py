"""The writer of the log, with file descriptors in the states in which other programs leave them."""

import os
import sys
import threading

import pytest

from flaskd.log import writer as logwriter
from flaskd.log.writer import Writer


@pytest.fixture
def pipe():
    """A pipe whose writing end is non-blocking, as a program that shares it may make it (O_NONBLOCK, open(2))."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    yield reading, writing
    for fd in (reading, writing):
        os.close(fd)


def fill(fd):
    size = 0
    try:
        while True:
            size += os.write(fd, b"." * 4096)
    except BlockingIOError:
        return size


def read(fd, size):
    data = b""
    while len(data) < size:
        data += os.read(fd, 65536)
    return data


def test_a_non_blocking_stderr_loses_no_line(pipe, monkeypatch):
    """Lines that do not fit now are written when there is room, each whole and in order."""
    reading, writing = pipe
    lines = [f"{number} {'x' * 3000}" for number in range(100)]
    with os.fdopen(writing, "w", closefd=False) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        before = fill(writing)
        writer = Writer(str)
        writer.start()
        for line in lines:
            writer.put(line)
        expected = "".join(f"{line}\n" for line in lines)
        found = read(reading, before + len(expected))[before:].decode()
        writer.flush(10)
    assert found == expected


def test_what_is_lost_is_counted(pipe, monkeypatch):
    """Without a thread a full standard error costs the line after a second; later the number of lost lines is logged."""
    reading, writing = pipe
    monkeypatch.setattr(logwriter, "_PATIENCE", 0.0)
    with os.fdopen(writing, "w", closefd=False) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        before = fill(writing)
        writer = Writer(lambda words: f"warning {words}")
        writer.put("one")
        writer.put("two")
        read(reading, before)
        writer.put("three")
        found = os.read(reading, 65536).decode()
    why = "standard error was not read, or could not be written"
    assert found == f"three\nwarning 2 log lines were lost, because {why}\n"


def test_a_descriptor_that_is_something_else_now_is_not_written_to(monkeypatch, tmp_path):
    """If the app closed standard error and its number belongs to another file, no line is written to that file."""
    monkeypatch.setattr(sys, "stderr", None)
    kept = os.dup(2)
    try:
        writer = Writer(str)
        writer.start()
        other = os.open(tmp_path / "data", os.O_CREAT | os.O_RDWR)
        os.dup2(other, 2)
        os.close(other)
        writer.put("a line")
        writer.flush(10)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert (tmp_path / "data").read_bytes() == b""


def test_a_flush_comes_back_though_a_line_raises(monkeypatch):
    """If writing a line raises, the thread goes on, and `flush` returns."""
    writer = Writer(str)
    monkeypatch.setattr(writer, "_is_written", lambda _line: exec("raise KeyboardInterrupt"))
    writer.start()
    writer.put("one")
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (writer.flush(10), done.set()))
    waiting.start()
    assert done.wait(5)
    waiting.join()


def test_the_thread_ends_when_the_writer_is_closed(capsys):
    """All waiting lines are written, the thread is gone, later lines are written at once, and it can start again."""
    writer = Writer(str)
    for again in ("", "again "):
        before = set(threading.enumerate())
        writer.start()
        for number in range(1500):
            writer.put(f"{again}{number}", hurry=False)
        writer.close(10)
        assert set(threading.enumerate()) <= before
        writer.put("after")
        assert capsys.readouterr().err.splitlines() == [*(f"{again}{number}" for number in range(1500)), "after"]


def test_closing_waits_for_no_reader(pipe, monkeypatch):
    """While nothing reads standard error, closing takes the time it is given, and the lines are written later."""
    reading, writing = pipe
    with os.fdopen(writing, "w", closefd=False) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        size, before = fill(writing), set(threading.enumerate())
        writer = Writer(str)
        writer.start()
        writer.put("late")
        writer.close(0.1)
        assert read(reading, size + 5)[size:] == b"late\n"
        writer.close(10)
        assert set(threading.enumerate()) <= before
