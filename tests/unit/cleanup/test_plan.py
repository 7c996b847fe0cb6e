import math

import pytest
from cleanup_kit import step

from flaskd.cleanup import ACTIONS, Action, Plan, Step, StepFailedError, action_specs, build_plan
from flaskd.config import Phase, Section, load_mapping
from flaskd.errors import ConfigError

PHASES = {
    "command": "final", "call": "quiesce",
    "apscheduler.stop": "quiesce", "executor.stop": "quiesce", "threads.stop": "quiesce", "processes.stop": "quiesce",
    "sqlalchemy.dispose": "close", "psycopg_pool.close": "close", "redis.close": "close",
    "sentry.flush": "flush", "otel.shutdown": "flush",
    "http_client.close": "final", "cache.persist": "persist", "consul.deregister": "announce", "logging.flush": "flush",
    "webhook": "final", "files.remove": "final",
}  # fmt: skip
DISPOSE = {"use": "sqlalchemy.dispose"}


def plan_of(policies, **defaults):
    """Give the plan of a configuration with these policies and defaults."""
    data = {"cleanup": {"defaults": defaults, "policies": policies}}
    return build_plan(load_mapping(data, actions=action_specs()).values.cleanup)


def test_the_specs_cover_the_registry():
    """The configuration knows each action's fields and default phase."""
    specs = action_specs()
    phases = {name: str(spec.default_phase) for name, spec in specs.items()}
    assert specs.keys() == ACTIONS.keys() >= PHASES.keys()
    assert phases | PHASES == phases


def test_every_field_is_described():
    """Each field of each action has a description."""
    for action in ACTIONS.values():
        for name, field in action.fields.model_fields.items():
            assert field.description, f"{action.name}.{name}"


def test_a_policy_becomes_a_step():
    """The plan shows what the configuration says of a policy, defaults included."""
    plan = plan_of(
        {
            "bye": {
                "use": "command",
                "with": {"argv": ["true"], "kill_grace": "1s"},
                "timeout": "7s",
                "on_failure": "abort",
                "after": ["close-db"],
                "when": {"reason": ["signal"], "outcome": "clean"},
                "always": True,
            },
            "close-db": DISPOSE,
        },
        retries=2,
    )
    close_db, bye = plan.describe()
    assert (close_db["name"], close_db["phase"], close_db["timeout"]) == ("close-db", "close", 5.0)
    assert bye == {
        "name": "bye",
        "phase": "final",
        "use": "command",
        "timeout": 7.0,
        "retries": 2,
        "on_failure": "abort",
        "after": ["close-db"],
        "when": {"reason": ["signal"], "outcome": "clean"},
        "always": True,
        "scope": "service",
        "at_replacement": False,
        "found": [],
    }
    assert plan.steps[1].fields.kill_grace == 1.0


def test_disabled_policies_are_left_out_but_lead_on():
    """A disabled policy is not in the plan; steps that came after it come after its predecessors."""
    plan = plan_of({"a": DISPOSE, "b": {**DISPOSE, "after": ["a"], "enabled": False}, "c": {**DISPOSE, "after": ["b"]}})
    assert [(each.name, each.after) for each in plan.steps] == [("a", ()), ("c", ("a",))]


def test_file_order_where_nothing_else_decides():
    """Steps that neither phase nor edges order stay in the order of the file."""
    names = ["d", "b", "a", "c"]
    assert [each.name for each in plan_of(dict.fromkeys(names, DISPOSE)).steps] == names


def test_impossible_edges_do_not_hold_a_plan_up():
    """A plan with circles and edges to later or unknown steps loses these edges, but no step."""
    plan = Plan((step("a", after=("b", "nobody", "late")), step("b", after=("a",)), step("late", phase=Phase.FINAL)))
    assert [(each.name, each.after) for each in plan.steps] == [("a", ()), ("b", ("a",)), ("late", ())]


def test_dependents_are_all_that_come_after():
    """Dependents are found through other steps and across phases."""
    plan = Plan((step("a"), step("b", after=("a",)), step("c", after=("b",), phase=Phase.FINAL), step("d")))
    assert plan.dependents("a") == ("b", "c")
    assert plan.dependents("d") == ()


def test_an_action_that_is_not_there_is_a_configuration_error():
    """An action that the registry lacks, as after a package was removed, is reported by name."""
    cleanup = load_mapping({"cleanup": {"policies": {"x": DISPOSE}}}, actions=action_specs()).values.cleanup
    with pytest.raises(ConfigError, match=r'cleanup\.policies\.x\.use: there is no action "sqlalchemy\.dispose"'):
        build_plan(cleanup, actions={})


