"""Addresses of listeners, as people write them."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import quote

_EXPECTED = "expected HOST:PORT, [IPv6]:PORT, :PORT or unix:/path"
_MAX_PORT = 65535
MAX_UNIX_PATH = 107
"""The longest path in bytes: ``sun_path`` has 108 with its terminating NUL (unix(7))."""


@dataclass(frozen=True)
class Address:
    """The address of a listener: ``HOST:PORT``, ``[IPv6]:PORT``, ``:PORT`` (every IPv4 address) or ``unix:/path``."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address; raises ValueError with a message that says what was expected."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path.startswith("/") or "\0" in path:
                raise ValueError("expected unix: with an absolute path, such as unix:/run/shop/http.sock")
            if len(os.fsencode(path)) > MAX_UNIX_PATH:
                raise ValueError(f"expected unix: with a path of at most {MAX_UNIX_PATH} bytes")
            return cls(path=path)
        host, colon, port = text.rpartition(":")
        if not colon or not re.fullmatch(r"[0-9]{1,5}", port):
            raise ValueError(_EXPECTED)
        if int(port) > _MAX_PORT:
            raise ValueError(f"expected a port of at most {_MAX_PORT}")
        if host.startswith("[") and host.endswith("]"):
            return cls(_ip(host[1:-1], 6), int(port))
        if re.fullmatch(r"[0-9.]+", host):
            return cls(_ip(host, 4), int(port))
        if host and not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", host):
            raise ValueError(_EXPECTED)
        return cls(host or "0.0.0.0", int(port))  # noqa: S104 - the user asked for it

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL for clients on this machine; a wildcard address becomes the loopback address."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared
        return replace(self, host=loopback).announced

    @property
    def announced(self) -> str:
        """The URL for people; a wildcard address stays as it is, because other machines reach it, too."""
        return f"http+unix://{quote(self.path, safe='')}/" if self.path else f"http://{self}/"


def check_serving(host: object, port: object, threads: object) -> None:
    """Check the arguments of a server; raises TypeError for a wrong type, ValueError for a number out of range."""
    if not isinstance(host, str):
        raise TypeError(f"cannot serve on host {host!r}: expected a string, got {type(host).__name__}")
    for name, number, least, most in (("port", port, 0, _MAX_PORT), ("threads", threads, 1, None)):
        wanted = f"expected a whole number from {least} to {most}" if most else f"expected a whole number from {least}"
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"cannot serve with {name}={number!r}: {wanted}, got {type(number).__name__}")
        if number < least or (most and number > most):
            raise ValueError(f"cannot serve with {name}={number!r}: {wanted}, got {number}")


def _ip(text: str, version: int) -> str:
    try:
        right = ipaddress.ip_address(text).version == version
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"expected an IPv{version} address and a port")
    return text
