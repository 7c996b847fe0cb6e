from __future__ import annotations

import hashlib
import importlib
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from flask.cli import NoAppException

from flaskd import demo
from flaskd.errors import ConfigError
from flaskd.serving.loading import load_app


@contextmanager
def fresh_app():
    """Make an app in the present environment and close its database afterwards."""
    app = demo.create_app()
    try:
        yield app
    finally:
        with app.app_context():
            demo.db.engine.dispose()


@pytest.fixture
def clean_environment(monkeypatch):
    """Remove the variables that would choose a place for the database or the control path."""
    for name in ("FLASKD_DEMO_DB", "STATE_DIRECTORY", "XDG_STATE_HOME", "FLASKD_CONTROL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def app(tmp_path, monkeypatch, clean_environment):
    """Give an app whose database is in a directory that does not exist yet."""
    monkeypatch.setenv("FLASKD_DEMO_DB", str(tmp_path / "state" / "demo.db"))
    with fresh_app() as app:
        yield app


@pytest.fixture
def client(app):
    """Give a client of that app."""
    return app.test_client()


def test_page_shows_counter_process_and_default_control_path(client):
    """The page shows the counted visit, the process id, and the path for `echo drain`."""
    page = client.get("/").get_data(as_text=True)
    assert '<span id="visits">1</span>' in page
    assert f'id="pid">{os.getpid()}<' in page
    assert "echo drain &gt; /run/flaskd/control<" in page
    assert "counted in SQLite" in page


def test_page_needs_nothing_from_elsewhere(client):
    """The page loads no script, style or picture from another place."""
    page = client.get("/").get_data(as_text=True).replace("http://www.w3.org/2000/svg", "")
    assert "//" not in page.replace("// ", "")
    assert "<script src" not in page


@pytest.mark.parametrize(
    ("configured", "environment", "shown"),
    [
        (None, "/run/a/control", "/run/a/control"),
        (None, "/run/a/control.sock", "/run/a/control"),
        ("/run/b/control", "/run/a/control", "/run/b/control"),
        ("/tmp/my runtime/control", None, "&#39;/tmp/my runtime/control&#39;"),
        ("/tmp/<b>", None, "&#39;/tmp/&lt;b&gt;&#39;"),
    ],
)
def test_control_path(app, monkeypatch, configured, environment, shown):
    """The control path is the configured one, else the environment's, quoted for the shell and for HTML."""
    app.config["FLASKD_CONTROL"] = configured
    if environment is not None:
        monkeypatch.setenv("FLASKD_CONTROL", environment)
    assert f"echo drain &gt; {shown}<" in app.test_client().get("/").get_data(as_text=True)


def test_count_goes_up_by_one(client):
    """Each request counts once, and the page counts too."""
    assert [client.get("/count").json["visits"] for _ in range(3)] == [1, 2, 3]
    client.get("/")
    assert client.get("/count").json == {"visits": 5}


def test_count_survives_a_new_app(client):
    """A new app continues the count, because the counter is in the file."""
    client.get("/count")
    with fresh_app() as second:
        assert second.test_client().get("/count").json == {"visits": 2}


@pytest.mark.parametrize("kept", ["file", "memory"])
def test_count_is_correct_under_eight_threads(app, tmp_path, monkeypatch, kept):
    """Eight threads that count at the same time lose no visit, even if the table has to be made."""
    if kept == "memory":
        monkeypatch.setenv("FLASKD_DEMO_DB", str(tmp_path))
    together = threading.Barrier(8)

    def visit(app, times):
        together.wait(10)
        return [app.test_client().get("/count").json["visits"] for _ in range(times)]

    with fresh_app() as counting, ThreadPoolExecutor(8) as pool:
        assert (counting.config["DEMO_DATABASE"] is None) == (kept == "memory")
        seen = [total for run in pool.map(visit, [counting] * 8, [25] * 8) for total in run]
    assert sorted(seen) == list(range(1, 201))


def test_count_is_correct_under_several_processes(client, app):
    """Processes that start at the same time without a database make one table and lose no visit."""
    code = "from flaskd.demo import app; c = app.test_client(); [c.get('/count') for _ in range(20)]"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0, 0, 0, 0]
    assert client.get("/count").json == {"visits": 81}


