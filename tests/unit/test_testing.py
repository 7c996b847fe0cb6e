"""The pytest plugin, tested in pytest runs of its own: each is a process, with warnings as errors."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PLUGINS = {"flask": "pytest_flask.plugin", "xdist": "xdist.plugin"}

CONFTEST = """
import threading
import flask
import pytest

def get(url, path="", timeout=20):
    import http.client
    from urllib.parse import urlsplit
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        connection.request("GET", "/" + path)
        return connection.getresponse().read()
    finally:
        connection.close()

class Asking(threading.Thread):
    '''A request made in a thread; its outcome is the body or the error.'''

    def __init__(self, url, path):
        super().__init__(name="asking")
        self.url, self.path = url, path
        self.start()

    def run(self):
        try:
            self.outcome = get(self.url, self.path)
        except Exception as error:
            self.outcome = error

@pytest.fixture(scope="session")
def app():
    app = flask.Flask("shop")
    app.entered, app.release = threading.Semaphore(0), threading.Event()

    @app.get("/")
    def hello():
        return "hello"

    @app.get("/hold")
    def hold():
        app.entered.release()
        app.release.wait(30)
        return "held"

    @app.get("/stream")
    def stream():
        def events():
            yield "data: first\\n\\n"
            app.entered.release()
            flask.request.environ["flaskd.draining"].wait(30)
        return flask.Response(flask.stream_with_context(events()), mimetype="text/event-stream")

    @app.get("/deaf")
    def deaf():
        def events():
            yield "data: first\\n\\n"
            app.entered.release()
            app.release.wait(30)
        return flask.Response(events(), mimetype="text/event-stream")

    yield app
    app.release.set()
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project with an app that has a page which waits, and a way to run the project's tests."""
    pytester.makeconftest(CONFTEST)
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "FLASK"))]:
        monkeypatch.delenv(name)

    def run(tests, *args, ini="", plugins=(), files=()):
        for name, text in dict(files).items():
            Path(name).write_text(text)
        pytester.makepyfile(
            test_shop="import threading, socket, time, flask, pytest\nfrom conftest import Asking, get\n" + tests
        )
        pytester.makeini("[pytest]\n" + ini)
        others = [f"-pno:{name}" for name in PLUGINS if name not in plugins]
        return pytester.runpytest_subprocess("-Werror", "-pno:cacheprovider", *others, *args, timeout=60)

    return run


def test_a_server_for_each_test(project):
    """Each test has a server of its own for the same app, and afterwards its account in ``report``."""
    run = project("""
servers = []

@pytest.fixture(params=["waitress", "werkzeug"])
def kind(request):
    request.applymarker(pytest.mark.flaskd_server(server=request.param))

@pytest.mark.parametrize("time", range(2))
def test_it_serves(kind, time, flaskd_server):
    assert get(flaskd_server.url) == b"hello"
    assert flaskd_server.report is None
    servers.append(flaskd_server)

def test_they_are_gone():
    assert len({each.port for each in servers}) == 4
    assert all(each.report.clean for each in servers)
    assert [each for each in threading.enumerate() if each.name.startswith("flaskd")] == []
    for each in servers:
        with pytest.raises(ConnectionRefusedError):
            get(each.url)
""")
    run.assert_outcomes(passed=5)


@pytest.mark.parametrize(("scope", "servers"), [("function", 4), ("class", 3), ("module", 1), ("session", 1)])
def test_the_scope_is_an_ini_option(project, scope, servers):
    """The ini file sets the scope of the server, which is stopped at the end of that scope."""
    run = project(
        """
seen = set()
def look(server):
    assert get(server.url) == b"hello"
    seen.add(server)
def test_one(flaskd_server): look(flaskd_server)
class TestShop:
    def test_two(self, flaskd_server): look(flaskd_server)
    def test_three(self, flaskd_server): look(flaskd_server)
def test_four(flaskd_server): look(flaskd_server)
@pytest.fixture(scope="session", autouse=True)
def count():
    yield
    print(len(seen), "servers,", sum(each.report is not None for each in seen), "stopped")
""",
        "-s",
        ini=f"flaskd_server_scope = {scope}\n",
    )
    run.assert_outcomes(passed=4)
    run.stdout.fnmatch_lines([f"*{servers} servers, {servers} stopped*"])


