"""The pytest plugin: the fixture ``flaskd_server`` serves the project's ``app``, and reports what a test leaves behind.

pytest imports this file at every start, so it imports only pytest and the standard library. The server is imported when
the first test asks for the fixture.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import stat
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from flaskd.ledger import DrainReport, InFlight
    from flaskd.serving.embedded import ServerThread

_OPTIONS = {"threads": int, "server": str, "config": str, "host": str, "port": int, "timeout": float, "leaks": str}
"""The options of the marker and the ini file, each with the function that reads its text."""
_SCOPES: dict[str, Any] = {
    "class": pytest.Class,
    "module": pytest.Module,
    "package": pytest.Package,
    "session": pytest.Session,
}
_STOP = 5.0
"""The time limit of a stop in seconds if no configuration sets one: shorter than in production."""
_SETTLE = 0.5
"""Seconds to wait for requests that are nearly over: a client has its answer slightly before the account has it."""
_LOOK = 0.01

_FAILED = pytest.StashKey[bool]()
_WATCHES = pytest.StashKey["list[_Watch]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the ini options."""
    parser.addini("flaskd_server_scope", f"Scope of flaskd_server: function, {', '.join(_SCOPES)}.", default="function")
    parser.addini(
        "flaskd_server_options", f"Options of flaskd_server, each NAME=VALUE: {', '.join(_OPTIONS)}.", type="linelist"
    )
    parser.addini(
        "flaskd_server_ignore",
        'What a test may leave, as patterns: names of threads, "GET /path", "listener ADDRESS", "connection A -> B".',
        type="linelist",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; refuse a scope that does not exist with a message of one line."""
    scope = config.getini("flaskd_server_scope")
    if scope != "function" and scope not in _SCOPES:
        raise pytest.UsageError(
            f'cannot take flaskd_server_scope "{scope}": expected function, {", ".join(_SCOPES)}; correct the ini file'
        )
    config.addinivalue_line(
        "markers",
        "flaskd_server(threads=4, server='waitress', config=None, host='127.0.0.1', port=0, timeout=5, leaks='fail'): "
        "options of the flaskd_server fixture; they go before those of the ini file.",
    )


def _scope(fixture_name: str, config: pytest.Config) -> Any:  # noqa: ARG001 - pytest gives it by name
    return config.getini("flaskd_server_scope")


@pytest.fixture(scope=_scope)
def flaskd_server(request: pytest.FixtureRequest, app: Any) -> Iterator[ServerThread]:
    """The project's ``app``, served by a running `flaskd.ServerThread`; ``flaskd_server.url`` is its URL.

    At the end the server answers the requests in flight and runs the cleanup steps. ``flaskd_server.report`` is the
    account; a failed test shows it in its section "flaskd". The test fails if a request was cut, if a cleanup step
    failed, or if it left something behind: a request, a thread, a listener, or a connection to the server. For the
    options see the marker ``flaskd_server`` and ``pytest --help``.
    """
    from flaskd.errors import FlaskdError  # noqa: PLC0415 - see the module's docstring
    from flaskd.serving.embedded import ServerThread  # noqa: PLC0415

    options = _options(request)
    fails, timeout = options.pop("leaks", "fail") == "fail", options.pop("timeout", None)
    if timeout is None and "config" not in options:
        timeout = _STOP
    watch = _Watch(request.config.getini("flaskd_server_ignore"), fails=fails)
    try:
        server = ServerThread(app, **options)
        watch.start(server)
    except (FlaskdError, TypeError, ValueError) as error:
        raise pytest.fail.Exception(f"flaskd_server cannot serve the app: {error}", pytrace=False) from None
    request.config.stash.setdefault(_WATCHES, []).append(watch)
    yield server
    watch.stop(timeout)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a marker on a test whose server, of a wider scope, has started with other options."""
    scope = item.config.getini("flaskd_server_scope")
    if scope == "function" or "flaskd_server" not in getattr(item, "fixturenames", ()):
        return
    wider: pytest.Collector | None = item.getparent(_SCOPES[scope])
    for node, _ in item.iter_markers_with_node("flaskd_server"):
        if wider is not None and node not in wider.listchain():
            pytest.fail(
                f'flaskd_server cannot take the options of the marker on "{node.name}": one server serves the whole '
                f"{scope}; mark that, or use the ini option flaskd_server_options",
                pytrace=False,
            )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note that a test failed: its traceback keeps objects alive, which then are no leak."""
    if call.excinfo is not None:
        item.stash[_FAILED] = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """After all fixtures are torn down, check what each server left, and what the test left at servers that run on."""
    try:
        result = yield
    except BaseException:
        _settle(item)
        raise
    if problems := _settle(item):
        pytest.fail("\n".join(problems), pytrace=False)
    return result


def _settle(item: pytest.Item) -> list[str]:
    """Add the accounts to the test's report; returns the test's faults, none if it has failed already."""
    watches = item.config.stash.get(_WATCHES, [])
    asked = "flaskd_server" in getattr(item, "fixturenames", ())
    problems: list[str] = []
    for watch in list(watches):
        if watch.stopped:
            watches.remove(watch)
        elif not asked:  # a test that does not use the server is not checked
            watch.look()
            continue
        found = watch.leaks()
        raised, told = watch.problems + found * watch.fails, watch.account + found * (not watch.fails)
        if item.stash.get(_FAILED, False):
            raised, told = [], told + raised
        if told:
            item.add_report_section("teardown", "flaskd", "\n".join(told))
        problems += raised
    return problems


class _Watch:
    """Compares what exists after a server has run with what existed before it."""

    server: ServerThread

    def __init__(self, ignore: list[str], *, fails: bool) -> None:
        self._ignore = ignore
        self.fails = fails
        self.stopped = False
        self.account: list[str] = []
        self.problems: list[str] = []
        self._left: list[InFlight] = []
        self._told: set[int] = set()
        self._cut_in: set[str] = set()
        self._own: set[threading.Thread] = set()
        self.look()

    def start(self, server: ServerThread) -> None:
        """Start the server; its own threads are no leaks until it has stopped."""
        self.server = server
        server.start()
        self._own = set(threading.enumerate()) - self._threads

    def look(self) -> None:
        """Note everything that exists now, so that it is no leak of the next test."""
        self._threads = set(threading.enumerate()) - self._own
        self._sockets = set(_open_sockets())

    def stop(self, timeout: float | None) -> None:
        """Stop the server, and keep its account."""
        server = self.server
        known = server.report  # a test that drained or stopped it has handled the report
        self._left = self._in_flight()
        report: DrainReport = server.stop(timeout)
        self.stopped = True
        self.account = [f"{server.url} drained: {report}"]
        self.account += [f"cleanup: {name}: {entry['fate']}" for name, entry in server.policies.items()]
        self._cut_in = {each.thread for each in report.cut}
        for cut in report.cut:
            if known is None or cut not in known.cut:
                self.problems.append(f"flaskd_server had to {cut.with_stack()}")
                self._left = [each for each in self._left if each.id != cut.id]
        for name, entry in server.policies.items():
            if entry["fate"] in {"failed", "timed_out"}:
                what = f'the cleanup step "{name}" {entry["fate"].replace("_", " ")}'
                self.problems.append(
                    ": ".join(filter(None, [what, entry["why"] or entry["detail"]])) + f"\n{entry['trace']}".rstrip()
                )

    def leaks(self) -> list[str]:
        """What exists now and did not before, each as a sentence; each is reported once."""
        left = self._left if self.stopped else self._in_flight()
        found = [f"the test left a request in flight: {each}; wait for its answer, or close it" for each in left]
        found += [*self._new_threads(), *self._new_sockets()]
        self._left = []
        self._told |= {each.id for each in left}
        self.look()
        return found

    def _ignored(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._ignore)

    def _in_flight(self) -> list[InFlight]:
        """Requests that are not over within `_SETTLE` seconds and whose client still waits."""
        until = time.monotonic() + _SETTLE
        while True:
            left = [
                each
                for each in self.server.requests()
                if not (each.gone or each.id in self._told or self._ignored(f"{each.method} {each.path}"))
            ]
            if not left or time.monotonic() >= until:
                return left
            time.sleep(_LOOK)

    def _new_threads(self) -> Iterator[str]:
        from flaskd.stacks import folded, stack_of  # noqa: PLC0415 - see the module's docstring

        until = time.monotonic() + _SETTLE
        pool, behind = self.server.app_threads(), self.server.left_behind()
        for thread in threading.enumerate():
            ours = thread in pool or (thread in self._own and not self.stopped)
            if thread in self._threads or self._ignored(thread.name) or (ours and not self.stopped):
                continue
            thread.join(max(0.0, until - time.monotonic()))
            if not thread.is_alive():
                continue
            where = f'"{thread.name}"\n{folded(stack_of(thread))}'.rstrip()
            if not ours:
                yield f"the test left a thread running: {where}"
            elif thread.name not in self._cut_in:  # otherwise it was reported with its request
                at = f" in {behind[thread].method} {behind[thread].path}, which is over" if thread in behind else ""
                self.account.append(f"flaskd_server left a thread of its own behind{at}: {where}")

    def _new_sockets(self) -> Iterator[str]:
        if not set(_open_sockets()) - self._sockets:
            return
        gc.collect()  # closes unreferenced sockets, which give a ResourceWarning
        server = {(address.host, address.port) for address in self.server.addresses}
        for key, descriptor in _open_sockets().items():
            name = _name_of(descriptor, server, listeners=self.stopped)
            if key not in self._sockets and name and not self._ignored(name):
                yield f"the test left a socket open: {name}"


def _open_sockets() -> dict[tuple[int, int], int]:
    """The open sockets of this process; none if the system does not show them (fd(4), proc_pid_fd(5))."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/dev/fd"):  # noqa: PTH208 - only names are wanted
            with contextlib.suppress(OSError):  # closed meanwhile, as is the listing's own descriptor
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found[int(name), status.st_ino] = int(name)
    return found


