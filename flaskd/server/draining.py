"""A drain as the loop carries it out: it closes the gate, empties the backlog, finishes requests, and reports.

The gate is what refuses new connections on a listener while those whose handshake is under way can still complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from flaskd.background_work import in_background, left_behind
from flaskd.ledger import Cut, DrainReport
from flaskd.server.admission import Admission
from flaskd.server.request import Connection

log = logging.getLogger("flaskd.server")

GATE = 0.03
"""Seconds that handshakes under way have to complete behind a closed gate, where the kernel does not report them."""
GATE_MOST = 1.0
"""The same in seconds, at most, where the kernel does report them: a client may be far away or busy. Bounded, because
some handshakes never complete, such as a port scanner's."""
GATE_AGAIN = 0.01
"""Seconds until the kernel is asked again whether handshakes are under way."""
BACKLOG = 4096
"""Most connections accepted from the backlog of a listener without a gate. Bounded, because clients come back."""
TOO_LATE = "the deadline came"
_ROOM_AGAIN = 0.05
"""Seconds until a backlog that met the connection limit is tried again."""
_LAST_FLUSH = 0.25
"""Seconds after the deadline in which requests that never began still get their 503."""


class Draining:
    """One drain, in the loop's thread; `begins` and `deadline` are time.monotonic() moments.

    Until it begins, it is announced: the loop goes on accepting, and each response closes its connection. When it
    begins it calls `began`, which returns the connections on which a stream is being sent; when it is over, `over`.
    """

    def __init__(
        self,
        admission: Admission,
        begins: float,
        deadline: float,
        *,
        began: Callable[[], Sequence[Connection]],
        over: Callable[[DrainReport], object],
        counted_from: tuple[int, int],
    ) -> None:
        self.deadline = deadline
        self._begins = begins
        self._begun = False
        self._begin_loop = began
        self._admission = admission
        self._connections = admission.connections
        self._context = admission.context
        self._over = over
        self._counted_from = counted_from
        self._asked = self._began = time.monotonic()
        self._gated: list[Any] = []
        """Acceptors whose backlog has not been emptied yet."""
        self._gate_until = self._gate_at_most = 0.0
        self._last_batch_taken = self._told_closed = False
        self._streams: list[tuple[float, Connection]] = []
        self.cut: list[Cut] = []
        """The requests that were cut so far."""
        self._last_moment = 0.0
        self._unaccepted = 0

    @property
    def next_moment(self) -> float:
        """The time.monotonic() moment at which `advance` must be called, even if nothing else happens."""
        if not self._begun:
            return self._begins
        moments = [self._last_moment or self.deadline]
        if self._gated:
            moments.append(self._gate_until)
        if self._streams:
            moments.append(self._streams[0][0])
        return min(moments)

    def _begin(self) -> None:
        """Close the gates, and look at every connection."""
        self._begun, self._began = True, time.monotonic()
        streams = self._begin_loop()
        self.close_gates()
        for channel in self._connections.channels():
            self._context.poller.touch(channel)
        self.end_streams(streams)

    def hasten(self, deadline: float) -> None:
        """Begin at the next look, and end at `deadline` at the latest."""
        self._begins = min(self._begins, time.monotonic())
        self.deadline = min(self.deadline, deadline)

    def close_gates(self) -> None:
        """Take no new connections; called again when another process has stopped sharing a listener."""
        now = time.monotonic()
        self._gate_until, self._gate_at_most = now + GATE, now + GATE_MOST
        for acceptor in self._context.acceptors:
            listener = acceptor.listener
            if not acceptor.accepting or acceptor in self._gated:
                continue
            if listener.shared and listener.copied and not listener.kept:
                acceptor.close_listener()  # other workers go on accepting from their copies
            elif listener.shared:
                self._context.poller.listen(acceptor, on=False)  # another process accepts its backlog
            elif listener.gate():
                self._gated.append(acceptor)
            else:
                listener.withdraw()
                self._let_in(acceptor)
        self._tell_if_closed()

    def _tell_if_closed(self) -> None:
        if not self._gated and not self._told_closed:
            self._told_closed = True
            self._context.on_closed()

    def pass_the_gate(self, *, patient: bool = True) -> None:
        """Wait until the handshakes under way have completed, or their time is over; then accept all connections."""
        while self._gated and ((left := self._gate_until - time.monotonic()) > 0 or (patient and self._connecting())):
            self._turn(max(left, GATE_AGAIN))
        self._let_all_in()

    def _look_at_the_gate(self, now: float) -> None:
        if self._connecting():
            self._gate_until = now + GATE_AGAIN
        else:
            self._let_all_in()

    def _connecting(self) -> bool:
        """Whether a handshake is under way behind a gate and still has time."""
        return time.monotonic() < self._gate_at_most and any(each.listener.handshakes() for each in self._gated)

    def _let_all_in(self) -> None:
        self._gate_until = time.monotonic() + _ROOM_AGAIN
        gated, self._gated = self._gated, []
        for acceptor in gated:
            self._let_in(acceptor)
        self._tell_if_closed()

    def _turn(self, timeout: float) -> None:
        poller = self._context.poller
        poller.wait(timeout)
        while poller.events:
            poller.handle()  # gives no connection: while answers close theirs, each request is queued

    def _let_in(self, acceptor: Any) -> None:
        """Empty the backlog and close the listener; at the connection limit, do so once some connections have ended."""
        acceptor.accept_some(BACKLOG)
        if self._admission.full:
            self._gated.append(acceptor)
        else:
            self._close(acceptor)

    def _close(self, acceptor: Any) -> None:
        """Close the listener, and count the connections that this resets: none where other workers have copies."""
        if not acceptor.listener.copied and (left := acceptor.listener.waiting()):
            log.warning(f"{left} connections in the backlog of {acceptor.listener.address} are reset")
            self._unaccepted += left
        acceptor.close_listener()

    def end_streams(self, channels: Sequence[Connection]) -> None:
        """End these streams between two parts, `stream_grace` seconds after the begin of the drain."""
        moment = self._began + self._context.stream_grace
        self._streams += [(moment, channel) for channel in channels]

    def advance(self, now: float) -> None:
        """Do what is due; report once no connection is open and no background work is left, or the deadline came."""
        if not self._begun:
            if now < self._begins:
                return
            self._begin()
        if self._gated and now >= self._gate_until:
            self._look_at_the_gate(now)
        while self._streams and self._streams[0][0] <= now:
            self._streams.pop(0)[1].end_stream()
        if not self._gated and not self._open() and not self._last_batch():
            self._report()
        elif self._last_moment:
            if now >= self._last_moment:
                self._connections.cut_all(TOO_LATE)
                self._report()
        elif now >= self.deadline:
            self._refuse_what_never_started()
            self._connections.cut_all(TOO_LATE, but=lambda channel: channel.serving_was_refused)
            self._last_moment = now + _LAST_FLUSH
            if not self._open():  # nothing was refused, so there is no refusal to flush
                self._report()

    def _last_batch(self) -> bool:
        """Accept, once, what waits on shared listeners that may have no next owner; returns whether there was any."""
        if self._last_batch_taken:
            return False
        self._last_batch_taken = True
        waiting = [each for each in self._context.acceptors if each.accepting and each.listener.last_batch]
        taken = [acceptor.accept_some(BACKLOG) for acceptor in waiting]
        return any(taken)

    def _open(self) -> bool:
        if in_background() and not self._last_moment:
            return True
        return self._context.account.in_flight > 0 or any(
            not channel.internal for channel in self._connections.channels()
        )

    def _refuse_what_never_started(self) -> None:
        """Answer 503 to requests that wait in the queue or at the gate: none has begun, so a retry is safe."""
        self._context.refusing = True
        if self._gated:
            self.pass_the_gate(patient=False)
            self._turn(0)  # read what the accepted connections have sent
        self._context.answer()
        for acceptor in self._gated:
            self._close(acceptor)
        self._gated = []
        self._tell_if_closed()
        for channel in self._context.pool.take_back():
            for request in channel.requests:
                request.rejected = True
            channel.serve_here()
        self._context.answer()  # to the requests that were pipelined behind these

    def _report(self) -> None:
        completed, rejected = self._counted_from
        account = self._context.account
        self._over(
            DrainReport(
                completed=account.completed - completed,
                rejected=account.rejected - rejected,
                cut=tuple(self.cut),
                took=time.monotonic() - self._asked,
                background=left_behind(),
                unaccepted=self._unaccepted,
            )
        )
