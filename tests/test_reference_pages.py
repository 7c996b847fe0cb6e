"""docs/reference is what the code says: each page is the one that docs/reference/make.py writes."""

import importlib.util
import re
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parent.parent / "docs" / "reference"


def load():
    """docs/reference/make.py as a module; it is in no package."""
    spec = importlib.util.spec_from_file_location("make_reference", DIRECTORY / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = load()


@pytest.mark.parametrize("name", sorted(MAKE.PAGES))
def test_the_page_is_what_the_code_says(name):
    """Each page is what docs/reference/make.py writes; run it after a change of the code."""
    assert (DIRECTORY / name).read_text() == f"{MAKE.PAGES[name]()}\n", "run: python docs/reference/make.py"


def test_there_are_no_other_pages():
    """The directory has only the script, and pages that it writes."""
    assert {path.name for path in DIRECTORY.glob("*.md")} == set(MAKE.PAGES)


def test_each_key_of_the_model_has_its_row():
    """The page has one row for each key of the JSON Schema that is no section."""
    from flaskd.config.model import Config

    page = MAKE.configuration()
    for path, _, own in MAKE.sections(Config):
        [part] = re.findall(rf"^## {re.escape(path or 'At the top')}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE) == [each.key for each in own]
    assert "any value" not in page


def test_each_value_is_told_in_words():
    """Each kind of value has words; a new kind of the model fails here."""
    rows = {
        row[0]: row[1:] for row in (line.split(" | ") for line in MAKE.configuration().splitlines()) if len(row) == 5
    }
    assert rows["| `request_timeout`"][:3] == ["duration, or `null`", "`null`", "at once"]
    assert rows["| `workers`"][:3] == ["integer from 0 to 512, or `auto`", "`0`", "a restart"]
    assert rows["| `preload`"][:3] == ["`true`, `false`", "`false`", "new workers"]
    assert rows["| `max_request_body_size`"][:3] == ["size", "`1GiB`", "new workers; else a restart"]
    assert rows["| `phase`"][0].startswith("`announce`, `drain`")
