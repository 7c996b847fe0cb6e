"""Fixtures of the live tests: flaskd processes, and service managers."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_kit import Flaskd, requires
from systemd_kit import LONG, Managers, Systemd, or_skipped, root_of, why_not

# In the background of a shell, or under nohup, SIGQUIT and SIGHUP are ignored, as SIGINT is, and flaskd would leave them
# ignored. The tests of these signals need the defaults, as in a terminal.
for _number in (signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)


@pytest.fixture
def make_flaskd() -> Iterator[Callable[[], Flaskd]]:
    """Makes flaskd processes, each with a directory of its own with a short path (a Unix socket's has 107 bytes)."""
    made: list[Flaskd] = []

    def make() -> Flaskd:
        made.append(Flaskd(Path(tempfile.mkdtemp(prefix="flaskd-test-"))))
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(OSError):
            print(f"--- log of {each.directory}:\n{each.log}")
        each.close()
        shutil.rmtree(each.directory)


@pytest.fixture
def flaskd(make_flaskd: Callable[[], Flaskd]) -> Iterator[Flaskd]:
    """One flaskd; after a stop in good order, it must have left nothing."""
    each = make_flaskd()
    yield each
    ended = each.process is not None and each.process.poll() is not None
    if ended and each.process is not None and each.process.returncode >= 0:
        assert each.leftovers() == []


managers = Managers()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the service managers when the next test needs none, because others look for remaining children."""
    if nextitem is None or "systemd" not in nextitem.path.name:
        managers.end()


@pytest.fixture(params=["machine", "debian-13"])
def each_systemd(request: pytest.FixtureRequest) -> Systemd:
    """This machine's service manager, and Debian 13's."""
    return managers.boot(request.param)


@pytest.fixture(params=["machine", "debian-13"])
def bare_systemd(request: pytest.FixtureRequest) -> Iterator[Systemd]:
    """Like each_systemd, but without flaskd, with a network of its own, and for one test alone."""
    requires("systemd", why_not())
    with contextlib.ExitStack() as ends:
        with or_skipped(request.param):
            manager = ends.enter_context(Systemd(root_of(request.param), bare=True))
        tried = manager.run("/usr/bin/python3", "-c", "import ensurepip", check=False)
        requires("systemd", ["/usr/bin/python3 with ensurepip (Debian: python3-venv)"] if tried.returncode else [])
        yield manager


@pytest.fixture(params=["machine", "debian-13"] if LONG else ["machine"])
def systemd(request: pytest.FixtureRequest) -> Systemd:
    """This machine's service manager; with $FLASKD_LONG also Debian 13's."""
    return managers.boot(request.param)
