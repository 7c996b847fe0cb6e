"""The kit that boots service managers never talks to the machine's own one."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import systemd_kit
from patience import until
from systemd_kit import PROJECT, Managers, Systemd, UnavailableError

# Takes the place of unshare at a boot: a process whose child becomes a systemd when the test says so.
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
        """Wait for a line from the child."""
        assert self._outer.stdout is not None
        assert self._outer.stdout.readline() == f"{line}\n".encode()

    def becomes_systemd(self) -> None:
        """Let the child change its name as the exec at the end of a boot does."""
        assert self._outer.stdin is not None
        self._outer.stdin.write(b"go on\n")
        self._outer.stdin.flush()
        self.says("renamed")

    def ctl(self, *args: str, check: bool = True, timeout: float = 60) -> str:
        """Note the call; an exit ends the child."""
        del check, timeout
        self.sent.append(args)
        assert self._outer.stdin is not None
        self._outer.stdin.close()
        return ""

    def find(self) -> int:
        return self._find()

    def end(self) -> None:
        self._end()

    @property
    def outer(self) -> "subprocess.Popen[bytes]":
        return self._outer

    @property
    def child(self) -> int:
        return self._first_child()


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A boot that has started its child."""
    each = Stub()
    yield each
    if each.outer.poll() is None:
        each.outer.kill()
    each.outer.wait()
    for pipe in (each.outer.stdin, each.outer.stdout):
        if pipe is not None:
            pipe.close()


def test_a_child_that_is_no_systemd_yet_is_not_spoken_to(stub: Stub) -> None:
    """A child that still sees the machine's /run has no pid to talk to, and is ended by its number."""
    child = stub.child
    assert child
    assert stub.find() == 0
    with pytest.raises(AssertionError, match="nothing is sent"):
        stub.command("systemctl", "exit", "--force")
    stub.end()
    assert stub.outer.poll() is not None
    until(lambda: not Path(f"/proc/{child}").exists(), "the child outlived the end")
    assert stub.sent == []


def test_a_child_that_is_systemd_is_asked_to_exit(stub: Stub) -> None:
    """Once the child has executed systemd, its /run is its own, and it is asked to exit."""
    child = stub.child
    stub.becomes_systemd()
    assert stub.find() == child
    stub.end()
    assert stub.sent == [("exit", "--force")]
    assert stub.outer.poll() is not None


class Unprepared:
    """A service manager that boots, and cannot be prepared."""

    there: ClassVar[list["Unprepared"]] = []
    error: Exception

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def __enter__(self) -> Self:
        self.there.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.there.remove(self)

    def prepare(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "require", "outcome"),
    [
        (UnavailableError("a wheel"), "", pytest.skip.Exception),
        (UnavailableError("a wheel"), "postgres,systemd", pytest.fail.Exception),
        (AssertionError("the units are wrong"), "", AssertionError),
    ],
    ids=["unavailable", "required", "at fault"],
)
def test_a_manager_that_cannot_be_prepared_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, error: Exception, require: str, outcome: type[BaseException]
) -> None:
    """If something is missing for a manager, tests skip, or fail where it is required; it ends at once."""
    monkeypatch.setattr(systemd_kit, "why_not", list)
    monkeypatch.setattr(systemd_kit, "Systemd", Unprepared)
    monkeypatch.setattr(Unprepared, "error", error, raising=False)
    monkeypatch.setenv("FLASKD_REQUIRE", require)
    managers = Managers()
    with pytest.raises(outcome, match=str(error)):
        managers.boot("machine")
    assert (managers.booted, Unprepared.there) == ({}, [])


def test_two_runs_may_make_the_root_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two runs make the root at the same time, the second uses the first one's, and leaves nothing behind."""
    made = tmp_path / "debian-13"

    def make(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        Path(command[-1]).mkdir()
        (made / "etc").mkdir(parents=True)  # the other run finishes at this moment
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(systemd_kit, "CACHE", tmp_path)
    monkeypatch.setattr(systemd_kit.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(systemd_kit.subprocess, "run", make)
    assert systemd_kit.debian_13() == made
    assert [each.name for each in tmp_path.iterdir()] == ["debian-13"]
    assert (made / "etc").exists()


@pytest.mark.parametrize(
    ("uid", "mounts", "required"), [("0", "true", True), ("0", "false", False), ("1000", "true", False)]
)
def test_the_gate_says_what_it_cannot_test(uid: str, mounts: str, required: bool) -> None:
    """Where no service manager can be had, the gate prints what is not tested, and does not require it."""
    (block,) = re.findall(r"^if \[ \"\$\(id -u\).*?^fi$", (PROJECT / ".ci/run").read_text(), re.DOTALL | re.MULTILINE)
    script = (
        f"id() {{ echo {uid}; }}; findmnt() {{ {mounts}; }}; FLASKD_REQUIRE=postgres\n{block}\necho $FLASKD_REQUIRE"
    )
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    assert ("systemd,systemd-257" in done.stdout) == required
    assert ("NOT TESTED" in done.stderr and "tests/live/test_systemd_" in done.stderr) != required
