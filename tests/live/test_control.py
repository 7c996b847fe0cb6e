"""The control plane of a real daemon: FIFO, socket, both dialects, and the client verbs."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
from typing import Any

import pytest
from daemon_kit import NOBODY, Flaskd
from http_client import get
from patience import PATIENCE


def test_echo_in_a_shell(flaskd: Flaskd) -> None:
    """In a shell `echo drain > control` drains, `echo resume` undoes it, and `echo stop` ends flaskd."""
    flaskd.start()
    subprocess.run(["sh", "-c", f"echo drain > {flaskd.fifo_path}"], check=True, timeout=PATIENCE)
    flaskd.wait_message("drained")
    subprocess.run(["sh", "-c", f"echo resume > {flaskd.fifo_path}"], check=True, timeout=PATIENCE)
    flaskd.wait_message("ready: ")
    subprocess.run(["sh", "-c", f"printf 'status\\nstop\\n' > {flaskd.fifo_path}"], check=True, timeout=PATIENCE)
    assert flaskd.wait() == 0
    assert "control: drain from the FIFO" in flaskd.log
    assert "control: state: ready" in flaskd.log


def test_an_unfinished_line_is_not_the_next_writers(flaskd: Flaskd) -> None:
    """`printf drai > control` alone is dropped with a warning; the next `echo` is carried out."""
    flaskd.start()
    subprocess.run(["sh", "-c", f"printf drai > {flaskd.fifo_path}"], check=True, timeout=PATIENCE)
    flaskd.until(lambda: "4 bytes without a newline, and their writer left" in flaskd.log)
    subprocess.run(["sh", "-c", f"echo drain > {flaskd.fifo_path}"], check=True, timeout=PATIENCE)
    flaskd.wait_message("drained")
    assert flaskd.stop() == 0


def test_junk_in_the_fifo_is_told_in_the_log(flaskd: Flaskd) -> None:
    """A mistyped command in the FIFO is logged, because a FIFO gives no answer; empty lines are ignored."""
    flaskd.start()
    with flaskd.fifo_path.open("wb") as fifo:
        fifo.write(b"\n\ndrian\n\xff\xfe\n")
    flaskd.until(lambda: 'unknown-command "drian"; did you mean "drain"?' in flaskd.log)
    assert flaskd.status()["state"] == "ready"
    assert flaskd.stop() == 0


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("drian", 'ERR unknown-command "drian"; did you mean "drain"? try "help"\n'),
        ("xyzzy", 'ERR unknown-command "xyzzy"; try "help"\n'),
        ("", 'ERR usage expected a command; try "help"\n'),
        ("drain fast", 'ERR usage drain does not know "fast"; it knows wait\n'),
        ("health wait", 'ERR usage health does not know "wait"; it takes none\n'),
        ("health", "OK healthy\n"),
        ("ready", "OK ready\n"),
        ("resume", "OK ready\n"),
        ("x" * 5000, "ERR usage a command has at most 4096 bytes\n"),
    ],
)
def test_text_answers(flaskd: Flaskd, line: str, answer: str) -> None:
    """Each line gets its answer, then the connection closes; these commands change nothing."""
    flaskd.start()
    assert flaskd.command(line) == answer
    assert flaskd.status()["state"] == "ready"
    assert flaskd.stop() == 0


def test_answers_of_many_lines(flaskd: Flaskd) -> None:
    """The answers of help, status, plan, config and version end with OK."""
    flaskd.write("flaskd.yaml", "cleanup: {policies: {bye: {use: command, with: {argv: ['true']}}}}\n")
    flaskd.start()
    helped = flaskd.command("help")
    for verb in ["help", "status", "health", "ready", "drain", "resume", "stop", "reload", "plan", "config", "version"]:
        assert any(line.split()[0] == verb for line in helped.splitlines()), verb
    assert helped.endswith("\nOK help\n")
    status = flaskd.command("status").splitlines()
    assert "state: ready" in status
    assert f"pid: {flaskd.pid}" in status
    assert status[-1] == "OK ready"
    assert any("bye" in line and "command" in line for line in flaskd.command("plan").splitlines())
    assert "deadline: 25s" in flaskd.command("config")
    assert flaskd.command("version").startswith("OK 0.")
    assert flaskd.stop() == 0


def test_json_lines(flaskd: Flaskd) -> None:
    """Several JSON requests on one connection get JSON answers with their ids; faulty ones change nothing."""
    flaskd.start()
    held = flaskd.hold()
    with flaskd.control() as client, client.makefile("rwb") as stream:

        def ask(line: str) -> dict[str, object]:
            stream.write(line.encode() + b"\n")
            stream.flush()
            return dict(json.loads(stream.readline()))

        assert ask('{"id":1,"cmd":"health"}') == {"id": 1, "ok": True, "result": "healthy"}
        status = ask('{"id":"two","cmd":"status"}')
        assert (status["id"], status["state"], status["in_flight"]) == ("two", "ready", 1)
        [request] = ask('{"cmd":"status","requests":true}')["requests"]  # type: ignore[misc]
        assert (request["method"], request["path"], request["phase"]) == ("GET", "/hold", "running")
        for wrong in ["{", '{"id":3}', '{"id":3,"cmd":7}', '{"id":3,"cmd":"drain","wait":1}', "[1]" * 9, "{}" + "x"]:
            answer = ask(wrong)
            assert answer["ok"] is False
            assert answer["error"]["code"] == "usage"  # type: ignore[index]
        assert ask('{"id":4,"cmd":"drain","fast":true}')["error"]["code"] == "usage"  # type: ignore[index]
        assert ask('{"cmd":"ready"}')["result"] == "ready"
        first = ask('{"id":7,"cmd":"drain","wait":true}')
        assert first == {"id": 7, "event": "progress", "in_flight": 1, "left": first["left"]}
        flaskd.gate.open()
        while True:
            answer = dict(json.loads(stream.readline()))
            if "ok" in answer:
                break
        assert answer.pop("took") >= 0
        assert answer == {"id": 7, "ok": True, "result": "drained", "completed": 1, "rejected": 0, "cut": []}
        assert ask('{"id":8,"cmd":"ready"}')["error"] == {"code": "not-ready", "message": "flaskd is drained"}
    assert held.result() == (200, b"held")
    assert flaskd.stop() == 0


def test_a_waiting_client_that_leaves_changes_nothing(flaskd: Flaskd) -> None:
    """The drain goes on when the client that asked for it has gone."""
    flaskd.start()
    held = flaskd.hold()
    with flaskd.control() as client:
        client.sendall(b"drain wait\n")
        assert client.recv(100).startswith(b".. in_flight=1 left=")
    assert flaskd.status()["state"] == "draining"
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    flaskd.wait_message("drained")
    assert flaskd.stop() == 0


def test_half_open_clients_do_not_hinder_others(flaskd: Flaskd) -> None:
    """Clients that are silent, or never read, do not affect control and serving."""
    flaskd.start()
    silent = [flaskd.control() for _ in range(20)]
    for each in silent:
        each.sendall(b"stat")
    assert flaskd.command("health") == "OK healthy\n"
    assert get(flaskd.url) == (200, b"hello")
    for each in silent:
        each.close()
    assert flaskd.stop() == 0


def test_modes_and_group_of_the_nodes(flaskd: Flaskd) -> None:
    """Both nodes have `control.mode`; the directory was made for this run, and is removed after it."""
    flaskd.write("flaskd.yaml", "control: {mode: 0600}\n")
    flaskd.start()
    assert stat.S_IMODE(flaskd.socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(flaskd.fifo_path.stat().st_mode) == 0o600
    assert stat.S_ISFIFO(flaskd.fifo_path.stat().st_mode)
    assert flaskd.stop() == 0
    assert not flaskd.runtime.exists()


def test_nodes_that_are_not_ours_any_more_stay(flaskd: Flaskd) -> None:
    """A file that replaced a node is not removed at the exit."""
    flaskd.start()
    flaskd.fifo_path.unlink()
    flaskd.fifo_path.write_text("mine")
    assert flaskd.stop() == 0
    assert flaskd.fifo_path.read_text() == "mine"
    flaskd.fifo_path.unlink()


# --- client verbs -------------------------------------------------------------------------------------------------


def test_client_verbs(flaskd: Flaskd) -> None:
    """Every verb's exit code fits its answer; --json is one object; the socket is found in three ways."""
    flaskd.start()
    code, out, _ = flaskd.client("status")
    assert (code, out.split()[:2]) == (0, ["ready", "for"])
    for how in (
        ["--socket", str(flaskd.socket_path)],
        ["--socket", str(flaskd.runtime)],
        ["--socket", str(flaskd.fifo_path)],
    ):
        assert flaskd.client("ready", *how)[0] == 0
    del flaskd.env["RUNTIME_DIRECTORY"]
    flaskd.env["FLASKD_CONTROL"] = str(flaskd.socket_path)
    assert flaskd.client("health")[:2] == (0, "healthy\n")
    code, out, _ = flaskd.client("drain", "--wait", "--json")
    assert (code, json.loads(out.splitlines()[-1])["result"]) == (0, "drained")
    code, _, err = flaskd.client("ready")
    assert (code, err) == (75, "flaskd: flaskd is drained\n")
    code, _, err = flaskd.client("reload")
    assert (code, err) == (75, "flaskd: cannot reload: flaskd is drained\n")
    assert flaskd.client("resume")[0] == 0
    assert flaskd.client("plan")[0] == 0
    assert "server:" in flaskd.client("config")[1]
    code, out, _ = flaskd.client("stop", "--wait")
    assert (code, out.startswith("stopped completed=0 rejected=0 cut=0 took=")) == (0, True)
    assert flaskd.wait() == 0


