"""A drain in the loop: the gate, the backlog, what is in hand, the deadline, the report."""

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
"""Seconds in which handshakes under way complete behind a closed gate, where the kernel does not tell of them."""
GATE_MOST = 1.0
"""Seconds in which they complete where it does: to a client far away it is a long way, and a busy one is slow. Bounded,
because some never complete, as those of who only looks for open ports."""
GATE_AGAIN = 0.01
"""Seconds until the kernel is asked again whether some are under way."""
BACKLOG = 4096
"""Connections taken from the backlog of a listener that could not be gated. Bounded, because clients come back."""
TOO_LATE = "the deadline came"
_ROOM_AGAIN = 0.05
"""Seconds until a backlog is tried again for which there was no room."""
_LAST_FLUSH = 0.25
"""Seconds past the deadline in which the refusals of what never started get out."""


class Draining:
    """One drain, in the loop's thread; `begins` and `deadline` are time.monotonic() moments.

    Until it begins, the loop goes on accepting, and each response closes its connection. `began` is called when it
    begins, and gives the connections on which a response without an end of its own is being sent.
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
        """Acceptors whose backlog is still to be taken."""
        self._gate_until = self._gate_at_most = 0.0
        self._last_batch_taken = self._told_closed = False
        self._streams: list[tuple[float, Connection]] = []
        self.cut: list[Cut] = []
        """What was broken off so far."""
        self._last_moment = 0.0
        self._unaccepted = 0

    @property
    def next_moment(self) -> float:
        """The time.monotonic() moment at which `advance` has something to do whatever happens."""
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
        """Take no new connections; again when a listener that somebody shared is ours alone by now."""
        now = time.monotonic()
        self._gate_until, self._gate_at_most = now + GATE, now + GATE_MOST
        for acceptor in self._context.acceptors:
            listener = acceptor.listener
            if not acceptor.accepting or acceptor in self._gated:
                continue
            if listener.shared and listener.copied and not listener.kept:
                acceptor.close_listener()  # other workers go on accepting; it keeps no place and no client
            elif listener.shared:
                self._context.poller.listen(acceptor, on=False)  # its backlog belongs to the next owner
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
        """Wait until handshakes under way are done, or had their time behind the gate, and let all of them in."""
        while self._gated and ((left := self._gate_until - time.monotonic()) > 0 or (patient and self._connecting())):
            self._turn(max(left, GATE_AGAIN))
        self._let_all_in()

    def _look_at_the_gate(self, now: float) -> None:
        if self._connecting():
            self._gate_until = now + GATE_AGAIN
        else:
            self._let_all_in()

    def _connecting(self) -> bool:
        """Whether a client is still on its way through the gate, and has time left."""
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
        while poller.handle_next():
            pass

    def _let_in(self, acceptor: Any) -> None:
        """Take the backlog and close the listener; where the connections are at their limit, as soon as some end."""
        acceptor.accept_some(BACKLOG)
        if self._admission.full:
            self._gated.append(acceptor)
        else:
            self._close(acceptor)

    def _close(self, acceptor: Any) -> None:
        """Close the listener, and count whom that resets: no client, where other workers have copies of it."""
        if not acceptor.listener.copied and (left := acceptor.listener.waiting()):
            log.warning(f"{left} connections in the backlog of {acceptor.listener.address} are reset")
            self._unaccepted += left
        acceptor.close_listener()

    def end_streams(self, channels: Sequence[Connection]) -> None:
        """End streams at a chunk boundary once their grace, counted from the begin of the drain, is over."""
        moment = self._began + self._context.stream_grace
        self._streams += [(moment, channel) for channel in channels]

    def advance(self, now: float) -> None:
        """Do what is due; report when nothing is open or in the background any more, or the deadline came."""
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
        """Take once what waits where nobody knows whether a successor comes; whether there was something."""
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
        """Answer 503 to what waits in the queue, or before the gate: nobody has begun it, and another server may."""
        self._context.refusing = True
        if self._gated:
            self.pass_the_gate(patient=False)
            self._turn(0)  # read what those have sent
        self._context.answer()
        for acceptor in self._gated:
            self._close(acceptor)
        self._gated = []
        self._tell_if_closed()
        for channel in self._context.pool.take_back():
            for request in channel.requests:
                request.rejected = True
            channel.serve_here()
        self._context.answer()  # to what was pipelined behind

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
