"""After kill -9, and with full or read-only disks: the next start says what happened, repairs, and serves."""

import json
import os
import re
import signal
import socket
import subprocess

import pytest
from daemon_kit import NOBODY, Flaskd, requires
from http_client import get

KEEPING = "cleanup: {policies: {keep: {use: cache.persist}}}\n"
CACHED = """
import os
import re
from flask import request
from flask_caching import Cache
from gateapp import app
app.secret_key = "not a secret in a test"
cache = Cache(app, config={"CACHE_TYPE": "SimpleCache"})

@app.get("/set")
def put():
    cache.set("value", request.args["value"], timeout=0)
    return "set"

@app.get("/get")
def look():
    return str(cache.get("value"))

def hold(context):
    import socket
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)
"""


def killed(flaskd: Flaskd) -> int:
    """Kill it with SIGKILL; returns its pid."""
    pid = flaskd.pid
    flaskd.kill(signal.SIGKILL)
    assert flaskd.wait() == -signal.SIGKILL
    return pid


def test_the_last_stop_is_not_shown_as_if_nothing_had_come_after_it(flaskd: Flaskd) -> None:
    """After a kill, `last-stop` says first which flaskd died, with a daemon and without, and then shows the record."""
    flaskd.start()
    pid = killed(flaskd)
    assert flaskd.socket_path.exists()  # no daemon answers
    died = f"previous run: died without a complete stop (pid {pid}, started "
    code, out, err = flaskd.client("last-stop", *NOBODY)
    assert (code, err) == (0, "")
    assert re.fullmatch(re.escape(died) + r"\S+\)\nno stop has been recorded\n", out)
    flaskd.start()
    assert flaskd.command("last-stop").startswith(died)
    assert flaskd.stop() == 0
    assert flaskd.client("last-stop", *NOBODY)[1].startswith("reason: signal: SIGTERM\n")
    flaskd.start()
    died = died.replace(str(pid), str(killed(flaskd)))
    for start in (False, True):
        if start:
            flaskd.start()
        code, out, _ = flaskd.client("last-stop", *NOBODY)
        assert code == 0
        assert out.startswith(died)
        assert out.splitlines()[1:3] == ["the last stop that was recorded:", "reason: signal: SIGTERM"]
    assert json.loads(flaskd.client("last-stop", *NOBODY, "--json")[1])["previous"].startswith(
        "died without a complete stop"
    )
    assert flaskd.stop() == 0
    assert "previous" not in flaskd.client("last-stop", *NOBODY)[1]


def test_a_record_of_another_shape_is_told_as_damaged(flaskd: Flaskd) -> None:
    """JSON that no stop has written is reported as damaged by `last-stop`, and `status` works."""
    flaskd.state.mkdir(exist_ok=True)
    (flaskd.state / "last-stop.json").write_text('{"reason": "x", "cut": 5, "policies": []}')
    why = '"cut" is not what a stop writes there'
    code, _, err = flaskd.client("last-stop", *NOBODY)
    assert code == 69
    assert err.endswith(f"there is no record in {flaskd.state}/last-stop.json that can be read ({why})\n")
    flaskd.start()
    told = f"cannot be read: {flaskd.state}/last-stop.json is not a record: {why}\n"
    assert flaskd.client("last-stop") == (0, f"the record of the last stop {told}", "")
    code, out, _ = flaskd.client("status")
    assert code == 0
    assert f"last stop    {told}" in out
    assert flaskd.command("status").endswith("OK ready\n")


