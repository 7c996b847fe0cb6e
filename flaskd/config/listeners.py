"""Checks that no two listeners of the configuration have the same address.

It works on the tree, not on the model, so that a fault has its own place and is reported together with all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaskd.config.faults import Faults, dotted
from flaskd.config.nodes import Items, Node, Path, Scalar, Table, child, shown
from flaskd.sockets import Address

if TYPE_CHECKING:
    from collections.abc import Iterator

_LISTENERS = (("server", "listen"), ("admin", "listen"), ("admin", "agent"), ("shutdown", "endpoint", "listen"))
_ALL = "0.0.0.0"  # noqa: S104 - compared
_LOOPBACK = "127.0.0.1"


def check_listeners(tree: Table, faults: Faults) -> None:
    """Note each listener on the address of another one, and an endpoint under ``profile: production``."""
    taken: dict[str, Address | str] = {}
    for path, node in _listeners(tree):
        key, address = dotted(path), _address(node.text)
        if address is None:
            continue
        if others := [owner for owner, other in taken.items() if _meet(address, other)]:
            message = f"expected an address of its own, got {shown(node)}, which is that of {others[0]}"
            faults.add(node.place, key, message)
        else:
            taken[key] = address
    _check_profile(tree, faults)


def _check_profile(tree: Table, faults: Faults) -> None:
    endpoint, profile = _at(tree, ("shutdown", "endpoint")), child(tree, "profile")
    listen = child(endpoint, "listen") if endpoint else None
    if endpoint is None or not isinstance(listen, Scalar) or listen.value is None or listen.broken:
        return
    if isinstance(profile, Scalar) and profile.text == "production":
        faults.add(
            endpoint.key,
            "shutdown.endpoint",
            "expected none under profile: production, got one; there, use signals or the control socket",
        )


def _listeners(tree: Table) -> Iterator[tuple[Path, Scalar]]:
    for path in _LISTENERS:
        node = _at(tree, path)
        several = (
            [((*path, i), each) for i, each in enumerate(node.items)] if isinstance(node, Items) else [(path, node)]
        )
        yield from ((at, each) for at, each in several if isinstance(each, Scalar) and not each.broken)


def _address(text: str) -> Address | str | None:
    """The address; None if it is malformed, or has port 0, for which the kernel chooses a free port each time."""
    if text.startswith("fd:"):
        return text
    try:
        address = Address.parse(text)
    except ValueError:
        return None  # its fault is noted
    return None if not address.path and not address.port else address


def _meet(one: Address | str, other: Address | str) -> bool:
    """Whether both cannot be bound; a listener on all IPv4 addresses uses each of them (ip(7))."""
    if isinstance(one, str) or isinstance(other, str) or one.path or other.path:
        return one == other
    hosts = {_LOOPBACK if each.host == "localhost" else each.host for each in (one, other)}
    every = (_ALL in hosts and not any(":" in each for each in hosts)) or (
        "::" in hosts and all(":" in each for each in hosts)
    )
    return one.port == other.port and (len(hosts) == 1 or every)


def _at(tree: Table, keys: Path) -> Node | None:
    found: Node | None = tree
    for key in keys:
        found = child(found, key) if found else None
    return found
