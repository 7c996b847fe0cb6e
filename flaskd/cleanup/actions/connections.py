"""``sqlalchemy.dispose`` and the like: close pools and clients that keep connections to databases and services."""

from __future__ import annotations

from typing import Any

from flaskd.cleanup.context import StepContext
from flaskd.cleanup.ending import LOOK, live_action
from flaskd.cleanup.kinds import ASYNCHRONOUS, Kind
from flaskd.cleanup.targets import TargetFields
from flaskd.config import Phase


def dispose(engine: Any, _context: StepContext, _fields: TargetFields) -> None:
    """Close the connections that are checked in to the engine's pool (sqlalchemy.engine.Engine.dispose)."""
    engine.dispose()


def close_pool(pool: Any, context: StepContext, _fields: TargetFields) -> None:
    """Close a psycopg pool (psycopg_pool.ConnectionPool.close); it waits for its threads until the timeout."""
    pool.close(timeout=max(LOOK, context.remaining() * 0.9))


def close_redis(client: Any, _context: StepContext, _fields: TargetFields) -> None:
    """Close a pool, or a client and its pool; redis.Redis.close alone leaves a pool open that it was given."""
    if hasattr(client, "close"):
        client.close()
    pool = getattr(client, "connection_pool", client)
    if hasattr(pool, "disconnect"):
        pool.disconnect()


def close_http(client: Any, _context: StepContext, _fields: TargetFields) -> None:
    """Close the connections that the client keeps (httpx.Client.close, requests.Session.close)."""
    client.close()


ACTIONS = (
    live_action(
        "sqlalchemy.dispose",
        Phase.CLOSE,
        dispose,
        needs={"sqlalchemy": "sqlalchemy"},
        kinds=(
            Kind(
                ("sqlalchemy.engine:Engine",),
                but=("sqlalchemy.engine.base:OptionEngine",),  # a view of another engine, on the same pool
                left=lambda engine: ASYNCHRONOUS if engine.dialect.is_async else "",
            ),
        ),
        summary="Closes the pools of SQLAlchemy's engines.",
    ),
    live_action(
        "psycopg_pool.close",
        Phase.CLOSE,
        close_pool,
        needs={"psycopg_pool": "psycopg-pool"},
        kinds=(Kind(("psycopg_pool:ConnectionPool",), ended=lambda pool: pool.closed),),
        summary="Closes the pools of psycopg.",
    ),
    live_action(
        "redis.close",
        Phase.CLOSE,
        close_redis,
        needs={"redis": "redis"},
        kinds=(
            Kind(("redis:Redis",), but=("redis.client:Pipeline",), owns=lambda client: [client.connection_pool]),
            Kind(("redis:ConnectionPool",)),
            Kind(
                ("redis.cluster:RedisCluster",),
                but=("redis.cluster:ClusterPipeline",),
                owns=lambda cluster: [node.redis_connection for node in cluster.get_nodes()],
            ),
        ),
        summary="Closes the clients of Redis and their pools.",
    ),
    # The last phase, because telemetry and policies may send through such a client.
    live_action(
        "http_client.close",
        Phase.FINAL,
        close_http,
        needs={"httpx": "httpx", "requests": "requests"},
        kinds=(
            Kind(("httpx:Client", "requests:Session"), ended=lambda client: bool(getattr(client, "is_closed", False))),
        ),
        summary="Closes the clients of httpx and the sessions of requests.",
    ),
)
