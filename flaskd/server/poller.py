"""Waitress' map of sockets, which also waits for their events: with epoll, or with waitress' own poll without one.

At each turn, waitress' own loop asks every connection what it waits for, and rebuilds the poll set. Here the map owns
an epoll: a connection is armed for one event (EPOLLONESHOT, epoll_ctl(2)), and is asked again only after an event, or
after another thread has written output.
"""

from __future__ import annotations

import contextlib
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from waitress import wasyncore

_BATCH = 512
"""Most events taken from the kernel at once."""
_READABLE = getattr(select, "EPOLLIN", 0)
_NEXT_REQUEST = _READABLE | getattr(select, "EPOLLET", 0)


class Poller(Protocol):
    """A map of sockets that waits for events and handles them; calling `wake` ends a wait."""

    wake: Callable[[], None]

    def wait(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for events; called when all earlier events are handled."""

    events: Sequence[tuple[int, int]]
    """Events that are not handled yet, the oldest first; the next thread that leads continues with them."""

    def handle(self) -> Any:
        """Handle the oldest event.

        Returns a connection if this thread is to answer the request that has come on it: it has a place for it.
        """

    def touch(self, channel: Any) -> None:
        """Ask a connection again what it waits for, if it has output or a drain is under way (any thread)."""

    def expect(self, channel: Any) -> None:
        """Wait for a connection's next request (any thread; the caller holds its `requests_lock`)."""

    def listen(self, acceptor: Any, *, on: bool) -> None:
        """Wait for new connections on a listener, or stop waiting for them."""

    def put_off(self, acceptor: Any) -> bool:
        """Handle all other events before new connections; returns False if there are none, or this was done already."""

    def close(self) -> None:
        """Close what the map holds beside its sockets."""


# The methods are described in Poller.
# ruff: noqa: D102


class EpollMap(dict[int, Any]):
    """The map with epoll(7). Connections have `one_shot` set; triggers and listeners are level-triggered.

    A connection is armed for one event, except while only its next request is waited for: then it stays armed from one
    request to the next, edge-triggered, which saves a system call for each. An event that comes while a thread has the
    connection is `missed`; the thread arms the connection again, and epoll reports what is still there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wake: Callable[[], None] = lambda: None
        self._epoll = select.epoll()
        self._channels: dict[int, Any] = {}
        """The connections in the map."""
        self.events: deque[tuple[int, int]] = deque()
        self._put_off: set[int] = set()
        """The listeners whose connections have been put off since the last wait."""
        self._touched: deque[int] = deque()
        self._closed: set[int] = set()
        self._asleep = False

    def __setitem__(self, fd: int, obj: Any) -> None:
        one_shot = getattr(obj, "one_shot", False)
        listens = hasattr(obj, "accept_connections")
        flags = select.EPOLLIN | select.EPOLLONESHOT if one_shot else 0 if listens else select.EPOLLIN
        self._epoll.register(fd, flags)  # first, because it may raise: then the socket must not be in the map
        super().__setitem__(fd, obj)
        if one_shot:
            self._channels[fd] = obj

    def __delitem__(self, fd: int) -> None:
        super().__delitem__(fd)
        self._channels.pop(fd, None)
        self._closed.add(fd)  # so that its events of this turn do not go to a new socket with this number
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def listen(self, acceptor: Any, *, on: bool) -> None:
        self._epoll.modify(acceptor._fileno, select.EPOLLIN if on else 0)  # noqa: SLF001 - waitress' own name

    def put_off(self, acceptor: Any) -> bool:
        fd = acceptor._fileno  # noqa: SLF001 - waitress' own name
        if fd in self._put_off or not self.events:
            return False
        self._put_off.add(fd)
        self.events.append((fd, select.EPOLLIN))
        return True

    def touch(self, channel: Any) -> None:
        fd = channel._fileno  # noqa: SLF001 - waitress' own name
        if fd is not None and (channel.writable() or channel.context.drains):
            self._touched.append(fd)
            if self._asleep:
                self._asleep = False
                self.wake()

    def expect(self, channel: Any) -> None:
        if channel.stays_armed and not channel.missed:
            return
        channel.stays_armed, channel.missed = True, False
        if (sock := channel.socket) is not None:
            with contextlib.suppress(OSError, ValueError):  # the loop has closed the socket just now
                self._epoll.modify(sock, _NEXT_REQUEST)

    def wait(self, timeout: float) -> None:
        while self._touched:
            fd = self._touched.popleft()
            if (channel := self._channels.get(fd)) is not None:
                self._arm(fd, channel)
        if self._closed:
            self._closed.clear()
        if self._put_off:
            self._put_off.clear()
        self._asleep = True
        # A thread that touched a channel before `_asleep` was set is found in `_touched`; a later one wakes this one.
        self.events.extend(self._epoll.poll(0 if self._touched else timeout, _BATCH))
        self._asleep = False

    def handle(self) -> Any:
        fd, flags = self.events.popleft()
        if self._closed and fd in self._closed:
            return None
        if (channel := self._channels.get(fd)) is None:
            if (obj := self.get(fd)) is not None:
                wasyncore.readwrite(obj, flags)
            return None
        if channel.keeper is not None and channel.stays_armed and _note_missed(channel):
            return None
        if flags == _READABLE:
            try:
                if channel.read():
                    return channel
            except Exception:  # noqa: BLE001 - as wasyncore.read() does
                channel.handle_error()
            if channel.keeper is not None and not channel.context.drains:
                return None  # a request is complete, and its thread has the connection from here on
        else:
            wasyncore.readwrite(channel, flags)
        if self._channels.get(fd) is channel:
            self._arm(fd, channel)
        return None

    def _arm(self, fd: int, channel: Any) -> None:
        if channel.context.drains:
            channel.close_if_idle()
            if fd not in self:
                return  # it has closed the connection
        elif channel.requests and not channel.total_outbufs_len:
            return  # a thread owns it, and arms it when it has finished
        with channel.requests_lock:
            flags = (select.EPOLLIN if channel.readable() else 0) | (select.EPOLLOUT if channel.writable() else 0)
            if flags or channel.context.drains:
                # Even without flags epoll reports a reset (EPOLLERR, EPOLLHUP): a drain need not wait for that client.
                channel.stays_armed = False
                self._epoll.modify(fd, flags | select.EPOLLONESHOT)

    def close(self) -> None:
        self._epoll.close()


def _note_missed(channel: Any) -> bool:
    """Let the thread that has the connection arm it again when it has finished; False if it just has."""
    with channel.requests_lock:
        has_thread = channel.keeper is not None
        channel.missed = channel.missed or has_thread
    return has_thread


class PollMap(dict[int, Any]):
    """The map with waitress' own poll, for systems without epoll; slower with many connections, otherwise equal."""

    def __init__(self) -> None:
        super().__init__()
        self.wake: Callable[[], None] = lambda: None
        self.events: tuple[tuple[int, int], ...] = ()

    def listen(self, acceptor: Any, *, on: bool) -> None:
        acceptor.paused = not on

    def put_off(self, acceptor: Any) -> bool:  # noqa: ARG002
        return False

    def touch(self, channel: Any) -> None:  # noqa: ARG002 - every turn asks all connections
        self.wake()

    def expect(self, channel: Any) -> None:  # noqa: ARG002
        self.wake()

    def wait(self, timeout: float) -> None:
        wait = wasyncore.poll2 if hasattr(select, "poll") else wasyncore.poll
        wait(timeout, self)
        for channel in list(self.values()):
            if getattr(channel, "one_shot", False):
                channel.close_if_idle()

    def handle(self) -> Any:
        raise NotImplementedError  # waitress' poll has handled what it waited for

    def close(self) -> None:
        """Do nothing: this map holds only its sockets."""


def make_poller() -> EpollMap | PollMap:
    """Make the quickest map that this system supports."""
    return EpollMap() if hasattr(select, "epoll") else PollMap()
