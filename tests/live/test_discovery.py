"""What the app holds is closed: with a real PostgreSQL and Redis, a running scheduler, and an exporter that hangs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from daemon_kit import NOBODY, Flaskd
from http_client import get
from services import Postgres, Redis, postgres_server, redis_cluster, redis_server

AT_FLUSH = """
# A provider of telemetry whose shutdown waits at the gate: while it does, all earlier phases are over.
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter

class Exporter(SpanExporter):
    def export(self, spans):
        pass
    def shutdown(self):
        with socket.socket(socket.AF_UNIX) as gate:
            gate.connect(os.environ["GATE"])
            gate.sendall(b"entered")
            gate.recv(1)

provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(SimpleSpanProcessor(Exporter()))
trace.set_tracer_provider(provider)
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with redis_server() as server:
        yield server


def fates(flaskd: Flaskd) -> dict[str, str]:
    """The fate of each step, from the record."""
    return {name: entry["fate"] for name, entry in flaskd.record()["policies"].items()}


def test_no_connection_to_postgres_is_left(flaskd: Flaskd, postgres: Postgres) -> None:
    """Without configuration, every PostgreSQL connection of the app is closed before the process ends."""
    flaskd.write(
        "shop.py",
        f"""
import os, socket
import psycopg_pool, sqlalchemy
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

URL = {postgres.url("shop")!r}
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = URL
db = SQLAlchemy(app)
pool = psycopg_pool.ConnectionPool(URL.replace("+psycopg", ""), min_size=2, open=True)
later = {{}}

@app.get("/")
def index():
    later["engine"] = engine = sqlalchemy.create_engine(URL)  # made by a request, known to no extension
    with engine.connect() as connection, pool.connection() as pooled:
        pooled.execute("select 1")
        one = connection.execute(sqlalchemy.text("select 1")).scalar()
    return str(db.session.execute(sqlalchemy.text("select 41")).scalar() + one)
{AT_FLUSH}""",
    )
    flaskd.start(app="shop")
    assert get(flaskd.url) == (200, b"42")
    assert postgres.connections("shop") >= 4
    flaskd.command("stop")
    flaskd.gate.entered()
    flaskd.until(lambda: postgres.connections("shop") == 0)  # while the process still runs
    flaskd.gate.open()
    assert flaskd.wait() == 0
    assert fates(flaskd) == {
        "found:psycopg_pool.close": "ok", "found:sqlalchemy.dispose": "ok", "found:otel.shutdown": "ok",
    }  # fmt: skip
    assert flaskd.record()["policies"]["found:sqlalchemy.dispose"]["detail"] in {
        "sqlalchemy, Engine-1",
        "Engine-1, sqlalchemy",
    }


def test_no_connection_to_redis_is_left(flaskd: Flaskd, redis: Redis) -> None:
    """Redis clients of extensions, clients on a shared pool and the pool itself are closed before the process ends."""
    flaskd.write(
        "shop.py",
        f"""
import os, socket
import redis
from flask import Flask
from flask_caching import Cache
from flask_redis import FlaskRedis

PATH = {str(redis.path)!r}
app = Flask(__name__)
app.config |= {{"REDIS_URL": f"unix://{{PATH}}?client_name=shop", "CACHE_TYPE": "RedisCache",
    "CACHE_REDIS_URL": f"unix://{{PATH}}?client_name=shop"}}
flask_redis = FlaskRedis(app)
cache = Cache(app)
pool = redis.ConnectionPool.from_url(f"unix://{{PATH}}?client_name=shop")

@app.get("/")
def index():
    flask_redis.set("answer", 42)
    cache.set("answer", 42)
    return redis.Redis(connection_pool=pool).get("answer")
{AT_FLUSH}""",
    )
    flaskd.start(app="shop")
    assert get(flaskd.url) == (200, b"42")
    assert redis.connections("shop") == 3
    flaskd.command("stop")
    flaskd.gate.entered()
    flaskd.until(lambda: redis.connections("shop") == 0)  # while the process still runs
    flaskd.gate.open()
    assert flaskd.wait() == 0
    assert fates(flaskd) == {"found:redis.close": "ok", "found:otel.shutdown": "ok"}


