import sys
import types
from pathlib import Path

import pytest
import yaml
from cleanup_kit import run

from flaskd.cleanup import ACTIONS, Fate, Step, action_specs
from flaskd.config import load


def perform(use, **fields):
    """Run one action on its own and give its result."""
    action = ACTIONS[use]
    return run(Step("it", action, action.fields(**fields), action.default_phase, timeout=10.0))["it"]


@pytest.fixture
def module(monkeypatch):
    """Give a module that can be imported as `cleanup_module`."""
    found = types.ModuleType("cleanup_module")
    monkeypatch.setitem(sys.modules, "cleanup_module", found)
    return found


def test_call_gives_the_context(module):
    """The function is called with the step's context; text that it returns is the detail."""
    module.stop = lambda context: f"{context.policy} for {context.reason}"
    result = perform("call", target="cleanup_module:stop")
    assert (result.fate, result.detail) == (Fate.OK, "it for signal")


def test_call_finds_methods_and_ignores_other_results(module):
    """A dotted attribute is followed, and a result that is no text is no detail."""
    module.jobs = types.SimpleNamespace(stop=lambda _context: 42)
    result = perform("call", target="cleanup_module:jobs.stop")
    assert (result.fate, result.detail) == (Fate.OK, "")


def test_call_fails_with_the_function(module):
    """What the function raises is the failure, with its traceback."""

    def stop(_context):
        raise RuntimeError("jobs still run")

    module.stop = stop
    result = perform("call", target="cleanup_module:stop")
    assert (result.fate, result.why) == (Fate.FAILED, "RuntimeError: jobs still run")
    assert "in stop" in result.trace


def test_call_without_its_target():
    """A target that has disappeared since the start fails the step, with the target's name."""
    result = perform("call", target="cleanup_nowhere:stop")
    assert result.fate is Fate.FAILED
    assert result.why.startswith('cannot import target "cleanup_nowhere:stop": ModuleNotFoundError')


def test_the_reference_shows_the_fields_with_their_defaults():
    """For each of its actions the annotated reference shows every field, with its default if it has one."""
    path = Path(__file__).parents[3] / "config" / "flaskd.yaml"
    written = yaml.safe_load(path.read_text())["cleanup"]["policies"]
    policies = load(path, actions=action_specs(), environ={"CREDENTIALS_DIRECTORY": ""}).values.cleanup.policies
    for name in ("warm-cache", "leave-consul", "tell-the-team", "tidy-up", "flush-logs"):
        fields = ACTIONS[policies[name].use].fields.model_fields
        assert set(written[name]["with"]) == {field.alias or key for key, field in fields.items()}
        for key, field in fields.items():
            assert field.is_required() or getattr(policies[name].with_, key) == field.default, (name, key)
