"""docs/migrating.md is true: its tables are those of the command, and its keys are flaskd's."""

import re
from pathlib import Path
from types import SimpleNamespace

import flask.cli
import pytest
import yaml
from waitress.adjustments import Adjustments

from flaskd.cleanup import action_specs
from flaskd.cli import foreign, translation
from flaskd.cli.init import translated
from flaskd.cli.python_values import Setting
from flaskd.config import load_mapping
from flaskd.config.model import Config

PAGE = (Path(__file__).parents[3] / "docs" / "migrating.md").read_text()


def section(title):
    """The text below a heading, up to the next one of any level."""
    [text] = re.findall(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return text


def rows(title):
    """The rows of the tables of a section, each as its cells."""
    lines = re.findall(r"^\| (.*) \|$", section(title), re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def by_words(settings, words):
    """The rows that the table must have: settings with the same text are in one row."""
    found = {}
    for each in settings:
        found.setdefault(words(each), []).append(each)
    return [[" ".join(f"`{name}`" for name in sorted(same)), said] for said, same in found.items()]


def test_gunicorns_settings_with_an_equivalent_are_those_of_the_command():
    """Each such setting has its row, with the key that ``flaskd init --from`` writes."""
    shown = {names(row[0])[0]: "".join(names(row[1])) for row in rows("gunicorn")[1:] if len(row) == 3}
    assert shown == {name: key for name, (key, _) in translation._GUNICORN.items()}  # noqa: SLF001 - it is the table


def test_what_is_said_of_gunicorns_other_settings_is_what_the_command_says():
    """The rows have the command's text, word by word."""
    others = [*translation._SAID, *sorted(translation._OTHERS)]  # noqa: SLF001 - see above
    assert [row for row in rows("gunicorn") if len(row) == 2][1:] == by_words(others, translation._advice)  # noqa: SLF001


def test_the_hooks_are_those_of_the_command():
    """The rows about hooks have the command's text, word by word."""
    hooks = translation._HOOKS  # noqa: SLF001 - see above
    assert rows("Hooks")[1:] == by_words(hooks, hooks.get)


@pytest.mark.parametrize("setting", [*translation._SAID, *sorted(translation._OTHERS)])  # noqa: SLF001 - see above
def test_each_setting_of_the_tables_is_told_when_it_is_met(setting):
    """In a gunicorn file the setting is reported with the words of its row."""
    done = translation.gunicorn({setting: Setting(3, "x")}, "{}:{}".format, {})
    [row] = [right for left, right in (r for r in rows("gunicorn") if len(r) == 2) if setting in names(left)]
    assert f"{setting}:3: {row}" in done.notes


def test_waitress_settings_are_all_there_and_go_where_the_table_says():
    """Each setting of the installed Waitress has a row, and the command writes what the row names."""
    shown = {name: right for left, right in rows("waitress-serve") for name in names(left)}
    assert {name.replace("_", "-") for name, _ in Adjustments._params} | {"call"} <= set(shown)  # noqa: SLF001
    for name, right in shown.items():
        value = ["127.0.0.1"] if name in {"listen", "unix-socket"} else "1"
        done = translation.waitress({name: value, "app": "shop:app"}, "{}".format)
        key = f"server.{name.replace('-', '_')}"
        assert (key in names(right)) == (key in done.values), name
        if right == "no such setting":
            assert done.notes == [f"{name}: flaskd has no such setting"]


def test_flasks_options_are_all_there():
    """Each option of ``flask run`` is in the table."""
    shown = "\n".join(left for left, _ in rows("flask run"))
    options = [option for each in flask.cli.run_command.params for option in each.opts if option.startswith("--")]
    assert [each for each in options if each not in shown] == []


def test_every_key_that_is_named_is_there():
    """Each key that the page names is in the model."""
    keys = re.findall(rf"`((?:{'|'.join(Config.model_fields)})(?:\.[a-z_]+)+)\b(?!\()", PAGE)
    assert len(set(keys)) > 30
    for key in keys:
        at = Config
        for part in key.split("."):
            assert part in at.model_fields, key
            at = at.model_fields[part].annotation


def test_the_yaml_is_valid():
    """Each YAML block, and the YAML in the tables, is a valid configuration."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        load_mapping(yaml.safe_load(block), actions=action_specs(), environ={})


def test_the_commands_are_understood(monkeypatch, tmp_path):
    """Each ``flaskd init --from`` of the page translates; the shown answer is the real one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gunicorn.conf.py").write_text("workers = 4\n")
    sources = re.findall(r"flaskd init --from (?:'([^…']+)'|(\S+\.py))", PAGE)
    assert len(sources) >= 2
    for quoted, path in sources:
        assert translated(quoted or path).values["server.workers"] == 4
    shown = re.findall(r"^\$ flaskd serve \S+ (--\S+).*\nflaskd: (.*)$", PAGE, re.MULTILINE)
    assert shown == [(option, foreign.advice("flaskd serve", option, [])) for option, _ in shown]


def test_the_python_is_python(monkeypatch):
    """Each Python block compiles, and registers its function in a phase that exists."""
    from flaskd.cleanup import callbacks

    registered = []
    monkeypatch.setattr(callbacks, "_registered", registered)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        found = {"scheduler": SimpleNamespace(start=lambda: None)}
        exec(compile(re.sub(r"^from shop.*$", "", block, flags=re.MULTILINE), "migrating.md", "exec"), found)
    assert [each.phase for each in registered] == ["quiesce", "announce"]