def test_prepare_names_every_policy_at_fault(tmp_path, monkeypatch):
    """All targets that cannot be imported are reported together, each with its policy."""
    (tmp_path / "cleanup_targets.py").write_text(
        "import sys\nnumber = 3\ndef stop(context): ...\nasync def wait(c): ...\n"
    )
    (tmp_path / "cleanup_exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    targets = {
        "good": "cleanup_targets:stop",
        "gone": "cleanup_nowhere:stop",
        "attribute": "cleanup_targets:halt",
        "number": "cleanup_targets:number",
        "coroutine": "cleanup_targets:wait",
        "exits": "cleanup_exits:stop",
    }
    plan = plan_of({name: {"use": "call", "with": {"target": target}} for name, target in targets.items()})
    with pytest.raises(ConfigError) as caught:
        plan.prepare()
    cannot, module = "cannot import target", "module 'cleanup_targets'"
    plain = "expected a plain function of one argument"
    assert [line.removeprefix("cleanup.policies.") for line in str(caught.value).splitlines()] == [
        f"gone: {cannot} \"cleanup_nowhere:stop\": ModuleNotFoundError: No module named 'cleanup_nowhere'",
        f"attribute: {cannot} \"cleanup_targets:halt\": AttributeError: {module} has no attribute 'halt'",
        f'number: target "cleanup_targets:number": {plain}, got int',
        f'coroutine: target "cleanup_targets:wait": {plain}, got coroutine function',
        f'exits: {cannot} "cleanup_exits:stop": SystemExit: 3',
    ]
    plan_of({"good": {"use": "call", "with": {"target": targets["good"]}}}).prepare()


def test_building_a_plan_imports_nothing():
    """Neither the check nor the plan imports the module of a call."""
    plan_of({"x": {"use": "call", "with": {"target": "cleanup_nowhere:stop"}}})


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"use": "call", "with": {"target": "no colon"}}, "target: expected MODULE:FUNCTION"),
        ({"use": "call"}, "with"),
        ({"use": "command", "with": {"argv": []}}, "argv: expected"),
        ({"use": "command", "with": {"argv": ["a\0b"]}}, "argv[0]: expected text"),
        ({"use": "command", "with": {"argv": [""]}}, 'argv: expected the program as the first item, got [""]'),
        ({"use": "command", "with": {"argv": [" ", "a"]}}, "argv: expected the program as the first item"),
        ({"use": "webhook", "timeout": math.nan, "with": {"url": "http://x"}}, "timeout: expected a duration"),
        ({"use": "webhook", "with": {"url": "http://x", "json": math.nan}}, "json: expected a value that JSON has"),
        (
            {"use": "webhook", "with": {"url": "http://x", "json": {"a": [math.inf]}}},
            "json: expected a value that JSON has",
        ),
        ({"use": "command", "with": {"argv": ["a"], "env": {"A=B": "c"}}}, "name of an environment variable"),
        ({"use": "command", "with": {"argv": ["a"], "kill_grace": "soon"}}, "kill_grace: expected a duration"),
        ({"use": "command", "with": {"argv": ["a"], "shell": True}}, 'got "shell"'),
        ({**DISPOSE, "with": {"bind": "x"}}, 'got "bind"'),
    ],
)
def test_fields_refuse_what_makes_no_sense(policy, words):
    """A value that an action cannot use is a configuration error with the field's name."""
    with pytest.raises(ConfigError) as caught:
        plan_of({"x": policy})
    assert words in str(caught.value)


def test_what_was_kept_is_restored_step_by_step(tmp_path):
    """Each action that can restore is called with app and state directory; one that fails does not stop the others."""
    asked = []

    def restores(app, state, fields):
        asked.append((app, state, type(fields)))
        return "restored"

    def refuses(_app, _state, _fields):
        raise StepFailedError("refused x")

    def breaks(_app, _state, _fields):
        raise KeyError("x")

    plan = Plan(
        tuple(
            Step(each.__name__, Action("a", Section, Phase.PERSIST, print, restore=each), Section(), Phase.PERSIST, 1.0)
            for each in (breaks, refuses, restores)
        )
    )
    assert [(words, done) for _, words, done in plan.restore("app", tmp_path)] == [
        ("cleanup persist/breaks: cannot restore: KeyError('x')", False),
        ("cleanup persist/refuses: refused x", False),
        ("cleanup persist/restores: restored", True),
    ]
    assert asked == [("app", tmp_path, Section)]
