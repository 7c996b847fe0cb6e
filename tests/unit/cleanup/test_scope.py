"""With worker processes: what each worker runs at a stop, and what the daemon runs once."""

import pytest
from cleanup_kit import NoFields, Reason, fates, runner, step

from flaskd.cleanup import (
    ACTIONS,
    Action,
    Fate,
    Frame,
    Plan,
    Step,
    Times,
    action_specs,
    build_plan,
    divided,
    overview,
    with_found,
    with_service,
)
from flaskd.cleanup.callbacks import _Callback, with_callbacks
from flaskd.cleanup.model import StepResult
from flaskd.cleanup.preview import latest, plan_from, rehearse, simulated
from flaskd.config import ActionSpec, Phase, load_mapping
from flaskd.errors import ConfigError

FRAME = Frame(deadline=25.0, reserve=3.0, announce=0.0, drain=15.0, max_parallel=8, workers=True)
CLOSE, TELL = {"use": "logging.flush"}, {"use": "webhook", "with": {"url": "http://x"}}
AFTER = 'expected a policy that each worker process runs, as "{}" is run'


def cleanup_of(policies, workers=2, actions=None):
    """Give the cleanup of a configuration with these policies and workers."""
    data = {"server": {"workers": workers}, "cleanup": {"policies": policies}}
    return load_mapping(data, actions=actions or action_specs(), environ={}).values.cleanup


def faults(policies, workers=2, actions=None):
    """Give the faults of a configuration with these policies and workers."""
    with pytest.raises(ConfigError) as caught:
        cleanup_of(policies, workers, actions)
    return [f"{fault.key}: {fault.message}" for fault in caught.value.faults]


def names(plan):
    return [each.name for each in plan.steps]


def test_what_asks_nothing_of_the_app_runs_once():
    """Commands, webhooks, deregistering and removing files run once, for the service; all others in each worker."""
    service = {name for name, action in ACTIONS.items() if action.scopes[0] == "service"}
    assert service == {"command", "webhook", "consul.deregister", "files.remove"}
    assert {ACTIONS[name].scopes for name in service} == {("service", "worker")}
    assert {action.scopes for name, action in ACTIONS.items() if name not in service} == {("worker",)}
    assert Action("mine", NoFields, Phase.FINAL, lambda *_: None).scopes == ("worker",)  # an action of another package


def test_a_plan_is_that_of_a_scope_or_all():
    """Each process runs the steps of its scope; without workers one process runs all, in the order of the phases."""
    policies = {"tell": {**TELL, "phase": "announce"}, "close": CLOSE, "each": {**TELL, "scope": "worker"}}
    cleanup = cleanup_of(policies)
    assert names(build_plan(cleanup)) == ["tell", "close", "each"]
    assert names(build_plan(cleanup, "worker")) == ["close", "each"]
    assert names(build_plan(cleanup, "service")) == ["tell"]
    assert {each["name"]: each["scope"] for each in build_plan(cleanup).describe()} == {
        "tell": "service",
        "close": "worker",
        "each": "worker",
    }


@pytest.mark.parametrize("use", ["call", "cache.persist", "sqlalchemy.dispose", "logging.flush", "executor.stop"])
def test_what_uses_the_app_cannot_be_the_services(use):
    """An action that needs the app cannot have scope service, with workers and without."""
    policy = {"use": use, "scope": "service", **({"with": {"target": "a:b"}} if use == "call" else {})}
    expected = "expected worker, for this action uses the app, which only workers import"
    assert faults({"x": policy}, 0) == [f'cleanup.policies.x.scope: {expected}, got "service"']


def test_a_scope_has_its_names():
    """An unknown scope is refused, with a suggestion."""
    assert faults({"x": {**TELL, "scope": "servce"}}) == [
        'cleanup.policies.x.scope: expected one of worker, service, got "servce"; did you mean "service"?'
    ]


@pytest.mark.parametrize("workers", [1, 4, "auto"])
def test_a_worker_cannot_wait_for_what_runs_once(workers):
    """The fault explains both scopes and what to do."""
    assert faults({"tell": TELL, "close": {**TELL, "scope": "worker", "after": ["tell"]}}, workers) == [
        f'cleanup.policies.close.after[0]: {AFTER.format("close")}, got "tell", which runs once, outside of the workers; '
        'give "tell" "scope: worker", or leave this out'
    ]


