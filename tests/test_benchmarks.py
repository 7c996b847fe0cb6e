"""The benchmarks count correctly: every request has a fate, losses are noticed, and figures are what was measured.

No test here checks how long anything takes.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import select
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LOSS = BENCHMARKS / "loss.py"


@pytest.fixture
def instrument(monkeypatch):
    """Import a module of the benchmarks; they are removed from sys.modules afterwards, because they are no package."""
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
    """Figures name the versions that they were measured with: each package that a server needs."""
    servers = instrument("_servers")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2.{len(name)}")
    told = servers.environment()
    needed = {module for server in servers.SERVERS.values() for module in server.modules} - {"uwsgidecorators"}
    for name in (*needed, "uwsgi", "flask"):
        assert f"{name} 1.2.{len(name)}" in told


PREFORK = """
import os, socket, subprocess, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
code = (
    "import importlib, os, socket, waitress;"
    "app = getattr(importlib.import_module(os.environ['BENCHMARKS_MODULE']), os.environ['BENCHMARKS_APP']);"
    f"waitress.serve(app, sockets=[socket.socket(fileno={listener.fileno()})], threads=4)"
)
workers = [subprocess.Popen([sys.executable, "-c", code], pass_fds=[listener.fileno()]) for _ in range(int(sys.argv[2]))]
for each in workers:
    each.wait()
time.sleep(60)
"""
"""A server with worker processes on one listener, none of which it starts again."""


@pytest.fixture
def prefork(instrument):
    """The simplest server with worker processes."""
    return instrument("_servers").Server(
        "prefork", (), lambda port, served: ["-c", PREFORK, str(port), str(served.processes)]
    )


def find(value):
    """All accounts in the written JSON."""
    if isinstance(value, dict):
        if "fates" in value:
            yield value
        for each in value.values():
            yield from find(each)
    elif isinstance(value, list):
        for each in value:
            yield from find(each)


def run(name, tmp_path, *arguments):
    """Run a benchmark in its smallest form; returns its output, and the JSON that it wrote."""
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
    """One small stop of each kind gives a row each, medians of the measured values, and every request is answered."""
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
    """In one short run requests, seconds and ratios agree, nothing fails, and each goal has its figure."""
    printed, written = run("speed.py", tmp_path, "--servers", "flaskd,waitress-serve", "--client", "own")
    assert "| 256 connections" in printed
    assert list(written["origins"]) == ["flaskd"]
    assert f"flaskd: {written['origins']['flaskd']}\n" in printed
    rates = {}
    for load in written["loads"]:
        (sample,) = load["samples"]
        assert sample["requests"] > 0 == sample["failed"]
        assert 0 < sample["p99"] < 2 * sample["seconds"]  # the last answers may come after the end
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
    """A checkout is measured beside flaskd, its directory is printed, and goals are compared with the pair."""
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
    """A directory without a flaskd is refused, because the installed one would be measured instead."""
    argv = [sys.executable, str(BENCHMARKS / "speed.py"), "--before", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 2
    assert f"no flaskd in '{tmp_path}'" in done.stderr


def test_a_browsers_head_has_14_lines(instrument):
    """The browser's head of the benchmarks' own client has 14 lines and some 700 bytes."""
    head = instrument("_wire").request("/", headers=instrument("_measure").BROWSER)
    assert head.count(b"\r\n") == 1 + 14 + 1
    assert head.startswith(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert 650 <= len(head) <= 750


def test_the_variant_with_a_log_writes_it(instrument):
    """The variant with an access log writes each request in the combined format; plain flaskd writes none."""
    measure, servers = instrument("_measure"), instrument("_servers")
    flaskd = servers.SERVERS["flaskd"]
    for server, lines in ((flaskd, 0), (measure.logged(flaskd), 1)):
        with servers.running(server, servers.free_port()) as each:  # waiting until it was ready took one request
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
    """Requests, failures, seconds and the 99th percentile are read from the output of wrk, in seconds."""
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
    """Two starts of each server give a row each, ratios of the measured values, and a result for each goal."""
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


def test_what_attackers_leave_is_a_share_of_the_speed_alone(tmp_path):
    """One short run of each attack gives a row each, shares of the measured speeds, and a result for each goal."""
    printed, written = run("attacks.py", tmp_path, "--servers", "flaskd")
    names = ["heads", "bodies", "readers", "idle"]
    assert [each["attack"] for each in written["attacks"]] == names
    assert sum("| " in line for line in printed.splitlines()) == len(names) + 1
    assert "flask 3" in written["environment"]
    for attack, goal in zip(written["attacks"], written["goals"], strict=True):
        (sample,) = attack["runs"]
        assert sample["before"] > 0
        alone = (sample["before"] + sample["after"]) / 2 if sample["after"] else sample["before"]
        assert attack["share"] == goal["figure"] == pytest.approx(sample["during"] / alone, abs=0.006)


def test_stopping_without_an_answer_is_seen(tmp_path):
    """The account shows that stock waitress answers nothing that is queued at the signal."""
    _, written = run("stop.py", tmp_path, "--servers", "waitress-serve", "--only", "queued")
    (stop,) = written["stops"]
    assert stop["figures"][0]["answered"] < stop["figures"][0]["of"]


def test_whoever_asks_about_flaskd_has_a_figure(tmp_path):
    """One short run of each part gives a row for each figure, with the median of the values, and a result for each goal."""
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


@pytest.mark.parametrize("name", ["flaskd", "gunicorn", "granian", "uvicorn", "uwsgi"])
def test_each_server_is_told_how_many_workers(name, instrument):
    """With 3 workers each server's command line says 3; with none the peers' say one, and flaskd's does not say any."""
    servers = instrument("_servers")
    option = {"flaskd": "-w", "gunicorn": "-w", "uwsgi": "--processes"}.get(name, "--workers")
    server = servers.SERVERS[name]
    assert server.pooled
    three, none = (server.bound(1, servers.Served(workers=workers)) for workers in (3, 0))
    assert three[three.index(option) + 1] == "3"
    assert (option in none) == (name not in {"flaskd", "uwsgi"})
    assert option not in none or none[none.index(option) + 1] == "1"


