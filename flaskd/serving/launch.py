"""The steps of a start: check the system, change the directory, bind listeners, find the app, make the server."""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from flaskd.cleanup import Plan, Step
from flaskd.config import AppConfig, Config, HealthConfig, ServerConfig
from flaskd.errors import AppError, CannotCreateError, ConfigError, FlaskdError, UnsupportedError, shortage
from flaskd.process.descriptors import open_files
from flaskd.server import BehindProxies, Board, WaitressThread, adjustments, missed_by_proxy_fix
from flaskd.serving import loading
from flaskd.serving.loading import LoadedApp
from flaskd.serving.patching import check_unpatched
from flaskd.sockets import Address, Listener, inherited, passed_to_another
from flaskd.systemd.store import Store, stored

log = logging.getLogger("flaskd.launch")

DEFAULT_LISTEN = "127.0.0.1:8000"
_OTHERS = {"admin", "agent", "control"}
"""Names (FileDescriptorName=, systemd.socket(5)) of passed sockets that are not for the app; all others may be."""


def check_system() -> None:
    """Raise UnsupportedError on a system on which the daemon cannot run, and ConfigError after monkey patching.

    The daemon uses features of Linux: epoll(7), socket(7), and the lock and peer credentials of unix(7). To be called
    before the control plane is imported, whose modules Windows does not have. Patching by gevent or eventlet is checked
    first, because it removes epoll, too.
    """
    check_unpatched()
    if not (hasattr(select, "epoll") and hasattr(socket, "SO_PEERCRED")):
        raise UnsupportedError(
            f"cannot serve: the daemon needs Linux, and this is {sys.platform}; "
            "for development and tests, flaskd.ServerThread and flaskd.ServerProcess serve here, too"
        )


def fault_of(error: BaseException) -> FlaskdError:
    """The error to report for a failed start: one clear line, with a traceback only if the error was not expected."""
    if isinstance(error, FlaskdError):
        return error
    if (lack := shortage(error)) is not None:
        return CannotCreateError(f"cannot start: {lack}")
    text = "".join(traceback.format_exception(error))
    return AppError(f"cannot start: {type(error).__name__} was raised in the main thread", text)


def change_directory(app: AppConfig) -> None:
    """Change into `app.chdir`, if it is set; raises ConfigError if that fails."""
    if app.chdir is not None:
        try:
            os.chdir(app.chdir)
        except OSError as error:
            raise ConfigError(f"cannot change into app.chdir {app.chdir}: {error.strerror}") from error


def take_passed(environ: Mapping[str, str], config: Config) -> dict[str, list[Listener]]:
    """The sockets that the service manager passed, by name; removes the environment variables that describe them.

    Raises ConfigError if they were passed to another process and `server.listen` names no address: flaskd would serve
    on its default address, and clients of these sockets would wait in vain.
    """
    passed = inherited(environ)
    if amiss := passed_to_another(environ):
        if not config.server.listen:
            raise ConfigError(f"cannot listen: {amiss}; if they are not meant for it, set server.listen")
        log.warning(f"{amiss}; they are left alone")
    for name in ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return passed


def for_control(config: Config, passed: Mapping[str, Sequence[Listener]]) -> Sequence[Listener]:
    """The passed sockets for the control plane: those called "control", unless another listener is to take them."""
    named = (*config.server.listen, *config.admin.listen, *config.admin.agent)
    return [] if "fd:control" in named else passed.get("control", [])


def bind_all(
    config: Config,
    app: list[Listener],
    beside: Mapping[str, list[Listener]],
    passed: dict[str, list[Listener]],
    store: Store,
) -> None:
    """Bind or take over the listeners of the app, and those of ``admin`` and ``agent`` (`beside`); add each at once.

    A passed socket that has no use is closed, with a warning. Raises CannotCreateError, and ConfigError for an
    `fd:NAME` that was not passed.
    """
    _bind(config, app, passed, store)
    for name, listen in (("admin", config.admin.listen), ("agent", config.admin.agent)):
        for each in listen or ([f"fd:{name}"] if name in passed else []):
            beside[name].extend(_listeners(each, passed))
    _let_go(passed, [*app, *chain(*beside.values()), *for_control(config, passed)])


def _bind(config: Config, listeners: list[Listener], passed: dict[str, list[Listener]], store: Store) -> None:
    """Bind or take over the listeners that `server.listen` names.

    Without `server.listen`, take all sockets that the service manager passed, except those of the admin listener, the
    agent and the control plane; if there are none, bind the default address. A socket unit without FileDescriptorName=
    passes its own name (sd_listen_fds_with_names(3)), so a socket for the app may have any name.
    """
    listen = config.server.listen
    if not listen:
        others = _OTHERS | {each.removeprefix("fd:") for each in (*config.admin.listen, *config.admin.agent)}
        listeners += [each for name in passed if name not in others and not stored(name) for each in passed[name]]
        listen = [] if listeners else [DEFAULT_LISTEN]
    store.open(passed, listen if config.systemd.fdstore else [])
    for each in listen:
        kept = store.take(each)
        listeners += [kept] if kept else _listeners(each, passed)


