"""The open connections: silent and slow ones are closed in time, and at a deadline all are."""

from __future__ import annotations

import heapq
import logging
import operator
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from flaskd.log.setup import bounded_by
from flaskd.server.channel import Channel, Probe
from flaskd.server.context import Context
from flaskd.server.request import Connection, Request
from flaskd.server.slow import PATIENCE, SLOW, Progress
from flaskd.sockets import unread

log = logging.getLogger("flaskd.server")

_LOOKS = 10
"""How often connections are looked at within the shortest timeout, so a timeout may be exceeded by a tenth of it."""
_AT_ONCE = 64
"""How many connections that may be closed to make room are looked for at once."""


class Connections:
    """All open connections of a loop. Methods run in the loop's thread, except where they say "any thread"."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.patience = float("inf")
        """Seconds in which a client must complete a request, counted from its connecting or its last answer."""
        self._restful: deque[tuple[tuple[bool, float], Channel]] = deque()
        """Connections that may be closed to make room, in the order in which they are to be closed."""
        context.waiting.close = lambda channel, why: context.call(
            lambda: self._close_slow(channel, "outbuf_high_watermark", why)
        )
        self.next_reaping = 0.0
        """The time.monotonic() moment at which to look for silent and slow connections again."""

    @property
    def count(self) -> int:
        """How many connections are open, without those of probes (any thread)."""
        return self.context.connections

    def channels(self) -> Iterator[Channel]:
        """All connections, including those of probes (any thread)."""
        for acceptor in self.context.acceptors:
            yield from list(acceptor.active_channels.values())
        yield from list(self.context.probes.values())

    def in_hand(self) -> list[Request]:
        """The requests in flight, and those with a complete head whose body is still coming (any thread)."""
        # The arriving ones are read first: one that is completed meanwhile is then among those in flight.
        arriving = [channel.arriving for channel in self.channels() if not channel.internal]
        in_flight = self.context.account.in_hand
        return [each for each in arriving if each is not None and each.headers_finished] + list(in_flight.values())

    def moved(self) -> Hashable:
        """A value that changes when a request begins or ends, or a byte is received or sent (any thread)."""
        at = tuple((each.id, each.channel.flushed, each.channel.last_activity) for each in self.in_hand())
        return *self.context.account.counted, at

    def attach(self, sock: Any, *, here: bool = False) -> None:
        """Serve a connection that did not come through a listener, such as a probe's; it is in no count and no log.

        With `here` the loop itself answers, without the app and without a thread of the pool.
        """
        acceptor = self.context.acceptors[0]
        sock.setblocking(False)
        Probe(acceptor, sock, ("probe", None), acceptor.adj, map=self.context.poller).here = here

    def reap(self, now: float) -> None:
        """Close connections that were idle for too long (`channel_timeout`), whether accepting is paused or not.

        Also close those whose client stopped reading (in waitress they would keep a thread for ever), took longer than
        `patience` to send a request, or is slower than `head_timeout` and `min_rate` allow.
        """
        for acceptor in self.context.acceptors:
            shortest = min(acceptor.adj.channel_timeout, self.patience, self.context.limits.head_timeout)
            self.next_reaping = now + min(acceptor.adj.cleanup_interval, shortest / _LOOKS)
            timeout = acceptor.adj.channel_timeout
            for channel in list(acceptor.active_channels.values()):
                slow = not channel.requests and now - channel.grace_from > self.patience
                if slow or channel.stalled(now - timeout):
                    if channel.total_outbufs_len:
                        self._close_slow(channel, "channel_timeout", f"its client read nothing for {timeout}s")
                    else:
                        channel.handle_close()
                else:
                    self._look_at_pace(channel, now, timeout)

    def _look_at_pace(self, channel: Channel, now: float, timeout: float) -> None:
        """Refuse a request that comes too slowly; close the connection of a client that reads too slowly."""
        head_timeout, rate = self.context.limits.head_timeout, self.context.limits.min_rate
        least = rate * timeout
        arriving = channel.arriving if not (channel.keeper or channel.requests) else None
        if arriving is not None and not arriving.headers_finished:
            if now - max(arriving.first_byte, channel.grace_from) > head_timeout:
                self._time_out(channel, arriving, "head_timeout", f"its head took longer than {head_timeout:g}s")
        elif arriving is not None:
            progress = channel.progress = channel.progress or Progress()
            if progress.too_slow(now, arriving, arriving.body_bytes_received, timeout=timeout, least=least):
                self._time_out(channel, arriving, "min_rate", f"its client sent less than {rate} bytes a second")
        elif owed := channel.total_outbufs_len:
            progress, moved = channel.progress or Progress(), channel.flushed
            channel.progress = progress
            if progress.too_slow(now, channel, moved, owed=moved + owed, timeout=timeout, least=least):
                self._close_slow(channel, "min_rate", f"its client read less than {rate} bytes a second")
        elif channel.progress is not None:
            channel.progress = None

    def _time_out(self, channel: Channel, request: Request, limit: str, why: str) -> None:
        self._limited(limit, f"refused {request.snapshot()} with 408: {why} (server.{limit})")
        with channel.requests_lock:
            if channel.request is request:
                request.time_out(f"the request came too slowly: {why}")
                channel.request, channel.sent_continue = None, False
                channel.requests.append(request)
                channel.begin_next()

    def _close_slow(self, channel: Any, limit: str, why: str) -> None:
        if channel.connected:
            self._limited(limit, f"closed the connection of {channel.serving.snapshot()}: {why}")
            channel.handle_close()

    def make_room(self, count: int) -> int:
        """Close up to `count` connections that wait for their clients; returns how many were closed.

        First those without a request, or with only a part of its head, the oldest first; then those whose client sends
        a body or reads an answer more slowly than `SLOW`. Every client has at least `PATIENCE` seconds before that.
        """
        closed, searched = 0, False
        while closed < count:
            if not self._restful and not searched:
                searched = True
                at_rest = [(rest, each) for each in self.channels() if not each.internal and (rest := _rest(each))]
                self._restful.extend(heapq.nsmallest(_AT_ONCE, at_rest, key=operator.itemgetter(0)))
            if not self._restful:
                break
            found, channel = self._restful.popleft()
            rest = _rest(channel) if channel.connected else None
            if rest is not None and rest <= found and not unread(channel.socket):
                what = f"closed the connection of {channel.client} to make room for another (server.connection_limit)"
                self._limited("connection_limit", what)
                channel.handle_close()
                closed += 1
        return closed

    def _limited(self, limit: str, what: str) -> None:
        """Count and log what a limit has done to a client."""
        self.context.account.limited(limit)
        log.warning(what, extra=bounded_by(f"clients that met {limit}"))

    def cut_all(self, reason: str, *, but: Callable[[Connection], bool] = lambda _: False) -> None:
        """Cut all requests on all connections, except those for which `but` is true, and close them."""
        account = self.context.account
        channels = [channel for channel in self.channels() if not channel.internal and not but(channel)]
        arriving = [channel.arriving for channel in channels]
        in_hand = [request for request in list(account.in_hand.values()) if not but(request.channel)]
        # Another thread may be reading: a request that was arriving a moment ago may be in flight or over by now.
        account.cut_together(dict.fromkeys([*in_hand, *filter(None, arriving)]), reason)
        for channel in channels:
            channel.handle_close()

    def forget(self) -> None:
        """In a forked child, close its copies of the sockets of all connections, and nothing else."""
        for channel in self.channels():
            channel.socket.close()


def _rest(channel: Channel) -> tuple[bool, float] | None:
    """The rank of a connection among those that may be closed to make room, the least first; None if it may not.

    First come connections without a request, by the time.monotonic() moment since which they have none; then those
    whose client sends a body or reads an answer more slowly than `SLOW`, by its bytes a second. A connection younger
    than `PATIENCE` seconds is not closed.
    """
    if channel.keeper or channel.requests:
        return None
    now, since = time.monotonic(), channel.grace_from
    if now - since < PATIENCE:
        return None
    arriving = channel.arriving
    if channel.total_outbufs_len and (answered := next(iter(channel.unsettled), None)):
        rate = answered.sent / (now - answered.began)
    elif arriving is not None and arriving.headers_finished:
        rate = arriving.body_bytes_received / (now - arriving.first_byte)
    else:
        return False, since
    return (True, rate) if rate < SLOW else None