def test_a_server_is_ready_when_each_worker_has_the_app(instrument, prefork):
    """Three workers are waited for and told apart from their parent; a variant may have its own number."""
    servers = instrument("_servers")
    with servers.running(prefork, servers.free_port(), served=servers.Served(workers=3)) as each:
        assert len(each.workers) == each.imports == 3
        assert each.process.pid not in each.workers
        status, body = each.ask("/pid", 10)
        assert (status, int(body) in each.workers) == (200, True)
    two = dataclasses.replace(prefork, workers=2)
    with servers.running(two, servers.free_port(), served=servers.Served(workers=3)) as each:
        assert len(each.workers) == 2


def test_nothing_is_left_of_a_server_that_was_killed(instrument, prefork):
    """Workers that outlive their killed parent are ended with the server."""
    servers = instrument("_servers")
    with contextlib.ExitStack() as stack:
        with servers.running(prefork, servers.free_port(), served=servers.Served(workers=2)) as each:
            alive = [os.pidfd_open(pid) for pid in each.workers]
            for fd in alive:
                stack.callback(os.close, fd)
            os.kill(each.process.pid, signal.SIGKILL)
            each.process.wait()
        for fd in alive:
            assert until_readable(fd)


def until_readable(fd):
    """Whether a process ends within some seconds; its pidfd is readable then."""
    watch = select.poll()
    watch.register(fd, select.POLLIN)
    return watch.poll(10_000)


