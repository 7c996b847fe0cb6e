"""A worker's board: shared memory to which its server writes what it does, and which the supervisor reads at any time.

The board outlives the worker: after a SIGKILL the supervisor can still read which requests were in flight.

Worker and supervisor share no lock. The board relies on three things: the memory is a memfd mapped shared; CPython
stores and loads an aligned word of 8 bytes through a memoryview in one piece; and other processes see stores in the
order in which they are made. x86 guarantees the last one; on arm64 a store may be seen some nanoseconds before an
earlier one, so the reader copies a row twice, and uses it only when both copies are equal.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import threading
import time
from collections.abc import Hashable
from typing import Any, Self

from flaskd.errors import FlaskdError
from flaskd.ledger import InFlight, visible
from flaskd.server.request import Request
from flaskd.server.request_ids import NO_IDS, Ids
from flaskd.server.tally import COUNTS, SUMS, Counts, Tally

_MAGIC, _VERSION = int.from_bytes(b"flskdbrd", "little"), 3
ROWS = 2048
"""How many requests in flight have a row that describes them; a row that was never used costs no memory."""

_WORD = 8
# Positions of single words at the beginning of the memory: moments and sums are floats, all others integers.
_LAST_TURN, _CONNECTIONS, _UNNAMED, _MOVED, _STUCK_AT, _BACKGROUND, _USED, _IN_USE, _LOST = range(2, 11)
_COUNTS = 11
_SUMS = _COUNTS + COUNTS
_IDS = 64
assert _SUMS + SUMS <= _IDS
_ROWS_AT = (_IDS + ROWS) * _WORD

# A row: three moments (first byte, complete, begun); sending or not; thread name; client, method and path; ids.
_ROW = struct.Struct("@dddq32s256s192s")
_NAME = struct.Struct("@32s")
_BEGUN_AT, _SENDING_AT, _NAME_AT = 2, 3, 4 * _WORD
"""Offsets from the beginning of a row: two in words, the last one in bytes."""
_ROW_WORDS = _ROW.size // _WORD
_PATH_LENGTH = 200
_SIZE = _ROWS_AT + ROWS * _ROW.size
_TRIES = 1000
"""Most attempts to copy one row while it changes; a request takes as long as many attempts."""


class Board:
    """The worker's server writes it, each figure from one thread at a time; the supervisor reads it.

    A request in flight has a row. Its id is stored last, which publishes the row; a 0 in its place withdraws it. Ids
    do not repeat: if the id is still the same after a row was copied, all of the copy belongs to one request. A worker
    that is killed while it writes a row leaves that row without an id.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        """The descriptor of the memory; close-on-exec. `close` closes it."""
        self._map = mmap.mmap(fd, _SIZE)
        self._bytes = memoryview(self._map)
        self._words, self._floats = self._bytes.cast("q"), self._bytes.cast("d")
        self._ids = self._words[_IDS : _IDS + ROWS]
        counts, sums = self._words[_COUNTS : _COUNTS + COUNTS], self._floats[_SUMS : _SUMS + SUMS]
        self.counts = Counts(counts, sums)
        """How all requests so far ended."""
        self._views: list[memoryview[Any]] = [counts, sums, self._ids, self._words, self._floats, self._bytes]
        self._free = list(range(ROWS, 0, -1))
        """Free rows, numbered from 1; the last of the list is used next."""
        self._lock = threading.Lock()
        """Held while a row is given out, given back or changed: after its request is over, another may have the row."""

    @classmethod
    def make(cls) -> Self:
        """Make a new board; raises OSError when no memory or no descriptor is left."""
        import fcntl  # noqa: PLC0415 - not on Windows, where there are no workers

        fd = os.memfd_create("flaskd-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _SIZE)
            # If the file were shortened, SIGBUS would kill the process that reads it.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            board = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        board._words[1] = _VERSION
        board._words[0] = _MAGIC
        return board

    @classmethod
    def attach(cls, fd: int) -> Self:
        """Open the board behind a descriptor and own that; raises FlaskdError for a board of another layout."""
        head = os.pread(fd, 2 * _WORD, 0)
        if os.fstat(fd).st_size != _SIZE or head != struct.pack("@qq", _MAGIC, _VERSION):
            raise FlaskdError(f"cannot use the board at descriptor {fd}: it is of another version; restart flaskd")
        os.set_inheritable(fd, False)
        return cls(fd)

    def close(self) -> None:
        """Release memory and descriptor; the board cannot be used after that."""
        if self._map.closed:
            return
        for view in self._views:
            view.release()
        self._map.close()
        os.close(self.fd)

    # --- what the worker's server writes ----------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        """Note a request of which all has been received (one thread at a time)."""
        try:
            row = self._free.pop()
        except IndexError:
            with self._lock:
                request.row = -1
                self._words[_UNNAMED] += 1
            return
        path = request.request_uri.partition("?")[0]
        if len(path) > _PATH_LENGTH:
            path = path[:_PATH_LENGTH] + "..."
        text = f"{request.client}\n{request.command}\n{path}".encode("latin-1", "replace")
        at, ids = _ROWS_AT + (row - 1) * _ROW.size, request.ids
        named = "\n".join(ids).encode("ascii") if ids is not NO_IDS else b""
        _ROW.pack_into(self._map, at, request.first_byte, request.complete, 0.0, 0, b"", text, named)
        request.row = row
        self._ids[row - 1] = request.id

    def begin(self, request: Request) -> None:
        """Note that a thread begins to run the app for a request."""
        name = _encoded(request.thread.name) if request.thread is not None else b""
        with self._lock:
            if (row := request.row - 1) >= 0:
                _NAME.pack_into(self._map, _ROWS_AT + row * _ROW.size + _NAME_AT, name)
                self._floats[_ROWS_AT // _WORD + row * _ROW_WORDS + _BEGUN_AT] = request.began

    def send(self, request: Request, *, sending: bool = True) -> None:
        """Note that an answer waits to be sent or, with `sending=False`, that its thread no longer waits for that."""
        with self._lock:
            if (row := request.row - 1) >= 0:
                self._words[_ROWS_AT // _WORD + row * _ROW_WORDS + _SENDING_AT] = sending

    def leave(self, request: Request) -> None:
        """Note that a request is over; called once for each `enter`, after the request was counted."""
        with self._lock:
            row, request.row = request.row, 0
            if row > 0:
                self._ids[row - 1] = 0
                self._free.append(row)
            else:
                self._words[_UNNAMED] -= 1

    def turned(self, now: float) -> None:
        """Note that the loop has turned at `now`, a time.monotonic() moment."""
        self._floats[_LAST_TURN] = now

    def connect(self, count: int) -> None:
        """Note how many connections are open."""
        self._words[_CONNECTIONS] = count

    def look(self, *, moved: Hashable, stuck_at: Hashable | None, background: int, lost: int) -> None:
        """Note what is written once a second, because each change would cost too much.

        `stuck_at` is the value of `Account.all_are_at`.
        """
        self._words[_MOVED] = hash(moved)
        self._words[_STUCK_AT] = (hash(stuck_at) or 1) if stuck_at is not None else 0
        self._words[_BACKGROUND] = background
        self._words[_LOST] = lost

    def use(self, now: float) -> None:
        """Note that a request that counts for the idle stop came or was answered at `now`."""
        self._floats[_USED] = now

    def count_for_idle(self, *, in_use: bool) -> None:
        """Note whether a request or background work is under way that counts for the idle stop."""
        self._words[_IN_USE] = in_use

    # --- what the supervisor reads ----------------------------------------------------------------------------------

    def tally(self) -> Tally:
        """How all requests so far ended: the worker's `Account.tally`."""
        return self.counts.tally()

    @property
    def last_turn(self) -> float:
        """When the loop last turned (time.monotonic(), the same clock in all processes); 0 before its first turn."""
        return self._floats[_LAST_TURN]

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return self._words[_CONNECTIONS]

    @property
    def queued(self) -> int:
        """How many requests wait for a place; requests without a row are counted as waiting."""
        return sum(each.phase == "queued" for each in self.in_flight()) + self.unnamed

    @property
    def busy(self) -> int:
        """How many requests are being run, each by a thread."""
        return sum(each.phase == "running" for each in self.in_flight())

    @property
    def unnamed(self) -> int:
        """How many requests in flight have no row, because none was free."""
        return self._words[_UNNAMED]

    @property
    def background(self) -> int:
        """How many pieces of background work were under way when the loop last looked, which it does every second."""
        return self._words[_BACKGROUND]

    @property
    def lost(self) -> int:
        """How many threads still ran a request that was over, when the loop last looked (every second)."""
        return self._words[_LOST]

    def moved(self) -> Hashable:
        """A value that changes, within a second, when a request begins or ends or a byte of one is received or sent."""
        return *self.tally().outcomes.values(), self._words[_MOVED]

    def all_are_at(self) -> Hashable | None:
        """A hash of `Account.all_are_at` when the loop last looked (every second); it can only be compared."""
        return self._words[_STUCK_AT] or None

    def idle_for(self) -> float:
        """Seconds since a request that counts for the idle stop came or was answered; 0 while one is in hand.

        Only for a worker that watches for idleness (`WaitressThread.watch_idle`); counted from the begin of its watch.
        That a request is in hand may be noted late, by a quarter of the idle time at most; the number is small
        meanwhile, because the request's coming was noted at once.
        """
        return 0.0 if self._words[_IN_USE] else time.monotonic() - self._floats[_USED]

    def in_flight(self) -> list[InFlight]:
        """The requests in flight, oldest first, without stacks: at most `ROWS`; `unnamed` is the number of others."""
        found = [self._read(row) for row, number in enumerate(self._ids.tolist()) if number]
        return sorted(filter(None, found), key=lambda each: each.id)

    def _read(self, row: int) -> InFlight | None:
        place = slice(_ROWS_AT + row * _ROW.size, _ROWS_AT + (row + 1) * _ROW.size)
        for _ in range(_TRIES):
            number = self._ids[row]
            if not number:
                return None  # the request has ended meanwhile
            copy, again = self._map[place], self._map[place]
            if copy == again and self._ids[row] == number:
                return _in_flight(number, copy)
        return None


def _in_flight(number: int, row: bytes) -> InFlight:
    first_byte, _complete, began, sending, name, text, named = _ROW.unpack(row)
    client, method, path = (*text.rstrip(b"\0").decode("latin-1").split("\n", 2), "", "")[:3]
    ids = Ids(*named.rstrip(b"\0").decode("latin-1").split("\n")[:2])
    return InFlight(
        id=number,
        client=client,
        method=method or "?",
        path=visible(path),
        age=time.monotonic() - first_byte,
        phase="sending" if sending else "running" if began else "queued",
        thread=name.rstrip(b"\0").decode("latin-1") if began and not sending else "",
        request_id=ids.request_id,
        traceparent=ids.traceparent,
    )


@functools.lru_cache(maxsize=256)
def _encoded(name: str) -> bytes:
    return name.encode("latin-1", "replace")
