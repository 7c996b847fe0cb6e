"""The end of a process, tested in processes of their own."""

import atexit
import concurrent.futures
import functools
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from flaskd.process.exit import at_exit, unfinished

FULL = """
import array, fcntl, logging, os, sys, termios, threading, time
from flaskd.process.exit import Ending, leave

logging.basicConfig()  # its handler flushes standard error in an atexit callback

def fill():
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(2, True)

def keep_writing():
    threading.Thread(target=lambda: sys.stderr.write("x" * 2**20), daemon=True).start()
    size, waiting = fcntl.fcntl(2, fcntl.F_GETPIPE_SZ), array.array("i", [0])
    while waiting[0] < size:  # then it is within write(2), and has the stream's lock
        fcntl.ioctl(2, termios.FIONREAD, waiting)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it looks at a pipe as Linux shows it")
@pytest.mark.parametrize(
    "app",
    [
        "fill(); threading.Thread(target=time.sleep, args=(600,)).start()",
        "keep_writing()",
        "fill(); print('x', end='')",
    ],
    ids=["something to say", "a thread that writes", "nothing to say"],
)
def test_nobody_who_reads_keeps_the_exit(app):
    """If standard error is full and not read, the process ends with its own exit code all the same."""
    with subprocess.Popen(
        [sys.executable, "-E", "-c", f"{FULL}\n{app}\nleave(7, Ending())"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.wait(20) == 7
        finally:
            process.kill()


END = """
import os, sys, threading, time, types
from flaskd.process.exit import Ending, leave

app = sys.modules["app"] = types.ModuleType("app")
ending = Ending()
ending.start()
until = time.monotonic() + WAIT
ending.left = lambda: until - time.monotonic()
ending.late_code = 9

def cut(unfinished):
    for each in unfinished:
        print(each.name)
    sys.stdout.flush()
    os._exit(8)

exec(APP, vars(app))
ending.run(cut=cut)
print("in time", flush=True)
leave(3, ending)
"""


def ended(app, wait=15.0):
    """Run code of an app in a process to its end; returns its exit code and output."""
    code = f"WAIT, APP = {wait}, {app!r}\n{END}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr


PAUSE = "import threading, time, atexit, concurrent.futures, multiprocessing\npause = threading.Event().wait\n"


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("atexit.register(lambda: pause(0.3) or print('over', flush=True))", "over"),
        ("threading.Thread(target=lambda: pause(0.3) or print('over', flush=True)).start()", "over"),
        ("pool = concurrent.futures.ThreadPoolExecutor(1)\nfor each in range(8): pool.submit(print, each)", "7"),
        (
            "def bye(): threading.Thread(target=lambda: pause(0.3) or print('over', flush=True)).start()\n"
            + ("atexit.register(bye)" if sys.version_info < (3, 12) else "bye()"),  # no threads can be started there
            "over",
        ),
        (
            "multiprocessing.get_context('fork').Process(target=lambda: pause(0.3) or print('over', flush=True)).start()",
            "over",
        ),
        ("def bye(): raise RuntimeError('bye')\natexit.register(print, 'over')\natexit.register(bye)", "over"),
    ],
    ids=["callback", "thread", "executor", "thread of a callback", "child", "a callback that raises"],
)
def test_what_is_left_to_the_end_is_done(app, said):
    """Exit callbacks, threads, queued jobs and children are finished, and the exit code is that of the stop."""
    code, lines, _ = ended(PAUSE + app)
    assert code == 3
    assert lines[-2:] == [said, "in time"]


@pytest.mark.parametrize(
    ("app", "cut"),
    [
        (
            "def bye(): pause()\ndef never(): pass\natexit.register(never)\natexit.register(bye)",
            ["app.bye", "app.never"],
        ),
        ("threading.Thread(target=pause, name='stray').start()", ["thread/stray"]),
        (
            "pool = concurrent.futures.ThreadPoolExecutor(1, 'mail')\nfor _ in range(3): pool.submit(pause)",
            ["thread/mail_0", "executor/mail: 2 jobs not begun"],
        ),
    ],
    ids=["callback", "thread", "executor"],
)
def test_what_takes_too_long_is_cut_and_named(app, cut):
    """What is unfinished at the time limit is cut and named, also callbacks that were not called yet."""
    code, lines, _ = ended(PAUSE + app, wait=0.5)
    assert code == 8
    assert [line.removeprefix("atexit/") for line in lines] == cut


def test_finalizers_run_and_files_are_written():
    """Objects of modules are finalized: `__del__` runs, and buffers of files are written."""
    code, lines, _ = ended("class Last:\n    def __del__(self, say=print): say('over', flush=True)\nlast = Last()")
    assert (code, lines) == (3, ["in time", "over"])


@pytest.mark.parametrize("hang", ["pause()", "[0 for _ in iter(int, 1)]"], ids=["sleeps", "computes"])
def test_a_finalizer_cannot_keep_the_process(hang):
    """A finalizer that never ends is cut in time, with its stack; the exit code is the one asked for."""
    app = f"{PAUSE}class Last:\n    def __del__(self, pause=pause):\n        {hang}\nlast = Last()"
    code, lines, errors = ended(app, wait=0.5)
    assert (code, lines) == (9, ["in time"])
    assert "in __del__" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize("how", ["full", "closed pipe", "closed"])
def test_streams_that_cannot_be_written_do_not_change_the_exit_code(how):
    """The exit code stays, where Python's own would be 120 (Py_FinalizeEx)."""
    app = "import sys\nfor stream in (sys.stdout, sys.stderr):\n    print('x' * 100, end='', file=stream)"
    quiet = END.replace('print("in time", flush=True)', "")
    code = f"WAIT, APP = 15, {app!r}\n{quiet}"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe, Path("/dev/full").open("wb") as full:
        stream = {"full": full, "closed pipe": pipe, "closed": None}[how]
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {">&- 2>&-" if stream is None else ""}', "sh", sys.executable, "-c", code],
            stdout=stream, stderr=stream, timeout=20, check=False,
            env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
        )  # fmt: skip
    assert done.returncode == 3