def test_importing_opens_and_writes_nothing(tmp_path, clean_environment):
    """A new interpreter that imports the demo leaves no file and no open database behind."""
    code = "import flaskd.demo as d; assert d.app.config['DEMO_DATABASE'].name == 'demo.db'"
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FLASKD_DEMO_DB": "{}/own.db", "STATE_DIRECTORY": "{}/s"}, "own.db"),
        ({"STATE_DIRECTORY": "{}/first:{}/second", "XDG_STATE_HOME": "{}/x"}, "first/demo.db"),
        ({"XDG_STATE_HOME": "{}/x", "HOME": "{}/home"}, "x/flaskd-demo/demo.db"),
        ({"HOME": "{}/home"}, "home/.local/state/flaskd-demo/demo.db"),
    ],
)
def test_database_place(tmp_path, monkeypatch, clean_environment, environment, expected):
    """The database's place is the one named for it, else the state directory, else the user's own."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("{}", str(tmp_path)))
    with fresh_app() as app:
        assert app.config["DEMO_DATABASE"] == tmp_path / expected
        assert app.test_client().get("/count").json == {"visits": 1}
    assert stat.S_IMODE((tmp_path / expected).parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "environment",
    [{"FLASKD_DEMO_DB": "/dev/null/demo.db"}, {"FLASKD_DEMO_DB": "/"}, {"XDG_STATE_HOME": "not/absolute"}],
)
def test_unwritable_place_means_memory(monkeypatch, clean_environment, environment):
    """If no file can be written, the counter is in memory, and the page says so."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with fresh_app() as app:
        assert app.config["DEMO_DATABASE"] is None
        client = app.test_client()
        assert [client.get("/count").json["visits"] for _ in range(2)] == [1, 2]
        assert "counted in memory" in client.get("/").get_data(as_text=True)


def test_no_home_means_memory(monkeypatch, clean_environment):
    """A user without a home directory has the counter in memory."""

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", homeless)
    assert demo.create_app().config["DEMO_DATABASE"] is None


