"""The journal's native protocol: each entry is one datagram; fields have names, and values may have newlines.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: a field is `KEY=value` and a newline; if the value has newlines, it is
`KEY`, a newline, the length as 64 bits little-endian, the value and a newline. An entry that is too large for a
datagram is sent as a sealed memory file.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import socket
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
_MOST = 1 << 20
"""The longest value, in bytes; the journal accepts more, but such an entry is not readable."""
_NOT_IN_NAMES = re.compile(r"[^A-Z0-9_]")
_LONGEST_NAME = 64


@functools.lru_cache(maxsize=256)
def field_name(key: str) -> str:
    """The journal's name for one of flaskd's keys: ``FLASKD_`` and the key in capitals (A-Z, 0-9, _; at most 64)."""
    return ("FLASKD_" + _NOT_IN_NAMES.sub("_", key.upper()))[:_LONGEST_NAME]


def encode(fields: Mapping[str, str]) -> bytes:
    """One entry as bytes."""
    plain, rest = [], []
    for name, text in fields.items():
        if "\n" in text or len(text) > _MOST:
            value = text.encode("utf-8", "replace")[:_MOST]
            rest += [name.encode(), b"\n", len(value).to_bytes(8, "little"), value, b"\n"]
        else:
            plain.append(f"{name}={text}\n")
    return b"".join(["".join(plain).encode("utf-8", "replace"), *rest])


class Journal:
    """Sends entries to the journal, without connecting the socket, so that it also works when that has restarted."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def send(self, entry: bytes) -> None:
        """Send what `encode` made; raises OSError if the journal does not receive it."""
        try:
            self._socket.sendto(entry, self._path)
        except OSError as error:
            if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            self._send_as_file(entry)

    def _send_as_file(self, entry: bytes) -> None:
        import fcntl  # noqa: PLC0415 - Windows has neither this module nor a journal

        fd = os.memfd_create("flaskd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(entry)
            while view:
                view = view[os.write(fd, view) :]
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))
            self._socket.sendmsg([b""], [rights], 0, self._path)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the socket."""
        with contextlib.suppress(OSError):
            self._socket.close()
