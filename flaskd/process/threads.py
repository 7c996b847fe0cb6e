"""Threads of flaskd in which code of the app runs."""

from __future__ import annotations

import threading

from flaskd.objects import attributes_of


class AppThread(threading.Thread):
    """A thread for which the end of the process does not wait, although it waits for threads that the app starts in it.

    A new thread inherits `daemon` from the thread that starts it (threading.Thread.daemon). Under other servers an
    app's threads are therefore no daemon threads unless it asks for that, and the process waits for them at its end.
    """

    _begun = False

    @property
    def daemon(self) -> bool:  # type: ignore[override]  # it must not be changed
        """True at the start, when the interpreter reads it for this thread; then False, for threads that inherit it."""
        return not self._begun

    def run(self) -> None:
        """Run the thread's target."""
        self._begun = True
        super().run()


def waited_for() -> list[threading.Thread]:
    """The threads for which the interpreter waits at its end (threading._shutdown), without the main thread."""
    ours = {threading.main_thread(), threading.current_thread()}
    return [
        each for each in threading.enumerate() if not (_is_daemon(each) or isinstance(each, AppThread) or each in ours)
    ]


def name_of(thread: threading.Thread) -> str:
    """A thread's name, read without running code of its class, which may be the app's."""
    return str(attributes_of(thread).get("_name", "?"))


def _is_daemon(thread: threading.Thread) -> bool:
    return bool(attributes_of(thread).get("_daemonic", True))
