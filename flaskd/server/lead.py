"""Who leads: one thread at a time, which passes the lead on before it runs a request, or keeps it where that is quick.

To wake another thread costs more than many a request: two switches, and two threads that contend for the GIL. So a
thread keeps the lead while it runs a request of a kind that has been quick of late. Should that one take long after
all, a thread that watches passes the lead on in its stead, at the first look that finds the request of the look before.

A slow request counts for more where the lead was kept: there nothing but the request itself was slow (or, now and then,
the machine), and others waited for it. Where several threads run at once they also wait for the GIL, and a quick
request seems slow.
"""

from __future__ import annotations

import logging
import threading
import time

log = logging.getLogger("flaskd.server")

_TICK = 0.005
"""Seconds between two looks of the thread that watches."""
_QUIET = 10
"""Looks without a request until it watches no more."""
_QUICK = 0.0005
"""Seconds that a quick request takes at most, the sending of its answer included. One that takes longer may be waiting
for something, while another thread could read."""
_TRUSTED = 16
"""Quick requests of one kind after which its next one is expected to be quick."""
_REMEMBERED = 2 * _TRUSTED
"""How many of them are remembered."""
_BETRAYED, _SLOW = 16, 2
"""How many of them one slow request outweighs: where the lead was kept for it, and where it was not."""
_BUSY = 0.005
"""Seconds between two requests that are expected to be quick, from which on it is worth while to watch."""
_MOST_KINDS = 1000
"""Kinds that are remembered; bounded, because clients make them up."""


class Lead:
    """The right to lead; all methods but `end` and `join` are for the thread that has it, or wants it."""

    def __init__(self) -> None:
        self._token = threading.Lock()
        """Held for the thread that leads."""
        self._lock = threading.Lock()
        """Held when one of the following changes."""
        self._kept = False
        """Whether the thread that leads runs a request meanwhile."""
        self._count = 0
        """How many requests were run so."""
        self._watched = False
        """Whether the other thread watches."""
        self._quick: dict[str, int] = {}
        """How many more requests of each kind have been quick of late than slow ones outweigh."""
        self._last = 0.0
        self._wanted, self._over = threading.Event(), threading.Event()
        self._watch: threading.Thread | None = None

    def take(self) -> None:
        """Wait until this thread leads."""
        self._token.acquire()

    def pass_on(self) -> None:
        """Let another thread lead."""
        self._token.release()

    def keep(self, kind: str) -> bool:
        """Whether to keep the lead while a request of this kind is run; `still_kept` must be called afterwards."""
        if self._quick.get(kind, 0) < _TRUSTED:
            return False
        with self._lock:
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
        """Whether this thread still leads, after it has run a request meanwhile, which took so many seconds."""
        with self._lock:
            kept, self._kept = self._kept, False
        if seconds > _QUICK or self._quick.get(kind, 0) < _REMEMBERED:
            self.note(kind, seconds, kept=True)
        return kept

    def note(self, kind: str, seconds: float, *, kept: bool) -> None:
        """Note how long a request of this kind took, and whether the lead was kept for it (any thread)."""
        quick = self._quick.get(kind, 0)
        if seconds > _QUICK:
            quick -= _BETRAYED if kept else _SLOW
            if quick > 0:
                self._quick[kind] = quick
            else:
                self._quick.pop(kind, None)
        elif quick < _REMEMBERED:
            if not quick and len(self._quick) >= _MOST_KINDS:
                self._quick.clear()
            self._quick[kind] = quick + 1

    # --- the thread that watches ----------------------------------------------------------------------------------

    def _want_watch(self) -> None:
        if self._watch is None:
            self._watch = threading.Thread(target=self._watches, name="flaskd-watch", daemon=True)
            try:
                self._watch.start()
            except RuntimeError as error:  # no thread can be had: then the lead is always passed on
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
        """Let the thread that watches end; the lead is kept no more (any thread)."""
        self._over.set()
        self._wanted.set()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for that (any thread)."""
        if self._watch is not None and self._watch.ident is not None:
            self._watch.join(timeout)
