"""What only the policies together can get wrong: unknown actions, and ``after`` edges that lead nowhere.

Works on the tree, not on the model, so that these faults come together with all others.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

from flaskd.config.action_spec import Phase
from flaskd.config.faults import Faults, dotted
from flaskd.config.nodes import Items, Node, Scalar, Table, child, shown
from flaskd.config.order import circle_in
from flaskd.text import did_you_mean, nearest_first

if TYPE_CHECKING:
    from flaskd.config.action_spec import Actions, ActionSpec
    from flaskd.config.nodes import Path

_WHERE = ("cleanup", "policies")
_MAX_CIRCLES = 10
_SHOWN = 12


def policy_tables(tree: Table) -> dict[str, Table]:
    """Return the policies of a tree, those that are not mappings left out."""
    cleanup = child(tree, "cleanup")
    policies = child(cleanup, "policies") if cleanup else None
    entries = policies.entries if isinstance(policies, Table) else {}
    return {name: policy for name, policy in entries.items() if isinstance(policy, Table)}


def action_of(policy: Table, actions: Actions) -> ActionSpec | None:
    """Return the action that a policy uses, None if it names none that is known."""
    use = policy.entries.get("use")
    return actions.get(use.text) if isinstance(use, Scalar) else None


def enabled(policy: Table) -> bool:
    """Whether a policy counts."""
    written = policy.entries.get("enabled")
    return not (isinstance(written, Scalar) and written.value is False)


def check_policies(tree: Table, actions: Actions, faults: Faults) -> None:
    """Note unknown and unusable actions, and ``after`` edges to unknown or later policies, or in a circle."""
    policies = policy_tables(tree)
    for name, policy in policies.items():
        use = policy.entries.get("use")
        if isinstance(use, Scalar) and not use.broken:
            _check_use(use, name, actions, faults, enabled=enabled(policy))
    phases = {name: _phase(policy, actions) for name, policy in policies.items()}
    edges: dict[tuple[str, str], tuple[Node, str]] = {}
    for name, policy in policies.items():
        for key, item in _after(policy):
            path = dotted((*_WHERE, name, *key))
            other = item.text
            if other == name:
                faults.add(item.place, path, "expected another policy, got the policy itself")
            elif other not in policies:
                names = [known for known in policies if known != name]
                word = functools.partial(_unknown, "expected the name of a policy", item, names)
                faults.add(item.place, path, word)
            elif (mine := phases[name]) and (its := phases[other]) and its.position > mine.position:
                expected = f"expected a policy of phase {mine} or before"
                faults.add(item.place, path, f"{expected}, got {shown(item)} of phase {its}")
            else:
                edges.setdefault((name, other), (item, path))
    _check_circles(edges, faults)


def _check_use(use: Scalar, name: str, actions: Actions, faults: Faults, *, enabled: bool) -> None:
    path = dotted((*_WHERE, name, "use"))
    if use.text not in actions:
        faults.add(use.place, path, functools.partial(_unknown, "expected an action", use, list(actions)))
    elif fault := actions[use.text].fault:
        faults.add(use.place, path, f"expected an action that can be used, got {shown(use)}: {fault}")
    elif enabled and (missing := actions[use.text].missing()):
        expected = f"expected {missing} to be installed where flaskd is, for this action needs it"
        faults.add(use.place, path, f"{expected}, got {shown(use)}")


def _after(policy: Table) -> list[tuple[Path, Scalar]]:
    after = policy.entries.get("after")
    found: list[tuple[Path, Node]] = []
    if isinstance(after, Items):
        found = [(("after", i), item) for i, item in enumerate(after.items)]
    elif after is not None:
        found = [(("after",), after)]
    return [
        (key, item) for key, item in found if isinstance(item, Scalar) and item.value is not None and not item.broken
    ]


def _phase(policy: Table, actions: Actions) -> Phase | None:
    written = policy.entries.get("phase")
    if isinstance(written, Scalar):
        return Phase(written.text) if written.text in list(Phase) else None
    spec = action_of(policy, actions)
    return spec.default_phase if spec and written is None else None


def _check_circles(edges: dict[tuple[str, str], tuple[Node, str]], faults: Faults) -> None:
    for _ in range(_MAX_CIRCLES):
        after: dict[str, list[str]] = {}
        for name, other in edges:
            after.setdefault(name, []).append(other)
        if not (circle := circle_in(after)):
            return
        item, path = edges[circle[0], circle[1]]
        names = circle if len(circle) <= _SHOWN else [*circle[: _SHOWN - 1], "...", circle[-1]]
        faults.add(item.place, path, f"expected an order, got a circle: {' after '.join(names)}")
        for edge in itertools.pairwise(circle):
            edges.pop(edge, None)


def _unknown(expected: str, node: Scalar, names: list[str]) -> str:
    if node.secret:
        return f"{expected}, got {shown(node)}"
    known = f"; known: {nearest_first(node.text, names)}" if names else ""
    return f"{expected}, got {shown(node)}{did_you_mean(node.text, names)}{known}"