def _name_of(descriptor: int, server: set[tuple[str, int]], *, listeners: bool) -> str:
    """What a socket is: a listener, or a connection to or from the server; empty for all others.

    Other connections of the app, such as to its database, may live as long as the app. While the server runs
    (`listeners` is False), its own listeners and its ends of connections are no leaks.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            here = sock.getsockname()
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return "" if _pair(here) in server and not listeners else f"listener {_shown(here)}"
            there = sock.getpeername()
    except OSError:  # closed meanwhile, or not connected
        return ""
    if _pair(there) in server or (listeners and _pair(here) in server):
        return f"connection {_shown(here)} -> {_shown(there)}"
    return ""


def _pair(address: Any) -> Any:
    return tuple(address[:2]) if isinstance(address, tuple) else address


def _shown(address: Any) -> str:
    if isinstance(address, tuple):
        return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
    return f"unix:{os.fsdecode(address)}"


def _options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The options: those of the ini file, overridden by those of the markers, the nearest marker last."""
    options: dict[str, Any] = {}
    for line in request.config.getini("flaskd_server_options"):
        name, equals, text = line.partition("=")
        name, text = name.strip(), text.strip()
        _check({name: text}, whole=bool(equals))
        try:
            options[name] = _OPTIONS[name](text)
        except ValueError:
            message = f'flaskd_server cannot take "{line}": expected a number'
            raise pytest.fail.Exception(message, pytrace=False) from None
        if name == "config":
            base = request.config.inipath.parent if request.config.inipath else request.config.rootpath
            options[name] = base / Path(text)
    for mark in reversed(list(request.node.iter_markers("flaskd_server"))):
        _check(mark.kwargs, whole=not mark.args)
        options.update(mark.kwargs)
    return options


def _check(options: Mapping[str, Any], *, whole: bool) -> None:
    for name in options:
        if name not in _OPTIONS:
            pytest.fail(f'flaskd_server has no option "{name}"; there are {", ".join(_OPTIONS)}', pytrace=False)
    if not whole:
        pytest.fail(f"flaskd_server takes its options by name: {', '.join(_OPTIONS)}", pytrace=False)
    if (leaks := options.get("leaks", "fail")) not in {"fail", "report"}:
        pytest.fail(f'flaskd_server cannot take leaks="{leaks}": expected "fail" or "report"', pytrace=False)