def test_options(project):
    """Markers override the ini file, the nearest one last; the options are named like ServerThread's."""
    run = project(
        """
pytestmark = pytest.mark.flaskd_server(threads=2)

def app_threads():
    return sum(each.name.startswith("flaskd-thread") for each in threading.enumerate())

def test_module(flaskd_server):
    assert app_threads() == 3  # one leads

@pytest.mark.flaskd_server(threads=5)
def test_nearest(flaskd_server):
    assert app_threads() == 6

def test_ini(flaskd_server):
    assert flaskd_server.url.startswith("http://localhost:")
    assert flaskd_server._config.shutdown.drain.timeout == 7

@pytest.mark.flaskd_server(config={"shutdown": {"drain": {"timeout": "3s"}}})
def test_mapping(flaskd_server):
    assert flaskd_server._config.shutdown.drain.timeout == 3
""",
        ini="flaskd_server_options =\n    threads=9\n    host=localhost\n    config=shop.yaml\n",
    )
    run.stdout.fnmatch_lines(["*cannot read *shop.yaml*"])
    Path("shop.yaml").write_text("shutdown: {drain: {timeout: 7s}}\n")
    project(Path("test_shop.py").read_text(), ini=Path("tox.ini").read_text().partition("\n")[2]).assert_outcomes(
        passed=4
    )


