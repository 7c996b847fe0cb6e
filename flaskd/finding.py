"""Finds daemons: the control socket of the one to talk to, and those of all flaskds on this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from flaskd.client import ControlClient, reading, user, whose
from flaskd.errors import FlaskdError, ForbiddenError, NoDaemonError
from flaskd.protocol import FIFO, SOCKET, runtime_directories

_OF_ALL_USERS = Path("/run/user/*/*")
"""The runtime directories of all users, where root looks for daemons."""
_BOUND = Path("/proc/net/unix")
"""The list of all Unix sockets in this network namespace, each with the path to which it was bound."""
_BRIEFLY = 2.0
"""How many seconds each daemon has to answer when several are asked."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def find_socket(explicit: str | None, name: str, environ: Mapping[str, str]) -> Path:
    """The control socket to talk to: `explicit`, else ``$FLASKD_CONTROL``, else the first that exists.

    A socket that a killed daemon left is used only if there is no other: connecting to it then tells what is wrong.
    Raises NoDaemonError, which lists the places that were tried, or the daemons of other names. Raises ForbiddenError
    if a daemon may be in a directory that this user must not read, or in one that another user made in a public place.
    """
    if chosen := explicit or environ.get("FLASKD_CONTROL"):
        return _named(Path(chosen), environ)
    tried: list[str] = []
    closed: list[Path] = []
    stale: list[Path] = []
    foreign: list[str] = []
    for directory in runtime_directories(name, environ):
        path = directory / SOCKET
        if str(path) in tried:
            continue
        tried.append(str(path))
        try:
            path.stat()
        except PermissionError:
            closed.append(directory)
            continue
        except OSError:  # no such file, or the name is too long
            continue
        if why := _not_ours(directory):
            foreign.append(f"cannot trust {path}: {why}; if it is meant, name it with --socket")
        elif _is_stale(path):
            stale.append(path)
        else:
            return path
    if foreign or closed:
        return stale[0] if stale else _refused(tried, closed, foreign)
    return _left_behind(name, environ, tried, stale)


def _left_behind(name: str, environ: Mapping[str, str], tried: list[str], stale: list[Path]) -> Path:
    """The socket that a killed daemon left; raises NoDaemonError if there is none, or if other daemons run."""
    if others := _others(environ):
        why = f"{stale[0]} was left behind by one that was killed" if stale else f"there is no {', no '.join(tried)}"
        raise NoDaemonError(f"cannot find a daemon named {name}: {why}; running here: {others}")
    if stale:
        return stale[0]
    raise NoDaemonError(f"cannot find a daemon: there is no {', no '.join(tried)}; start one, or name its --socket")


def _others(environ: Mapping[str, str]) -> str:
    """The daemons that run under any name, each as the option that leads to it; empty if there is none."""
    return ", ".join(
        way_to(path, environ, told) for path, told in running(environ) if not isinstance(told, NoDaemonError)
    )


def running(environ: Mapping[str, str]) -> Iterator[tuple[Path, dict[str, Any] | FlaskdError]]:
    """The control socket of each flaskd on this machine that this user can see, and its status or an error.

    The usual places of runtime directories are searched for any name, and the directories where a socket was bound as
    flaskd binds its own; root searches those of all users.
    """
    import glob  # noqa: PLC0415 - for a list, or if nothing was found

    places = [f"{glob.escape(str(each.parent))}/{each.name}" for each in runtime_directories("*", environ)]
    found = [path for each in [*places, _OF_ALL_USERS] for path in glob.glob(f"{each}/{SOCKET}")]  # noqa: PTH207 - whole
    for path in map(Path, dict.fromkeys([*found, *_bound()])):
        if _not_ours(path.parent) or _is_stale(path):
            continue
        try:
            with ControlClient(path, timeout=_BRIEFLY) as client, reading(path):
                told: dict[str, Any] | FlaskdError = _in_short(client.request("status"))
        except FlaskdError as error:
            if isinstance(error, NoDaemonError) and not (path.parent / FIFO).exists():
                continue  # it may belong to any program
            told = error
        yield path, told


