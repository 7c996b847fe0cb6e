import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from flaskd.places.record import read_record
from flaskd.places.state import StateDirectory, state_directory
from flaskd.present import record_lines


@pytest.fixture
def directory(tmp_path):
    """A state directory that does not exist yet."""
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
    """The service manager's directory comes first, then root's, then the user's own."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_directory("shop", environ) == Path(expected.replace("HOME", str(tmp_path)))


def test_a_record_is_written_where_it_was_asked_for(directory, caplog):
    """The record of a stop can be read back, and only its owner may read the file."""
    state = opened(directory)
    state.record({"reason": "signal: SIGTERM", "completed": 3})
    state.close()
    record = directory / "last-stop.json"
    assert json.loads(record.read_bytes()) == {"reason": "signal: SIGTERM", "completed": 3}
    assert record.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert messages(caplog) == []


def test_the_mark_stands_while_the_run_lasts(directory):
    """The mark names the running process, and is removed at its end."""
    state = opened(directory)
    mark = read_record(directory / "running.json")
    assert mark["pid"] == os.getpid()
    assert mark["started"].endswith("Z")
    state.close()
    assert list(directory.iterdir()) == []
    state.close()


def test_a_complete_stop_is_followed_by_a_quiet_start(directory, caplog):
    """After a complete stop the next start logs no warning."""
    opened(directory).close()
    opened(directory).close()
    assert messages(caplog) == []


def killed(state):
    """Leave the directory like a killed process: the kernel releases its lock, and nothing else changes."""
    state.forget()


def test_a_crash_is_told_by_the_next_start(directory, caplog):
    """A left mark names the process that died, in the log and in answers."""
    killed(opened(directory))
    state = opened(directory)
    assert messages(caplog) == [f"the flaskd before this one (pid {os.getpid()}) died without a complete stop"]
    assert state.previous.startswith(f"died without a complete stop (pid {os.getpid()}, started 20")
    state.close()
    after = opened(directory)
    assert after.previous is None
    after.close()


def test_a_crash_in_the_middle_of_a_stop(directory, caplog):
    """The mark says that the stop had begun, and why."""
    state = opened(directory)
    began = read_record(directory / "running.json")["started"]
    state.stopping("signal: SIGTERM")
    killed(state)
    assert read_record(directory / "running.json") == {
        "pid": os.getpid(), "started": began, "stopping": "signal: SIGTERM",
    }  # fmt: skip
    state = opened(directory)
    words = "without a complete stop, in the middle of its stop (signal: SIGTERM)"
    assert messages(caplog) == [f"the flaskd before this one (pid {os.getpid()}) died {words}"]
    assert words in state.previous
    state.close()


def test_a_stop_that_is_noted_too_late_harms_nothing(directory):
    """Noting the stop after the end makes no new mark."""
    state = opened(directory)
    state.close()
    state.stopping("signal: SIGTERM")
    assert list(directory.iterdir()) == []


def test_a_damaged_mark_is_a_crash_too(directory, caplog):
    """A mark that cannot be parsed counts as a crash, and is replaced."""
    directory.mkdir()
    (directory / "running.json").write_text("{")
    state = opened(directory)
    assert messages(caplog) == ["the flaskd before this one (pid unknown) died without a complete stop"]
    assert read_record(directory / "running.json")["pid"] == os.getpid()
    state.close()


@pytest.fixture
def gone():
    """The pid of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_after_a_crash_what_was_left_is_tidied_up(directory, tmp_path, caplog, monkeypatch, gone):
    """Flaskd's half-written files and metric files of ended processes are removed; other files and links stay."""
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    ours = [f"counter_{gone}.db", f"gauge_livesum_{os.getpid()}.db"]
    others = [f"counter_{os.getppid()}.db", "app.db", "counter_x.db"]
    for name in ours + others:
        (metrics / name).touch()
    state = StateDirectory("shop", {"STATE_DIRECTORY": str(directory), "PROMETHEUS_MULTIPROC_DIR": str(metrics)})
    state.open(record="sub/last-stop.json")
    killed(state)
    (directory / ".running.json.flaskd-tmp").touch()
    (directory / "sub" / ".last-stop.json.flaskd-tmp").touch()
    (directory / ".demo.tmp").touch()
    (directory / ".link.flaskd-tmp").symlink_to(directory / ".demo.tmp")
    state.open(record="sub/last-stop.json")
    (said,) = messages(caplog)
    removed = [".running.json.flaskd-tmp", ".last-stop.json.flaskd-tmp", *sorted(ours)]
    assert said.endswith(f"died without a complete stop; removed what it left: {', '.join(removed)}")
    assert sorted(each.name for each in metrics.iterdir()) == sorted(others)
    assert {each.name for each in directory.iterdir()} == {".demo.tmp", ".link.flaskd-tmp", "running.json", "sub"}
    assert list((directory / "sub").iterdir()) == []
    state.close()