NO_DESCRIPTOR = """
import os, resource, threading, time
def turn():
    while True:
        time.sleep(0)
for _ in range(4):
    threading.Thread(target=turn, daemon=True).start()
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.3)
slow = Slow()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
"""


def test_a_process_without_a_free_descriptor_keeps_its_exit_code():
    """Its finalizers are cut: the C library would abort it when the interpreter ends the threads that are left."""
    assert ended(NO_DESCRIPTOR) == (9, ["in time"], "")


def test_what_is_looked_at_is_not_kept():
    """The list keeps no frames of threads: they would keep the app's objects until the garbage collector comes."""

    class Held:
        pass

    def hold():
        mine = Held()
        kept.append(weakref.ref(mine))
        entered.set()
        stop.wait()

    kept, entered, stop = [], threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, name="holds")
    thread.start()
    assert entered.wait(10)
    gc.disable()
    try:
        assert "thread/holds" in [each.name for each in unfinished()]
        stop.set()
        thread.join()
        assert kept[0]() is None
    finally:
        gc.enable()


def test_what_the_exit_would_wait_for():
    """The list has the app's threads, children and exit callbacks, the last registered first, without libraries'."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="mailer")
    thread.start()
    callback = functools.partial(bye, 1)
    atexit.register(callback)
    try:
        names = at_exit()
        assert "thread/mailer" in names
        assert f"atexit/{__name__}.bye" in names
        assert not [name for name in names if name.startswith("atexit/logging.")]
    finally:
        atexit.unregister(callback)
        stop.set()
        thread.join(20)


def test_an_executor_of_processes_is_no_business_of_the_exit():
    """Thread and processes of a process pool are ended by a cleanup step, and not listed here."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(int).result(20)
        assert [name for name in at_exit() if name.startswith(("thread/", "process/"))] == []


def bye(number):
    """An exit callback."""


STARTS_THREADS = """
import concurrent.futures, os, sys, threading
from flaskd.process.exit import _waiting_jobs

sys.setswitchinterval(1e-6)
kept = [concurrent.futures.ThreadPoolExecutor(1) for _ in range(20)]
for each in kept:
    each.submit(int).result()

def start():
    while len(kept) < 1000:
        kept.append(concurrent.futures.ThreadPoolExecutor(1))
        kept[-1].submit(int)

threads = threading.Thread(target=start)
threads.start()
while threads.is_alive():
    list(_waiting_jobs())
print("told", flush=True)
os._exit(0)
"""


def test_what_is_unfinished_while_the_app_starts_threads():
    """Threads of executors that begin in that moment make no list of waiting jobs fail."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS_THREADS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("told\n", "")