def test_no_connection_to_a_cluster_is_left(flaskd: Flaskd) -> None:
    """A client of a Redis cluster is found once; its connections to all nodes are closed."""
    with redis_cluster() as cluster:
        flaskd.write(
            "shop.py",
            f"""
import os, socket
from flask import Flask
from redis.cluster import RedisCluster

app = Flask(__name__)
client = RedisCluster(host="127.0.0.1", port={cluster.port}, client_name="shop")

@app.get("/")
def index():
    client.set("answer", 42)
    return client.get("answer")
{AT_FLUSH}""",
        )
        flaskd.start(app="shop")
        assert get(flaskd.url) == (200, b"42")
        assert cluster.connections("shop") >= 1
        flaskd.command("stop")
        flaskd.gate.entered()
        flaskd.until(lambda: cluster.connections("shop") == 0)  # while the process still runs
        flaskd.gate.open()
        assert flaskd.wait() == 0
    assert fates(flaskd) == {"found:redis.close": "ok", "found:otel.shutdown": "ok"}
    assert "shop:client" in flaskd.record()["policies"]["found:redis.close"]["detail"].split(", ")


def test_no_connection_of_sessions_or_stored_jobs_is_left(flaskd: Flaskd, postgres: Postgres, redis: Redis) -> None:
    """Flask-Session's and Flask-APScheduler's connections are closed, after the jobs have ended."""
    flaskd.write(
        "shop.py",
        f"""
import os, socket
import redis
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from flask import Flask, session
from flask_apscheduler import APScheduler
from flask_session import Session
from flask_sqlalchemy import SQLAlchemy

URL = {postgres.url("shop")!r}

def hold():
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)

def carts(name, **config):
    app = Flask(name)
    app.config |= config
    app.add_url_rule("/", "index", lambda: str(session.setdefault("answer", 42)))
    Session(app)
    return app

app = carts(__name__, SESSION_TYPE="redis", SESSION_REDIS=redis.Redis.from_url("unix://{redis.path}?client_name=shop"))
other = carts("other", SQLALCHEMY_DATABASE_URI=URL, SESSION_TYPE="sqlalchemy")
app.config |= {{"SCHEDULER_JOBSTORES": {{"default": SQLAlchemyJobStore(url=URL)}}, "SCHEDULER_TIMEZONE": "UTC"}}
scheduler = APScheduler()
scheduler.init_app(app)
scheduler.start()
scheduler.add_job("hold", hold)
app.add_url_rule("/other", "other", lambda: other.test_client().get("/").data)
{AT_FLUSH}""",
    )
    flaskd.start(app="shop")
    flaskd.gate.entered()
    assert get(flaskd.url) == get(flaskd.url, "/other") == (200, b"42")
    assert redis.connections("shop") == 1
    assert postgres.connections("shop") == 2
    flaskd.command("stop")
    flaskd.until(lambda: "found:apscheduler.stop" in flaskd.status()["cleanup"])
    flaskd.gate.open()
    flaskd.gate.entered()
    flaskd.until(lambda: postgres.connections("shop") == redis.connections("shop") == 0)  # while the process still runs
    flaskd.gate.open()
    assert flaskd.wait() == 0
    assert set(fates(flaskd).values()) == {"ok"}
    assert {"found:apscheduler.stop", "found:redis.close", "found:sqlalchemy.dispose"} < set(fates(flaskd))


SCHEDULED = """
import os, socket, sqlite3, sqlalchemy
from flask import Flask
from flask_apscheduler import APScheduler

app = Flask(__name__)
app.config["JOBS"] = [{"id": "hold", "func": "shop:hold"}]
engine = sqlalchemy.create_engine("sqlite:///jobs.db")
sqlalchemy.event.listen(engine, "close", lambda *_: print("closed", flush=True))
with engine.begin() as connection:
    connection.execute(sqlalchemy.text("create table done (at text)"))
scheduler = APScheduler()

def hold():
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("insert into done values ('now')"))
    print("written", flush=True)

def never():
    print("begun after the pause", flush=True)

@app.get("/more")
def more():
    scheduler.add_job("never", never)
    return "added"

scheduler.init_app(app)
scheduler.start()
"""


def test_a_job_that_runs_is_waited_for_before_its_database_is_closed(flaskd: Flaskd) -> None:
    """The scheduler is paused at once and begins no job; the running one ends, and then the database is closed."""
    flaskd.write("shop.py", SCHEDULED)
    flaskd.start(app="shop")
    flaskd.gate.entered()
    flaskd.until(lambda: "the app holds" in flaskd.log)
    flaskd.command("stop")
    flaskd.until(lambda: "found:apscheduler.stop:pause: ok" in flaskd.log)
    flaskd.until(lambda: "found:apscheduler.stop" in flaskd.status()["cleanup"])
    flaskd.gate.open()
    assert flaskd.wait() == 0
    assert flaskd.log.index("written") < flaskd.log.index("closed")
    assert "begun after the pause" not in flaskd.log
    assert set(fates(flaskd).values()) == {"ok"}


