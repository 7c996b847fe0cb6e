"""Answers that the loop goes on with by itself: it puts out a part every second, say, and no thread waits meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from waitress.channel import ClientDisconnected

log = logging.getLogger("flaskd.server")


class Pushed:
    """What an app may return where the loop runs it (`threads=0`): an answer that goes on until its client leaves.

    `news` gives a part, at once, and is called every `every` seconds. For the server the answer is over with its first
    part: the connection counts as idle, so a drain closes it and waits for nothing. A client that has not read the part
    before gets no other one, and is closed like any that reads too slowly.
    """

    _channel: Any = None
    _chunked = False

    def __init__(self, news: Callable[[], bytes], every: float) -> None:
        self.news = news
        self._every = every

    def __iter__(self) -> Iterator[bytes]:
        """The first part alone, for a server that does not know of this."""
        yield self.news()

    @property
    def open(self) -> bool:
        """Whether its client is there."""
        channel = self._channel
        return channel is not None and bool(channel.connected) and not channel.half_closed

    def go_on(self, channel: Any, *, chunked: bool) -> None:
        """Put out more from now on (loop's thread)."""
        self._channel, self._chunked = channel, chunked
        channel.context.timers.at(time.monotonic() + self._every, self._push)

    def _push(self, now: float) -> None:
        channel = self._channel
        if not self.open or channel.context.drains:  # then it is closed like an idle one
            return
        try:
            if not channel.total_outbufs_len:
                part = self.news()
                channel.write_soon(b"%X\r\n%b\r\n" % (len(part), part) if self._chunked else part)
                channel.grace_from = channel.last_activity = time.monotonic()  # it is not idle
                channel.context.poller.touch(channel)
        except ClientDisconnected:
            return
        except Exception:
            log.exception("cannot go on with an answer: the connection is closed")
            channel.handle_close()
            return
        channel.context.timers.at(now + self._every, self._push)
