import os
import threading
import time

import pytest
from cleanup_kit import run
from patience import PATIENCE

from flaskd.cleanup import ACTIONS, Fate, Step, action_specs
from flaskd.config import load_mapping
from flaskd.errors import ConfigError


def remove(*paths, timeout=PATIENCE):
    """Run the action and give its result."""
    action = ACTIONS["files.remove"]
    fields = action.fields(paths=[str(path) for path in paths])
    return run(Step("it", action, fields, action.default_phase, timeout))["it"]


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture
def tree(tmp_path):
    for name in ("a/1.tmp", "a/2.tmp", "a/3.txt", "a/.4.tmp", "b/1.tmp", "c", "d/e/5.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "dir.tmp").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("a/*.tmp", ["a/1.tmp", "a/2.tmp"]),
        ("a/.*.tmp", ["a/.4.tmp"]),
        ("a/[12].tmp", ["a/1.tmp", "a/2.tmp"]),
        ("a/[!1].tmp", ["a/2.tmp"]),
        ("?/1.tmp", ["a/1.tmp", "b/1.tmp"]),
        ("*/*/5.tmp", ["d/e/5.tmp"]),
        ("c", ["c"]),
        ("a/9.tmp", []),
        ("*/nothing", []),
    ],
)
def test_patterns_name_files(tree, pattern, gone):
    """Matching files are removed and all others stay; a second run does nothing."""
    before = names(tree)
    result = remove(tree / pattern)
    assert (result.fate, result.detail) == (Fate.OK, f"{len(gone)} file{'' if len(gone) == 1 else 's'} removed")
    assert sorted(set(before) - set(names(tree))) == gone
    assert remove(tree / pattern).detail == "0 files removed"


def test_several_patterns_relative_to_the_working_directory(tree, monkeypatch):
    """Relative paths start in the working directory, even one without a slash."""
    monkeypatch.chdir(tree)
    assert remove("c", "a/*.txt").detail == "2 files removed"


def test_directories_are_never_removed(tree):
    """A directory given by name is a failure, one that matches a pattern is skipped; files are removed all the same."""
    result = remove(tree / "a" / "dir.tmp", tree / "a" / "*.tmp")
    assert (result.fate, result.why) == (Fate.FAILED, f'cannot remove "{tree}/a/dir.tmp": it is a directory')
    assert [each for each in names(tree) if each.startswith("a/")] == ["a/.4.tmp", "a/3.txt", "a/dir.tmp"]


def test_the_directory_has_to_be_there(tree):
    """A directory given by name that is missing, or is a file, is a failure."""
    result = remove(tree / "none" / "*.tmp", tree / "c" / "x")
    assert result.fate is Fate.FAILED
    assert f'cannot remove "{tree}/none": No such file or directory' in result.why
    assert f'cannot remove "{tree}/c": Not a directory' in result.why


def test_links_are_not_followed(tree):
    """A link to a directory is not followed; a link that matches is removed, and not its target."""
    (tree / "link").symlink_to(tree / "a")
    (tree / "b" / "2.tmp").symlink_to(tree / "a" / "3.txt")
    assert remove(tree / "link" / "*.tmp").why == (
        f'cannot remove "{tree}/link": a symbolic link, and those are not followed'
    )
    assert remove(tree / "l*" / "*.tmp").detail == "0 files removed"
    (tree / "b" / "3.tmp").symlink_to(tree / "a")
    assert remove(tree / "b" / "*.tmp").detail == "3 files removed"
    assert {"a/1.tmp", "a/3.txt"} <= set(names(tree))


@pytest.mark.parametrize("kind", ["STATE", "CACHE", "RUNTIME", "LOGS", "CONFIGURATION"])
def test_the_service_managers_own_link_is_followed(tree, monkeypatch, kind):
    """With DynamicUser= each directory of a service is a link (systemd.exec(5)): files in it can be removed."""
    (tree / "shop").symlink_to("a")
    monkeypatch.setenv(f"{kind}_DIRECTORY", f"{tree / 'other'}:{tree / 'shop'}")
    assert remove(tree / "shop" / "*.tmp").fate is Fate.OK
    assert [name for name in names(tree / "a") if name.endswith(".tmp")] == [".4.tmp", "dir.tmp"]
    (tree / "shop" / "deeper").symlink_to(tree / "b")
    assert remove(tree / "shop" / "deeper" / "*").fate is Fate.FAILED
    assert names(tree / "b") == ["1.tmp"]


def test_a_directory_that_is_exchanged_leads_nowhere_else(tree, monkeypatch):
    """If a directory is replaced by a link after it was opened, files of the old directory are removed, no others."""
    real = os.listdir

    def exchange(descriptor):
        found = real(descriptor)
        (tree / "b").rename(tree / "moved")
        (tree / "b").symlink_to(tree / "a")
        return found

    monkeypatch.setattr(os, "listdir", exchange)
    assert remove(tree / "b" / "*.tmp").detail == "1 file removed"
    assert "a/1.tmp" in names(tree)
    assert "moved/1.tmp" not in names(tree)


def test_what_cannot_be_removed_is_named(tree, monkeypatch):
    """The failure names the first few files that could not be removed; the others are removed."""
    real = os.unlink

    def refuse(name, *, dir_fd):
        if name != "1.tmp":
            raise PermissionError(1, "Operation not permitted")
        real(name, dir_fd=dir_fd)

    for number in range(10, 20):
        (tree / "a" / f"{number}.tmp").touch()
    monkeypatch.setattr(os, "unlink", refuse)
    result = remove(tree / "a" / "*.tmp")
    assert result.fate is Fate.FAILED
    assert result.why.startswith(f'cannot remove "{tree}/a/10.tmp": Operation not permitted; ')
    assert result.why.endswith("; and 6 more")
    assert not (tree / "a" / "1.tmp").exists()


def test_it_ends_with_its_time(tree, monkeypatch):
    """When the step's time is up, no further file is removed."""
    real = os.unlink

    def slowly(name, *, dir_fd):
        real(name, dir_fd=dir_fd)
        time.sleep(0.2)

    monkeypatch.setattr(os, "unlink", slowly)
    assert remove(tree / "a" / "*.tmp", timeout=0.1).fate is Fate.TIMED_OUT
    for thread in threading.enumerate():
        if thread.name == "flaskd-cleanup-it":
            thread.join(PATIENCE)
    assert not (tree / "a" / "1.tmp").exists()
    assert (tree / "a" / "2.tmp").exists()


@pytest.mark.parametrize(
    ("paths", "fault"),
    [
        ([], "with.paths: expected a list of at least 1"),
        ("", "with.paths: expected a path of files"),
        ("/run/shop/", "with.paths: expected a path of files"),
        ("/run/../etc/passwd", "with.paths: expected a path of files without . and .."),
        (["/a", "/b/**/c"], "with.paths[1]: expected * once for each directory level, not **"),
    ],
)
def test_wrong_paths_are_faults(paths, fault):
    """The configuration refuses paths that could reach further than they seem."""
    policy = {"use": "files.remove", "with": {"paths": paths}}
    with pytest.raises(ConfigError) as caught:
        load_mapping({"cleanup": {"policies": {"it": policy}}}, actions=action_specs())
    assert fault in str(caught.value)
