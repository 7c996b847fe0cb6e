"""The instruments: every request has a fate, what is lost is seen, and figures are what was measured.

Nothing here says how long anything may take.
"""

import dataclasses
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LOSS = BENCHMARKS / "loss.py"


@pytest.fixture
def instrument(monkeypatch):
    """Import a module of the benchmarks; they are forgotten afterwards, for they are not a package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for file in BENCHMARKS.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("scenario", ["stop", "connect", "restart", "drain"])
def test_every_request_has_a_fate(scenario, tmp_path):
    """One cycle of flaskd under 24 clients: a table, an account that adds up, and nothing lost."""
    file = tmp_path / "account.json"
    done = subprocess.run(
        [sys.executable, str(LOSS), "--servers", "flaskd", "--scenario", scenario, "--cycles", "1", "--json", str(file)],
        capture_output=True, text=True, timeout=80, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| flaskd |" in done.stdout
    text = file.read_text()
    accounts = [each for each in find(json.loads(text)) if each["server"] == "flaskd"]
    assert accounts, text
    for account in accounts:
        assert account["requests"] == sum(account["fates"].values()) > 0


def test_the_versions_of_all_peers_are_told(instrument, monkeypatch):
    """A figure is worth nothing without what it was measured with: each package that a server needs is named."""
    servers = instrument("_servers")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2.{len(name)}")
    told = servers.environment()
    needed = {module for server in servers.SERVERS.values() for module in server.modules} - {"uwsgidecorators"}
    for name in (*needed, "uwsgi", "flask"):
        assert f"{name} 1.2.{len(name)}" in told


def find(value):
    """All accounts in what was written."""
    if isinstance(value, dict):
        if "fates" in value:
            yield value
        for each in value.values():
            yield from find(each)
    elif isinstance(value, list):
        for each in value:
            yield from find(each)


def run(name, tmp_path, *arguments):
    """Run a benchmark in its smallest form; returns what it printed, and what it wrote."""
    file = tmp_path / "figures.json"
    argv = [sys.executable, str(BENCHMARKS / name), "--quick", "--json", str(file), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert not done.stderr, done.stdout + done.stderr
    written = json.loads(file.read_text())
    missed = written["missed"] if name == "stop.py" else [each for each in written["goals"] if not each["met"]]
    assert done.returncode == bool(missed)
    assert ("flaskd misses" in done.stdout) == bool(missed)
    return done.stdout, written


def test_each_kind_of_stop_has_its_figure(tmp_path):
    """One small stop of each kind: a row each, medians of what was measured, and every request answered."""
    printed, written = run("stop.py", tmp_path, "--servers", "flaskd")
    kinds = ["idle", "in_flight", "kept_alive", "just_answered", "refusal", "backlog", "queued", "slow_readers"]
    kinds += ["second_signal", "third_signal", "crowd"]
    assert [each["kind"] for each in written["stops"]] == kinds
    assert sum("| " in line for line in printed.splitlines()) == len(kinds) + 1
    for stop in written["stops"]:
        assert not stop["error"]
        assert stop["median"] == statistics.median(each["seconds"] for each in stop["figures"])
        assert [each["answered"] for each in stop["figures"]] == [each["of"] for each in stop["figures"]]
    asked = {each["kind"]: each["figures"][0]["of"] for each in written["stops"]}
    assert asked["queued"] == 8
    assert asked["slow_readers"] == 3
    assert asked["backlog"] > 0


def test_speed_is_relative_to_waitress(tmp_path):
    """One short run: requests, seconds and ratios agree, nothing failed, and each goal has its figure."""
    printed, written = run("speed.py", tmp_path, "--servers", "flaskd,waitress-serve", "--client", "own")
    assert "| 256 connections" in printed
    assert list(written["origins"]) == ["flaskd"]
    assert f"flaskd: {written['origins']['flaskd']}\n" in printed
    rates = {}
    for load in written["loads"]:
        (sample,) = load["samples"]
        assert sample["requests"] > 0 == sample["failed"]
        assert 0 < sample["p99"] < sample["seconds"]
        assert (sample["slept"] > 0) == (load["load"] == "sleepers")
        assert load["rate"] == pytest.approx(sample["requests"] / sample["seconds"])
        rates[load["load"], load["server"]] = load["rate"]
    for load in written["loads"]:
        assert load["ratio"] == pytest.approx(load["rate"] / rates[load["load"], "waitress-serve"], abs=0.01)
    assert {server for load, server in rates if load == "head"} == {"flaskd", "flaskd+log", "waitress-serve"}
    assert {server for load, server in rates if load != "head"} == {"flaskd", "waitress-serve"}
    assert len({load for load, _ in rates}) == 11
    for kind in ("idle", "memory"):
        assert {each["server"] for each in written[kind]} == {"flaskd", "waitress-serve"}
    assert min(each["runs"][0] for each in written["memory"]) > 5
    assert len(written["goals"]) == 4 + 4 + 2 + 2 + 2 + 1
    assert (
        sum(line.startswith(f"| {goal['goal']} ") for goal in written["goals"] for line in printed.splitlines()) == 15
    )
    assert not written["errors"]


def test_an_earlier_flaskd_has_a_column_of_its_own(tmp_path):
    """A checkout is measured beside flaskd, its directory is told, and what is held against it is judged by the pair."""
    before = tmp_path / "before"
    before.mkdir()
    (before / "flaskd").symlink_to(BENCHMARKS.parent / "flaskd")
    options = ["--servers", "flaskd", "--before", str(before), "--only", "post,sleeps", "--client", "own"]
    printed, written = run("speed.py", tmp_path, *options)
    assert "| flaskd | before |" in " ".join(printed.split())
    assert written["origins"]["before"] == str(before)
    samples = {(load["load"], load["server"]): load["samples"][0] for load in written["loads"]}
    assert set(samples) == {(load, server) for load in ("post", "sleeps") for server in ("flaskd", "before")}
    rate = [each["requests"] / each["seconds"] for each in (samples["post", "flaskd"], samples["post", "before"])]
    late = [samples["sleeps", server]["p99"] for server in ("flaskd", "before")]
    figures = {goal["goal"]: goal["figure"] for goal in written["goals"]}
    assert figures["1 MiB up, 16 connections: requests a second ÷ before"] == pytest.approx(rate[0] / rate[1], abs=0.01)
    assert figures["5 ms of sleep, 32 connections, 16 threads: p99 ÷ before"] == pytest.approx(
        late[0] / late[1], abs=0.01
    )
    assert len(figures) == 3


def test_an_earlier_flaskd_is_a_checkout(tmp_path):
    """A directory without a flaskd in it is refused: what is installed would be measured in its place."""
    argv = [sys.executable, str(BENCHMARKS / "speed.py"), "--before", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 2
    assert f"no flaskd in '{tmp_path}'" in done.stderr


def test_a_browsers_head_has_14_lines(instrument):
    """What a browser sends has 14 header lines in some 700 bytes, by the benchmarks' own client."""
    head = instrument("_wire").request("/", headers=instrument("_measure").BROWSER)
    assert head.count(b"\r\n") == 1 + 14 + 1
    assert head.startswith(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert 650 <= len(head) <= 750


def test_the_variant_with_a_log_writes_it(instrument):
    """The variant of flaskd with its access log on writes each request there, in the combined format; flaskd none."""
    measure, servers = instrument("_measure"), instrument("_servers")
    flaskd = servers.SERVERS["flaskd"]
    for server, lines in ((flaskd, 0), (measure.logged(flaskd), 1)):
        with servers.running(server, servers.free_port()) as each:  # that it is ready was asked for with one request
            assert each.wait_exit(each.terminate()) < servers.EXIT_PATIENCE
            assert each.log.read_text().count('"GET / HTTP/1.1" 200 7 "-" "-"') == lines


def test_a_pinned_server_has_one_core(instrument):
    """Every thread of a server that is given a core may run on that one alone."""
    servers, core = instrument("_servers"), max(os.sched_getaffinity(0))
    pinned = dataclasses.replace(servers.SERVERS["flaskd"], core=core)
    with servers.running(pinned, servers.free_port()) as each:
        threads = [int(task.name) for task in Path(f"/proc/{each.process.pid}/task").iterdir()]
        assert len(threads) > 4
        assert [os.sched_getaffinity(thread) for thread in threads] == [{core}] * len(threads)


def test_what_wrk_says_is_read(instrument):
    """Requests, failures, seconds and the 99th percentile are those that wrk prints, in seconds."""
    said = """Running 3s test @ http://127.0.0.1:1/
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   509.81us  243.61us   5.26ms   88.06%
  Latency Distribution
     50%  488.00us
     99%    1.94ms
  4184 requests in 3.10s, 2.08MB read
  Socket errors: connect 0, read 1, write 2, timeout 3
  Non-2xx or 3xx responses: 4
Requests/sec:   2092.00
"""
    told = instrument("_measure").told
    assert told(said, 3.0) == {"requests": 4184, "failed": 10, "seconds": 2.0, "p99": pytest.approx(0.00194)}
    assert told(said.replace("1.94ms", "2.00s "), 3.0)["p99"] == 2.0
    with pytest.raises(ValueError, match="cannot read what wrk says"):
        told(said.replace("99%", "98%"), 3.0)


def test_a_start_is_relative_to_importing_flask(tmp_path):
    """Two starts of each: a row for each server, ratios of what was measured, and each goal judged."""
    printed, written = run("start.py", tmp_path, "--servers", "flaskd,waitress-serve")
    flask = statistics.median(written["import_flask"])
    assert [each["server"] for each in written["starts"]] == ["flaskd", "waitress-serve"]
    for each in written["starts"]:
        assert not each["error"]
        assert len(each["seconds"]) == len(each["memory"]) == len(written["import_flask"]) == 2
        assert f"{statistics.median(each['seconds']) / flask:.2f} |" in printed
        assert min(each["memory"]) > 5
    ratio, memory = (goal["figure"] for goal in written["goals"])
    assert ratio == pytest.approx(statistics.median(written["starts"][0]["seconds"]) / flask)
    assert memory == statistics.median(written["starts"][0]["memory"])


def test_stopping_without_an_answer_is_seen(tmp_path):
    """Under stock waitress, which answers nothing that is queued at the signal, the account says so."""
    _, written = run("stop.py", tmp_path, "--servers", "waitress-serve", "--only", "queued")
    (stop,) = written["stops"]
    assert stop["figures"][0]["answered"] < stop["figures"][0]["of"]


def test_whoever_asks_about_flaskd_has_a_figure(tmp_path):
    """One short run of each part: a row for each figure, its median the one of what was measured, each goal judged."""
    printed, written = run("control.py", tmp_path)
    figures = written["figures"]
    assert sum("| " in line for line in printed.splitlines()) == len(figures) + 1
    for figure in figures.values():
        assert len(figure["values"]) == 1
    assert figures["verb"]["values"][0] > 0 < figures["click"]["values"][0]
    assert figures["busy_median"]["values"][0] <= figures["busy_p99"]["values"][0]
    assert [each["goal"] for each in written["goals"]] == [
        each["text"] for each in figures.values() if each["most"] is not None
    ]
    assert len(written["goals"]) == 6


@pytest.mark.parametrize(
    ("name", "what", "known"),
    [
        ("stop.py", "no row 'nap'", "idle"),
        ("speed.py", "no load 'nap'", "memory"),
        ("control.py", "no part 'nap'", "stuck"),
    ],
)
def test_an_unknown_row_is_refused(name, what, known):
    """A misspelt row is named, with the ones there are."""
    argv = [sys.executable, str(BENCHMARKS / name), "--only", "nap"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 2
    assert what in done.stderr
    assert known in done.stderr


def test_each_approach_keeps_what_its_textbook_version_loses(tmp_path):
    """One run of each way to stop an app: flaskd's answer the request in hand and clean up, the others drop it."""
    file = tmp_path / "figures.json"
    argv = [sys.executable, str(BENCHMARKS / "approaches.py"), "--runs", "1", "--json", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())["figures"]
    assert sum(line.startswith(f"| {name} ") for name in figures for line in done.stdout.splitlines()) == 7
    for name, [one] in figures.items():
        assert one["answered"] == (not name.startswith("textbook"))