def test_a_paused_scheduler_begins_no_job(flaskd: Flaskd) -> None:
    """A job that becomes due while the stop drains does not run."""
    flaskd.write("shop.py", SCHEDULED)
    flaskd.write("flaskd.yaml", "shutdown: {announce: 10s}\n")
    flaskd.start(app="shop")
    flaskd.gate.entered()
    flaskd.gate.open()
    url = flaskd.url
    flaskd.until(lambda: "written" in flaskd.log and "the app holds" in flaskd.log)
    flaskd.command("stop")
    flaskd.until(lambda: "found:apscheduler.stop:pause: ok" in flaskd.log)
    assert get(url, "/more") == (200, b"added")
    flaskd.command("stop now")
    assert flaskd.wait() == 0
    assert "begun after the pause" not in flaskd.log


def test_an_exporter_that_hangs_does_not_hold_the_exit(flaskd: Flaskd) -> None:
    """The step of an exporter that hangs is abandoned at its timeout with its stack in the log, and the process ends."""
    flaskd.write("shop.py", f"import os, socket\nfrom flask import Flask\napp = Flask(__name__)\n{AT_FLUSH}".replace(
        "shutdown_on_exit=False", "shutdown_on_exit=True"))  # fmt: skip
    flaskd.write("flaskd.yaml", "cleanup: {defaults: {timeout: 300ms}}\n")
    flaskd.start(app="shop")
    began = time.monotonic()
    assert flaskd.stop() == 0
    assert time.monotonic() - began < 10.0
    assert fates(flaskd) == {"found:otel.shutdown": "timed_out"}
    assert "gate.recv(1)" in flaskd.log


def test_a_search_that_hangs_does_not_hold_the_stop(flaskd: Flaskd) -> None:
    """An object that hangs when discovery looks at it delays the stop for a moment, is logged, and stops no policy."""
    flaskd.write(
        "shop.py",
        """
import threading, httpx
from flask import Flask
app = Flask(__name__)
class Client(httpx.Client):
    @property
    def is_closed(self):
        threading.Event().wait()
client = Client()
""",
    )
    flaskd.write("flaskd.yaml", "cleanup: {policies: {bye: {use: command, with: {argv: ['true']}}}}\n")
    flaskd.start(app="shop")
    assert flaskd.command("plan").endswith("what the app holds is not known yet\nOK plan\n")
    began = time.monotonic()
    assert flaskd.stop() == 0
    assert time.monotonic() - began < 10.0
    assert fates(flaskd) == {"bye": "ok"}
    assert "what the app holds is not known yet" in flaskd.log


HOLDER = """
import sqlalchemy
from flask import Flask
app = Flask(__name__)
engine = sqlalchemy.create_engine("sqlite:///x.db")
sqlalchemy.event.listen(engine, "close", lambda *_: print("let go", flush=True))
engine.connect().close()
@app.get("/")
def index():
    return "hello"
"""


@pytest.mark.parametrize("discovery", ["report", "off", "{exclude: 'shop:engine'}", "{exclude: sqlalchemy.dispose}"])
def test_what_is_not_to_be_touched_is_not(flaskd: Flaskd, discovery: str) -> None:
    """With report, off or an exclude nothing is closed; report and exclude still show it."""
    flaskd.write("shop.py", HOLDER)
    flaskd.write("flaskd.yaml", f"cleanup: {{discovery: {discovery}}}\n")
    flaskd.start(app="shop")
    if discovery != "off":
        flaskd.until(lambda: "the app holds" in flaskd.log)
    code, out, _ = flaskd.client("plan", "--json")
    plan = json.loads(out)
    assert (code, plan["policies"]) == (0, [])
    assert [each["name"] for each in plan["found"]] == ([] if discovery == "off" else ["shop:engine"])
    assert flaskd.stop() == 0
    assert fates(flaskd) == {}
    assert "let go" not in flaskd.log