def test_killed_while_serving(flaskd: Flaskd) -> None:
    """The next start says which pid died, replaces nodes, removes half-written files, and `status` shows it."""
    metrics = flaskd.directory / "metrics"
    metrics.mkdir()
    flaskd.env["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
    node = flaskd.directory / "http.sock"
    flaskd.start(listen=f"unix:{node}")
    assert flaskd.status()["previous"] is None
    pid = killed(flaskd)
    (metrics / f"counter_{pid}.db").touch()
    (flaskd.state / ".last-stop.json.flaskd-tmp").write_text("{")
    half_made = socket.socket(socket.AF_UNIX)
    half_made.bind(str(flaskd.runtime / f".{pid}"))
    half_made.close()
    os.mkfifo(flaskd.runtime / f".control.{pid}")
    flaskd.start(listen=f"unix:{node}")
    words = f"died without a complete stop (pid {pid}, started "
    assert flaskd.status()["previous"].startswith(words)
    assert f"previous: {words}" in flaskd.command("status")
    tidied = f"removed what it left: .last-stop.json.flaskd-tmp, counter_{pid}.db"
    assert f"the flaskd before this one (pid {pid}) died without a complete stop; {tidied}" in flaskd.log
    assert f"had left in {flaskd.runtime}: .{pid}, .control.{pid}" in flaskd.log
    assert sorted(os.listdir(flaskd.runtime)) == ["control", "control.sock"]
    assert os.listdir(metrics) == []
    assert get(f"unix:{node}") == (200, b"hello")
    assert flaskd.stop() == 0
    assert not node.exists()
    flaskd.start()
    assert flaskd.status()["previous"] is None
    assert flaskd.stop() == 0


def test_killed_while_its_child_lives(flaskd: Flaskd) -> None:
    """A child of the app holds neither directory's lock: the next start works, and says what it found."""
    flaskd.write("forking.py", "import os, time\nfrom gateapp import app\n@app.get('/fork')\ndef fork():\n"
                 "    child = os.fork()\n    if child == 0:\n        time.sleep(60)\n        os._exit(0)\n    return str(child)\n")  # fmt: skip
    flaskd.start(app="forking")
    child = int(get(flaskd.url, "/fork")[1])
    try:
        killed(flaskd)
        flaskd.start(app="forking")
        assert flaskd.status()["previous"].startswith("died")
        assert "another flaskd" not in flaskd.log
        assert flaskd.stop() == 0
    finally:
        os.kill(child, signal.SIGKILL)


def test_killed_in_the_middle_of_the_cleanup(flaskd: Flaskd) -> None:
    """The next start says that a stop was under way, and why; the record of the stop before stays."""
    flaskd.write("cached.py", CACHED)
    flaskd.write("flaskd.yaml", "cleanup: {policies: {hold: {use: call, with: {target: 'cached:hold'}}}}\n")
    flaskd.start(app="cached")
    flaskd.kill(signal.SIGTERM)
    flaskd.gate.entered()
    flaskd.gate.open()
    assert flaskd.wait() == 0
    record = flaskd.record()
    flaskd.start(app="cached")
    flaskd.kill(signal.SIGTERM)
    flaskd.gate.entered()
    pid = killed(flaskd)
    assert flaskd.record() == record
    flaskd.write("flaskd.yaml", "")
    flaskd.start(app="cached")
    words = f"died without a complete stop, in the middle of its stop (signal: SIGTERM) (pid {pid}, started "
    assert flaskd.status()["previous"].startswith(words)
    assert flaskd.stop() == 0


def test_what_a_crash_lies_behind_does_not_come_back(flaskd: Flaskd) -> None:
    """A kept cache is restored once: after a crash the app starts with an empty cache, not with an old one."""
    flaskd.write("cached.py", CACHED)
    flaskd.write("flaskd.yaml", KEEPING)
    flaskd.start(app="cached")
    get(flaskd.url, "/set?value=one")
    assert flaskd.stop() == 0
    flaskd.start(app="cached")
    assert get(flaskd.url, "/get") == (200, b"one")
    get(flaskd.url, "/set?value=two")
    killed(flaskd)
    flaskd.start(app="cached")
    assert get(flaskd.url, "/get") == (200, b"None")
    assert "it was restored before" in flaskd.log
    killed(flaskd)  # the cache file stays, as after a crash


def test_a_start_that_fails_uses_nothing_up(flaskd: Flaskd) -> None:
    """A cache that a failed start has restored is restored again at the next start."""
    flaskd.write("cached.py", CACHED)
    flaskd.write("flaskd.yaml", KEEPING)
    flaskd.start(app="cached")
    get(flaskd.url, "/set?value=one")
    assert flaskd.stop() == 0
    flaskd.write("flaskd.yaml", KEEPING + "health: {probe: /hold}\n")
    flaskd.launch(app="cached")
    flaskd.gate.entered()  # the probe runs: the caches are filled, and the start is not over
    flaskd.until(lambda: "restored 1 entry" in flaskd.log)  # the log has a thread of its own
    killed(flaskd)
    flaskd.write("flaskd.yaml", KEEPING)
    flaskd.start(app="cached")
    assert get(flaskd.url, "/get") == (200, b"one")
    assert flaskd.stop() == 0
    (flaskd.state / "cache.bin").unlink()


def mount_namespace() -> None:
    """Skip if no file system can be mounted in a namespace of the test."""
    done = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True, check=False
    )
    requires("a private mount", [done.stderr.strip() or "unshare failed"] if done.returncode else [])


