"""`ServerProcess`: an app in a process of its own, from start to stop, kill, and the end of its owner."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from http_client import Answer, get, outcome
from patience import PATIENCE

import flaskd
from flaskd.errors import AppError, CannotCreateError, ConfigError, FlaskdError

SHOP = """
import os, pathlib, time
from flask import Flask
import flaskd

here = pathlib.Path(__file__).parent
app = Flask(__name__)

def create_app():
    return app

@app.get("/")
def index():
    return f"{os.getpid()}"

@app.get("/slow")
def slow():
    (here / "entered").touch()
    time.sleep(1)
    return "slow"

@app.get("/stuck")
def stuck():
    os.write(os.open(here / "entered.fifo", os.O_WRONLY), b"x")
    time.sleep(60)

@flaskd.on_stop(timeout=5)
def mark(context):
    with (here / "mark").open("a") as file:
        file.write(f"{context.reason_text}\\n")
"""


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    os.mkfifo(tmp_path / "entered.fifo")
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_left():
    """After each test there is no new thread, child or open file."""
    threads, files = set(threading.enumerate()), files_open()
    yield
    assert not [each.name for each in threading.enumerate() if each not in threads]
    gc.collect()
    assert files_open() <= files


def files_open():
    """What the descriptors of this process refer to, without the one that lists them."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(str(Path(f"/proc/self/fd/{number}").readlink()))
    return found


def page(process):
    """The text of the first page."""
    status, body = get(process.url)
    assert status == 200
    return body.decode()


def serves(process):
    """Whether a new request is accepted."""
    found = outcome(process.url)
    return isinstance(found, tuple) and found[0] == 200


def marks(shop):
    return (shop / "mark").read_text().splitlines()


def entered(shop):
    """Wait until the request to /stuck runs."""
    with (shop / "entered.fifo").open("rb") as fifo:
        assert fifo.read(1) == b"x"


@pytest.mark.parametrize("target", ["shop:app", "shop:create_app()", "shop"])
@pytest.mark.parametrize("server", ["waitress", "werkzeug"])
def test_it_serves_in_a_process_of_its_own(shop, target, server):
    """It is ready, its pid is not the test's, and it ends with 0 after its cleanup."""
    with flaskd.ServerProcess(target, server=server, chdir=shop) as process:
        assert process.url.startswith("http://127.0.0.1:")
        assert page(process) == str(process.pid) != str(os.getpid())
        assert process.exitcode is None
    assert process.exitcode == 0
    assert marks(shop) == ["control: ServerProcess.stop()"]
    assert process.policies["mark"]["fate"] == "ok"


def test_it_can_be_started_again(shop):
    """After its end, the same object serves in another process."""
    process = flaskd.ServerProcess("shop:app", chdir=shop)
    assert process.pid is None
    with process:
        first = process.pid
        with pytest.raises(FlaskdError, match=f"^cannot start: this process runs already, pid {first};"):
            process.start()
    with process:
        assert page(process) == str(process.pid) != str(first)


@pytest.mark.parametrize("how", ["stop", "SIGTERM", "SIGINT", "SIGHUP"])
def test_what_is_in_flight_is_answered_however_it_is_stopped(shop, how):
    """A request of one second is answered, the cleanup runs, exit code 0; terminate() loses nothing either."""
    with flaskd.ServerProcess("shop:app", chdir=shop) as process:
        client = Answer(process.url, "/slow")
        while not (shop / "entered").exists():
            pass
        if how == "stop":
            report = process.stop()
            assert (report.completed, report.cut) == (1, ())
        elif how == "SIGTERM":
            process.terminate()
        else:
            os.kill(process.pid, signal.Signals[how])
        process.join()
        assert client.result() == (200, b"slow")
        assert process.exitcode == 0
        assert marks(shop) == [f"signal: {how}" if how != "stop" else "control: ServerProcess.stop()"]


def test_what_is_not_done_in_time_is_cut_and_named(shop):
    """`stop` returns within its timeout with a report of what was cut, and the cleanup has run."""
    process = flaskd.ServerProcess("shop:app", chdir=shop, config={"shutdown": {"exit_codes": {"degraded": 9}}})
    process.start().wait_ready()
    client = Answer(process.url, "/stuck")
    entered(shop)
    began = time.monotonic()
    report = process.stop(timeout=1)
    assert time.monotonic() - began < 5
    assert [(each.method, each.path) for each in report.cut] == [("GET", "/stuck")]
    assert "in stuck" in report.cut[0].stack
    assert process.exitcode == 9
    assert marks(shop)
    assert isinstance(client.result(), Exception)