def test_no_daemon_there(flaskd: Flaskd) -> None:
    """Without a daemon, or if nothing answers at the node, a client exits with 69 and one line with the places."""
    code, _, err = flaskd.client("status", *NOBODY)
    assert code == 69
    none = rf"flaskd: cannot find a daemon( named nobody-runs-this)?: there is no {flaskd.runtime}/control\.sock, no "
    assert re.match(none, err)  # others may run on this machine
    stale = flaskd.directory / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    code, _, err = flaskd.client("status", "--socket", str(stale))
    assert (code, err) == (
        69,
        f"flaskd: cannot reach a daemon at {stale}: Connection refused; is flaskd running there?\n",
    )


def test_an_answer_that_cannot_be_written(flaskd: Flaskd) -> None:
    """On a full disk the client writes one line of error and fails; closed streams are no fault."""
    flaskd.start()
    for name in [name for name in flaskd.env if name.startswith("PYTHON")]:
        del flaskd.env[name]

    def run(line: str) -> tuple[int, str]:
        done = subprocess.run(
            ["sh", "-c", line, sys.executable],
            cwd=flaskd.directory, env=flaskd.env, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    for verb in (
        "status",
        "config",
        "requests --json",
        "drain --wait",
        "resume",
        "top",
        "help",
        "check",
        "schema",
        "",
        "--help",
        "--version",
    ):
        said = run(f"exec $0 -m flaskd {verb} >/dev/full")
        assert said[0] == 73, verb
        assert said[1].endswith("flaskd: cannot write the answer: No space left on device\n"), verb
        assert "Traceback" not in said[1]
        assert run(f"exec $0 -m flaskd {verb} <&- >&- 2>&-") == (0, ""), verb
    for verb, code in {"drian": 64, "check nowhere.yaml": 78, "status --socket nowhere": 69}.items():
        assert run(f"exec $0 -m flaskd {verb} 2>/dev/full")[0] == code, verb
    assert flaskd.stop() == 0


def test_usage_faults(flaskd: Flaskd) -> None:
    """A malformed command line has exit code 64."""
    assert flaskd.client("drian")[0] == 64
    assert flaskd.client("drain", "--now")[0] == 64
    assert flaskd.client("serve", "gateapp", "--name", "a/b")[0] == 64
    assert flaskd.client("--help")[0] == 0
    assert flaskd.client("--version")[:2] == (0, "flaskd 0.1.0\n")


def test_a_check_for_programs(flaskd: Flaskd) -> None:
    """`check --json` has each fault with its place on standard output; the exit code is the same as for people."""
    good = flaskd.write("good.yaml", "version: 1\n")
    bad = flaskd.write("bad.yaml", "server:\n  threads: many\n  thraeds: 3\n")
    unit = flaskd.write("short.service", "[Service]\nTimeoutStopSec=3\n")

    def check(*args: object) -> tuple[int, dict[str, Any]]:
        code, out, err = flaskd.client("check", "--json", *map(str, args))
        assert err == ""
        return code, json.loads(out)

    assert check(good) == (0, {"ok": True, "config": str(good), "faults": [], "omitted": 0, "warnings": []})
    assert check() == (0, {"ok": True, "config": None, "faults": [], "omitted": 0, "warnings": []})
    code, answer = check(bad)
    first, second = answer.pop("faults")
    assert (code, answer) == (78, {"ok": False, "config": str(bad), "omitted": 0, "warnings": []})
    assert first == {
        "path": str(bad), "line": 2, "column": 12, "key": "server.threads", "message": 'expected an integer, got "many"',
    }  # fmt: skip
    assert (second["line"], second["column"], second["key"]) == (3, 3, "server.thraeds")
    code, answer = check(flaskd.directory / "none.yaml")
    assert (code, answer["faults"][0]["message"].startswith("cannot read ")) == (78, True)
    code, answer = check("--unit", unit, good)
    assert (code, answer["faults"][0]["path"]) == (78, str(unit))
    assert "TimeoutStopSec=3s" in answer["faults"][0]["message"]


def test_the_list_tells_of_a_daemon_what_its_status_tells(flaskd: Flaskd) -> None:
    """`flaskd list` has each daemon's status, with its socket for programs, and with its name for people."""
    flaskd.start()
    code, out, _ = flaskd.client("list", "--json")
    [listed] = [each for each in json.loads(out)["daemons"] if each.get("pid") == flaskd.pid]
    status = flaskd.status()
    keys = ("name", "state", "app", "listen")
    assert (code, listed["socket"], [listed[key] for key in keys]) == (
        0,
        str(flaskd.socket_path),
        [status[key] for key in keys],
    )
    rows = [line.split() for line in flaskd.client("list")[1].splitlines()]
    assert ["flaskd", "ready", "gateapp", str(flaskd.pid)] in [row[:4] for row in rows]


def test_offline_verbs(flaskd: Flaskd) -> None:
    """Check and schema work without a daemon, and import nothing of the app."""
    good = flaskd.write("good.yaml", "app: {target: 'nosuch:app'}\n")
    bad = flaskd.write("bad.yaml", "server:\n  threads: many\n  thraeds: 3\n")
    assert flaskd.client("check", "-c", str(good)) == (0, f"{good}: OK\n", "")
    code, out, err = flaskd.client("check", "-c", str(good), str(bad))
    assert (code, out) == (64, "")
    assert err == f'flaskd: expected one file, got "{good}" and "{bad}"; see "flaskd check --help"\n'
    code, out, err = flaskd.client("check", "-c", str(bad))
    assert (code, out) == (78, "")
    assert err.splitlines()[0].startswith(f'{bad}:2:12 server.threads: expected an integer, got "many"')
    assert "did you mean" in err.splitlines()[1]
    code, out, _ = flaskd.client("schema")
    assert json.loads(out)["properties"]["cleanup"]


def test_what_was_lost_is_named_in_the_answer(flaskd: Flaskd) -> None:
    """A drain names each request that it cut, a stop each step that failed and why, for people and in the progress."""
    flaskd.write(
        "flaskd.yaml",
        "shutdown: {drain: {timeout: 100ms}}\n"
        "cleanup: {policies: {bad: {use: command, with: {argv: ['false']}}, good: {use: command, with: {argv: ['true']}}}}\n",
    )
    flaskd.start()
    flaskd.hold()
    *lost, last = flaskd.command("drain wait").splitlines()
    assert last.startswith("OK drained completed=0 rejected=0 cut=1 took=")
    assert lost[-1].startswith("cut GET /hold (running for ")
    assert flaskd.command("drain").startswith("cut GET /hold (running for ")
    code, out, err = flaskd.client("drain", "--wait")
    assert code == 1
    assert out.startswith("cut GET /hold (running for ")
    code, out, err = flaskd.client("stop", "--wait")
    failed = r"bad: failed in [\d.]+m?s, exit code 1"
    assert re.search(rf"^{failed}\n", out, re.MULTILINE)
    assert "good" not in out
    assert re.search(r"^\.\. policy=bad fate=failed took=[\d.]+m?s why=exit code 1", err, re.MULTILINE)
    assert err.startswith(".. in_flight=")
    assert flaskd.wait() == 0


def test_programs_are_told_faults_as_they_are_told_answers(flaskd: Flaskd) -> None:
    """With --json a fault is one object on standard output, and there is no other output."""

    def told(*args: str) -> tuple[int, dict[str, Any]]:
        code, out, err = flaskd.client(*args, "--json")
        assert err == ""
        return code, json.loads(out)

    for verb in ("status", "plan", "top", "last-stop"):
        code, answer = told(verb, *NOBODY)
        assert (code, answer["ok"], answer["error"]["code"]) == (69, False, "no-daemon"), verb
    flaskd.start()
    assert told("ready") == (0, {"ok": True, "result": "ready"})
    assert told("drain")[1]["ok"]
    flaskd.until(lambda: flaskd.status()["state"] == "drained")
    fault = {"code": "not-ready", "message": "flaskd is drained"}
    assert told("ready") == (75, {"ok": False, "error": fault})
    assert told("log-level", "loud")[1]["error"]["code"] == "usage"
    assert flaskd.stop() == 0


def test_a_thread_that_cannot_stop_is_not_idle(flaskd: Flaskd) -> None:
    """A thread that still works on a cut request is shown with its stack by `threads`."""
    flaskd.write("flaskd.yaml", "shutdown: {drain: {timeout: 100ms}}\n")
    flaskd.start("-t", "1")
    flaskd.hold()
    flaskd.command("drain wait")
    stuck = r"(flaskd-thread-\d) \(\d+\) GET /hold \(running for .* in \1\); it is over, its thread goes on"
    assert re.search(rf"^{stuck}$", flaskd.command("threads"), re.MULTILINE)
    assert re.search(rf"^{stuck}$", flaskd.client("threads", "--stacks")[1], re.MULTILINE)
    assert flaskd.command("resume") == "OK ready\n"
    in_its_stead = r"(?m)^flaskd-thread-\d+ \(\d+\) idle$"
    flaskd.until(lambda: re.search(in_its_stead, flaskd.command("threads")) is not None)
    flaskd.gate.open()
    flaskd.until(lambda: "it is over" not in flaskd.command("threads"))
    assert flaskd.stop() == 0


def test_a_name_that_the_app_gave_a_thread_forges_no_answer(flaskd: Flaskd) -> None:
    """A thread's name stays on its line, so that the last line is flaskd's; it cannot control a terminal."""
    flaskd.write(
        "naming.py",
        "import threading\nthreading.current_thread().name = 'a\\x1b[31m\\nOK b'\nfrom gateapp import app\n",
    )
    flaskd.start(app="naming")
    for told in (flaskd.command("threads"), flaskd.client("threads")[1]):
        assert told.startswith(f"a?[31m?OK b ({flaskd.pid})\n")
    assert flaskd.stop() == 0


def test_words_that_are_read_once(flaskd: Flaskd) -> None:
    """No help text is cut off, repeated or without its verb, and exit code 1 is only for lost work."""
    code, out, _ = flaskd.client("--help")
    assert code == 0
    assert "..." not in out.replace("[ARGS]...", "")
    flaskd.start()
    assert flaskd.client("version") == (0, "0.1.0\n", "")
    assert "flaskd-thread-0 (" in flaskd.client("threads")[1]
    assert flaskd.client("threads")[1] == flaskd.command("threads").rpartition("OK")[0]
    assert flaskd.client("last-stop") == (75, "", "flaskd: no stop has been recorded yet\n")
    assert flaskd.stop() == 0


def test_the_plan_while_flaskd_starts(flaskd: Flaskd) -> None:
    """While flaskd starts, `plan` has the policies of the configuration, and says that a stop would run none of them."""
    flaskd.write("flaskd.yaml", "cleanup: {policies: {bye: {use: command, with: {argv: ['true']}}}}\n")
    flaskd.write("slow.py", "open('go').read()\nfrom gateapp import app\n")
    os.mkfifo(flaskd.directory / "go")
    flaskd.launch(app="slow")
    flaskd.until(lambda: "will serve on" in flaskd.log)
    plan = flaskd.command("plan")
    assert re.search(r"^\S+ +bye +command ", plan, re.MULTILINE), plan
    assert plan.endswith("\nflaskd is starting: a stop would end it at once now, and run none of these\nOK plan\n")
    (flaskd.directory / "go").write_text("")
    flaskd.wait_message("READY=1")
    assert "is starting" not in flaskd.command("plan")
    assert flaskd.stop() == 0
