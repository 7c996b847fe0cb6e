"""The app's source files, and the watch on them, without its thread: each test calls `look`."""

import os
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
from patience import PATIENCE

import flaskd
from flaskd.serving.code import CodeWatch, source_files


@pytest.fixture
def shop(tmp_path):
    """A module of the app."""
    file = tmp_path / "shop.py"
    file.write_text("one")
    return file


@pytest.fixture
def changes():
    """The calls of `changed`."""
    return []


@pytest.fixture
def watch(shop, changes):
    """A watch that has looked once."""
    return _watch([str(shop)], changes)


def _watch(files, changes, since=None):
    since = time.time() + 60 if since is None else since
    watch = CodeWatch(lambda: files, changed=lambda: changes.append(1), wanted=lambda: True, since=since)
    watch.look()
    return watch


def _look(watch, times=4):
    for _ in range(times):
        watch.look()


def test_a_saved_file_is_told_once(watch, shop, changes):
    """A saved file is reported once, when two looks in a row have seen the same; so is each later change."""
    _look(watch)
    assert changes == []
    shop.write_text("two, and")
    watch.look()
    shop.write_text("two, and more")
    watch.look()
    assert changes == []
    _look(watch)
    assert changes == [1]
    shop.write_text("three")
    _look(watch)
    assert changes == [1, 1]


def test_files_that_were_saved_together_are_told_together(shop, changes, caplog):
    """Files that were saved together, as by a checkout, are one change, and the log names the first ones."""
    files = [str(shop.with_name(f"{number}.py")) for number in range(5)]
    watch = _watch(files, changes)
    for each in files:
        Path(each).write_text("one")
    with caplog.at_level("INFO", "flaskd.daemon"):
        _look(watch)
    assert changes == [1]
    assert caplog.messages == [f"saved: {', '.join(files[:3])} and 2 more"]


def test_what_came_to_nothing_is_told_again(watch, shop, changes):
    """A change after which no reload came is reported again; what was never reported is not."""
    watch.again()
    _look(watch)
    assert changes == []
    shop.write_text("other")
    _look(watch)
    watch.again()
    _look(watch)
    assert changes == [1, 1]


def test_a_file_that_goes_and_comes_back_is_told(watch, shop, changes):
    """A file that is removed and restored is reported each time; one that an editor replaces is one change."""
    shop.unlink()
    _look(watch)
    shop.write_text("one")
    _look(watch)
    assert changes == [1, 1]
    other = shop.with_name("shop.py~")
    other.write_text("two")
    other.replace(shop)
    _look(watch)
    assert changes == [1, 1, 1]


def test_what_is_imported_later_is_watched_too(shop, changes, tmp_path):
    """A file is watched from the look that finds it imported."""
    files = [str(shop)]
    watch = _watch(files, changes)
    (tmp_path / "later.py").write_text("one")
    files.append(str(tmp_path / "later.py"))
    _look(watch)
    assert changes == []
    (tmp_path / "later.py").write_text("other")
    _look(watch)
    assert changes == [1]


@pytest.mark.parametrize("name", ["new.py", "neighbour.py"])
def test_a_traceback_names_files_to_watch(watch, changes, tmp_path, name):
    """Files that a traceback names are watched, with their neighbours; not those of Python."""
    (tmp_path / "new.py").write_text("def")
    (tmp_path / "neighbour.py").write_text("one")
    watch.add_those_of(
        f'Traceback (most recent call last):\n  File "{os.__file__}", line 2, in <module>\n'
        f'  File "{tmp_path}/new.py", line 1\n    def\nSyntaxError: invalid syntax\n'
    )
    (tmp_path / name).write_text("other")
    _look(watch)
    assert changes == [1]


def test_the_files_of_the_app_are_those_that_it_has_imported(shop):
    """Files of Python, installed packages and flaskd are left out; an object in a module's place runs no code."""
    shop.write_text("")
    code = (
        "import sys, json, click, flaskd.serving.code as code, shop\n"
        "class Strange:\n    def __getattribute__(self, name): raise RuntimeError(name)\n"
        "sys.modules['strange'], sys.modules['none'] = Strange(), None\n"
        "print(*code.source_files())"
    )
    root = Path(flaskd.__file__).parents[1]
    path = os.pathsep.join([str(shop.parent), str(root), sysconfig.get_path("purelib")])
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(shop)]
    assert str(shop) not in source_files()


def test_what_was_saved_while_the_app_was_imported_is_told(shop, changes):
    """A file that was saved during the import is reported once, because the import may have read it before."""
    watch = _watch([str(shop)], changes, since=shop.stat().st_mtime - 1)
    _look(watch)
    assert changes == [1]
    _look(_watch([str(shop)], changes, since=shop.stat().st_mtime + 1))
    assert changes == [1]


def test_it_rests_while_it_is_not_wanted(shop, changes):
    """While the watch rests, no file is looked at, and no worker is asked."""
    wanted, looked = threading.Event(), threading.Event()

    def files():
        looked.set()
        return [str(shop)]

    asked = threading.Event()
    watch = CodeWatch(
        files,
        changed=lambda: changes.append(1),
        wanted=lambda: asked.set() or wanted.is_set(),
        since=shop.stat().st_mtime + 1,
    )
    watch.start()
    try:
        assert asked.wait(PATIENCE)
        assert not looked.is_set()
        wanted.set()
        assert looked.wait(PATIENCE)
    finally:
        watch.stop()
