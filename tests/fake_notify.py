"""The service manager's end of sd_notify(3) for tests: a datagram socket at NOTIFY_SOCKET."""

import socket
from contextlib import contextmanager

from patience import PATIENCE


class Receiver:
    """Receives whole messages as bytes; `address` is the value for NOTIFY_SOCKET."""

    def __init__(self, address):
        self.address = str(address)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.address[1:] if self.address.startswith("@") else self.address)
        self._socket.settimeout(PATIENCE)

    def fileno(self):
        """The socket's descriptor; it can be read when there is a message."""
        return self._socket.fileno()

    def message(self):
        """Give the next message, waiting for it."""
        return self._socket.recv(65536)

    def message_with_descriptors(self):
        """Give the next message and the descriptors that came with it, waiting for it."""
        message, descriptors, _, _ = socket.recv_fds(self._socket, 65536, 4)
        return message, descriptors

    def messages(self):
        """Give all messages that are there now."""
        self._socket.setblocking(False)
        found = []
        try:
            while True:
                found.append(self._socket.recv(65536))
        except BlockingIOError:
            return found
        finally:
            self._socket.settimeout(PATIENCE)

    def close(self):
        """Close the socket; its node stays, like that of a manager that died."""
        self._socket.close()


@contextmanager
def receiving(address):
    """Give a `Receiver` at a path, or at an abstract address that starts with "@"."""
    receiver = Receiver(address)
    try:
        yield receiver
    finally:
        receiver.close()
