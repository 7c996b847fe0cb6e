"""Checks the policies together: unknown actions, and ``after`` edges that lead nowhere.

It works on the tree, not on the model, so that these faults are reported together with all others.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, get_args

from flaskd.config.action_spec import REPLACEMENTS, Phase, Scope
from flaskd.config.faults import Faults, dotted
from flaskd.config.fields import AUTO
from flaskd.config.nodes import Items, Node, Scalar, Table, child, shown
from flaskd.config.order import circle_in
from flaskd.text import did_you_mean, nearest_first, quoted

if TYPE_CHECKING:
    from flaskd.config.action_spec import Actions, ActionSpec
    from flaskd.config.nodes import Path

_WHERE = ("cleanup", "policies")
_MAX_CIRCLES = 10
_SHOWN = 12


def policy_tables(tree: Table) -> dict[str, Table]:
    """The policies of a tree, without those that are not mappings."""
    cleanup = child(tree, "cleanup")
    policies = child(cleanup, "policies") if cleanup else None
    entries = policies.entries if isinstance(policies, Table) else {}
    return {name: policy for name, policy in entries.items() if isinstance(policy, Table)}


def action_of(policy: Table, actions: Actions) -> ActionSpec | None:
    """The action that a policy uses; None if it names no known one."""
    use = policy.entries.get("use")
    return actions.get(use.text) if isinstance(use, Scalar) else None


def enabled(policy: Table) -> bool:
    """Whether a policy is enabled."""
    written = policy.entries.get("enabled")
    return not (isinstance(written, Scalar) and written.value is False)


def check_policies(tree: Table, actions: Actions, faults: Faults) -> None:
    """Note unknown and unusable actions, and ``after`` edges to unknown or later policies, or in a circle.

    If there are workers, a policy of the workers cannot come after one that the daemon runs once. Until the drain is
    over, the other way round is not possible either, because both run at the same time then.
    """
    policies = policy_tables(tree)
    workers = workers_of(tree) != 0
    for name, policy in policies.items():
        use = policy.entries.get("use")
        if isinstance(use, Scalar) and not use.broken:
            _check_use(use, name, actions, faults, enabled=enabled(policy))
        _check_scope(policy, name, actions, faults)
        if workers:
            _check_reasons(policy, name, actions, faults)
    phases = {name: _phase(policy, actions) for name, policy in policies.items()}
    edges: dict[tuple[str, str], tuple[Node, str]] = {}
    for name, policy in policies.items():
        for key, item in _entries(policy, "after"):
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
            elif workers and (fault := _across(item, name, policies[other], policy, actions)):
                faults.add(item.place, path, fault)
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


def workers_of(tree: Table) -> int | None:
    """How many worker processes there should be; None: one for each CPU, 0: the value has a fault."""
    server = child(tree, "server")
    written = child(server, "workers") if server else None
    if not isinstance(written, Scalar) or written.broken:
        return 0
    return None if written.text == AUTO else written.value if type(written.value) is int else 0


def scope_of(policy: Table, actions: Actions) -> Scope | None:
    """Where a policy runs; None if the value has a fault."""
    written, spec = policy.entries.get("scope"), action_of(policy, actions)
    if isinstance(written, Scalar):
        return next((each for each in get_args(Scope) if each == written.text), None)
    return spec.scopes[0] if spec and written is None else None


def _check_scope(policy: Table, name: str, actions: Actions, faults: Faults) -> None:
    written, spec = policy.entries.get("scope"), action_of(policy, actions)
    scope = scope_of(policy, actions)
    if written is not None and spec is not None and not spec.fault and scope is not None and scope not in spec.scopes:
        why = ", for this action uses the app, which only workers import" if scope == "service" else ""
        expected = f"expected {' or '.join(spec.scopes)}{why}"
        faults.add(written.place, dotted((*_WHERE, name, "scope")), f"{expected}, got {shown(written)}")


def _check_reasons(policy: Table, name: str, actions: Actions, faults: Faults) -> None:
    """Note reasons for which a worker is replaced in policies that never run then."""
    once = scope_of(policy, actions) == "service"
    spec, when = action_of(policy, actions), child(policy, "when")
    if when is None or spec is None or (spec.at_replacement and not once):
        return
    why = "this policy runs once, outside of the workers" if once else "this action runs only when the service stops"
    for key, item in _entries(when, "reason"):
        if item.text in REPLACEMENTS:
            path = dotted((*_WHERE, name, "when", *key))
            faults.add(item.place, path, f"expected a reason to stop the service, for {why}, got {shown(item)}")


def _across(item: Scalar, name: str, its: Table, mine: Table, actions: Actions) -> str:
    """The fault of an edge between a policy of the workers and one that runs once; empty if it is possible."""
    phase, scopes = _phase(mine, actions), (scope_of(mine, actions), scope_of(its, actions))
    if scopes == ("worker", "service"):
        mine_runs, its_run = "each worker process runs", "once, outside of the workers"
    elif scopes == ("service", "worker") and phase in {Phase.ANNOUNCE, Phase.DRAIN}:
        mine_runs, its_run = "runs once", f"in each worker process at the same time, in the phase {phase}"
    else:
        return ""
    ways = ((shown(item), its, scopes[0]), (quoted(name), mine, scopes[1]))
    can = [
        f'give {whose} "scope: {scope}", or '
        for whose, policy, scope in ways
        if (spec := action_of(policy, actions)) and scope in spec.scopes
    ]
    expected = f"expected a policy that {mine_runs}, as {quoted(name)} is run"
    return f"{expected}, got {shown(item)}, which runs {its_run}; {''.join(can[:1])}leave this out"


def _entries(table: Node, key: str) -> list[tuple[Path, Scalar]]:
    """The texts of a list, or a single text in place of a list, each with its path."""
    written = child(table, key)
    found: list[tuple[Path, Node]] = []
    if isinstance(written, Items):
        found = [((key, i), item) for i, item in enumerate(written.items)]
    elif written is not None:
        found = [((key,), written)]
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
