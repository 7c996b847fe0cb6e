"""Threads that run the app's code, and which of them the interpreter waits for at its end."""

import subprocess
import sys
import threading

from patience import PATIENCE

from flaskd.process.threads import AppThread, waited_for


def test_a_thread_of_the_apps_is_no_daemon():
    """A thread that the app starts in a thread of flaskd is waited for at the exit, unless it is a daemon."""
    made = []

    def app():
        made.extend([threading.Thread(), threading.Thread(daemon=True)])

    thread = AppThread(target=app)
    assert thread.daemon  # when the interpreter reads it, at the start
    thread.start()
    thread.join(PATIENCE)
    assert [each.daemon for each in made] == [False, True]


def test_our_own_thread_is_not_waited_for():
    """The exit waits for threads that are no daemons, but not for those of flaskd."""
    stop = threading.Event()
    theirs = threading.Thread(target=stop.wait)
    threads = [theirs, AppThread(target=stop.wait), threading.Thread(target=stop.wait, daemon=True)]
    for each in threads:
        each.start()
    try:
        assert set(waited_for()) & set(threads) == {theirs}
    finally:
        stop.set()
        for each in threads:
            each.join(PATIENCE)


def test_the_interpreter_ends_without_it():
    """A thread of flaskd that never ends does not delay the exit; one that the app started in it does."""
    code = """
import threading
from flaskd.process.threads import AppThread
began, over = threading.Event(), threading.Event()

def child():
    over.wait(0.2)
    print("finished", flush=True)

def app():
    threading.Thread(target=child).start()
    began.set()
    threading.Event().wait()

AppThread(target=app).start()
began.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "finished\n"
