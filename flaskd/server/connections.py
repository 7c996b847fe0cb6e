"""The open connections: those that say nothing for too long are closed, and at a deadline all are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from flaskd.server.channel import Channel, Probe
from flaskd.server.context import Context
from flaskd.server.request import Connection, Request

log = logging.getLogger("flaskd.server")

_LOOKS = 10
"""How often connections are looked at within the time that they have, which is so kept to a tenth, or to a turn."""


class Connections:
    """All open connections of a loop, in its thread, except where it says "any thread"."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.patience = float("inf")
        """Seconds that a client has for a request, since it connected or had its last answer."""
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
        And those that take longer than `patience` over a request.
        """
        for acceptor in self.context.acceptors:
            shortest = min(acceptor.adj.channel_timeout, self.patience)
            self.next_reaping = now + min(acceptor.adj.cleanup_interval, shortest / _LOOKS)
            cutoff = now - acceptor.adj.channel_timeout
            for channel in list(acceptor.active_channels.values()):
                slow = not channel.requests and now - channel.grace_from > self.patience
                if slow or channel.stalled(cutoff):
                    if channel.requests:
                        seconds = acceptor.adj.channel_timeout
                        log.warning(f"{channel.requests[0].snapshot()}: its client read nothing for {seconds}s: closed")
                    channel.handle_close()

    def cut_all(self, reason: str, *, but: Callable[[Connection], bool] = lambda _: False) -> None:
        """Break off whatever is in hand on all connections `but` some, and close them."""
        account = self.context.account
        channels = [channel for channel in self.channels() if not channel.internal and not but(channel)]
        arriving = [channel.arriving for channel in channels]
        in_hand = [request for request in list(account.in_hand.values()) if not but(request.channel)]
        # A thread may be reading: what still arrived a moment ago may be in hand by now, or over.
        for request in dict.fromkeys([*in_hand, *filter(None, arriving)]):
            account.cut_one(request, reason)
        for channel in channels:
            channel.handle_close()

    def forget(self) -> None:
        """Close the sockets of all connections, and nothing else: in a forked child they are not ours."""
        for channel in self.channels():
            channel.socket.close()
