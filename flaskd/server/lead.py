"""The lead: one thread has it at a time, and passes it on before it runs a request, unless that will be quick.

Waking another thread takes longer than many requests: two switches, and two threads that compete for the GIL. So a
thread keeps the lead while it runs a request of a kind that has been quick of late. If such a request takes long after
all, the watching thread passes the lead on in its place: at its first look that finds the same request as the last one.

A slow request counts for more if the lead was kept for it: then only the request itself was slow (or, rarely, the
machine), and other requests waited for it. Where several threads run at once they also wait for the GIL, so a quick
request may seem slow.
"""

from __future__ import annotations

import logging
import threading
import time

log = logging.getLogger("flaskd.server")

_TICK = 0.005
"""Seconds between two looks of the watching thread."""
_QUIET = 10
"""Looks without a new request after which the watching thread goes to sleep."""
_QUICK = 0.0005
"""Most seconds that a quick request takes, including the sending of its answer. A longer one may be waiting for
something, and another thread could read meanwhile."""
_TRUSTED = 16
"""Quick requests of one kind after which the next is expected to be quick."""
_MOST_COUNTED = 2 * _TRUSTED
"""Up to which number the quick requests of one kind are counted."""
_SLOW_IF_KEPT, _SLOW = 16, 2
"""By how much one slow request lowers that count: if the lead was kept for it, and if it was not."""
_BUSY = 0.005
"""Most seconds between two requests that are expected to be quick for which the watching thread is woken."""
_MOST_KINDS = 1000
"""Most kinds that are counted; bounded, because clients choose the paths."""


class Lead:
    """The right to lead. All methods except those that say "any thread" are for a thread that has it or wants it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._token = threading.Lock()
        """Locked while a thread leads."""
        self._lock = lock
        """Held while one of the following changes; the caller's, which holds it for `keep` and `still_kept`."""
        self._kept = False
        """Whether the leading thread is running a request."""
        self._count = 0
        """How many requests were run by a thread that kept the lead."""
        self._watched = False
        """Whether the watching thread is awake."""
        self._quick: dict[str, int] = {}
        """The count of quick requests of each kind, lowered by slow ones."""
        self._last = 0.0
        self._wanted, self._over = threading.Event(), threading.Event()
        self._watch: threading.Thread | None = None

    def take(self) -> None:
        """Wait until this thread leads."""
        self._token.acquire()

    def pass_on(self) -> None:
        """Let another thread take the lead."""
        self._token.release()

    def keep(self, kind: str) -> bool:
        """Whether to keep the lead while running a request of this kind; if so, call `still_kept` afterwards."""
        if self._quick.get(kind, 0) < _TRUSTED:
            return False
        if self._watched:
            self._count += 1
            self._kept = True
            return True
        now, before = time.monotonic(), self._last
        self._last = now
        if now - before < _BUSY:
            self._want_watch()
        return False

    def still_kept(self, kind: str, seconds: float) -> bool:
        """Whether this thread still leads after it has run its request, which took `seconds`."""
        kept, self._kept = self._kept, False
        if seconds > _QUICK or self._quick.get(kind, 0) < _MOST_COUNTED:
            self.note(kind, seconds, kept=True)
        return kept

    def note(self, kind: str, seconds: float, *, kept: bool) -> None:
        """Note how many seconds a request of this kind took, and whether the lead was kept for it (any thread)."""
        quick = self._quick.get(kind, 0)
        if seconds > _QUICK:
            quick -= _SLOW_IF_KEPT if kept else _SLOW
            if quick > 0:
                self._quick[kind] = quick
            else:
                self._quick.pop(kind, None)
        elif quick < _MOST_COUNTED:
            if not quick and len(self._quick) >= _MOST_KINDS:
                self._quick.clear()
            self._quick[kind] = quick + 1

    # --- the watching thread --------------------------------------------------------------------------------------

    def _want_watch(self) -> None:
        if self._watch is None:
            self._watch = threading.Thread(target=self._watches, name="flaskd-watch", daemon=True)
            try:
                self._watch.start()
            except RuntimeError as error:  # no thread can be started: then the lead is always passed on
                log.debug(f"cannot watch the thread that leads: {error}")
        self._wanted.set()

    def _watches(self) -> None:
        while not self._over.is_set():
            self._wanted.wait()
            self._wanted.clear()
            with self._lock:
                self._watched = True
            quiet, count = 0, -1
            while quiet < _QUIET and not self._over.wait(_TICK):
                with self._lock:
                    if self._count != count:
                        quiet, count = 0, self._count
                    elif self._kept:  # the same request as at the last look
                        self._kept = False
                        self._token.release()
                    else:
                        quiet += 1
                        self._watched = quiet < _QUIET
        with self._lock:
            self._watched = False
            if self._kept:
                self._kept = False
                self._token.release()

    def end(self) -> None:
        """Let the watching thread end; from then on the lead is always passed on (any thread)."""
        self._over.set()
        self._wanted.set()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the watching thread to end (any thread)."""
        if self._watch is not None and self._watch.ident is not None:
            self._watch.join(timeout)
