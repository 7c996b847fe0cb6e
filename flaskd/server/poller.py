"""Waitress' socket map, and what waits on it: epoll where there is one, waitress' own poll elsewhere.

A turn of waitress' own loop asks every connection what it waits for and rebuilds the poll set. Here the map owns an
epoll; a connection is armed for one event (EPOLLONESHOT, epoll_ctl(2)), and asked again only after something happened
to it: an event, or output of another thread.
"""

from __future__ import annotations

import contextlib
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from waitress import wasyncore

_BATCH = 512
"""Events taken from the kernel at once."""
_READABLE = getattr(select, "EPOLLIN", 0)
_NEXT_REQUEST = getattr(select, "EPOLLIN", 0) | getattr(select, "EPOLLONESHOT", 0)


class Poller(Protocol):
    """A socket map that can be turned; `wake` makes a sleeping turn return."""

    wake: Callable[[], None]

    def wait(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for events, if all that have come are handled."""

    events: Sequence[tuple[int, int]]
    """What came and is not handled, the oldest first; the thread that leads next goes on with it."""

    def handle(self) -> Any:
        """Handle the event that came first.

        Gives the connection, if a request on it is complete and has got a place: this thread is to answer it.
        """

    def touch(self, channel: Any) -> None:
        """Ask a connection anew what it waits for, if it has something to send, or a drain is on (any thread)."""

    def expect(self, sock: Any) -> None:
        """Wait for a connection's next request (any thread; its `requests_lock` is held)."""

    def listen(self, acceptor: Any, *, on: bool) -> None:
        """Wait for new connections, or do not."""

    def put_off(self, acceptor: Any) -> bool:
        """Handle all else that has come before new connections; False when there is nothing, or that has been done."""

    def close(self) -> None:
        """Give back what is not in the map."""


# What the methods mean is said once, in Poller.
# ruff: noqa: D102


class EpollMap(dict[int, Any]):
    """The map on epoll(7). Connections have `one_shot`; triggers and listeners are level-triggered."""

    def __init__(self) -> None:
        super().__init__()
        self.wake: Callable[[], None] = lambda: None
        self._epoll = select.epoll()
        self._channels: dict[int, Any] = {}
        """The connections in the map."""
        self.events: deque[tuple[int, int]] = deque()
        self._put_off: set[int] = set()
        """The listeners for which that has been done, since the last wait."""
        self._touched: deque[int] = deque()
        self._closed: set[int] = set()
        self._asleep = False

    def __setitem__(self, fd: int, obj: Any) -> None:
        one_shot = getattr(obj, "one_shot", False)
        listens = hasattr(obj, "accept_connections")
        flags = select.EPOLLIN | select.EPOLLONESHOT if one_shot else 0 if listens else select.EPOLLIN
        self._epoll.register(fd, flags)  # first: what the kernel has no room for is not in the map either
        super().__setitem__(fd, obj)
        if one_shot:
            self._channels[fd] = obj

    def __delitem__(self, fd: int) -> None:
        super().__delitem__(fd)
        self._channels.pop(fd, None)
        self._closed.add(fd)  # events of this turn that were meant for it are not for who gets its number next
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

    def expect(self, sock: Any) -> None:
        try:  # noqa: SIM105 - contextlib.suppress costs what is saved here, at every request
            self._epoll.modify(sock, _NEXT_REQUEST)
        except (OSError, ValueError):  # the loop closed it in this moment
            pass

    def wait(self, timeout: float) -> None:
        while self._touched:
            fd = self._touched.popleft()
            if (channel := self._channels.get(fd)) is not None:
                self._arm(fd, channel)
        self._closed.clear()
        self._put_off.clear()
        self._asleep = True
        # A thread that touched before it saw us asleep has left word; one that comes later wakes us.
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
        if flags == _READABLE:
            try:
                if channel.handle_read():
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
                return  # that closed it
        elif channel.requests and not channel.total_outbufs_len:
            return  # a thread of the pool has it, and arms it when it is done
        with channel.requests_lock:
            flags = (select.EPOLLIN if channel.readable() else 0) | (select.EPOLLOUT if channel.writable() else 0)
            if flags or channel.context.drains:
                # With no flags it still tells of a reset (EPOLLERR, EPOLLHUP): a drain does not wait for who is gone.
                self._epoll.modify(fd, flags | select.EPOLLONESHOT)

    def close(self) -> None:
        self._epoll.close()


class PollMap(dict[int, Any]):
    """The map on waitress' own loop, for systems without epoll; slower with many connections, otherwise the same."""

    def __init__(self) -> None:
        super().__init__()
        self.wake: Callable[[], None] = lambda: None
        self.events: tuple[tuple[int, int], ...] = ()

    def listen(self, acceptor: Any, *, on: bool) -> None:
        acceptor.paused = not on

    def put_off(self, acceptor: Any) -> bool:  # noqa: ARG002
        return False

    def touch(self, channel: Any) -> None:  # noqa: ARG002 - all are asked at every turn
        self.wake()

    def expect(self, sock: Any) -> None:  # noqa: ARG002
        self.wake()

    def wait(self, timeout: float) -> None:
        wait = wasyncore.poll2 if hasattr(select, "poll") else wasyncore.poll
        wait(timeout, self)
        for channel in list(self.values()):
            if getattr(channel, "one_shot", False):
                channel.close_if_idle()

    def handle(self) -> Any:
        raise NotImplementedError  # waitress' loop handles what it waited for

    def close(self) -> None:
        """Nothing is held beside the map."""


def make_poller() -> EpollMap | PollMap:
    """The best that this system has."""
    return EpollMap() if hasattr(select, "epoll") else PollMap()
