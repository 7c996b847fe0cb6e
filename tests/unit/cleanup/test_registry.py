import importlib.metadata
import subprocess
import sys

import pytest
from cleanup_kit import run
from entry_points_kit import install, install_example
from patience import PATIENCE

from flaskd.cleanup import ACTIONS, Fate, Step, action_specs
from flaskd.cleanup.registry import Registry, brought
from flaskd.config import load, schema
from flaskd.errors import ConfigError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Give a directory on sys.path with the example package and some broken ones."""
    target = install_example(tmp_path / "site")
    install(target, "broken", {
        "broken.gone": "flaskd_nowhere:action",
        "broken.raises": "flaskd_broken:action",
        "broken.kind": "flaskd_receipts:print_receipt",
        "broken.name": "flaskd_receipts:action",
        "command": "flaskd_receipts:receipts",
    })  # fmt: skip
    (target / "flaskd_broken.py").write_text("raise SystemExit('no\\nlicence')\n")
    monkeypatch.syspath_prepend(target)
    yield target
    for name in ("flaskd_receipts", "flaskd_broken"):
        sys.modules.pop(name, None)


def registry():
    """Give flaskd's own actions and those that are installed now."""
    return Registry({"command": ACTIONS["command"]}, brought)


def checked(tmp_path, text):
    path = tmp_path / "flaskd.yaml"
    path.write_text(text)
    return load(path, actions=action_specs(registry()))


def test_a_package_brings_an_action(installed, tmp_path):
    """Another package's action has its fields validated and its phase known, and runs like one of flaskd's own."""
    text = "cleanup: {policies: {bye: {use: receipts.print, with: {path: %s, copies: 2}}}}\n" % (tmp_path / "out")
    policy = checked(tmp_path, text).values.cleanup.policies["bye"]
    action = registry()["receipts.print"]
    assert (action.name, policy.phase) == ("receipts.print", "final")
    result = run(Step("bye", action, policy.with_, policy.phase, PATIENCE))["bye"]
    assert (result.fate, result.detail, result.use) == (Fate.OK, "2 printed", "receipts.print")
    assert (tmp_path / "out").read_text() == "bye: stopped for signal: SIGTERM\n" * 2


def test_its_fields_have_faults_with_a_place(installed, tmp_path):
    """Unknown and wrong fields are reported with line and column."""
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, "cleanup:\n  policies:\n    bye: {use: receipts.print, with: {pth: x, copies: 10}}\n")
    text = str(caught.value)
    assert "3:39 cleanup.policies.bye.with.pth: expected a known key" in text
    assert "3:55 cleanup.policies.bye.with.copies: expected at most 9, got 10" in text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken.gone", "from broken (flaskd_nowhere:action): ModuleNotFoundError: No module named 'flaskd_nowhere'"),
        ("broken.raises", "from broken (flaskd_broken:action): SystemExit: no licence"),
        ("broken.kind", "TypeError: expected a flaskd.cleanup.Action, got function"),
        ("broken.name", "AttributeError: module 'flaskd_receipts' has no attribute 'action'"),
    ],
)
def test_a_broken_one_is_a_fault_of_the_policy_that_uses_it(installed, tmp_path, name, why):
    """The fault has its place and says which package is broken and how; the policy's fields are not reported."""
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, f"cleanup: {{policies: {{bye: {{use: {name}, with: {{a: 1}}}}}}}}\n")
    (fault,) = str(caught.value).splitlines()
    assert f'flaskd.yaml:1:33 cleanup.policies.bye.use: expected an action that can be used, got "{name}": ' in fault
    assert fault.endswith(why)


def test_what_nobody_uses_is_not_loaded(installed, tmp_path):
    """A broken package does no harm if no policy uses it, and no package is imported without need."""
    checked(tmp_path, "cleanup: {policies: {bye: {use: command, with: {argv: ['true']}}}}\n")
    with pytest.raises(ConfigError, match='expected an action, got "receipts.prin"; did you mean "receipts.print"'):
        checked(tmp_path, "cleanup: {policies: {bye: {use: receipts.prin}}}\n")
    assert not {"flaskd_receipts", "flaskd_broken"} & sys.modules.keys()


def test_flaskds_own_actions_cannot_be_taken(installed, caplog):
    """A package's action with the name of one of flaskd's is ignored, with a warning."""
    found = registry()
    assert "receipts.print" in found
    assert found["command"] is ACTIONS["command"]
    (warning,) = caplog.messages
    assert warning == 'the action "command" of broken (flaskd_receipts:receipts) is left out: flaskd has its own'


def test_the_first_of_two_packages_wins(installed, caplog):
    """If two packages have an action of the same name, the second is ignored, with a warning."""
    install(installed / "more", "other", {"receipts.print": "flaskd_other:action"})
    sys.path.append(str(installed / "more"))
    try:
        assert registry()["receipts.print"].fault == ""
    finally:
        sys.path.remove(str(installed / "more"))
    assert [each for each in caplog.messages if "receipts.print" in each] == [
        'the action "receipts.print" of other (flaskd_other:action) is left out: '
        "flaskd-receipts (flaskd_receipts:receipts) has it too"
    ]


def test_the_schema_has_those_that_can_be_used(installed):
    """The schema has the fields of a package's action; broken actions are left out."""
    written = schema(action_specs(registry()))
    *uses, _ = written["$defs"]["Policy"]["properties"]["use"]["anyOf"]
    assert [each["const"] for each in uses] == ["command", "receipts.print"]
    assert "copies" in written["$defs"]["ReceiptFields"]["properties"]


def test_own_actions_are_found_without_looking_elsewhere(monkeypatch):
    """Using only flaskd's own actions does not search the installed packages."""

    def never(**_group):
        raise AssertionError("searched")

    monkeypatch.setattr(importlib.metadata, "entry_points", never)
    assert registry()["command"].name == "command"
    assert "command" in action_specs(registry())


def test_client_verbs_do_not_search():
    """A client verb imports neither the actions nor the search for them."""
    code = "import sys, flaskd.cli; print(*({'importlib.metadata', 'flaskd.cleanup'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
