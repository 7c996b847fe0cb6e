"""Threads of flaskd's in which code of the app runs."""

from __future__ import annotations

import threading


class AppThread(threading.Thread):
    """A thread that the process' end does not wait for, while it does for those that the app starts in it.

    A new thread takes `daemon` from the one that starts it. Under other servers an app's threads are no daemons,
    therefore, unless it says so, and what they do is finished before the process ends (threading.Thread.daemon).
    """

    _begun = False

    @property
    def daemon(self) -> bool:  # type: ignore[override]  # nobody else may change it
        """True when it starts, which is when the interpreter asks for itself; then False, for who inherits it."""
        return not self._begun

    def run(self) -> None:
        """Do its work."""
        self._begun = True
        super().run()


def waited_for() -> list[threading.Thread]:
    """The threads that the interpreter waits for at its end (threading._shutdown), beside the main one."""
    apart = {threading.main_thread(), threading.current_thread()}
    return [each for each in threading.enumerate() if each not in apart and _is_waited_for(each)]


def _is_waited_for(thread: threading.Thread) -> bool:
    try:
        return not (thread.daemon or isinstance(thread, AppThread))
    except Exception:  # noqa: BLE001 - a class of the app's, which may raise at every question
        return False
