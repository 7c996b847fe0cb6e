"""docs/cleanup.md is true: its examples are valid configurations, and its table of scopes is that of the actions."""

import re
from pathlib import Path

import yaml

from flaskd.cleanup import ACTIONS, action_specs
from flaskd.config import Phase, load_mapping

TEXT = (Path(__file__).parents[3] / "docs" / "cleanup.md").read_text()


def test_the_examples_are_configurations():
    """Each YAML block is a valid configuration, with workers and without."""
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    for workers in (0, 4):
        data = {**yaml.safe_load(example), "server": {"workers": workers}}
        assert len(load_mapping(data, actions=action_specs(), environ={}).values.cleanup.policies) == 3
    for when, path in zip(
        re.findall(r"`when: (\{.*?\})`", TEXT), re.findall(r'`path: ("cache-\{worker\}.bin")`', TEXT), strict=True
    ):
        policy = {"use": "logging.flush", "when": yaml.safe_load(when)}
        keep = {"use": "cache.persist", "with": {"path": yaml.safe_load(path)}}
        data = {"server": {"workers": 4}, "cleanup": {"policies": {"a": policy, "b": keep}}}
        load_mapping(data, actions=action_specs(), environ={})


def test_the_phases_are_the_phases():
    """The document lists the phases in their order."""
    assert f"`{' '.join(Phase)}`" in TEXT


def test_the_table_of_scopes_is_that_of_the_actions():
    """The document names all actions that run once by default."""
    (row,) = re.findall(r"^\| `service` .*$", TEXT, re.MULTILINE)
    named = set(re.findall(r"`([a-z.]+)`", row.rpartition("process |")[2]))
    assert named == {name for name, action in ACTIONS.items() if action.scopes[0] == "service"}
