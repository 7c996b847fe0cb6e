"""Kinds of objects that discovery knows; those that an action ends stand with the action."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

ASYNCHRONOUS = "asynchronous: only its own event loop can close it"
_NO_ACTION = "no action closes it; a function of your own can (use: call)"


@dataclass(frozen=True)
class Kind:
    """Types by ``module:name`` whose objects discovery finds, and what is known of these.

    `use` is the action that ends them, empty for none; for an action's own kinds it is filled in. `but` are subtypes
    that are something else, `ended` tells an object that needs nothing any more, `left` why one is not closed by
    itself, `owns` gives the objects that are ended along with it, and with `named` only those count that a module or an
    extension holds.
    """

    types: tuple[str, ...]
    use: str = ""
    but: tuple[str, ...] = ()
    ended: Callable[[Any], bool] = lambda _: False
    left: Callable[[Any], str] = lambda _: ""
    owns: Callable[[Any], Iterable[Any]] = lambda _: ()
    named: bool = False


UNCLOSED = (
    Kind(("asyncio.base_events:BaseEventLoop",), ended=lambda _: True, owns=lambda loop: [loop._default_executor]),  # noqa: SLF001 - as above
    Kind(
        (
            "psycopg_pool:AsyncConnectionPool",
            "redis.asyncio:Redis",
            "redis.asyncio.cluster:RedisCluster",
            "httpx:AsyncClient",
        ),
        left=lambda _: ASYNCHRONOUS,
    ),
    Kind(("pymongo:MongoClient",), left=lambda _: _NO_ACTION),
    Kind(
        (
            "psycopg:Connection",
            "psycopg2.extensions:connection",
            "pymysql.connections:Connection",
            "sqlite3:Connection",
        ),
        ended=lambda connection: bool(getattr(connection, "closed", False)),
        left=lambda _: _NO_ACTION,
        named=True,  # those of a pool have no name, and are its business
    ),
)
"""Kinds that no action ends: what is found is told, and left alone."""
