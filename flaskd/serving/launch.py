"""The steps of a start: the system, the directory, the listeners, the app and its caches, the server, the probe."""

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
"""FileDescriptorName= of sockets that are not the app's (systemd.socket(5)); any other name, given or not, may be."""


def check_system() -> None:
    """Raise UnsupportedError where no daemon can be had.

    Its loop, its gate, and the lock and the peers of its control plane are Linux's (epoll(7), socket(7), unix(7)).
    To be called before the control plane is imported, which is made of modules that Windows has not got. ConfigError
    where gevent or eventlet has been there before: they take epoll away, too.
    """
    check_unpatched()
    if not (hasattr(select, "epoll") and hasattr(socket, "SO_PEERCRED")):
        raise UnsupportedError(
            f"cannot serve: the daemon needs Linux, and this is {sys.platform}; "
            "for development and tests, flaskd.ServerThread and flaskd.ServerProcess serve here, too"
        )


def fault_of(error: BaseException) -> FlaskdError:
    """What kept a start from its end, as it is told: one clear line, and a traceback only for what was not foreseen."""
    if isinstance(error, FlaskdError):
        return error
    if (lack := shortage(error)) is not None:
        return CannotCreateError(f"cannot start: {lack}")
    text = "".join(traceback.format_exception(error))
    return AppError(f"cannot start: {type(error).__name__} was raised in the main thread", text)


def change_directory(app: AppConfig) -> None:
    """Work in `app.chdir`; raises ConfigError when that cannot be."""
    if app.chdir is not None:
        try:
            os.chdir(app.chdir)
        except OSError as error:
            raise ConfigError(f"cannot change into app.chdir {app.chdir}: {error.strerror}") from error


def take_passed(environ: Mapping[str, str], config: Config) -> dict[str, list[Listener]]:
    """The sockets that the service manager passed, by name; what tells of them in the environment is for us alone.

    Raises ConfigError when they were passed to another process and `server.listen` names no address: flaskd would serve
    on its default one, and clients of these would wait in vain.
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
    """Those of the passed sockets that are the control plane's, unless another listener is told to take them."""
    named = (*config.server.listen, *config.admin.listen, *config.admin.agent)
    return [] if "fd:control" in named else passed.get("control", [])


def bind_all(
    config: Config,
    app: list[Listener],
    beside: Mapping[str, list[Listener]],
    passed: dict[str, list[Listener]],
    store: Store,
) -> None:
    """Bind or take over the listeners of the app and, `beside` it, of ``admin`` and ``agent``, adding each at once.

    A passed socket that is then nobody's is closed, with a warning. Raises CannotCreateError, and ConfigError for an
    `fd:NAME` that was not passed.
    """
    _bind(config, app, passed, store)
    for name, listen in (("admin", config.admin.listen), ("agent", config.admin.agent)):
        for each in listen or ([f"fd:{name}"] if name in passed else []):
            beside[name].extend(_listeners(each, passed))
    _let_go(passed, [*app, *chain(*beside.values()), *for_control(config, passed)])


def _bind(config: Config, listeners: list[Listener], passed: dict[str, list[Listener]], store: Store) -> None:
    """Bind or take over what `server.listen` names.

    Without `server.listen`, all sockets that the service manager passed are taken, except those of the admin listener,
    the agent and the control plane, else the default address is bound. A socket unit without FileDescriptorName= gives
    its own name (sd_listen_fds_with_names(3)), so no name says that a socket is the app's.
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
    """Close the passed sockets that nobody has taken, and say so: whoever connects there waits."""
    for name, listeners in passed.items():
        for each in listeners:
            if each not in taken:
                log.warning(
                    f"nobody listens on {each.address}, which was passed as fd:{name}: clients wait there in vain; "
                    f"name it in server.listen or admin.listen, or stop its socket unit"
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
    there = ", ".join(f"fd:{name}" for name in passed) or "none was passed"
    raise ConfigError(f"cannot listen on {where}: no socket of that name was passed; {there}")


def keep(config: Config, listeners: Sequence[Listener], store: Store) -> None:
    """Store the listeners that `bind` bound, if that is wanted; they are in the order of `server.listen`."""
    if config.systemd.fdstore:
        own = [each for each in listeners if each.stored or not each.shared]
        listen = [each for each in config.server.listen or [DEFAULT_LISTEN] if not each.startswith("fd:")]
        store.keep(zip(listen, own, strict=False))  # none is own when sockets were passed and none is named


def find_app(app: AppConfig, given: Callable[..., Any] | LoadedApp | None, environ: Mapping[str, str]) -> LoadedApp:
    """The app in hand, or the one that is named; raises as `flaskd.serving.loading.load_app` does."""
    if isinstance(given, LoadedApp):  # it was found before this process was forked
        return given
    if given is None:
        found = loading.load_app(loading.choose_target(app.target, environ, Path.cwd()))
        check_unpatched()
        return found
    return loading.given_app(given)


def restore(plan: Plan, app: LoadedApp, state: Path | None) -> Callable[[], None]:
    """Bring back what the last stop kept, and say so; what cannot be is a warning.

    Returns what notes, once the start has succeeded, that it is used.
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
            except Exception as error:  # noqa: BLE001 - an action of another package: the app serves all the same
                log.warning(f"cleanup {step.phase}/{step.name}: {step.redact(str(error))}")


def make_server(
    server: ServerConfig,
    app: LoadedApp,
    listeners: list[Listener],
    *,
    on_death: Callable[[BaseException | None], None],
    board: Board | None = None,
) -> WaitressThread:
    """A server for the app on bound listeners, not started yet; RLIMIT_NOFILE is raised when they need it.

    Raises ConfigError where what was imported since the app has replaced threads and sockets.
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
    """Ask the app for `health.probe`, if there is one; returns what is wrong with the answer, None when it is good."""
    if health.probe is None:
        return None
    try:
        status = server.probe(health.probe, health.probe_timeout)
    except FlaskdError as error:
        return error
    if status >= 500:  # noqa: PLR2004 - RFC 9110 §15.6: server errors
        return AppError(f"cannot get ready: the probe of {health.probe} was answered with {status}")
    return None