FULL = """
set -e
mount -t tmpfs -o size=64k none "$STATE_DIRECTORY"
cp -p "$KEPT"/* "$STATE_DIRECTORY"
"$@" &
pid=$!
trap 'kill -TERM $pid' TERM
while kill -0 $pid 2>/dev/null; do code=0; wait $pid || code=$?; done
rm -f "$STATE_DIRECTORY/filler"
cp -a "$STATE_DIRECTORY" "$RESULT"
exit $code
"""
FILLED = """
import os
import re
from cached import app

@app.get("/fill")
def fill():
    with open(os.environ["STATE_DIRECTORY"] + "/filler", "wb", buffering=0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError as error:
            return error.strerror
"""


@pytest.fixture
def kept(flaskd: Flaskd) -> Flaskd:
    """A flaskd that has stopped before, with a record and a cache, which the next start finds."""
    mount_namespace()
    flaskd.write("cached.py", CACHED)
    flaskd.write("filled.py", FILLED)
    flaskd.write("flaskd.yaml", KEEPING)
    flaskd.start(app="cached")
    get(flaskd.url, "/set?value=one")
    assert flaskd.stop() == 0
    (flaskd.directory / "kept").mkdir()
    for path in flaskd.state.iterdir():
        path.rename(flaskd.directory / "kept" / path.name)
    flaskd.env.update(KEPT=str(flaskd.directory / "kept"), RESULT=str(flaskd.directory / "result"))
    return flaskd


def files(flaskd: Flaskd, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (flaskd.directory / name).iterdir()}


def test_a_full_disk_costs_the_record_and_the_cache(kept: Flaskd) -> None:
    """Nothing can be written any more: the stop is clean and in time, says what is lost, and the old files are whole.

    The mark stays, so the old record is not taken for that of this stop.
    """
    flaskd = kept
    flaskd.write("full.sh", FULL)
    flaskd.start(app="filled", prefix=["unshare", "-m", "sh", "full.sh"])
    url = flaskd.url
    assert get(url, "/get") == (200, b"one")
    assert get(url, "/fill") == (200, b"No space left on device")
    get(url, "/set?value=two")
    assert flaskd.stop() == 0
    assert "cleanup persist/keep: failed" in flaskd.log
    assert f"cannot write {flaskd.state}/cache.bin: No space left on device" in flaskd.log
    assert f"cannot record this stop in {flaskd.state}/last-stop.json: No space left on device" in flaskd.log
    found = files(flaskd, "result")
    mark = json.loads(found.pop("running.json"))
    assert mark["unrecorded"] == "No space left on device"
    assert found == files(flaskd, "kept")


READ_ONLY = """
set -e
mount --bind "$KEPT" "$STATE_DIRECTORY"
mount -o remount,bind,ro "$STATE_DIRECTORY"
exec "$@"
"""


def test_a_read_only_disk_costs_the_record_and_the_cache(kept: Flaskd) -> None:
    """With a read-only disk flaskd starts with a warning and an empty cache, serves, and stops; old files stay."""
    flaskd = kept
    before = files(flaskd, "kept")
    flaskd.write("read_only.sh", READ_ONLY)
    flaskd.start(app="cached", prefix=["unshare", "-m", "sh", "read_only.sh"])
    assert f"cannot write to {flaskd.state}: Read-only file system; the last stop will not be recorded" in flaskd.log
    assert f"cannot use {flaskd.state}/cache.bin: Read-only file system; starting empty" in flaskd.log
    assert get(flaskd.url, "/get") == (200, b"None")
    assert flaskd.client("last-stop")[0] != 69
    assert flaskd.stop() == 0
    assert f"cannot write {flaskd.state}/cache.bin: Read-only file system" in flaskd.log
    assert files(flaskd, "kept") == before
    assert json.loads(before["last-stop.json"])["reason"] == "signal: SIGTERM"


def test_a_state_directory_in_use(flaskd: Flaskd, make_flaskd) -> None:
    """A second flaskd with the same state directory serves without changing it."""
    flaskd.start()
    other = make_flaskd()
    other.env["STATE_DIRECTORY"] = str(flaskd.state)
    other.start()
    assert f"another flaskd uses {flaskd.state}; the last stop will not be recorded" in other.log
    assert other.stop() == 0
    assert not (flaskd.state / "last-stop.json").exists()
    assert flaskd.stop() == 0
    assert flaskd.record()["reason"] == "signal: SIGTERM"