@pytest.mark.parametrize("phase", ["announce", "drain"])
def test_until_the_drain_is_over_neither_waits_for_the_other(phase):
    """Before the drain is over, steps of workers and daemon cannot wait for each other, and the fault says why."""
    policies = {"pause": {**CLOSE, "phase": "announce"}, "tell": {**TELL, "phase": phase, "after": ["pause"]}}
    assert faults(policies) == [
        'cleanup.policies.tell.after[0]: expected a policy that runs once, as "tell" is run, got "pause", which runs in each '
        f'worker process at the same time, in the phase {phase}; give "tell" "scope: worker", or leave this out'
    ]
    cleanup_of(policies, 0)
    cleanup_of({**policies, "tell": {**policies["tell"], "phase": "quiesce"}})


def test_the_fault_tells_what_can_be_done():
    """The fault does not suggest scope worker for an action that can only run once."""
    actions = {
        "once": ActionSpec(NoFields, Phase.CLOSE, scopes=("service",)),
        "each": ActionSpec(NoFields, Phase.CLOSE),
        "both": ActionSpec(NoFields, Phase.CLOSE, scopes=("worker", "service")),
    }
    mine, theirs = ({"a": {"use": "once"}, "b": {"use": use, "after": "a"}} for use in ("each", "both"))
    said = f'cleanup.policies.b.after: {AFTER.format("b")}, got "a", which runs once, outside of the workers; '
    assert faults(mine, 2, actions) == [f"{said}leave this out"]
    assert faults(theirs, 2, actions) == [f'{said}give "b" "scope: service", or leave this out']
    assert faults({"a": {"use": "once", "scope": "worker"}}, 2, actions) == [
        'cleanup.policies.a.scope: expected service, got "worker"'
    ]


def test_without_workers_any_step_may_wait_for_any():
    """Without workers one process runs all steps, so any edge is allowed."""
    plan = build_plan(cleanup_of({"tell": TELL, "close": {**CLOSE, "phase": "final", "after": ["tell"]}}, 0))
    assert [(each.name, each.after) for each in plan.steps] == [("tell", ()), ("close", ("tell",))]


def test_what_runs_once_may_come_after_what_each_worker_runs():
    """A step that runs once may come after the workers' steps of its phase or before: all workers have ended by then."""
    cleanup = cleanup_of({"close": CLOSE, "tell": {**TELL, "after": ["close"]}})
    service = build_plan(cleanup, "service")
    assert (names(service), service.steps[0].after) == (["tell"], ("close",))


def test_a_step_waits_for_none_of_another_process():
    """An edge to a step of another process does not make a step wait."""
    plan = Plan((step("close", scope="worker"), step("tell", scope="service", after=("close",)))).part("service")
    running = runner()
    running.replan(plan)
    assert fates({each.name: each for each in running.run(Phase)}) == {"tell": "ok"}


@pytest.mark.parametrize(
    ("on_failure", "expected"),
    [
        ("continue", {"tell": "ok", "other": "ok"}),
        ("skip_dependents", {"tell": "skipped", "other": "ok"}),
        ("abort", {"tell": "skipped", "other": "skipped"}),
    ],
)
def test_what_failed_in_a_worker_counts_for_what_runs_once(on_failure, expected):
    """If a step failed in a worker, its dependents outside of the workers are skipped, or all, as `on_failure` says."""
    plan = Plan(
        (
            step("close", on_failure=on_failure),
            step("then", after=("close",)),
            step("tell", scope="service", after=("then",)),
            step("other", scope="service"),
        )
    ).part("service")
    running = runner()
    running.replan(plan)
    failed = StepResult("close", "quiesce", "test", Fate.FAILED, "no")
    unknown = StepResult("found:redis.close", "close", "redis.close", Fate.FAILED, "no")
    running.heed([unknown, StepResult("then", "quiesce", "test", Fate.SKIPPED, "after close"), failed])
    assert fates({each.name: each for each in running.run(Phase)}) == expected


def test_a_step_of_another_process_that_succeeded_skips_nothing():
    """A step that succeeded in a worker skips nothing outside of the workers."""
    plan = Plan((step("close", on_failure="abort"), step("tell", scope="service"))).part("service")
    running = runner()
    running.replan(plan)
    running.heed([StepResult("close", "quiesce", "test", Fate.OK)])
    assert fates({each.name: each for each in running.run(Phase)}) == {"tell": "ok"}


