"""The open connections: those that say nothing for too long are closed, and at a deadline all are."""

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
"""How often connections are looked at within the time that they have, which is so kept to a tenth, or to a turn."""
_AT_ONCE = 64
"""How many connections are found at once that may be closed to make room."""


class Connections:
    """All open connections of a loop, in its thread, except where it says "any thread"."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.patience = float("inf")
        """Seconds that a client has for a request, since it connected or had its last answer."""
        self._restful: deque[tuple[tuple[bool, float], Channel]] = deque()
        """Those that may be closed to make room, the first one first."""
        context.waiting.close = lambda channel, why: context.call(
            lambda: self._close_slow(channel, "outbuf_high_watermark", why)
        )
        self.next_reaping = 0.0
        """The time.monotonic() moment at which to look again for those that say nothing."""

    @property
    def count(self) -> int:
        """How many are open, without those of probes (any thread)."""
        return self.context.connections

    def channels(self) -> Iterator[Channel]:
        """All of them, those of probes too (any thread)."""
        for acceptor in self.context.acceptors:
            yield from list(acceptor.active_channels.values())
        yield from list(self.context.probes.values())

    def in_hand(self) -> list[Request]:
        """The requests in flight, and those still coming whose head is complete (any thread)."""
        # First those still coming: one that has come meanwhile is then among the others.
        arriving = [channel.arriving for channel in self.channels() if not channel.internal]
        in_flight = self.context.account.in_hand
        return [each for each in arriving if each is not None and each.headers_finished] + list(in_flight.values())

    def moved(self) -> Hashable:
        """How far the requests are: two answers differ when one began or ended, or a byte moved (any thread)."""
        at = tuple((each.id, each.channel.flushed, each.channel.last_activity) for each in self.in_hand())
        return *self.context.account.counted, at

    def attach(self, sock: Any, *, here: bool = False) -> None:
        """Serve a connection that came through no listener, such as a probe's; it is in no count and no log.

        With `here` the loop itself answers it, and no thread of the pool.
        """
        acceptor = self.context.acceptors[0]
        sock.setblocking(False)
        Probe(acceptor, sock, ("probe", None), acceptor.adj, map=self.context.poller).here = here

    def reap(self, now: float) -> None:
        """Close connections that were idle for too long, as waitress' maintenance does, accepting or not.

        Clients that stopped reading, too: waitress would let them keep the thread that waits for them for ever.
        And those that take longer than `patience` over a request, or are slower than they may be.
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
                self._time_out(channel, arriving, "min_rate", f"of its body came less than {rate} bytes a second")
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
            self._limited(limit, f"{channel.serving.snapshot()}: {why}: closed")
            channel.handle_close()

    def make_room(self, count: int) -> int:
        """Close up to `count` connections whose clients are waited for; returns how many.

        At first those on which there is no request, or no more than a part of its head, the oldest first; then those
        whose client sends a body or reads an answer more slowly than `SLOW`. None whose client had no time to speak.
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
                what = f"closed the connection of {channel.client}: another one has its place (server.connection_limit)"
                self._limited("connection_limit", what)
                channel.handle_close()
                closed += 1
        return closed

    def _limited(self, limit: str, what: str) -> None:
        """Count and tell what a limit has done to a client."""
        self.context.account.limited(limit)
        log.warning(what, extra=bounded_by(f"clients that met {limit}"))

    def cut_all(self, reason: str, *, but: Callable[[Connection], bool] = lambda _: False) -> None:
        """Break off whatever is in hand on all connections `but` some, and close them."""
        account = self.context.account
        channels = [channel for channel in self.channels() if not channel.internal and not but(channel)]
        arriving = [channel.arriving for channel in channels]
        in_hand = [request for request in list(account.in_hand.values()) if not but(request.channel)]
        # A thread may be reading: what still arrived a moment ago may be in hand by now, or over.
        account.cut_together(dict.fromkeys([*in_hand, *filter(None, arriving)]), reason)
        for channel in channels:
            channel.handle_close()

    def forget(self) -> None:
        """Close the sockets of all connections, and nothing else: in a forked child they are not ours."""
        for channel in self.channels():
            channel.socket.close()


def _rest(channel: Channel) -> tuple[bool, float] | None:
    """How a connection may be closed to make room for another one, the least first; None where it may not.

    First those with no request in hand, by the time.monotonic() moment since when that is so; then those whose client
    sends a body or reads an answer, by its bytes a second. It had time to speak, and is slow.
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
