"""Real servers for the tests, started and stopped by their fixtures: PostgreSQL and Redis, on Unix sockets; a cluster on loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import redis
from daemon_kit import requires
from patience import PATIENCE, until


def _unprivileged() -> dict[str, Any]:
    """Options of Popen for servers that refuse to run as root; empty if this is not root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextmanager
def _directory() -> Iterator[Path]:
    """A directory with a short path that belongs to the server's user."""
    path = Path(tempfile.mkdtemp(prefix="flaskd-srv-"))
    if who := _unprivileged():
        os.chown(path, who["user"], who["group"])
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Postgres:
    """A PostgreSQL server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def url(self, name: str) -> str:
        """A URL for SQLAlchemy and psycopg (without the +psycopg), with which the server knows the client as `name`."""
        return f"postgresql+psycopg://shop@/postgres?host={self.directory}&application_name={name}"

    def connections(self, name: str) -> int:
        """How many connections of that name there are (pg_stat_activity)."""
        with psycopg.connect(f"host={self.directory} user=shop dbname=postgres") as connection:
            row = connection.execute(
                "select count(*) from pg_stat_activity where application_name = %s", [name]
            ).fetchone()
            assert row is not None
            return int(row[0])


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Make a cluster with initdb, and start and stop it with pg_ctl."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *map(Path, os.get_exec_path())]
    bin_ = next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)
    requires("postgres", [] if bin_ else ["initdb and pg_ctl"])
    assert bin_ is not None
    with _directory() as directory:

        def call(*argv: str) -> None:
            # Into a file, because the reader of a pipe that a server inherits would wait for ever.
            with (directory / "said").open("ab") as said:
                done = subprocess.run(
                    argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=directory, check=False, timeout=120, **_unprivileged()
                )  # fmt: skip
            assert done.returncode == 0, (directory / "said").read_text()

        data = str(directory / "data")
        call(f"{bin_}/initdb", "-D", data, "-A", "trust", "-U", "shop", "--no-sync", "--no-locale", "-E", "UTF8")
        options = f"-k {directory} -c listen_addresses='' -c fsync=off -c max_connections=20 -c shared_buffers=8MB"
        call(f"{bin_}/pg_ctl", "-D", data, "-w", "-o", options, "-l", str(directory / "log"), "start")
        try:
            yield Postgres(directory)
        finally:
            call(f"{bin_}/pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


class Redis:
    """A Redis server."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.client = redis.Redis(unix_socket_path=str(path), decode_responses=True)

    def connections(self, name: str) -> int:
        """How many connections of that name there are (CLIENT LIST)."""
        return sum(each["name"] == name for each in self.client.client_list())


@contextmanager
def redis_server() -> Iterator[Redis]:
    """Start redis-server, wait until it answers, and end it."""
    requires("redis", [] if shutil.which("redis-server") else ["redis-server"])
    with _directory() as directory:
        path = directory / "redis.sock"
        argv = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory, **_unprivileged()
            )
        server = Redis(path)
        try:
            _answers(server, process, directory / "log")
            yield server
        finally:
            server.client.close()
            process.terminate()
            process.wait(PATIENCE)


class RedisCluster:
    """A Redis cluster of one node that has all slots; it listens on loopback, because it cannot use a Unix socket."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.client = redis.Redis(port=port, decode_responses=True)

    def connections(self, name: str) -> int:
        """How many connections of that name there are (CLIENT LIST)."""
        return sum(each["name"] == name for each in self.client.client_list())


@contextmanager
def redis_cluster() -> Iterator[RedisCluster]:
    """Start a node in cluster mode on free ports, give it all slots, and end it."""
    requires("redis", [] if shutil.which("redis-server") else ["redis-server"])
    with _directory() as directory, socket.socket() as one, socket.socket() as other:
        for each in (one, other):  # they stay bound, so that other processes cannot get the ports
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0))
        port, bus = (each.getsockname()[1] for each in (one, other))
        argv = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--cluster-enabled", "yes",
                "--cluster-port", str(bus), "--save", "", "--appendonly", "no"]  # fmt: skip
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory, **_unprivileged()
            )
        server = RedisCluster(port)
        try:
            _answers(server, process, directory / "log")
            server.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            until(lambda: server.client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")  # some 2 s
            yield server
        finally:
            server.client.close()
            process.terminate()
            process.wait(PATIENCE)


def _answers(server: Redis | RedisCluster, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until it answers, which is the only sign that it is ready."""

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return bool(server.client.ping())
        except redis.ConnectionError:
            return False

    until(answers)