def test_slow_sleeps_once_for_the_time_asked(client, monkeypatch):
    """The slow request sleeps in one piece and says how long it took."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert client.get("/slow?seconds=1.5").json["seconds"] == 1.5
    assert client.get("/slow").json["seconds"] == 5
    assert slept == [1.5, 5]
    assert client.get("/slow?seconds=0").json["took"] >= 0


@pytest.mark.parametrize("seconds", ["-1", "60.1", "nan", "inf", "soon", ""])
def test_slow_refuses_a_bad_time(client, seconds):
    """A value that is not a number from 0 to 60 is a 400 that quotes it."""
    answer = client.get("/slow", query_string={"seconds": seconds})
    assert answer.status_code == 400
    assert f"expected seconds from 0 to 60, got &#34;{seconds}&#34;" in answer.get_data(as_text=True)


class Clock(threading.Event):
    """A draining event on which waiting takes no time; it is set after `rounds` waits."""

    def __init__(self, rounds):
        super().__init__()
        self.rounds = rounds
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        if len(self.waits) > self.rounds:
            self.set()
        return self.is_set()


def test_stream_ends_when_the_drain_begins(client):
    """The endless stream sends an event a second until the draining event is set, then a goodbye."""
    draining = Clock(rounds=3)
    answer = client.get("/stream", environ_overrides={"flaskd.draining": draining})
    assert answer.mimetype == "text/event-stream"
    assert answer.headers["Cache-Control"] == "no-cache"
    blocks = answer.get_data(as_text=True).split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == ["id: 1", "id: 2", "id: 3", "event: bye", ""]
    assert f'"pid": {os.getpid()}' in blocks[0]
    assert '"why": "draining"' in blocks[3]
    assert draining.waits == [0, 1, 1, 1]


def test_stream_wakes_from_its_wait(client):
    """A stream that waits for its next second ends at once when another thread begins a drain."""
    draining = threading.Event()
    chunks = client.get("/stream", environ_overrides={"flaskd.draining": draining}).response
    assert "id: 1\n" in next(chunks).decode()
    draining.set()
    assert next(chunks).startswith(b"event: bye\n")
    with pytest.raises(StopIteration):
        next(chunks)
    chunks.close()


def test_stream_during_a_drain_is_only_a_goodbye(client):
    """A stream that begins during a drain is only the goodbye."""
    answer = client.get("/stream", environ_overrides={"flaskd.draining": Clock(rounds=0)})
    assert answer.get_data() == b'event: bye\ndata: {"why": "draining"}\n\n'


def test_stream_works_without_flaskd(client):
    """Under another server, which sets no draining event, a finite stream runs to its end."""
    assert client.get("/stream?events=1").get_data(as_text=True).endswith('event: bye\ndata: {"why": "done"}\n\n')


def test_stream_that_is_left_no_longer_counts_as_watching(client):
    """A client that goes away during a stream is not counted as watching any more."""
    answers = []
    for _ in range(2):
        answers.append(client.get("/stream", environ_overrides={"flaskd.draining": Clock(rounds=9)}))
        assert b'"watching": 1' in next(answers[-1].response)
        answers[-1].close()


@pytest.mark.parametrize("events", ["-1", "x", "1.5", "٣", "9" * 5000])
def test_stream_refuses_a_bad_number(client, events):
    """A value that is not a whole number is a 400."""
    assert client.get("/stream", query_string={"events": events}).status_code == 400


@pytest.mark.parametrize("length", [0, 1, 3 * demo.UPLOAD_BLOCK + 7])
def test_upload_answers_length_and_hash(client, length):
    """The answer to an upload has the number of its bytes, and their SHA-256."""
    body = os.urandom(length)
    answer = client.post("/upload", data=body).json
    assert answer == {"bytes": length, "sha256": hashlib.sha256(body).hexdigest()}


def test_cached_colour_is_kept_and_ages(app, client, monkeypatch):
    """The cached value stays and gets older; a new one is made after the cache has dropped it."""
    now, hues = 1_700_000_000.0, iter([12, 34])
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr("random.randrange", lambda _: next(hues))
    first = {"hue": 12, "created": "2023-11-14T22:13:20Z", "age": 0, "lifetime": 30}
    assert client.get("/cached").json == first
    now += 29
    assert client.get("/cached").json == first | {"age": 29}
    with app.app_context():
        demo.cache.clear()
    assert client.get("/cached").json == {"hue": 34, "created": "2023-11-14T22:13:49Z", "age": 0, "lifetime": 30}


def test_cached_colour_has_thirty_seconds(client, monkeypatch):
    """The cache drops the value after the time that the answer names."""
    kept = {}
    monkeypatch.setattr(demo.cache, "set", lambda key, _, timeout: kept.update({key: timeout}))
    assert client.get("/cached").json["lifetime"] == 30
    assert kept == {"colour": 30}


def test_ping_is_cheap(client, monkeypatch):
    """The health probe's path uses neither the database nor the cache."""
    with monkeypatch.context() as patch:
        patch.setattr(demo, "db", None)
        patch.setattr(demo, "cache", None)
        answer = client.get("/ping")
    assert (answer.status_code, answer.get_data()) == (200, b"ok\n")


def test_boom_raises(app):
    """The broken route raises in the app, and is a 500 for the client."""
    assert app.test_client().get("/boom").status_code == 500
    app.testing = True
    with pytest.raises(RuntimeError, match="boom"):
        app.test_client().get("/boom")


@pytest.mark.parametrize("missing", ["flask_sqlalchemy", "flask_caching"])
def test_missing_extra_is_one_clear_line(monkeypatch, missing):
    """Without its extra, importing the demo raises with the command that installs it; `flaskd serve` shows no traceback."""
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "flaskd.demo")
    with pytest.raises(ImportError) as caught:
        importlib.import_module("flaskd.demo")
    said = 'the demo needs its extra: pip install "flaskd[demo]"'
    assert caught.value.format_message() == said
    assert isinstance(caught.value, NoAppException)
    with pytest.raises(ConfigError) as told:
        load_app("flaskd.demo:app")
    assert str(told.value) == f"cannot load flaskd.demo:app: {said}"
