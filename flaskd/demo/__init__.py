"""A small app to watch a drain with: ``flaskd serve flaskd.demo:app``, then open it in a browser.

It has what many apps have: a database, a cache, slow requests, a stream, uploads. It has no code to shut them down: at
a stop, flaskd finds and closes them. Importing it opens nothing; the database file is made at the first visit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Flask, Response, abort, current_app, render_template, request
from flask.cli import NoAppException

try:
    import sqlalchemy as sa
    from flask_caching import Cache
    from flask_sqlalchemy import SQLAlchemy
    from sqlalchemy.dialects.sqlite import insert
except ImportError:

    class MissingExtraError(NoAppException, ImportError):
        """What flaskd and `flask run` tell in one line, and any other program as an import that failed."""

    raise MissingExtraError('the demo needs its extra: pip install "flaskd[demo]"') from None

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["app", "create_app"]

CACHE_LIFETIME = 30
LONGEST_SLEEP = 60
UPLOAD_BLOCK = 64 * 1024

db = SQLAlchemy()
cache = Cache()
routes = Blueprint("demo", __name__)
visits = db.Table(
    "visits", sa.Column("id", sa.Integer, primary_key=True), sa.Column("total", sa.Integer, nullable=False)
)

_started = datetime.now(UTC)
# SQLite allows one writer at a time anyway, and all threads share the one connection of the in-memory database.
_one_writer = threading.Lock()
_watching: set[object] = set()


@routes.get("/")
def index() -> str:
    """Show the page, which counts as a visit."""
    return render_template(
        "index.html",
        visits=_count_visit(),
        in_memory=current_app.config["DEMO_DATABASE"] is None,
        control=shlex.quote(_control_path()),
        pid=os.getpid(),
        started=_rfc3339(_started),
    )


@routes.get("/count")
def count() -> dict[str, int]:
    """Count one more visit."""
    return {"visits": _count_visit()}


@routes.get("/slow")
def slow() -> dict[str, float]:
    """Sleep for ``seconds`` (0 to 60, default 5): the request that is still running when the drain begins."""
    text = request.args.get("seconds", "5")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_SLEEP:
        abort(400, f'expected seconds from 0 to {LONGEST_SLEEP}, got "{text}"')
    begun = time.monotonic()
    time.sleep(seconds)
    return {"seconds": seconds, "took": round(time.monotonic() - begun, 3)}


@routes.get("/stream")
def stream() -> Response:
    """Send one event a second, ``events`` of them or without end, and a last event ``bye`` when a drain begins."""
    text = request.args.get("events")
    if text is not None and not re.fullmatch(r"[0-9]{1,9}", text):
        abort(400, f'expected events as a whole number, got "{text}"')
    # Under another server there is no such event; then this one is never set, and waiting for it is a plain sleep.
    draining = request.environ.get("flaskd.draining") or threading.Event()
    numbers = itertools.count(1) if text is None else range(1, int(text) + 1)
    unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Response(_events(numbers, draining), mimetype="text/event-stream", headers=unbuffered)


@routes.post("/upload")
def upload() -> dict[str, int | str]:
    """Read a body of any size, one block at a time; answer its length in bytes and its SHA-256."""
    digest, length = hashlib.sha256(), 0
    while block := request.stream.read(UPLOAD_BLOCK):
        digest.update(block)
        length += len(block)
    return {"bytes": length, "sha256": digest.hexdigest()}


@routes.get("/cached")
def cached() -> dict[str, Any]:
    """Answer a colour that is cached for 30 s; it survives a restart if flaskd persists the cache."""
    entry = cache.get("colour")
    if entry is None:
        entry = {"hue": random.randrange(360), "created": time.time()}  # noqa: S311 - a colour, not a secret
        cache.set("colour", entry, timeout=CACHE_LIFETIME)
    created = entry["created"]
    return {
        "hue": entry["hue"],
        "created": _rfc3339(datetime.fromtimestamp(created, UTC)),
        "age": round(max(0.0, time.time() - created), 3),
        "lifetime": CACHE_LIFETIME,
    }


@routes.get("/ping")
def ping() -> Response:
    """Answer ``ok`` without using database or cache; for ``health.probe``."""
    return Response("ok\n", mimetype="text/plain")


@routes.get("/boom")
def boom() -> str:
    """Raise an error, to show how flaskd logs it."""
    raise RuntimeError("boom: this is what an error in the app looks like")


def create_app() -> Flask:
    """Make the app. This chooses the path of the database, but opens and writes nothing."""
    demo = Flask(__name__)
    place = _database_place()
    # Without a file Flask-SQLAlchemy uses StaticPool, which has one connection: each one would see its own database.
    url = sa.URL.create("sqlite", database=None if place is None else str(place))
    demo.config.update(DEMO_DATABASE=place, SQLALCHEMY_DATABASE_URI=url, CACHE_TYPE="SimpleCache")
    db.init_app(demo)
    cache.init_app(demo)
    demo.register_blueprint(routes)
    return demo


def _count_visit() -> int:
    """Add one to the counter, in one statement, and return the new total."""
    counted = insert(visits).values(id=1, total=1)
    counted = counted.on_conflict_do_update(index_elements=["id"], set_={"total": visits.c.total + 1})
    place: Path | None = current_app.config["DEMO_DATABASE"]
    with _one_writer:
        if place is not None:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with db.engine.begin() as connection:
            connection.execute(sa.schema.CreateTable(visits, if_not_exists=True))
            return int(connection.execute(counted.returning(visits.c.total)).scalar_one())


def _events(numbers: Iterator[int] | range, draining: threading.Event) -> Iterator[str]:
    watcher = object()
    _watching.add(watcher)
    try:
        for number in numbers:
            if draining.wait(0 if number == 1 else 1):
                break
            now = _rfc3339(datetime.now(UTC))
            facts = {"number": number, "time": now, "watching": len(_watching)}
            facts |= {"pid": os.getpid(), "started": _rfc3339(_started)}
            yield f"id: {number}\ndata: {json.dumps(facts)}\n\n"
        why = "draining" if draining.is_set() else "done"
        yield f'event: bye\ndata: {{"why": "{why}"}}\n\n'
    finally:
        _watching.discard(watcher)


def _database_place() -> Path | None:
    """Return the path of the SQLite file, or None if no file can be written: then the database is in memory."""
    if chosen := os.environ.get("FLASKD_DEMO_DB"):
        place = Path(chosen).absolute()
    elif state := os.environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        place = Path(state).absolute() / "demo.db"
    else:
        try:
            state_home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        except RuntimeError:  # a user without a home
            return None
        place = state_home / "flaskd-demo" / "demo.db"
    folder = next((parent for parent in place.parents if os.access(parent, os.F_OK)), place)
    if not (place.is_absolute() and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return None
    return place if not place.exists() or (place.is_file() and os.access(place, os.W_OK)) else None


def _control_path() -> str:
    """Return the path of the control FIFO; if the path of the socket is configured, the FIFO is beside it."""
    path = current_app.config.get("FLASKD_CONTROL") or os.environ.get("FLASKD_CONTROL") or "/run/flaskd/control"
    return str(path).removesuffix(".sock")


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


app = create_app()