def test_a_killed_worker_hurts_its_own_connections_alone(instrument, prefork):
    """If one of three workers is killed under 24 clients, nothing is refused, and each loss is one of that worker's."""
    options = argparse.Namespace(workers=3, cycles=1, clients=24, unprivileged=False)
    account, took = instrument("_workers").tell(prefork, instrument("_servers").free_port(), "kill", options)
    assert account["requests"] == sum(account["fates"].values()) > 0
    assert (account["faults"], account["fates"]["refused"], len(took)) == ([], 0, 1)
    assert account["fates"]["answered"] > 24
    assert all(loss["target"] for loss in account["losses"])


def test_a_loss_that_no_kill_explains_is_seen(instrument):
    """A loss of another worker's request is a stray; so is one of no worker's, unless a worker was just killed."""
    strays = instrument("_workers").strays
    notes = ["+ 7 GET /?token=1", "- 7 GET /?token=1", "+ 8 GET /?token=2"]

    def lost(target, at):
        return {"fate": "reset", "kind": "fresh", "how": "RST", "target": target, "at": at}

    killed = {8: 100.0}
    assert strays([lost("/?token=2", 100.5), lost("/?token=3", 100.5)], notes, killed) == []
    assert "begun by 7, which was not killed" in strays([lost("/?token=1", 100.5)], notes, killed)[0]
    assert "begun by no worker, and not when one was killed" in strays([lost("/?token=3", 110)], notes, killed)[0]


def test_what_a_killed_worker_had_begun_has_to_be_named(instrument):
    """Requests that the killed worker had ended need no name; of the others each must be named by its path."""
    workers = instrument("_workers")
    notes = ["+ 8 GET /?token=1", "- 8 GET /?token=1", "+ 8 GET /?token=2", "+ 8 POST /upload?token=3", "+ 7 GET /"]
    told = {
        "workers": [{"pid": 7}],
        "deaths": [{"pid": 8, "cut": [{"method": "GET", "path": "/?token=2", "age": 0.1}]}],
    }
    named = workers.named_requests(told)
    assert named == {8: {"GET /": 1}}
    assert workers.unnamed(notes, {8: 1.0}, named) == ["worker 8 had 1 x POST /upload, and 0 are named"]


def test_work_that_workers_share_has_its_figures(instrument, prefork):
    """The jobs of each of four workers are counted, and the first process is measured without its workers."""
    measure = instrument("_measure")
    options = argparse.Namespace(workers=2, seconds=0.3)
    shared = measure.balance(prefork, options)
    assert len(shared.jobs) == 4
    assert shared.spread == max(shared.jobs.values()) / min(shared.jobs.values())
    assert shared.p99 >= measure.JOB
    idle = measure.supervisor(prefork, options)
    assert 1 < idle.memory < 25
    assert 0 <= idle.share < 0.5


def test_a_worker_without_a_job_is_no_balance(instrument):
    """If one of four workers did nothing, the ratio of the busiest to it is infinite."""
    assert instrument("_measure").Balance({"1": 5, "2": 5, "3": 5}, 0.01).spread == float("inf")


def test_workers_have_goals_of_their_own(instrument):
    """With workers the goals are ratios to one worker and to gunicorn, balance and supervisor; each can be missed."""
    goals, measure = instrument("_goals"), instrument("_measure")
    results = goals.Results()

    def rate(load, server, requests):
        results.samples[load, server] = {0: measure.Sample(requests, 0, 1.0, 1.0, 0.01)}

    for server, requests in (("flaskd", 180), (measure.ONE, 100), ("gunicorn", 181)):
        rate("compute", server, requests)
    rate("16", "flaskd", 1200)
    rate("16", "gunicorn", 1000)
    results.balance["flaskd"] = {0: measure.Balance({"1": 100, "2": 110, "3": 121, "4": 110}, 0.0125)}
    results.supervisor["flaskd"] = {0: measure.Supervisor(24.0, 0.02)}
    judged = goals.judge(results, ["16", "compute", "balance", "supervisor", "memory"], [], 2)
    assert [(each["figure"], each["met"]) for each in judged] == [
        (1.8, True), (0.99, False), (1.2, True), (1.21, False), (1.25, True), (24.0, True), (0.02, False),
    ]  # fmt: skip
    assert {each["goal"].rpartition(" ÷ ")[2] for each in judged[:3]} == {"one worker", "gunicorn"}
    assert goals.judge(results, ["balance", "supervisor"], []) == []


