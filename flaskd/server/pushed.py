"""Answers that the loop continues by itself, with a part every second, for example, and without a waiting thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from waitress.channel import ClientDisconnected

log = logging.getLogger("flaskd.server")


class Pushed:
    """What an app may return if the loop runs it (`threads=0`): an answer that goes on until its client leaves.

    `news` is called every `every` seconds and returns the next part; it must not wait. For the server the answer is
    over after its first part: the connection counts as idle, so a drain closes it without waiting. While a client has
    not read the last part it gets no other one, and it is closed like any client that reads too slowly.
    """

    _channel: Any = None
    _chunked = False

    def __init__(self, news: Callable[[], bytes], every: float) -> None:
        self.news = news
        self._every = every

    def __iter__(self) -> Iterator[bytes]:
        """The first part alone, for a server that does not support this class."""
        yield self.news()

    @property
    def open(self) -> bool:
        """Whether its client is still connected."""
        channel = self._channel
        return channel is not None and bool(channel.connected) and not channel.half_closed

    def go_on(self, channel: Any, *, chunked: bool) -> None:
        """Send a part every `every` seconds from now on (loop's thread)."""
        self._channel, self._chunked = channel, chunked
        channel.context.timers.at(time.monotonic() + self._every, self._push)

    def _push(self, now: float) -> None:
        channel = self._channel
        if not self.open or channel.context.drains:  # a drain closes it as an idle connection
            return
        try:
            if not channel.total_outbufs_len:
                part = self.news()
                channel.write_soon(b"%X\r\n%b\r\n" % (len(part), part) if self._chunked else part)
                channel.grace_from = channel.last_activity = time.monotonic()  # so that it is not closed as idle
                channel.context.poller.touch(channel)
        except ClientDisconnected:
            return
        except Exception:
            log.exception("cannot go on with an answer: the connection is closed")
            channel.handle_close()
            return
        channel.context.timers.at(now + self._every, self._push)
