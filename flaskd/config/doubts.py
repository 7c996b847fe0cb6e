"""Finds values that are valid but surely not meant: they contradict each other, or have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flaskd.config.faults import Fault, dotted
from flaskd.config.nodes import Table, scalars
from flaskd.units import format_duration

if TYPE_CHECKING:
    from flaskd.config.model import Config
    from flaskd.config.nodes import Path

_Doubt = tuple[str, tuple[str, ...]]
"""The message, and the keys that it is about, first the one to change."""


def doubts(config: Config, tree: Table, secrets: frozenset[Path]) -> tuple[Fault, ...]:
    """The doubts, each at the place of the first of its keys that is written in `tree`; none about secrets."""
    places = {dotted(path): scalar.place for path, scalar in scalars(tree)}
    hidden = set(map(dotted, secrets))
    found = []
    for message, keys in _all(config):
        if hidden.isdisjoint(keys) and (key := next((each for each in keys if each in places), "")):
            place = places[key]
            found.append(Fault(place.source, place.line, place.column, key, message))
    return tuple(found)


def _all(config: Config) -> Iterator[_Doubt]:
    yield from _of_requests(config)
    yield from _of_threads(config)
    yield from _of_workers(config)
    yield from _of_the_queue(config)
    yield from _of_a_stop(config)


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
    for key in ("max_requests", "max_age", "max_memory"):
        if not config.server.workers and getattr(config.pool, key) is not None:
            message = "it is a limit of workers, and there are none (server.workers is 0): nothing is replaced for it"
            yield message, (f"pool.{key}",)


def _of_the_queue(config: Config) -> Iterator[_Doubt]:
    most, connections, threads = config.server.max_queue, config.server.connection_limit, config.server.threads
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
            yield message, (key, "shutdown.drain.timeout")