def _bound() -> Iterator[str]:
    """The control sockets in directories where a socket was bound, by this user or root; all of them for root.

    flaskd binds a socket as ``.PID`` and then renames it; the kernel keeps the first name.
    """
    if not hasattr(os, "geteuid"):
        return
    with contextlib.suppress(OSError):
        for line in _BOUND.read_text(errors="surrogateescape").splitlines():
            directory, _, name = line.rpartition(" ")[2].rpartition("/")
            path = f"{directory}/{SOCKET}"
            if name == SOCKET or (name.startswith(".") and name[1:].isdecimal()):
                with contextlib.suppress(OSError):  # it does not exist, or this user must not see it
                    if os.geteuid() in {0, os.stat(path).st_uid} or not os.stat(directory).st_uid:  # noqa: PTH116 - bytes of any kind
                        yield path


def _in_short(status: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: str(status[key] or "") for key in ("name", "state", "app")},
        "pid": int(status["pid"]),
        "uptime": float(status["uptime"]),
        "listen": [str(each) for each in status["listen"]],
    }


def way_to(path: Path, environ: Mapping[str, str], told: object = None) -> str:
    """The option with which a client verb finds the daemon at a control socket; `told` is its value from `running`."""
    directory = path.parent
    own = str(told["name"]) if isinstance(told, dict) else ""
    for name in (own, directory.name, directory.name.rpartition("-")[0]):
        if name and directory in runtime_directories(name, environ):
            return f"--name {name}"
    return f"--socket {path}"


def _refused(tried: list[str], closed: list[Path], foreign: list[str]) -> NoReturn:
    """Raise ForbiddenError, because a daemon may be where this user must not look."""
    if foreign:
        raise ForbiddenError(foreign[0])
    tried.remove(str(closed[0] / SOCKET))
    none = f"; there is no {', no '.join(tried)}" if tried else ""
    raise ForbiddenError(f"cannot look for a daemon in {closed[0]}: Permission denied; {whose(closed[0])}{none}")


def _not_ours(directory: Path) -> str:
    """Why a directory in a public place such as /tmp is not this user's; empty if it is."""
    if not hasattr(os, "geteuid"):
        return ""
    try:
        if not directory.parent.stat().st_mode & stat.S_IWOTH:
            return ""  # made by root, the service manager, or this user
        found = directory.lstat()
    except OSError as error:
        return error.strerror or "it cannot be looked at"
    if not stat.S_ISDIR(found.st_mode):
        return f"{directory} is no directory, but may lead to one"
    if found.st_uid not in {0, os.geteuid()}:
        return f"{directory} belongs to {user(found.st_uid)}"
    return f"others may write to {directory}" if found.st_mode & _OTHERS_WRITE else ""


def _named(named: Path, environ: Mapping[str, str]) -> Path:
    """The socket at a path that was named; raises NoDaemonError if it does not exist, and other daemons run."""
    path = _meant_by(named)
    with contextlib.suppress(PermissionError, NotADirectoryError):  # connecting to it then tells what is wrong
        try:
            path.lstat()
        except FileNotFoundError as error:
            if others := _others(environ):
                none = f"cannot reach a daemon at {path}: {error.strerror}; running here: {others}"
                raise NoDaemonError(none) from error
    return path


def _meant_by(path: Path) -> Path:
    """The socket that is meant by its own path, by that of the FIFO beside it, or by that of its directory."""
    mode = 0
    with contextlib.suppress(OSError):  # connecting to it then tells what is wrong
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return path / SOCKET
    return path.with_name(SOCKET) if stat.S_ISFIFO(mode) else path


def _is_stale(path: Path) -> bool:
    """Whether a killed daemon left the socket: no process listens there (ECONNREFUSED, connect(2))."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            return probe.connect_ex(str(path)) == errno.ECONNREFUSED
    except (AttributeError, OSError):  # no Unix sockets on this system; a path too long for one
        return False
