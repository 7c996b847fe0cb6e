"""Clients of a service that is restarted or reloaded, and forms of the service whose listeners outlive it."""

from __future__ import annotations

import collections
import http.client
import threading
import time
from typing import Self

from patience import PATIENCE, until
from systemd_kit import PROJECT, Instance, Systemd

LISTEN = "server: {listen: '127.0.0.1:PORT'}\n"
STORED = LISTEN + "systemd: {fdstore: true}\n"
PORT_UNIT = "[Socket]\nListenStream=\nListenStream=127.0.0.1:PORT\n"
HARDENED = (PROJECT / "systemd/drop-ins/hardened.conf").read_text()


class Load:
    """Clients that send requests all the time: two with a new connection each time, two that keep theirs."""

    def __init__(self, instance: Instance, path: str = "/") -> None:
        self._address = ("127.0.0.1", instance.port)
        self._path = path
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[kept]) for kept in (False, False, True, True)]
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.longest = 0.0
        """The longest time, in seconds, in which no client got an answer."""
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for each in self._threads:
            each.join(PATIENCE)

    def _ask(self, kept: bool) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
        while not self._ended.is_set():
            try:
                if connection.sock is None:
                    try:
                        connection.connect()
                    except OSError as error:
                        raise ConnectionError(f"connecting: {error!r}") from error
                connection.request("GET", self._path)
                response = connection.getresponse()
                outcome = f"{response.status} {response.read().decode()[:20]}"
                if not kept:
                    connection.close()
            except (OSError, http.client.HTTPException) as error:
                outcome = repr(error)
                connection.close()
            with self._lock:
                now = time.monotonic()
                self.outcomes[outcome] += 1
                self.longest, self._last = max(self.longest, now - self._last), now
        connection.close()

    def until_more(self, count: int = 8) -> None:
        """Wait until this many more requests are over."""
        goal = self.outcomes.total() + count
        until(lambda: self.outcomes.total() >= goal, lambda: str(self.outcomes))


def activated(systemd: Systemd, name: str) -> Instance:
    """An instance in the hardened, socket-activated form, whose socket listens."""
    instance = systemd.flaskd(name, service=HARDENED, socket_unit=PORT_UNIT)
    systemd.ctl("start", instance.socket)
    return instance