WRONG = {
    "unknown option": ("@pytest.mark.flaskd_server(thread=3)", "", '*flaskd_server has no option "thread"; there are threads, server, *'),
    "unnamed option": ("@pytest.mark.flaskd_server(3)", "", "*flaskd_server takes its options by name: threads, *"),
    "unknown server": ("@pytest.mark.flaskd_server(server='gevent')", "", "*cannot serve with 'gevent': expected \"waitress\" or \"werkzeug\"*"),
    "configuration": ("@pytest.mark.flaskd_server(config={'cleanup': {'policis': {}}})", "", '*cleanup.policis: *did you mean "policies"?*'),
    "ini without value": ("", "flaskd_server_options = threads\n", "*flaskd_server takes its options by name*"),
    "ini without number": ("", "flaskd_server_options = threads=many\n", '*cannot take "threads=many": expected a number*'),
    "leaks": ("@pytest.mark.flaskd_server(leaks='ignore')", "", '*cannot take leaks="ignore": expected "fail" or "report"*'),
    "marker below the scope": ("@pytest.mark.flaskd_server(threads=3)", "flaskd_server_scope = module\n",
                               '*cannot take the options of the marker on "test_it": one server serves the whole module*'),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused(project, name):
    """A wrong option is one line that says what was expected, without a traceback."""
    marker, ini, line = WRONG[name]
    run = project(f"{marker}\ndef test_it(flaskd_server):\n    pass\n", ini=ini)
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines([line])
    run.stdout.no_fnmatch_line("*Traceback*")
    run.stdout.no_fnmatch_line("*During handling*")


def test_a_wrong_scope_is_refused(project):
    """With an unknown scope no test runs."""
    run = project("def test_it():\n    pass\n", ini="flaskd_server_scope = forever\n")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines(['ERROR: cannot take flaskd_server_scope "forever": expected function, class, module, *'])


def test_without_an_app(pytester, project):
    """In a project without a fixture ``app`` pytest says so."""
    pytester.makeconftest("def get(): pass\nAsking = get\n")
    run = project("def test_it(flaskd_server):\n    pass\n")
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines(["E *fixture 'app' not found"])


LEAKS = {
    "thread": (
        'threading.Thread(target=event.wait, args=(30,), name="stray", daemon=True).start()',
        ['*the test left a thread running: "stray"', "*in wait*"],
        "stray",
    ),
    "listener": (
        'kept.append(socket.create_server(("127.0.0.1", 0)))',
        ["*the test left a socket open: listener 127.0.0.1:*"],
        "listener 127.*",
    ),
    "connection": (
        'kept.append(socket.create_connection(("127.0.0.1", flaskd_server.port)))',
        ["*the test left a socket open: connection 127.0.0.1:* -> 127.0.0.1:*"],
        "connection *",
    ),
    "server of its own": (
        "import flaskd; kept.append(flaskd.ServerThread(app).start())",
        ['*the test left a thread running: "flaskd-thread-0"', "*the test left a socket open: listener 127.0.0.1:*"],
        "*",
    ),
    "request": (
        'kept.append(Asking(flaskd_server.url, "hold")); app.entered.acquire(timeout=20); threading.Timer(1, app.release.set).start()',
        ["*the test left a request in flight: GET /hold (running for *", "*drained: completed=1 rejected=0 cut=0 *"],
        "GET /hold",
    ),
    "stream": (
        'kept.append(Asking(flaskd_server.url, "stream")); app.entered.acquire(timeout=20)',
        ["*the test left a request in flight: GET /stream (running for *", "*drained: completed=1 rejected=0 cut=0 *"],
        "GET /stream",
    ),
}  # fmt: skip


LEAKY = """
kept, event = [], threading.Event()
{marker}
def test_leaky(flaskd_server, app):
    {statement}
def test_innocent(flaskd_server):
    pass
"""


@pytest.mark.parametrize("scope", ["function", "module"])
@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_failures(project, name, scope):
    """What a test leaves is named, a thread with its stack, in the test that left it and in no other."""
    statement, lines, _ = LEAKS[name]
    run = project(LEAKY.format(marker="", statement=statement), ini=f"flaskd_server_scope = {scope}\n")
    run.assert_outcomes(passed=2, errors=1)
    run.stdout.fnmatch_lines(["ERROR test_shop.py::test_leaky - *"])
    run.stdout.fnmatch_lines([line for line in lines if scope == "function" or "drained" not in line])


@pytest.mark.parametrize("name", LEAKS)
def test_what_is_meant_to_stay(project, name):
    """Patterns in the ini file allow tests to leave things."""
    statement, _, pattern = LEAKS[name]
    run = project(LEAKY.format(marker="", statement=statement), ini=f"flaskd_server_ignore = {pattern}\n")
    run.assert_outcomes(passed=2)


def test_leaks_can_be_reported_alone(project):
    """With ``leaks="report"`` the test passes, and its section names the leaks."""
    statement, lines, _ = LEAKS["thread"]
    run = project(LEAKY.format(marker="@pytest.mark.flaskd_server(leaks='report')", statement=statement), "-rP")
    run.assert_outcomes(passed=2)
    run.stdout.fnmatch_lines(["*Captured flaskd teardown*", "*drained: *", *lines])


def test_what_is_no_leak(project):
    """What existed before, what another fixture closes afterwards, and what ends within a moment is no leak."""
    run = project("""
@pytest.fixture
def later(app):
    kept = []
    yield kept
    for each in kept:
        each.close() if hasattr(each, "close") else (event.set(), each.join())

event = threading.Event()
before = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=threading.Event().wait, args=(30,), name="before", daemon=True).start()

def test_it(later, flaskd_server, app):
    later.append(socket.create_server(("127.0.0.1", 0)))
    later.append(threading.Thread(target=event.wait, args=(30,)))
    later[-1].start()
    database = socket.create_connection(before.getsockname())  # the app may keep its connections
    app.database = database
    threading.Thread(target=time.sleep, args=(0.1,)).start()

def test_a_client_that_went_away(flaskd_server, app):
    connection = socket.create_connection(("127.0.0.1", flaskd_server.port))
    connection.sendall(b"GET /stream HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n")
    assert app.entered.acquire(timeout=20)
    while b"first" not in connection.recv(4096): pass
    connection.close()

def test_the_end(app):
    app.database.close()
    before.close()
""")
    run.assert_outcomes(passed=3)


@pytest.mark.parametrize("kind", ["waitress", "werkzeug"])
def test_an_app_that_hangs(project, kind):
    """A request that does not end is cut at the timeout, and named with its stack; the run goes on."""
    run = project(
        f"""
@pytest.mark.flaskd_server(timeout=0.3, server={kind!r})
def test_hangs(flaskd_server, app):
    app.asking = Asking(flaskd_server.url, "hold")
    assert app.entered.acquire(timeout=20)

def test_goes_on(flaskd_server, app):
    app.asking.join()
    assert isinstance(app.asking.outcome, Exception)
    assert get(flaskd_server.url) == b"hello"
"""
    )
    run.assert_outcomes(passed=2, errors=1)
    run.stdout.fnmatch_lines(["*flaskd_server had to cut GET /hold (running for *): *", "*in hold*"])
    run.stdout.fnmatch_lines(["*drained: completed=0 rejected=0 cut=1 took=*"])
    run.stdout.no_fnmatch_line("*the test left*")


def test_a_stream_that_hears_of_no_drain(project):
    """The client of a stream that ignores the drain gets a proper end; the kept thread is named, but is no leak."""
    run = project(
        """
@pytest.mark.flaskd_server(config={"shutdown": {"drain": {"stream_grace": "0s"}}})
def test_listens(flaskd_server, app):
    app.asking = Asking(flaskd_server.url, "deaf")
    assert app.entered.acquire(timeout=20)
    assert flaskd_server.drain().clean
    app.asking.join()
    assert app.asking.outcome == b"data: first\\n\\n"

def test_goes_on(flaskd_server):
    assert get(flaskd_server.url) == b"hello"
""",
        "-rP",
    )
    run.assert_outcomes(passed=2)
    run.stdout.fnmatch_lines(
        ['flaskd_server left a thread of its own behind in GET /deaf, which is over: "flaskd-thread-*"', "*in events*"]
    )
    run.stdout.no_fnmatch_line("*the test left*")


def test_a_thread_more_after_a_resume(project):
    """If a stream keeps a thread, resume makes another one, which is no leak."""
    run = project(
        """
def test_resumes(flaskd_server, app):
    asking = Asking(flaskd_server.url, "deaf")
    assert app.entered.acquire(timeout=20)
    before = set(flaskd_server.app_threads())
    assert flaskd_server.drain().clean
    asking.join()
    flaskd_server.resume()
    assert set(flaskd_server.app_threads()) - before

def test_goes_on(flaskd_server):
    assert get(flaskd_server.url) == b"hello"
""",
        ini="flaskd_server_scope = module\nflaskd_server_options = config=shop.yaml\n",
        files={"shop.yaml": "shutdown: {drain: {stream_grace: 0s}}\n"},
    )
    run.assert_outcomes(passed=2)


def test_a_test_that_cuts_on_purpose(project):
    """If a test drains or stops the server itself, its report is not repeated as a failure."""
    run = project("""
@pytest.mark.parametrize("how", ["drain", "stop"])
def test_cut(flaskd_server, app, how):
    asking = Asking(flaskd_server.url, "hold")
    assert app.entered.acquire(timeout=20)
    report = getattr(flaskd_server, how)(timeout=0.2)
    assert [each.path for each in report.cut] == ["/hold"]
    assert flaskd_server.report == report
    app.release.set()
    asking.join()
    app.release.clear()
""")
    run.assert_outcomes(passed=2)


def test_a_failed_test_fails_once(project):
    """What a failed test leaves is shown in a section, and is no second failure."""
    run = project("""
@pytest.mark.flaskd_server(timeout=0.3)
def test_fails(flaskd_server, app):
    listener = socket.create_server(("127.0.0.1", 0))
    asking = Asking(flaskd_server.url, "hold")
    assert app.entered.acquire(timeout=20)
    raise LookupError("on purpose")
""")
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(
        ["*on purpose*", "*Captured flaskd teardown*", "*drained: *cut=1*", "*had to cut GET /hold*", "*listener*"]
    )


def test_cleanup_runs_and_is_held_to_account(project):
    """Functions and policies run at the end of the test, as in production; if one fails, the test fails."""
    run = project("""
import flaskd
said = []

@flaskd.on_stop
def tidy():
    said.append(flask.current_app.name)

def test_one(flaskd_server):
    assert said == []

def test_two():
    assert said == ["shop"]

policy = {"use": "command", "with": {"argv": ["false"]}}

@pytest.mark.flaskd_server(config={"cleanup": {"policies": {"say-goodbye": policy}}})
def test_three(flaskd_server):
    pass
""")
    run.assert_outcomes(passed=3, errors=1)
    run.stdout.fnmatch_lines(['*the cleanup step "say-goodbye" failed: exit code 1*'])
    run.stdout.fnmatch_lines(["cleanup: tidy: ok", "cleanup: say-goodbye: failed"])


def test_the_app_is_not_closed(project):
    """Discovery is off, because the app, and what it holds, outlives each server."""
    run = project("""
from flask_sqlalchemy import SQLAlchemy
import sqlalchemy as sa

@pytest.fixture(scope="module")
def db(app):
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"  # in memory: gone once its engine is disposed
    db = SQLAlchemy(app)
    with app.app_context():
        with db.engine.begin() as connection:
            connection.execute(sa.text("create table visits (id integer)"))
        yield db
        db.engine.dispose()

@pytest.mark.parametrize("time", range(2))
def test_it(db, flaskd_server, time):
    with db.engine.begin() as connection:
        connection.execute(sa.text("insert into visits values (1)"))
        assert connection.execute(sa.text("select count(*) from visits")).scalar_one() == time + 1
""")
    run.assert_outcomes(passed=2)


def test_next_to_pytest_flask(project):
    """pytest-flask's client, context and live_server work with flaskd_server, in one test and in successive ones."""
    run = project(
        """
def test_context(flaskd_server, client):
    assert flask.url_for("hello", _external=True) == "http://localhost/"
    assert client.get("/").data == b"hello" == get(flaskd_server.url)
    assert flask.request.path == "/"

@pytest.mark.options(debug=True)
def test_options(app, flaskd_server):
    assert app.debug
    assert get(flaskd_server.url) == b"hello"
""",
        plugins=("flask",),
    )
    run.assert_outcomes(passed=2)


def test_next_to_a_live_server_of_pytest_flask(project):
    """pytest-flask's forked server neither inherits flaskd's listener nor delays its clients."""
    run = project(
        """
import multiprocessing
multiprocessing.set_start_method("fork", force=True)  # since Python 3.14 it has to be asked for, which pytest-flask does not

def test_both(live_server, flaskd_server):
    assert get(live_server._server.url if hasattr(live_server, "_server") else f"http://localhost:{live_server.port}/") == b"hello"
    assert get(flaskd_server.url) == b"hello"

def test_flaskd_alone(flaskd_server):
    assert get(flaskd_server.url) == b"hello"
""",
        "-Wignore::DeprecationWarning",
        "-Wignore::ResourceWarning",
        "-Wignore::pytest.PytestUnraisableExceptionWarning",
        plugins=("flask",),
    )
    run.assert_outcomes(passed=2)


@pytest.mark.parametrize("scope", ["function", "session"])
def test_under_xdist(project, scope):
    """It works in two processes at once; a failure's account is shown in the terminal."""
    run = project(
        """
@pytest.mark.parametrize("number", range(10))
def test_it(flaskd_server, number):
    assert get(flaskd_server.url) == b"hello"

def test_leaky(flaskd_server):
    threading.Thread(target=threading.Event().wait, args=(30,), name="stray", daemon=True).start()
""",
        "-n2",
        ini=f"flaskd_server_scope = {scope}\n",
        plugins=("xdist",),
    )
    run.assert_outcomes(passed=11, errors=1)
    run.stdout.fnmatch_lines(["*ERROR at teardown of test_leaky*", '*the test left a thread running: "stray"'])


def test_it_costs_nothing_where_it_is_not_used():
    """At its start pytest imports only the plugin itself."""
    code = (
        "import sys, pytest; code = pytest.main(['-q', '-pno:cacheprovider', '--co', sys.argv[1]]);"
        "print(*({'flask', 'waitress', 'werkzeug', 'pydantic', 'yaml', 'click', 'logging.handlers'} & set(sys.modules)));"
        "print(*sorted(each for each in sys.modules if each.startswith('flaskd')))"
    )
    done = subprocess.run(
        [sys.executable, "-Werror", "-c", code, os.devnull],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTEST_ADDOPTS": "-p no:flask -p no:xdist"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-2:] == ["", "flaskd flaskd.testing flaskd.version"], (
        done.stdout + sysconfig.get_path("purelib")
    )