def test_functions_of_the_app_are_the_workers(caplog, monkeypatch):
    """Functions of the app are part of the workers' plan; a wish to come after a step that runs once is refused."""
    plan = build_plan(cleanup_of({"tell": TELL}), "worker")
    monkeypatch.setattr("flaskd.cleanup.callbacks._registered", [_Callback(print, Phase.FINAL, None, ("tell",), False)])
    found = with_found(with_callbacks(plan, None, timeout=1.0), (), cleanup_of({}))
    assert [(each.name, each.scope) for each in found.steps] == [("print", "worker")]
    assert names(Plan(found.elsewhere)) == ["tell"]
    assert 'print cannot wait for "tell": that policy runs once, outside of the workers' in caplog.text


# --- a worker that is replaced ---


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("reload", {"jobs": "ok", "keep": "skipped", "only": "ok"}),
        ("recycle", {"jobs": "ok", "keep": "skipped", "only": "skipped"}),
        ("signal", {"jobs": "ok", "keep": "ok", "only": "skipped"}),
    ],
)
def test_what_is_kept_over_a_restart_is_not_kept_at_a_replacement(reason, expected):
    """cache.persist does not run at a replacement; other policies may choose with two reasons of their own."""
    keep = Action("keep", NoFields, Phase.PERSIST, lambda *_: None, at_replacement=False)
    steps = (step("jobs"), Step("keep", keep, NoFields(), Phase.PERSIST, 5.0), step("only", reasons=("reload",)))
    results = {each.name: each for each in runner(*steps, reason=Reason(reason)).run(Phase)}
    assert fates(results) == expected
    if reason != "signal":
        assert results["keep"].why == "it runs only when the service stops"


def test_a_cache_is_not_kept_at_a_replacement():
    """The plan of workers says that a cache is not kept at a replacement; without workers it does not."""
    policy = {"use": "cache.persist", "with": {"path": "{worker}"}}
    plan = build_plan(cleanup_of({"keep": policy, "tell": TELL}))
    told = overview(plan, FRAME)
    assert [(each["name"], each["at_replacement"]) for each in told["policies"]] == [("keep", False), ("tell", False)]
    assert told["text"].count("only when the service stops") == 1
    whole = with_service(overview(plan.part("worker"), FRAME), plan.part("service"), FRAME)
    assert whole["text"].count("only when the service stops") == 1
    assert "only when the service stops" not in overview(plan, Frame(25.0, 3.0, 0.0, 15.0, 8))["text"]


def test_a_plan_for_one_worker_may_be_none_for_two():
    """If workers are added at run time, the plan reports steps that keep one file for all of them."""
    keep = {"use": "cache.persist"}
    policies = {"a": keep, "b": {**keep, "with": {"path": "{worker}"}}, "tell": TELL}
    assert build_plan(cleanup_of(policies, 1)).one_file() == ["a"]


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({**TELL, "when": {"reason": ["signal", "reload"]}}, "this policy runs once, outside of the workers"),
        (
            {"use": "cache.persist", "with": {"path": "{worker}"}, "when": {"reason": ["idle", "reload"]}},
            "this action runs only when the service stops",
        ),
    ],
)
def test_a_reason_for_which_a_policy_never_runs_is_a_fault(policy, why):
    """With workers, a reason for which a policy never runs is a fault; without workers it is none."""
    expected = f"expected a reason to stop the service, for {why}"
    assert faults({"x": policy}) == [f'cleanup.policies.x.when.reason[1]: {expected}, got "reload"']
    cleanup_of({"x": policy}, 0)
    cleanup_of({"x": {**TELL, "scope": "worker", "when": {"reason": "recycle"}}})


# --- time, and what is told beforehand ---


def test_the_reserve_is_divided_between_workers_and_service():
    """What runs once has half of the reserve, whatever hangs in a worker, and leaves the workers theirs before the drain."""
    assert divided(25.0, 3.0, later=True) == (Times(23.5, 1.5), Times(25.0, 3.0, 1.5))
    assert divided(25.0, 0.5, later=True) == (Times(24.0, 0.25), Times(25.0, 1.25, 1.0))
    assert divided(10.0, 0.0, later=True) == (Times(9.0, 0.0), Times(10.0, 2.8, 1.0))
    assert divided(25.0, 3.0, later=False) == (Times(25.0, 3.0), Times(25.0, 3.0))
    assert divided(10.0, 0.0, later=False) == (Times(10.0, 0.0), Times(10.0, 2.0))
    assert Times(25.0, 3.0, 1.5).for_steps() == Times(24.5, 2.5, 1.0)