def test_the_plan_shows_what_was_found_and_what_would_suffer(flaskd: Flaskd) -> None:
    """`flaskd plan` shows found steps with their moments; --simulate-hang uses the daemon's plan, or the file's."""
    flaskd.write("shop.py", HOLDER)
    flaskd.write("flaskd.yaml", "shutdown: {drain: {timeout: 1s}}\n"
                 "cleanup: {policies: {bye: {use: command, with: {argv: ['true']}, after: x}, x: {use: executor.stop}}}\n")  # fmt: skip
    flaskd.start(app="shop")
    flaskd.until(lambda: "the app holds" in flaskd.log)
    code, out, _ = flaskd.client("plan")
    assert code == 0
    assert "close    found:sqlalchemy.dispose  sqlalchemy.dispose  5s       6s         11s      shop:engine\n" in out
    code, out, _ = flaskd.client("plan", "--simulate-hang", "found:sqlalchemy.dispose")
    assert code == 0
    assert "close    found:sqlalchemy.dispose  timed_out  1s      6s" in out
    code, _, err = flaskd.client("plan", "--simulate-hang", "found:sqlalchemy")
    assert (code, 'did you mean "found:sqlalchemy.dispose"?' in err) == (64, True)
    assert flaskd.stop() == 0
    assert flaskd.client("plan", *NOBODY)[0] == 69
    code, out, _ = flaskd.client("plan", *NOBODY, "--simulate-hang", "x", "--simulate-hang", "bye")
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[2:]] == [
        ["quiesce", "x", "timed_out"],
        ["final", "bye", "timed_out"],
    ]
    code, out, _ = flaskd.client("plan", "-c", "flaskd.yaml", "--json")
    assert [each["name"] for each in json.loads(out)["policies"]] == ["x", "bye"]


def test_a_reload_may_switch_discovery(flaskd: Flaskd) -> None:
    """A stop uses the mode of discovery that is in force when it begins."""
    flaskd.write("shop.py", HOLDER)
    flaskd.write("flaskd.yaml", "cleanup: {discovery: off}\n")
    flaskd.start(app="shop")
    flaskd.write("flaskd.yaml", "cleanup: {discovery: auto}\n")
    assert flaskd.command("reload").startswith("OK reloaded")
    assert flaskd.stop() == 0
    assert fates(flaskd) == {"found:sqlalchemy.dispose": "ok"}
    assert "let go" in flaskd.log


def test_a_check_names_the_library_that_is_missing(flaskd: Flaskd) -> None:
    """`flaskd check` reports an action whose library is not installed, and serve refuses to start."""
    flaskd.write("hidden/sitecustomize.py", "import sys\nclass Hide:\n    def find_spec(self, name, *_):\n"
                 "        if name == 'redis':\n            raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, Hide())\n")  # fmt: skip
    flaskd.env["PYTHONPATH"] = str(flaskd.directory / "hidden")
    flaskd.write("flaskd.yaml", "cleanup:\n  policies:\n    bye: {use: redis.close}\n")
    said = ('flaskd.yaml:3:16 cleanup.policies.bye.use: expected redis to be installed where flaskd is, '
            'for this action needs it, got "redis.close"')  # fmt: skip
    assert flaskd.client("check") == (78, "", said + "\n")
    code, log = flaskd.fails()
    assert (code, said in log) == (78, True)


def test_a_scheduler_that_its_app_shuts_down_at_exit(flaskd: Flaskd) -> None:
    """If the app shuts its schedulers down at exit or in a function, the stop has no traceback, and its code goes on."""
    flaskd.write(
        "shop.py",
        """
import atexit, functools
import flaskd
from apscheduler.schedulers.background import BackgroundScheduler
from flask import Flask
from flask_apscheduler import APScheduler

app = Flask(__name__)
method, partial, function, registered = schedulers = [BackgroundScheduler() for _ in range(4)]
extension = APScheduler(app=app)
for each in (*schedulers, extension):
    each.start()
atexit.register(method.shutdown, wait=False)
atexit.register(functools.partial(partial.shutdown, wait=False))
atexit.register(lambda: (function.shutdown(), print("and then this", flush=True)))
atexit.register(extension.shutdown)

@flaskd.on_stop(phase="final")
def end():
    registered.shutdown()
""",
    )
    flaskd.start(app="shop")
    assert flaskd.stop() == 0
    assert set(fates(flaskd).values()) == {"ok"}
    assert "and then this" in flaskd.log
    assert "Traceback" not in flaskd.log
    assert "SchedulerNotRunning" not in flaskd.log


def test_what_an_app_has_frozen_is_closed(flaskd: Flaskd) -> None:
    """After `gc.freeze()` the app's objects are still closed, also with a module that raises at every attribute."""
    flaskd.write(
        "shop.py",
        HOLDER
        + """
import gc, sys, types
class Raising(types.ModuleType):
    def __getattribute__(self, name):
        raise RuntimeError(name)
sys.modules["raising"] = Raising("raising")
gc.collect()
gc.freeze()
""",
    )
    flaskd.start(app="shop")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0
    assert fates(flaskd) == {"found:sqlalchemy.dispose": "ok"}
    assert "let go" in flaskd.log