def test_a_second_sigterm_cuts_it_short(shop):
    """The first SIGTERM waits for the stuck request, the second does not."""
    process = flaskd.ServerProcess("shop:app", chdir=shop).start().wait_ready()
    client = Answer(process.url, "/stuck")
    entered(shop)
    process.terminate()
    while serves(process):  # until it has got the first signal: then it takes no new work
        pass
    time.sleep(0.3)  # signals less than 250 ms apart count as one
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert isinstance(client.result(), Exception)
    process.stop()


def test_an_interrupted_stop_is_cut_short(shop):
    """Ctrl-C during `stop` cuts the stuck request, the cleanup runs, and the process has ended when it is raised."""
    process = flaskd.ServerProcess("shop:app", chdir=shop).start().wait_ready()
    client = Answer(process.url, "/stuck")
    entered(shop)

    def interrupt():
        while serves(process):  # until it has got the order to stop: then it takes no new work
            pass
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    pressing = threading.Thread(target=interrupt)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        process.stop()
    pressing.join()
    assert process.exitcode == 0
    assert "/stuck" in [each.path for each in process.stop().cut]  # perhaps also an answer that has arrived
    assert marks(shop) == ["control: ServerProcess.stop()"]
    assert isinstance(client.result(), Exception)


def test_kill_cleans_nothing_up(shop):
    """After a kill the exit code is the signal's, and there is no report."""
    process = flaskd.ServerProcess("shop:app", chdir=shop).start().wait_ready()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert process.stop() is None
    assert not (shop / "mark").exists()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("", ConfigError, "^cannot load shop:app: "),
        ("raise LookupError('on purpose')", AppError, "^cannot load shop:app: the app raised LookupError: on purpose"),
        ("import no_such_module", AppError, "No module named 'no_such_module'"),
        ("import sys; sys.exit(3)", AppError, "the app raised SystemExit: 3"),
        ("import os; os._exit(7)", FlaskdError, "^cannot get ready: the process ended with exit code 7 before it"),
    ],
)
def test_what_keeps_it_from_serving_is_raised(tmp_path, source, error, message):
    """`wait_ready` raises the child's message, with the class of the child's error."""
    (tmp_path / "shop.py").write_text(source)
    process = flaskd.ServerProcess("shop:app", chdir=tmp_path).start()
    with pytest.raises(error, match=message):
        process.wait_ready()
    process.stop()
    assert process.exitcode in {error.exit_code, 7}


def test_a_busy_port_and_a_wrong_configuration_are_raised(shop):
    """Wrong addresses and configurations are raised, also by the context manager."""
    with flaskd.ServerThread(lambda _environ, _start: []) as taken:
        process = flaskd.ServerProcess("shop:app", port=taken.port, chdir=shop)
        with pytest.raises(CannotCreateError, match=f"^cannot listen on 127.0.0.1:{taken.port}"), process:
            pass
    with (
        pytest.raises(ConfigError, match="shutdown.deadlin: "),
        flaskd.ServerProcess("shop:app", chdir=shop, config={"shutdown": {"deadlin": "1s"}}),
    ):
        pass
    with pytest.raises(ConfigError, match="^cannot pass the configuration to the process: "):
        flaskd.ServerProcess("shop:app", config={"app": object()}).start()
    with pytest.raises(TypeError, match="expected its name"):
        flaskd.ServerProcess(print)
    with pytest.raises(FlaskdError, match="has not been started"):
        flaskd.ServerProcess("shop:app").wait_ready()
    with pytest.raises(FlaskdError, match="not ready"):
        _ = flaskd.ServerProcess("shop:app").url


def test_an_import_that_takes_long_is_waited_for_and_no_longer(tmp_path):
    """`wait_ready` raises after its timeout; `stop` ends the process during its import."""
    (tmp_path / "shop.py").write_text("import time; time.sleep(60)")
    process = flaskd.ServerProcess("shop:app", chdir=tmp_path).start()
    with pytest.raises(FlaskdError, match=r"^cannot get ready: pid \d+ does not serve within 0.2s"):
        process.wait_ready(0.2)
    began = time.monotonic()
    process.stop()
    assert time.monotonic() - began < 10
    assert process.exitcode == 0