PLAN = Plan(
    (
        step("leave", scope="service", phase=Phase.ANNOUNCE, timeout=1.0),
        step("pause", phase=Phase.ANNOUNCE, timeout=2.0),
        step("jobs", timeout=2.0),
        step("save", scope="service", phase=Phase.PERSIST, timeout=1.0),
        step("bye", phase=Phase.FINAL, timeout=60.0),
        step("tell", scope="service", phase=Phase.FINAL, timeout=60.0),
    )
)


def test_the_service_waits_for_the_workers():
    """Later steps of the service begin when all workers have ended; before that both run the same phases."""
    frame = Frame(deadline=25.0, reserve=3.0, announce=0.0, drain=5.0, max_parallel=8, workers=True)
    moments = latest(PLAN, frame)
    assert moments["pause"] == (0.0, 2.0)
    assert moments["leave"] == (0.0, 1.0)
    assert moments["jobs"] == (7.0, 9.0)
    assert moments["bye"] == (9.0, 23.0)
    assert moments["save"] is None  # only flush, final and `always` may use the reserve
    assert moments["tell"] == (23.0, 24.5)
    brief = Plan(tuple(each for each in PLAN.steps if each.name != "bye"))  # the app's own exit comes before it, too
    assert latest(brief, Frame(25.0, 3.0, 0.0, 5.0, 8, 1.5, workers=True))["save"] == (10.5, 11.5)


def test_workers_have_all_of_the_time_where_nothing_comes_after_them():
    """If nothing comes after the workers, they have all of the time."""
    moments = latest(Plan((step("bye", phase=Phase.FINAL, timeout=60.0),)), FRAME)
    assert moments == {"bye": (15.0, 24.5)}


def test_a_step_that_hangs_in_a_worker_is_rehearsed_with_what_depends_on_it():
    """If a step hangs in a worker, the rehearsal skips what comes after it outside of the workers."""
    plan = Plan(
        (step("jobs", timeout=2.0, on_failure="skip_dependents"), step("tell", scope="service", after=("jobs",)))
    )
    fate = {each.name: (str(each.fate), each.why) for each in rehearse(plan, FRAME, {"jobs"})}
    assert fate["tell"] == ("skipped", "after jobs, which timed out")
    _, text = simulated(plan, FRAME, ["jobs"])
    rows = [line.split()[:6] for line in text.splitlines()[1:]]
    assert rows[0] == ["PHASE", "POLICY", "FATE", "BEGINS", "ENDS", "SCOPE"]
    assert [row[5] for row in rows[1:]] == ["worker", "service"]


def test_the_table_has_the_scope_where_there_are_workers():
    """With workers the table has the scope of each step, in the order in which they run; without them it has none."""
    lines = overview(PLAN, FRAME)["text"].splitlines()
    assert lines[1].split() == ["PHASE", "POLICY", "ACTION", "TIMEOUT", "BEGINS", "BY", "ENDS", "BY", "SCOPE", "NOTES"]
    assert [line.split()[1] for line in lines[2:]] == ["pause", "leave", "jobs", "bye", "save", "tell"]
    assert [line.split()[-1] for line in lines[2:]] == ["worker", "service", "worker", "worker", "service", "service"]
    alone = overview(PLAN, Frame(25.0, 3.0, 0.0, 15.0, 8))
    assert "SCOPE" not in alone["text"]
    assert [each["name"] for each in alone["policies"]] == ["leave", "pause", "jobs", "save", "bye", "tell"]


def test_what_workers_say_is_shown_with_what_runs_once():
    """The service's overview is made of a worker's overview and of the steps that run once."""
    told = overview(Plan(PLAN.part("worker").steps), FRAME, ["thread-1"])
    told["found"] = [{"name": "shop.db:pool", "kind": "Pool", "use": "", "left": "excluded"}]
    whole = with_service(told, PLAN.part("service"), FRAME)
    expected = overview(PLAN, FRAME, ["thread-1"])
    assert whole["policies"] == expected["policies"]
    assert (whole["found"], whole["exit"]) == (told["found"], ["thread-1"])
    assert whole["text"].startswith(expected["text"].rpartition("\n")[0])
    assert "shop.db:pool" in whole["text"]


def test_a_described_plan_keeps_its_scopes():
    """A plan described by an older daemon, without scopes, can be read."""
    described = overview(PLAN, FRAME)["policies"]
    assert {each.name: each.scope for each in plan_from(described).steps} == {
        each.name: each.scope for each in PLAN.steps
    }
    without = [{key: value for key, value in each.items() if key != "scope"} for each in described]
    assert {each.scope for each in plan_from(without).steps} == {"worker"}
