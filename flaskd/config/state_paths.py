"""Checks that no two writers use the same file under the state directory, where one would overwrite the other's.

It works on the tree, not on the model, so that these faults are reported together with all others.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from flaskd.config.faults import Faults, dotted
from flaskd.config.model import ShutdownConfig
from flaskd.config.nodes import Node, Scalar, Table, child, shown
from flaskd.config.policies import action_of, enabled, policy_tables, workers_of
from flaskd.text import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flaskd.config.action_spec import Actions, Fields

MARK_FILE, KEY_FILE = "running.json", "cache.key"
"""Files that flaskd itself keeps there, apart from those that the configuration names."""

WORKER = "{worker}"
"""Stands for the number of a worker's slot in the path of a file that each worker keeps."""


def check_state_paths(
    tree: Table, fields: Mapping[str, Fields | None], actions: Actions, environ: Mapping[str, str], faults: Faults
) -> None:
    """Note each path that another writer has already, however it is spelled.

    `fields` are the validated fields of each policy. A relative path is under the state directory, which the service
    manager may name (``$STATE_DIRECTORY``); if it is not known yet, relative and absolute paths count as different. If
    there are several workers, a file that each of them keeps must have the worker's number in its path.
    """
    kept = list(_kept(tree, fields, actions))
    if workers_of(tree) not in {0, 1}:
        for key, node, path, said in kept:
            if WORKER not in path:
                such = "" if isinstance(node, Scalar) and node.secret else f" such as {quoted(_numbered(path))}"
                expected = f"expected a path with {WORKER} in it{such}, for each worker keeps a file of its own"
                faults.add(node.place, key, f"{expected}, got {said}")
    state = environ.get("STATE_DIRECTORY", "").partition(":")[0] or "state"
    taken = {_place(MARK_FILE, state): "is the mark of a running flaskd", _place(KEY_FILE, state): "is a cache's key"}
    for key, node, path, said in [*_record(tree), *kept]:
        place = _place(path, state)
        if others := [owner for other, owner in taken.items() if _meet(place, other)]:
            faults.add(node.place, key, f"expected a file of its own, got {said}, which {others[0]}")
        else:
            taken[place] = f"is that of {key}"


def _numbered(path: str) -> str:
    root, suffix = os.path.splitext(path)  # noqa: PTH122 - only text
    return f"{root}-{WORKER}{suffix}"


def _meet(one: str, other: str) -> bool:
    """Whether two paths may be the same file for some number of a worker."""
    first, second = ("[0-9]+".join(map(re.escape, path.split(WORKER))) for path in (one, other))
    return one == other or bool(re.fullmatch(first, other) or re.fullmatch(second, one))


def _place(path: str, state: str) -> str:
    place = os.path.normpath(os.path.join(state, path))  # noqa: PTH118 - pathlib does not remove ".."
    directory, name = os.path.split(place)  # a state directory may be a link (DynamicUser= in systemd.exec(5))
    return os.path.join(os.path.realpath(directory), name)  # noqa: PTH118


def _record(tree: Table) -> Iterator[tuple[str, Node, str, str]]:
    shutdown = child(tree, "shutdown")
    node = child(shutdown, "record") if shutdown else None
    if node is None:
        path = str(ShutdownConfig.model_fields["record"].default)
        yield "shutdown.record", shutdown or tree, path, f"{quoted(path)} by default"
    elif isinstance(node, Scalar) and node.value is not None and not node.broken:
        yield "shutdown.record", node, node.text, shown(node)


def _kept(tree: Table, fields: Mapping[str, Fields | None], actions: Actions) -> Iterator[tuple[str, Node, str, str]]:
    for name, policy in policy_tables(tree).items():
        spec = action_of(policy, actions)
        if spec is None or not spec.keeps or not enabled(policy) or (known := fields.get(name)) is None:
            continue
        written = child(policy, "with")
        node = child(written, spec.keeps) if written else None
        path = str(getattr(known, spec.keeps))
        key = dotted(("cleanup", "policies", name, "with", spec.keeps))
        yield key, node or policy.entries["use"], path, shown(node) if node else f"{quoted(path)} by default"