def test_a_state_directory_may_be_a_link_of_the_service_manager(tmp_path, caplog):
    """With DynamicUser= the state directory is a link to a private one (systemd.exec(5)), and is tidied up all the same."""
    (tmp_path / "private" / "flaskd").mkdir(parents=True)
    (tmp_path / "flaskd").symlink_to("private/flaskd")
    killed(opened(tmp_path / "flaskd"))
    (tmp_path / "private" / "flaskd" / ".last-stop.json.flaskd-tmp").touch()
    caplog.clear()
    state = opened(tmp_path / "flaskd")
    assert "removed what it left: .last-stop.json.flaskd-tmp" in caplog.text
    assert "cannot" not in caplog.text
    state.close()


def test_without_a_crash_nothing_is_tidied_up(directory):
    """After a complete stop nothing is tidied up."""
    opened(directory).close()
    (directory / ".x.flaskd-tmp").touch()
    opened(directory).close()
    assert (directory / ".x.flaskd-tmp").exists()


def test_a_record_that_was_laid_ready_and_not_taken_is_removed(directory):
    """A stop whose finalizers were cut ended without a word of Python's; the next start takes it away, and says nothing."""
    state = opened(directory)
    assert state.prepare({"took": 1.0}, unless={"took": 2.0}) is not None
    state.close()
    laid = directory / ".last-stop.json.flaskd-tmp"
    assert laid.exists()
    again = opened(directory)
    assert not laid.exists()
    assert again.last_stop() is not None
    again.close()


def test_metrics_that_cannot_be_tidied_up_are_a_warning(directory, tmp_path, caplog):
    """A missing directory of metrics costs one warning."""
    state = StateDirectory("shop", {"STATE_DIRECTORY": str(directory), "PROMETHEUS_MULTIPROC_DIR": "/nowhere"})
    state.open(record="last-stop.json")
    killed(state)
    state.open(record="last-stop.json")
    assert messages(caplog)[0] == "cannot tidy up PROMETHEUS_MULTIPROC_DIR /nowhere: No such file or directory"
    state.close()


def test_a_directory_that_another_works_with_is_left_alone(directory, caplog):
    """The mark of a running flaskd is no crash: nothing is changed, and no record is written."""
    first = opened(directory)
    (directory / ".x.flaskd-tmp").touch()
    second = opened(directory)
    second.record({"reason": "signal: SIGTERM"})
    second.close()
    assert (second.previous, second.writable) == (None, None)
    assert messages(caplog) == [f"another flaskd uses {directory}; the last stop will not be recorded"]
    assert {each.name for each in directory.iterdir()} == {".x.flaskd-tmp", "running.json"}
    (directory / ".x.flaskd-tmp").unlink()
    first.close()


def test_the_lock_ends_with_the_run(directory):
    """The next start gets the lock although a forked child still holds a copy."""
    state = opened(directory)
    [lock] = [each for each in Path("/proc/self/fd").iterdir() if each.resolve() == directory]
    kept = os.dup(int(lock.name))
    state.close()
    after = opened(directory)
    os.close(kept)
    assert after.writable == directory
    after.close()


def test_without_a_record_a_crash_is_told_all_the_same(directory, caplog):
    """Without a record none is written, while mark, lock and repair work as usual."""
    killed(opened(directory, record=None))
    (directory / ".cache.bin.flaskd-tmp").touch()
    state = opened(directory, record=None)
    assert state.previous.startswith(f"died without a complete stop (pid {os.getpid()}, ")
    assert messages(caplog)[0].endswith("died without a complete stop; removed what it left: .cache.bin.flaskd-tmp")
    assert opened(directory, record=None).writable is None
    assert messages(caplog)[1:] == [f"another flaskd uses {directory}; a crash will not be noticed"]
    state.record({"reason": "signal: SIGTERM"})
    assert state.last_stop() is None
    state.close()
    assert list(directory.iterdir()) == []