def test_new_code_is_of_the_kind_it_says(instrument):
    """Good code has the app in its version, broken code raises the words of the refusal, and 500 is answered."""
    kinds = {code.name: code for code in instrument("_reload").KINDS}
    app = instrument("app").app
    good = {}
    exec(kinds["good"].version("one"), good)
    assert good["app"] is app
    assert app.test_client().get("/version").text == "one"
    for name, error in (("syntax", SyntaxError), ("exception", RuntimeError)):
        with pytest.raises(error) as raised:
            exec(kinds[name].version("two"), {})
        assert kinds[name].says in f"{raised.type.__name__}: {raised.value}"
    sys.modules.pop("app")  # a new worker imports the app anew
    exec(kinds["probe"].version("three"), {})
    answer = instrument("app").app.test_client().get("/version")
    assert (answer.status_code, answer.text) == (500, "three")


def test_a_reload_that_breaks_a_promise_says_which(instrument):
    """Lost, wrong and refused requests, an exited server, the wrong code and the wrong outcome are faults each."""
    reload = instrument("reload")
    kinds = {code.name: code for code in reload.KINDS}
    fates = dict.fromkeys(instrument("_load").FATES, 0)
    fine = reload.Outcome("flaskd", "good", 10, fates, answers="new", told=0)
    assert fine.faults(kinds["good"]) == []
    refused = dataclasses.replace(fine, kind="syntax", answers="old", told=70, said="... SyntaxError: invalid syntax")
    assert refused.faults(kinds["syntax"]) == []
    broken = [
        dataclasses.replace(fine, fates=fates | {"cut": 1}),
        dataclasses.replace(fine, fates=fates | {"wrong": 1}),
        dataclasses.replace(fine, fates=fates | {"refused": 1}),
        dataclasses.replace(fine, exited=3),
        dataclasses.replace(fine, answers="new and old"),
        dataclasses.replace(fine, told=None),
        dataclasses.replace(fine, error="it did not become ready"),
    ]
    assert [len(each.faults(kinds["good"])) for each in broken] == [1] * len(broken)
    silent = dataclasses.replace(refused, said="")
    assert silent.faults(kinds["syntax"]) == ["did not say 'SyntaxError'"]