def _let_go(passed: Mapping[str, Sequence[Listener]], taken: Sequence[Listener]) -> None:
    """Close the passed sockets that have no use, with a warning: clients that connect there would wait in vain."""
    for name, listeners in passed.items():
        for each in listeners:
            if each not in taken:
                log.warning(
                    f"flaskd does not listen on {each.address}, which was passed as fd:{name}: clients would wait "
                    f"there in vain; name it in server.listen or admin.listen, or stop its socket unit"
                )
                each.close()


def _listeners(where: str, passed: Mapping[str, Sequence[Listener]]) -> Sequence[Listener]:
    name = where.removeprefix("fd:")
    if name == where:
        address = Address.parse(where)
        if given := next((name for name, there in passed.items() if address in [each.address for each in there]), None):
            raise ConfigError(
                f"cannot listen on {where}: the service manager does, and passed it as fd:{given}; "
                f"name that in server.listen or admin.listen, or leave server.listen out"
            )
        return [Listener.bind(address)]
    if name in passed:
        return passed[name]
    there = ", ".join(f"fd:{name}" for name in passed) or "none"
    raise ConfigError(f"cannot listen on {where}: no socket of that name was passed (passed: {there})")


def keep(config: Config, listeners: Sequence[Listener], store: Store) -> None:
    """Store copies of the bound listeners in the service manager, if configured; in the order of `server.listen`."""
    if config.systemd.fdstore:
        own = [each for each in listeners if each.stored or not each.shared]
        listen = [each for each in config.server.listen or [DEFAULT_LISTEN] if not each.startswith("fd:")]
        store.keep(zip(listen, own, strict=False))  # `own` is empty if sockets were passed and none is named


def find_app(app: AppConfig, given: Callable[..., Any] | LoadedApp | None, environ: Mapping[str, str]) -> LoadedApp:
    """The `given` app, or the one that the configuration names; raises as `flaskd.serving.loading.load_app` does."""
    if isinstance(given, LoadedApp):  # a template has loaded it before the fork
        return given
    if given is None:
        found = loading.load_app(loading.choose_target(app.target, environ, Path.cwd()))
        check_unpatched()
        return found
    return loading.given_app(given)


def restore(plan: Plan, app: LoadedApp, state: Path | None) -> Callable[[], None]:
    """Restore what the last stop kept, and log it; a failure is a warning.

    Returns a function to call after a successful start: it marks what was restored as used.
    """
    said = plan.restore(app.flask, state)
    for _, words, done in said:
        log.log(logging.INFO if done else logging.WARNING, "%s", words)
    return lambda: _use_up([step for step, _, done in said if done], state)


def _use_up(steps: Iterable[Step], state: Path | None) -> None:
    for step in steps:
        if step.action.use_up is not None:
            try:
                step.action.use_up(state, step.fields)
            except Exception as error:  # noqa: BLE001 - from an action of another package; the app serves all the same
                log.warning(f"cleanup {step.phase}/{step.name}: {step.redact(str(error))}")


def make_server(
    server: ServerConfig,
    app: LoadedApp,
    listeners: list[Listener],
    *,
    on_death: Callable[[BaseException | None], None],
    board: Board | None = None,
) -> WaitressThread:
    """Make a server for the app on bound listeners, without starting it; RLIMIT_NOFILE may be raised when needed.

    Raises ConfigError if a module that was imported after the app has replaced threads or sockets.
    """
    check_unpatched()
    if missed := missed_by_proxy_fix(app.wsgi, server):
        log.warning(missed)
    return WaitressThread(
        BehindProxies(app.wsgi, server),
        threads=server.threads,
        listeners=listeners,
        backlog=server.backlog,
        adjustments=adjustments(server, open_files.limit(raised=True)),
        on_death=on_death,
        board=board,
    )


def probe(server: WaitressThread, health: HealthConfig) -> FlaskdError | None:
    """Ask the app for `health.probe`, if it is set; returns the error, or None if the answer is good."""
    if health.probe is None:
        return None
    try:
        status = server.probe(health.probe, health.probe_timeout)
    except FlaskdError as error:
        return error
    if status >= 500:  # noqa: PLR2004 - RFC 9110 §15.6: server errors
        return AppError(f"cannot get ready: the probe of {health.probe} was answered with {status}")
    return None