def test_an_unwritable_directory_costs_only_the_record(tmp_path, caplog):
    """If the state directory cannot be made, there is one warning, and flaskd serves."""
    (tmp_path / "file").touch()
    state = opened(tmp_path / "file" / "state")
    state.record({"reason": "signal: SIGTERM"})
    state.close()
    (warning,) = messages(caplog)
    assert warning.startswith(f"cannot write to {tmp_path / 'file' / 'state'}: ")
    assert warning.endswith("; the last stop will not be recorded")


def test_an_unwritable_directory_does_not_hide_the_last_stop(directory, caplog):
    """An old record can be read where nothing can be written any more."""
    before = opened(directory)
    before.record({"reason": "signal: SIGTERM"})
    before.close()
    (directory / "running.json").mkdir()  # prevents the mark, even for root
    state = opened(directory)
    state.record({"reason": "control: stop"})
    assert state.last_stop() == {"reason": "signal: SIGTERM"}
    assert "the last stop will not be recorded" in caplog.text
    state.close()


def test_a_record_that_no_stop_has_written_is_damaged(directory):
    """JSON of another form counts as damaged when the last stop is asked for."""
    state = opened(directory)
    state.record({"reason": "signal: SIGTERM", "cut": 5})
    told = state.last_stop()
    state.close()
    assert told == {"damaged": f'{directory / "last-stop.json"} is not a record: "cut" is not what a stop writes there'}


def test_a_directory_that_goes_away_costs_only_the_record(directory, caplog):
    """If the record cannot be written at the end, there is one warning."""
    state = opened(directory)
    (directory / "running.json").unlink()
    directory.rmdir()
    state.record({"reason": "signal: SIGTERM"})
    state.close()
    (warning,) = messages(caplog)
    assert warning.startswith(f"cannot record this stop in {directory / 'last-stop.json'}: ")


def full(*_args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_stop_that_could_not_be_recorded_is_told(directory, caplog, monkeypatch):
    """The older record stays, and its reader learns of the later stop and why it has no record."""
    before = opened(directory)
    before.record({"reason": "signal: SIGTERM", "cut": []})
    before.close()
    state = opened(directory)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        state.record({"reason": "control: stop", "cut": [1]})
    state.close()
    assert messages(caplog) == [f"cannot record this stop in {directory / 'last-stop.json'}: No space left on device"]
    after = opened(directory)
    words = "came to its end, but its stop could not be recorded: No space left on device (pid "
    assert after.previous.startswith(words)
    assert messages(caplog)[1].startswith(f"the flaskd before this one {words}")
    shown = record_lines({"previous": after.previous, **after.last_stop()})
    assert shown[1] == "the last stop that was recorded:"
    after.record({"reason": "signal: SIGTERM"})
    after.close()
    last = opened(directory)
    assert last.previous is None
    last.close()


def test_a_record_is_laid_ready_for_the_very_end(directory):
    """Until the prepared record is put in place, the other one is there, so the truth is told at any moment."""
    state = opened(directory)
    settle, _ = state.prepare({"reason": "signal: SIGTERM"}, unless={"reason": "signal: SIGTERM", "unfinished": []})
    state.close()
    assert "unfinished" in read_record(directory / "last-stop.json")
    settle()
    assert read_record(directory / "last-stop.json") == {"reason": "signal: SIGTERM"}
    assert [each.name for each in directory.iterdir()] == ["last-stop.json"]


@pytest.mark.parametrize("mark", ["directory", "FIFO", "huge"])
def test_a_mark_that_cannot_be_read_tells_of_no_death(directory, caplog, mark):
    """A mark that cannot be read says nothing about the end of the run before."""
    directory.mkdir()
    path = directory / "running.json"
    if mark == "directory":
        path.mkdir()
    elif mark == "FIFO":
        os.mkfifo(path)
    else:
        path.write_bytes(b" " * 100_000)
    state = opened(directory)
    assert "died" not in caplog.text
    assert state.previous.startswith("left a mark that cannot be read, so it is not known how it ended: ")
    state.close()


def test_a_mark_that_may_not_be_read_tells_of_no_death(directory, caplog, monkeypatch):
    """A mark that may not be read for lack of permission is no crash."""

    def refuse(*_args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("flaskd.places.state.read_whole", refuse)
    state = opened(directory)
    assert "died" not in caplog.text
    assert state.previous.endswith(f"{directory / 'running.json'}: Permission denied")
    state.close()
