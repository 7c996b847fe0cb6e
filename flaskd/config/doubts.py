"""Finds values that are valid but surely not meant: they contradict each other, or have no effect."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flaskd.config.faults import Fault, dotted
from flaskd.config.nodes import Table, scalars
from flaskd.text import quoted
from flaskd.units import format_duration
from flaskd.verbs import VERBS

if TYPE_CHECKING:
    from flaskd.config.model import Config
    from flaskd.config.nodes import Path

_Doubt = tuple[str, tuple[str, ...]]
"""The message, and the keys that it is about, first the one to change."""


def doubts(config: Config, tree: Table, secrets: frozenset[Path]) -> tuple[Fault, ...]:
    """The doubts, each at the place of the first of its keys that is written in `tree`; none shows a secret."""
    places = {dotted(path): scalar.place for path, scalar in scalars(tree)}
    hidden = set(map(dotted, secrets))
    found = []
    for message, keys in _all(config, hidden):
        if key := next((each for each in keys if each in places), ""):
            place = places[key]
            found.append(Fault(place.source, place.line, place.column, key, message))
    return tuple(found)


def _all(config: Config, hidden: set[str]) -> Iterator[_Doubt]:
    for doubts_of in (
        _of_requests,
        _of_threads,
        _of_workers,
        _of_the_queue,
        _of_sizes,
        _of_a_stop,
        _of_cleanup,
        _of_access,
    ):
        yield from (each for each in doubts_of(config) if hidden.isdisjoint(each[1]))
    yield from _of_names(config, hidden)


def _limits(config: Config) -> Iterator[tuple[str, float]]:
    server = config.server
    if server.request_timeout is not None:
        yield "server.request_timeout", server.request_timeout
    for path, seconds in server.request_timeouts.items():
        if seconds is not None:
            yield dotted(("server", "request_timeouts", path)), seconds


def _of_requests(config: Config) -> Iterator[_Doubt]:
    most = config.shutdown.drain.timeout
    for key, seconds in _limits(config):
        if seconds > most:
            message = (
                f"a request may take {format_duration(seconds)} ({key}), but a stop waits for it no longer than "
                f"shutdown.drain.timeout ({format_duration(most)}), and then cuts it"
            )
            yield message, (key, "shutdown.drain.timeout")


def _of_threads(config: Config) -> Iterator[_Doubt]:
    longest, seconds = max(_limits(config), key=lambda each: each[1], default=("", 0.0))
    workers = bool(config.server.workers)
    for key, after, who in (
        ("pool.stuck_after", config.pool.stuck_after if workers else None, "a worker"),
        ("systemd.stuck_after", config.systemd.stuck_after if not workers else None, "flaskd"),
    ):
        if after is not None and longest and after <= seconds:
            message = (
                f"{who} is restarted when all threads hang for {format_duration(after)} ({key}), before requests are "
                f"given up that may take {format_duration(seconds)} ({longest})"
            )
            yield message, (key, longest)


def _of_workers(config: Config) -> Iterator[_Doubt]:
    pool = config.pool
    for key in ("max_requests", "max_age", "max_memory"):
        if not config.server.workers and getattr(pool, key) is not None:
            message = "it is a limit of workers, and there are none (server.workers is 0): nothing is replaced for it"
            yield message, (f"pool.{key}",)
    for key in ("preload", "canary", "stuck_after"):
        if not config.server.workers and getattr(pool, key):
            yield "it is for workers, and there are none (server.workers is 0)", (f"pool.{key}",)
    if config.server.workers and config.health.probe and config.health.probe_timeout > pool.start_timeout:
        message = (
            f"the probe may take {format_duration(config.health.probe_timeout)} (health.probe_timeout), but a worker "
            f"is given up when it is not ready after {format_duration(pool.start_timeout)} (pool.start_timeout)"
        )
        yield message, ("health.probe_timeout", "pool.start_timeout")


def _of_the_queue(config: Config) -> Iterator[_Doubt]:
    most, connections, threads = config.server.max_queue, config.server.connection_limit, config.server.threads
    if connections is not None and connections < threads:
        message = (
            f"{threads - connections} of {threads} threads (server.threads) never have a request: there are at most "
            f"{connections} connections (server.connection_limit)"
        )
        yield message, ("server.connection_limit", "server.threads")
    if most is not None and connections is not None and most > max(0, connections - threads):
        message = (
            f"so many requests cannot wait (server.max_queue is {most}): there are {connections} connections "
            f"(server.connection_limit), and {threads} of them are being answered (server.threads)"
        )
        yield message, ("server.max_queue", "server.connection_limit", "server.threads")


def _of_a_stop(config: Config) -> Iterator[_Doubt]:
    stop, drain = config.shutdown, config.shutdown.drain
    left = stop.deadline - stop.reserve - stop.announce
    if drain.timeout > left:
        announce = f", less shutdown.announce ({format_duration(stop.announce)})" if stop.announce else ""
        message = (
            f"a drain may take {format_duration(drain.timeout)} (shutdown.drain.timeout), but in a stop it has "
            f"{format_duration(max(0.0, left))}: shutdown.deadline ({format_duration(stop.deadline)}), less "
            f"shutdown.reserve ({format_duration(stop.reserve)}){announce}"
        )
        yield message, ("shutdown.drain.timeout", "shutdown.announce", "shutdown.deadline", "shutdown.reserve")
    for key, grace, what in (
        ("shutdown.drain.keepalive_grace", drain.keepalive_grace, "a connection may send one more request"),
        ("shutdown.drain.stream_grace", drain.stream_grace, "an event stream may go on"),
    ):
        if grace > drain.timeout:
            message = (
                f"{what} for {format_duration(grace)} ({key}), but a drain is over after "
                f"{format_duration(drain.timeout)} (shutdown.drain.timeout)"
            )
            yield message, (key,)
    if stop.exit_wait > stop.deadline:
        message = (
            f"the exit may take {format_duration(stop.exit_wait)} (shutdown.exit_wait), but the whole stop has "
            f"{format_duration(stop.deadline)} (shutdown.deadline)"
        )
        yield message, ("shutdown.exit_wait",)


def _of_cleanup(config: Config) -> Iterator[_Doubt]:
    most, defaults = config.shutdown.deadline, config.cleanup.defaults.timeout
    own = {
        dotted(("cleanup", "policies", name, "timeout")): each.timeout
        for name, each in config.cleanup.policies.items()
        if each.enabled and each.timeout != defaults
    }
    for key, seconds in {**own, "cleanup.defaults.timeout": defaults}.items():
        if seconds > most:
            message = (
                f"a step may take {format_duration(seconds)} ({key}), but the whole stop has {format_duration(most)} "
                "(shutdown.deadline)"
            )
            yield message, (key,)


_LEAST = {
    "server.max_request_body_size": (1024, "larger requests are refused with 413"),
    "server.max_request_header_size": (1024, "most browsers send more, and are refused with 431"),
    "pool.max_memory": (10 * 1024**2, "a worker uses more as soon as it has started, and is replaced again and again"),
}
"""Sizes below which a unit was surely forgotten, and the effect of the small size."""


def _of_sizes(config: Config) -> Iterator[_Doubt]:
    for key, (least, what) in _LEAST.items():
        section, _, name = key.partition(".")
        size = getattr(getattr(config, section), name)
        if size is not None and size < least and (section != "pool" or config.server.workers):
            yield f"it is {size} bytes; {what}: is a unit missing, such as {size}MiB?", (key,)


def _of_access(config: Config) -> Iterator[_Doubt]:
    control, roles = config.control, config.control.roles.members()
    if not control.mode_bits & stat.S_IWOTH:
        return
    verbs = [] if control.fifo is None else control.fifo
    if not roles:
        message = (
            f"every user of this machine may stop flaskd: the control socket has the mode {control.mode} "
            "(control.mode), and there are no control.roles; write 0660 and control.group, or control.roles"
        )
        yield message, ("control.mode",)
    elif changing := [each for each in verbs if VERBS[each].changes]:
        message = (
            f"every user of this machine may {changing[0]}: the FIFO has the mode {control.mode} (control.mode), takes "
            "that (control.fifo), and does not tell who writes; write 0660"
        )
        yield message, ("control.mode", "control.fifo")


def _of_names(config: Config, hidden: set[str]) -> Iterator[_Doubt]:
    """Doubts about names that this machine does not know; they are no faults, because a file may be for another one."""
    for role, members in config.control.roles.members().items():
        for i, member in enumerate(members):
            keys = (dotted(("control", "roles", role, i)), dotted(("control", "roles", role)))
            what, name = ("group", member[1:]) if member.startswith("@") else ("user", member)
            if not _is_known(name, group=what == "group"):
                shown = f" {quoted(name)}" if hidden.isdisjoint(keys) else ", as is interpolated here"
                yield f"this machine has no {what}{shown}, so it has no role", keys
    group = config.control.group
    if group is not None and not _is_known(group, group=True):
        shown = f" {quoted(group)}" if "control.group" not in hidden else ", as is interpolated here"
        yield (
            f"this machine has no group{shown}, so only the daemon's own user and root may control it",
            ("control.group",),
        )


def _is_known(name: str, *, group: bool) -> bool:
    """Whether this machine has a user or a group of that name; a number stands for itself."""
    import grp  # noqa: PLC0415 - Windows has neither of them, and no daemon
    import pwd  # noqa: PLC0415

    try:
        import grp  # noqa: PLC0415 - Windows has neither module, and no such names
        import pwd  # noqa: PLC0415

        return name.isdecimal() or bool(grp.getgrnam(name) if group else pwd.getpwnam(name))
    except (ImportError, KeyError):
        return False
