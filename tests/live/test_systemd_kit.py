"""The kit that boots service managers must never speak to the machine's own."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE
from systemd_kit import Systemd

# What unshare is at a boot: a process whose child becomes a systemd when it is told to.
STUB = """
bash -c 'echo there; read line; printf systemd > /proc/$$/comm; echo renamed; read line' <&0 &
wait
"""


class Stub(Systemd):
    """Notes what would be sent, and sends nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, ...]] = []
        self._outer: subprocess.Popen[bytes] = subprocess.Popen(
            ["bash", "-c", STUB], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.says("there")

    def says(self, line: str) -> None:
        """Wait for a line of the child's."""
        assert self._outer.stdout is not None
        assert self._outer.stdout.readline() == f"{line}\n".encode()

    def becomes_systemd(self) -> None:
        """Have the child do what the exec at the end of a boot does to its name."""
        assert self._outer.stdin is not None
        self._outer.stdin.write(b"go on\n")
        self._outer.stdin.flush()
        self.says("renamed")

    def ctl(self, *args: str, check: bool = True, timeout: float = 60) -> str:
        """Note it; an exit ends the child."""
        del check, timeout
        self.sent.append(args)
        assert self._outer.stdin is not None
        self._outer.stdin.close()
        return ""

    find: Callable[[Systemd], int] = Systemd._find
    end: Callable[[Systemd], None] = Systemd._end

    @property
    def outer(self) -> "subprocess.Popen[bytes]":
        return self._outer

    @property
    def child(self) -> int:
        return self._first_child()


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A boot that has got as far as its child."""
    each = Stub()
    yield each
    if each.outer.poll() is None:
        each.outer.kill()
    each.outer.wait()
    for pipe in (each.outer.stdin, each.outer.stdout):
        if pipe is not None:
            pipe.close()


def test_a_child_that_is_no_systemd_yet_is_not_spoken_to(stub: Stub) -> None:
    """It still sees the machine's /run: it has no pid to send to, and is ended by its number."""
    child = stub.child
    assert child
    assert stub.find() == 0
    with pytest.raises(AssertionError, match="nothing is sent"):
        stub.command("systemctl", "exit", "--force")
    stub.end()
    assert stub.outer.poll() is not None
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < end, "the child outlived the end"
    assert stub.sent == []


def test_a_child_that_is_systemd_is_asked_to_exit(stub: Stub) -> None:
    """Once it has executed systemd, its /run is its own, and it is spoken to."""
    child = stub.child
    stub.becomes_systemd()
    assert stub.find() == child
    stub.end()
    assert stub.sent == [("exit", "--force")]
    assert stub.outer.poll() is not None
