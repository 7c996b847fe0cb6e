import os

import pytest

from flaskd.config import FileWatch
from flaskd.config.loading import digest


class Owner:
    """Notes the reported digests, and accepts them or not."""

    def __init__(self, path):
        self.told = []
        self.deals = True
        self.watch = FileWatch(path, changed=self.changed, wanted=lambda: True)
        self.watch.known = digest(path.read_bytes())

    def changed(self, what):
        self.told.append(what)
        if self.deals:
            self.watch.known = what

    def looks(self, count=2):
        """Look several times, and give what was reported meanwhile."""
        self.told.clear()
        for _ in range(count):
            self.watch.look()
        return list(self.told)


@pytest.fixture
def path(tmp_path):
    """A configuration file as in a mounted Kubernetes ConfigMap: a link through a link that is exchanged."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "flaskd.yaml").write_text("one")
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "flaskd.yaml").symlink_to("..data/flaskd.yaml")
    return tmp_path / "flaskd.yaml"


def swap(path, number, text):
    """Exchange the ..data link, as the kubelet does."""
    directory = path.parent / number
    directory.mkdir()
    (directory / "flaskd.yaml").write_text(text)
    (path.parent / "..data_tmp").symlink_to(number)
    (path.parent / "..data_tmp").rename(path.parent / "..data")


def test_without_an_edit_nothing_is_told(path):
    """Neither the first look nor a touch is reported."""
    owner = Owner(path)
    assert owner.looks() == []
    os.utime(path, ns=(1, 1))
    assert owner.looks() == []


@pytest.mark.parametrize("how", ["in place", "rename", "swap", "swap of the same size"])
def test_each_kind_of_edit_is_told_once(path, how):
    """Every way to edit the file is reported once, and not again after it was accepted."""
    owner = Owner(path)
    owner.looks()
    for number in ("2", "3"):
        text = number * 3 if how.endswith("size") else f"edit {number}"
        if how == "in place":
            path.write_text(text)
        elif how == "rename":
            (path.parent / "new").write_text(text)
            (path.parent / "new").replace(path.resolve())
        else:
            swap(path, number, text)
        assert owner.looks() == [digest(text.encode())]
        assert owner.looks() == []


def test_a_file_with_the_old_date_is_an_edit(path):
    """A rename that keeps size and modification time, as rsync and cp -p make them, is noticed."""
    owner = Owner(path)
    owner.looks()
    (path.parent / "new").write_text("two")
    found = path.stat()
    os.utime(path.parent / "new", ns=(found.st_atime_ns, found.st_mtime_ns))
    (path.parent / "new").replace(path.resolve())
    assert owner.looks() == [digest(b"two")]


def test_an_edit_before_the_first_look_is_seen(path):
    """An edit after the file was read and before the watch began is noticed."""
    owner = Owner(path)
    path.write_text("two")
    assert owner.looks() == [digest(b"two")]


def test_half_of_an_edit_is_not_read(path):
    """While the file changes from look to look, nothing is reported."""
    owner = Owner(path)
    owner.looks()
    for number in range(3):
        path.write_text("x" * (number + 10))
        assert owner.looks(1) == []
    assert owner.looks(1) == [digest(b"x" * 12)]


def test_what_was_not_dealt_with_is_told_again(path):
    """A change that the owner could not process is reported again at the next look."""
    owner = Owner(path)
    owner.looks()
    owner.deals = False
    path.write_text("two")
    assert owner.looks(4) == [digest(b"two")] * 3
    owner.deals = True
    assert len(owner.looks()) == 1
    assert owner.looks() == []


def test_a_file_that_goes_away_is_a_change(path):
    """A file's disappearance is reported once, and so is its return."""
    owner = Owner(path)
    owner.looks()
    path.resolve().unlink()
    assert owner.looks(4) == [""]
    path.resolve().write_text("back")
    assert owner.looks(4) == [digest(b"back")]


def test_an_edit_that_is_taken_back_is_a_change(path):
    """A return to the content in force is reported, so that a shown fault disappears."""
    owner = Owner(path)
    owner.looks()
    path.write_text("[")
    owner.looks()
    path.write_text("one")
    assert owner.looks() == [digest(b"one")]


def test_a_pipe_is_not_watched(tmp_path):
    """A pipe is never read, because it cannot be read twice."""
    (tmp_path / "file").write_text("x")
    owner = Owner(tmp_path / "file")
    (tmp_path / "file").unlink()
    os.mkfifo(tmp_path / "file")
    assert owner.looks(4) == []
