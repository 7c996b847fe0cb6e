"""share/: the man pages and the completions fit the code, and man and the shells can read them."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flaskd.cli import cli
from flaskd.cli.completion import SHELLS
from flaskd.config import Config, Settings

SHARE = Path(__file__).parent.parent / "share"
_spec = importlib.util.spec_from_file_location("share_make", SHARE / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
PAGES = {name: text for name, text in make.pages().items() if name.startswith("man/")}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_that_of_the_code(name):
    """Each file is what share/make.py writes; run it after a change of a verb or a key."""
    assert (SHARE / name).read_text() == PAGES[name], "run share/make.py"


def test_the_pages_have_every_verb_and_every_key():
    """The man pages have every verb and every key under its full name."""
    command, file = PAGES.values()
    assert all(make.bold(f"flaskd {name}") in command for name in cli.commands)

    def leaves(section, path=""):
        for each in section.model_fields.values():
            if isinstance(each.annotation, type) and issubclass(each.annotation, Settings):
                yield from leaves(each.annotation, f"{path}{each.key}.")
            else:
                yield path + each.key

    assert all(f"{make.bold(key)} (" in file for key in leaves(Config))


@pytest.mark.parametrize("name", PAGES)
def test_man_has_nothing_to_complain_of(name):
    """Man and groff report no unknown macro, no line that cannot be broken and no missing character."""
    if shutil.which("groff") is None:
        required = "groff" in os.environ.get("FLASKD_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)("needs groff")
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8", SHARE / name], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    shown = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)
    assert all(f"\n{each}\n" in shown for each in ("NAME", "SYNOPSIS", "DESCRIPTION", "SEE ALSO"))
    assert "\\" not in shown.replace("\\\n", "")


def test_what_the_page_says_of_the_environment_is_read():
    """The code reads each variable that the page names."""
    code = "".join(path.read_text() for path in (SHARE.parent / "flaskd").rglob("*.py"))
    assert [name for name in make.ENVIRONMENT if f'"{name}"' not in code] == []


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_its_script(shell):
    """Each shell's script asks the command for completions; the rest is click's, and may differ with its version."""
    text = (SHARE / make.COMPLETIONS[shell]).read_text()
    assert f"_FLASKD_COMPLETE={shell}_complete" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n", SHARE / make.COMPLETIONS[shell]], check=True)
