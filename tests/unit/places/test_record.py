import errno
import json
import os
import stat
from pathlib import Path

import pytest

from flaskd.places.record import read_record, write_record


def names(directory):
    """Give the names in a directory."""
    return sorted(path.name for path in directory.iterdir())


def test_what_is_written_is_read(tmp_path):
    """A record is read back as it was written, from a file that only its owner may read."""
    path = tmp_path / "last-stop.json"
    write_record(path, {"reason": "signal: SIGTERM", "cut": [], "took": 1.5})
    assert read_record(path) == {"reason": "signal: SIGTERM", "cut": [], "took": 1.5}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path) == ["last-stop.json"]


def test_keys_keep_their_order_and_strangers_become_text(tmp_path):
    """Keys keep the caller's order; a value that JSON does not have is written as its text."""
    path = tmp_path / "record"
    write_record(path, {"z": Path("/x"), "a": 1})
    assert list(json.loads(path.read_text()).items()) == [("z", "/x"), ("a", 1)]


def test_no_record_is_none(tmp_path):
    """A missing file is no record, and no error."""
    assert read_record(tmp_path / "none" / "at-all.json") is None


@pytest.mark.parametrize("content", [b"", b'{"reason": "sig', b"[1]", b"\xff\xfe", b"[" * 100_000, b" " * 5_000_000])
def test_a_damaged_record_says_so(tmp_path, content):
    """A file that is no complete JSON object gives a record that only says that it is damaged."""
    path = tmp_path / "last-stop.json"
    path.write_bytes(content)
    record = read_record(path)
    assert list(record) == ["damaged"]
    assert str(path) in record["damaged"]


def test_a_fifo_in_its_place_is_damage(tmp_path):
    """A FIFO in place of the record does not block the reader."""
    path = tmp_path / "last-stop.json"
    os.mkfifo(path)
    assert "not a regular file" in read_record(path)["damaged"]


def test_a_directory_in_its_place_is_damage(tmp_path):
    """A directory in place of the record is damage, and writing there is an error."""
    assert list(read_record(tmp_path)) == ["damaged"]
    (tmp_path / "record").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_record(tmp_path / "record", {})
    assert names(tmp_path) == ["record"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_costs_the_new_record_only(tmp_path, monkeypatch, call):
    """On a full disk writing raises, the previous record stays, and no other file is left."""
    path = tmp_path / "last-stop.json"
    write_record(path, {"number": 1})

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
        with pytest.raises(OSError, match="No space left"):
            write_record(path, {"number": 2})
    assert read_record(path) == {"number": 1}
    assert names(tmp_path) == ["last-stop.json"]


def test_a_really_full_device_is_an_error(tmp_path):
    """If the kernel refuses a write with ENOSPC, no file is left."""
    path = tmp_path / "record"
    temporary = tmp_path / ".record.flaskd-tmp"
    real = os.open

    def into_full(target, flags, mode=0o777):
        return real("/dev/full", os.O_WRONLY) if Path(target) == temporary else real(target, flags, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", into_full)
        with pytest.raises(OSError, match="No space left"):
            write_record(path, {"number": 1})
    assert names(tmp_path) == []


def test_a_leftover_of_a_crash_is_replaced(tmp_path):
    """A temporary file left by a crash, even a link, is replaced and not followed."""
    target = tmp_path / "precious"
    target.write_text("keep")
    (tmp_path / ".record.flaskd-tmp").symlink_to(target)
    write_record(tmp_path / "record", {"number": 1})
    assert target.read_text() == "keep"
    assert names(tmp_path) == ["precious", "record"]


def test_no_directory_is_an_error(tmp_path):
    """A missing directory raises an error."""
    with pytest.raises(FileNotFoundError):
        write_record(tmp_path / "none" / "record", {})


def test_a_record_that_would_be_too_large_can_be_read(tmp_path):
    """A record that is too large loses its stacks, then the end of its longest list, and says how many entries."""
    path = tmp_path / "record"
    cut = [{"path": "/x", "stack": "x" * 1000} for _ in range(10_000)]
    write_record(path, {"reason": "signal: SIGTERM", "cut": cut})
    assert read_record(path)["cut"] == [{"path": "/x", "stack": ""}] * 10_000
    long = [{"path": "/" + "x" * 1000, "stack": ""} for _ in range(10_000)]
    write_record(path, {"reason": "signal: SIGTERM", "cut": long, "background": [{"name": "x"}]})
    record = read_record(path)
    assert len(record["cut"]) + record["omitted"]["cut"] == 10_000
    assert record["cut"][0] == long[0]
    assert record["background"] == [{"name": "x"}]
    write_record(path, {"reason": "signal: SIGTERM", "policies": {"x": {"fate": "ok", "detail": "x" * 5_000_000}}})
    assert read_record(path) == {"reason": "signal: SIGTERM"}