def test_it_finds_what_its_owner_finds(tmp_path, monkeypatch):
    """A module on the owner's sys.path is found, even outside of the working directory."""
    (tmp_path / "only_here.py").write_text(SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    with flaskd.ServerProcess("only_here:app") as process:
        assert page(process) == str(process.pid)


OWNER = """
import os, signal, sys
import flaskd

process = flaskd.ServerProcess("shop:app", chdir=sys.argv[1]).start().wait_ready()
if sys.argv[2] == "fork" and os.fork() == 0:
    # A child of the owner must not keep the process alive.
    signal.pause()
print(process.pid, process.url, os.getpid(), flush=True)
signal.pause()
"""


@pytest.mark.parametrize("more", ["alone", "fork"])
def test_it_dies_with_its_owner(shop, more):
    """When its owner is killed, requests are answered, the cleanup runs, and the process ends."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(shop), more], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        pid, url, _ = owner.stdout.readline().split()
        ended = os.pidfd_open(int(pid))

        client = Answer(url, "/slow")
        while not (shop / "entered").exists():
            pass
        owner.kill()
        import select

        assert select.select([ended], [], [], PATIENCE)[0], "it still lives"
        os.close(ended)
        assert client.result() == (200, b"slow")
        assert marks(shop) == ["control: the process that started it has ended"]
    finally:
        os.killpg(owner.pid, signal.SIGKILL)  # a session of its own, with the forked child
        owner.wait()
        owner.stdout.close()


def test_ctrl_c_reaches_both_and_loses_nothing(shop):
    """With SIGINT to the whole group, the owner leaves its block and the process finishes its request."""
    script = """
import sys, threading, urllib.request
import flaskd
try:
    with flaskd.ServerProcess("shop:app", chdir=sys.argv[1]) as process:
        answers = []
        client = threading.Thread(target=lambda: answers.append(urllib.request.urlopen(process.url + "slow").read()))
        client.start()
        print("asked", flush=True)
        client.join()
        threading.Event().wait()
except KeyboardInterrupt:
    client.join()
    print(process.exitcode, answers, flush=True)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(shop)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert owner.stdout.readline() == "asked\n"
    while not (shop / "entered").exists():
        pass
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.communicate(timeout=PATIENCE)[0] == "0 [b'slow']\n"


def test_what_the_app_writes_goes_where_the_owner_writes(shop, capfd):
    """Standard output and error are the owner's; flaskd writes nothing there unless a log is configured."""
    (shop / "loud.py").write_text("print('from the app', flush=True)\n" + SHOP)
    with flaskd.ServerProcess("loud:app", chdir=shop):
        pass
    out, err = capfd.readouterr()
    assert out == "from the app\n"
    assert err == ""
    with flaskd.ServerProcess("shop:app", chdir=shop, config={"log": {"level": "info"}}):
        pass
    assert "cleanup quiesce/mark: ok" in capfd.readouterr().err
    assert Path(shop / "mark").exists()


EXITS = """
import atexit, os, threading
from flask import Flask

app = Flask(__name__)
wait = threading.Event().wait

def work(seconds):
    wait(seconds)
    with open("done", "a") as file:
        file.write("done\\n")

@app.get("/thread/<float:seconds>")
def thread(seconds):
    threading.Thread(target=work, args=(seconds,), name="mailer").start()
    return "accepted"
"""


def test_what_the_app_left_to_its_end_is_finished(tmp_path):
    """A thread that a request has started is waited for, and the report is clean."""
    (tmp_path / "exits.py").write_text(EXITS)
    with flaskd.ServerProcess("exits:app", chdir=tmp_path) as process:
        assert get(process.url, "/thread/1.0")[0] == 200
        report = process.stop()
    assert (tmp_path / "done").read_text() == "done\n"
    assert (process.exitcode, report.clean) == (0, True)


def test_what_the_app_left_to_its_end_is_cut_in_time(tmp_path):
    """What takes longer than `shutdown.exit_wait` is in the report, and the exit code says so."""
    (tmp_path / "exits.py").write_text(EXITS)
    config = {"shutdown": {"exit_wait": "300ms", "exit_codes": {"degraded": 9}}}
    with flaskd.ServerProcess("exits:app", chdir=tmp_path, config=config) as process:
        assert get(process.url, "/thread/60.0")[0] == 200
        report = process.stop()
    assert (process.exitcode, report.clean) == (9, False)
    assert [each.name for each in report.unfinished] == ["thread/mailer"]