def test_the_longest_silence_is_told(instrument, monkeypatch):
    """Silence is the longest time between two answers to any clients, up to the end of the account."""
    load, now = instrument("_load"), [0.0]
    monkeypatch.setattr(load.time, "monotonic", lambda: now[0])
    account = load.Account()
    for moment, fate in ((1, "answered"), (2, "refused"), (4, "answered"), (4.5, "answered")):
        now[0] = moment
        account.enter(fate, "fresh", "", 0.0)
    assert account.as_json()["silence"] == 3
    now[0] = 10
    assert account.as_json()["silence"] == 5.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loss.py", "--scenario", "kill"], "--scenario kill takes worker processes: give --workers N, too"),
        (["loss.py", "--workers", "two"], "'two' is not a number of processes"),
        (["speed.py", "--only", "16,balance"], "--only balance takes worker processes: give --workers N, too"),
        (["limits.py", "--only", "hang,nap"], "no measurement 'nap': choose from hang, overload"),
        (["reload.py", "--kinds", "nap"], "no kind 'nap': choose from good,"),
        (["reload.py", "--servers", "waitress-serve"], "no server 'waitress-serve' that reloads: choose from flaskd,"),
        (["reload.py", "--workers", "0"], "--workers 0 cannot reload code: give at least 1"),
    ],
)
def test_what_makes_no_sense_with_workers_is_refused(arguments, said):
    """A scenario without its workers, and an unknown server or kind, are refused by name, with the next step."""
    argv = [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("name", "what", "known"),
    [
        ("stop.py", "no row 'nap'", "idle"),
        ("speed.py", "no load 'nap'", "memory"),
        ("control.py", "no part 'nap'", "stuck"),
        ("fleet.py", "no table 'nap'", "race"),
        ("attacks.py", "no attack 'nap'", "readers"),
    ],
)
def test_an_unknown_row_is_refused(name, what, known):
    """An unknown row is refused by name, with the known ones."""
    argv = [sys.executable, str(BENCHMARKS / name), "--only", "nap"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 2
    assert what in done.stderr
    assert known in done.stderr


def test_each_approach_keeps_what_its_textbook_version_loses(tmp_path):
    """In one run of each way, flaskd's ways answer the running request and clean up, and the textbook's do not."""
    file = tmp_path / "figures.json"
    argv = [sys.executable, str(BENCHMARKS / "approaches.py"), "--runs", "1", "--json", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())["figures"]
    assert sum(line.startswith(f"| {name} ") for name in figures for line in done.stdout.splitlines()) == 7
    for name, [one] in figures.items():
        assert one["answered"] == (not name.startswith("textbook"))


def test_a_fleet_that_fails_a_request_says_where(instrument):
    """Failures in a rolling restart, in the announced race, and after a kill are faults; in the unannounced race not."""
    fleet = instrument("fleet")

    def account(**fates):
        return {"fates": {"answered": 9, "refused": 0, "reset": 0} | fates}

    fine = {
        "rolls": {"flaskd": {"ways": {"agent": account()}}, "gunicorn": {"ways": {"httpchk": account(reset=1)}}},
        "race": {"flaskd, announce: 6s": account(), "flaskd, announce: 0s": account(reset=5)},
        "kill": {"flaskd": {"later": 0}},
    }
    assert fleet.faults_of(fine) == fleet.faults_of({"rolls": {}, "race": {}, "kill": {}}) == []
    assert fleet.how(account(refused=2, reset=1)) == "2 refused, 1 reset"
    broken = [
        fine | {"rolls": {"flaskd": {"ways": {"agent": account(refused=1)}}}},
        fine | {"race": {"flaskd, announce: 6s": account(reset=2)}},
        fine | {"kill": {"flaskd": {"later": 3}}},
    ]
    assert [fleet.faults_of(each) for each in broken] == [
        ["agent: 1 failed"], ["the race, announced: 2 failed"], ["3 failed that began after a kill"],
    ]  # fmt: skip


@pytest.mark.parametrize(("at_sigterm", "killed"), [("exit 0", False), ("true", True)])
def test_the_kubelet_kills_what_outlives_its_grace(instrument, at_sigterm, killed):
    """A pod that exits is not killed, one that does not is; in either case the balancer is told once."""
    script = f"trap '{at_sigterm}' TERM; echo ready; while :; do read line; done"
    told = []
    with subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdout.readline()
        end_pod = instrument("_kubelet").end_pod
        assert end_pod(process, lambda: told.append("out"), delay=0.1, grace=20 if not killed else 0.3) == killed
    assert told == ["out"]
    assert process.returncode == (-signal.SIGKILL if killed else 0)


def test_a_server_whose_threads_hang_is_asked(tmp_path):
    """One short run of flaskd: its health is told at once, the next request when the limit has ended those that hang."""
    argv = [sys.executable, str(BENCHMARKS / "hang.py"), "--servers", "flaskd", "--runs", "1", "--limit", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| flaskd")]
    _, health, after, hung = [cell.strip() for cell in row.strip("|").split("|")]
    assert float(health.removesuffix(" s")) < float(after.removesuffix(" s"))
    assert hung == "504 (4)"
