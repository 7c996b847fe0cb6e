"""The kinds of objects that discovery finds and no action ends. An action's own kinds stand in the action's file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flaskd.values import value

ASYNCHRONOUS = "asynchronous: only its own event loop can close it"
_NO_ACTION = "no action closes it; a function of your own can (use: call)"


@value
class Kind:
    """Object types, given as ``module:name``, that discovery finds.

    `use` is the name of the action that ends such objects, empty if there is none; for the kinds of an action it is
    filled in. Objects of the types in `but` are skipped. `ended(object)` is true when the object needs no ending any
    more. `left(object)` says why a stop does not close it by itself; it is empty if a stop does. `owns(object)` gives
    the objects that end together with it. With `named`, only objects that a module or an extension holds are found.
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
        named=True,  # a pool's connections have no name; the pool closes them
    ),
)
"""Kinds that no action ends: the plan lists these objects, and a stop leaves them open."""
