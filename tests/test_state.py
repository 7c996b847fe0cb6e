import json
import os
from pathlib import Path

import pytest

from flaskd.cleanup import read_record
from flaskd.state import StateDirectory, state_directory


@pytest.fixture
def directory(tmp_path):
    """A state directory that is not there yet."""
    return tmp_path / "state"


def opened(directory, record="last-stop.json"):
    state = StateDirectory("shop", {"STATE_DIRECTORY": str(directory)})
    state.open(record=record)
    return state


def messages(caplog):
    return [each.getMessage() for each in caplog.records]


@pytest.mark.parametrize(
    ("uid", "environ", "expected"),
    [
        (0, {}, "/var/lib/shop"),
        (0, {"XDG_STATE_HOME": "/xdg"}, "/var/lib/shop"),
        (0, {"STATE_DIRECTORY": "/state/shop:/state/more"}, "/state/shop"),
        (7, {"STATE_DIRECTORY": "/state/shop"}, "/state/shop"),
        (7, {"XDG_STATE_HOME": "/xdg"}, "/xdg/shop"),
        (7, {}, "HOME/.local/state/shop"),
        (7, {"STATE_DIRECTORY": "", "XDG_STATE_HOME": ""}, "HOME/.local/state/shop"),
    ],
)
def test_where_state_is_kept(uid, environ, expected, monkeypatch, tmp_path):
    """The service manager's word comes first, then root's place, then the user's own."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_directory("shop", environ) == Path(expected.replace("HOME", str(tmp_path)))


def test_a_record_is_written_where_it_was_asked_for(directory, caplog):
    """The record of a stop can be read back, and only its owner may."""
    state = opened(directory)
    state.record({"reason": "signal: SIGTERM", "completed": 3})
    state.close()
    record = directory / "last-stop.json"
    assert json.loads(record.read_bytes()) == {"reason": "signal: SIGTERM", "completed": 3}
    assert record.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert messages(caplog) == []


def test_the_mark_stands_while_the_run_lasts(directory):
    """The mark names the running process, and its end takes it away."""
    state = opened(directory)
    mark = read_record(directory / "running.json")
    assert mark["pid"] == os.getpid()
    assert mark["started"].endswith("Z")
    state.close()
    assert list(directory.iterdir()) == []
    state.close()


def test_a_complete_stop_is_followed_by_a_quiet_start(directory, caplog):
    """A run that came to its end is no reason to warn."""
    opened(directory).close()
    opened(directory).close()
    assert messages(caplog) == []


def test_a_crash_is_told_by_the_next_start(directory, caplog):
    """A mark that was left behind names the process that died."""
    opened(directory)
    opened(directory).close()
    assert messages(caplog) == [f"the flaskd before this one (pid {os.getpid()}) died without a complete stop"]


def test_a_damaged_mark_is_a_crash_too(directory, caplog):
    """A mark that cannot be read is told like any other, and replaced."""
    directory.mkdir()
    (directory / "running.json").write_text("{")
    state = opened(directory)
    assert messages(caplog) == ["the flaskd before this one (pid unknown) died without a complete stop"]
    assert read_record(directory / "running.json")["pid"] == os.getpid()
    state.close()


def test_without_a_record_nothing_is_kept(directory):
    """No record asked for: no directory, no mark, no file."""
    state = opened(directory, record=None)
    state.record({"reason": "signal: SIGTERM"})
    state.close()
    assert not directory.exists()


def test_an_unwritable_directory_costs_only_the_record(tmp_path, caplog):
    """A state directory that cannot be made is one warning, and the life goes on."""
    (tmp_path / "file").touch()
    state = opened(tmp_path / "file" / "state")
    state.record({"reason": "signal: SIGTERM"})
    state.close()
    (warning,) = messages(caplog)
    assert warning.startswith(f"cannot write to {tmp_path / 'file' / 'state'}: ")
    assert warning.endswith("; the last stop will not be recorded")


def test_a_directory_that_goes_away_costs_only_the_record(directory, caplog):
    """What cannot be recorded at the end is one warning."""
    state = opened(directory)
    (directory / "running.json").unlink()
    directory.rmdir()
    state.record({"reason": "signal: SIGTERM"})
    state.close()
    (warning,) = messages(caplog)
    assert warning.startswith(f"cannot record this stop in {directory / 'last-stop.json'}: ")
