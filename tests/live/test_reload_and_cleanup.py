"""Reloads are validated and applied or refused. Policies run at the stop, within the deadline, and are recorded."""

import json
import signal
import time
from pathlib import Path

import pytest
from daemon_kit import Flaskd
from http_client import get


def test_a_reload_takes_what_can_change(flaskd: Flaskd) -> None:
    """A reload changes threads, log and policies, and the running daemon shows them."""
    path = flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start()
    pid = flaskd.pid
    flaskd.write("flaskd.yaml", "server: {threads: 3}\nlog: {access: 'off'}\n"
                 "cleanup: {policies: {bye: {use: command, with: {argv: ['true']}}}}\n")  # fmt: skip
    assert flaskd.client("reload", "--wait")[:2] == (0, f"reloaded config={path}\n")
    status = flaskd.status()
    assert (status["threads"], status["pid"], status["last_reload"]["ok"]) == (3, pid, True)
    assert "bye" in flaskd.command("plan")
    get(flaskd.url, "/silent")
    assert "/silent" not in flaskd.log
    reloading = flaskd.messages.index(next(each for each in flaskd.drain_messages() if "RELOADING=1" in each))
    assert flaskd.messages[reloading + 1].startswith("READY=1\n")
    assert flaskd.stop() == 0
    assert flaskd.record()["policies"]["bye"]["fate"] == "ok"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("cleanup: {policies: {close-db: {use: sqlalchemy.dispose, timeout: soon}}}\n",
         "flaskd.yaml:1:67 cleanup.policies.close-db.timeout: expected a duration such as 5s"),
        ("server: {thread: 3}\n", "flaskd.yaml:1:10 server.thread: "),
        ("server: [\n", 'flaskd.yaml:1:9: expected a closing "]"'),
        ("cleanup: {policies: {p: {use: call, with: {target: 'nosuch:f'}}}}\n", "cleanup.policies.p: "),
    ],
)  # fmt: skip
def test_a_reload_at_fault_keeps_the_old_configuration(flaskd: Flaskd, text: str, fault: str) -> None:
    """A faulty configuration is reported with its place in reply, log and STATUS, and nothing changes."""
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start()
    flaskd.write("flaskd.yaml", text)
    answer = flaskd.command("reload")
    shown = "    1 | server: [\n      |         ^\n" if "[" in text else ""
    assert answer.startswith(f"{shown}ERR config-invalid ")
    assert fault in answer
    assert answer.endswith("; keeping the old configuration\n")
    code, out, err = flaskd.client("reload")
    assert (code, out, fault in err) == (78, "", True)
    told = json.loads(flaskd.client("reload", "--json")[1])["error"]
    places = [f"flaskd.yaml:{each['line']}:{each['column']}" for each in told.get("faults", [])]
    assert [each in fault for each in places] == ([] if "nosuch" in text else [True])
    assert any(each.startswith("READY=1\nSTATUS=ready, but the reload failed: ") for each in flaskd.drain_messages())
    assert flaskd.status()["threads"] == 2
    assert flaskd.status()["last_reload"]["ok"] is False
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0


def test_a_reload_that_needs_a_restart_is_refused_as_a_whole(flaskd: Flaskd) -> None:
    """A reload that needs a restart names the keys, and changes nothing."""
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start()
    flaskd.write("flaskd.yaml", "server: {threads: 3, backlog: 7}\ncontrol: {required: true}\n")
    assert flaskd.command("reload") == (
        "ERR restart-needed server.backlog, control.required: cannot change without a restart; keeping the old configuration\n"
    )
    assert flaskd.client("reload")[0] == 78
    assert flaskd.status()["threads"] == 2
    assert flaskd.stop() == 0


def test_command_line_options_win_at_a_reload_too(flaskd: Flaskd) -> None:
    """The option -t wins over the file at a reload, too."""
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start("-t", "5")
    assert flaskd.status()["threads"] == 5
    flaskd.write("flaskd.yaml", "server: {threads: 3}\n")
    assert flaskd.command("reload").startswith("OK reloaded")
    assert flaskd.status()["threads"] == 5
    assert flaskd.stop() == 0


def test_policies_run_in_their_order_and_are_recorded(flaskd: Flaskd) -> None:
    """Policies run by phase and `after`, a failure does not stop the others, and the record has every fate."""
    flaskd.write("steps.py", "import pathlib\ndef note(context):\n    with open('order', 'a') as file:\n"
                 "        file.write(context.policy + '\\n')\ndef fail(context):\n    note(context)\n    raise ValueError('no')\n")  # fmt: skip
    flaskd.write(
        "flaskd.yaml",
        """
cleanup:
  policies:
    last: {use: command, phase: final, with: {argv: [sh, -c, 'echo last >> order; echo $FLASKD_CONTROL > where']}}
    second: {use: call, phase: quiesce, with: {target: "steps:note"}, after: first}
    first: {use: call, phase: quiesce, with: {target: "steps:fail"}}
    early: {use: call, phase: announce, with: {target: "steps:note"}}
    never: {use: call, phase: close, with: {target: "steps:note"}, when: {reason: idle}}
""",
    )
    flaskd.start()
    code, out, _ = flaskd.client("stop", "--wait")
    assert code == 0
    assert "first: failed" in out
    assert flaskd.wait() == 0
    assert (flaskd.directory / "order").read_text().split() == ["early", "first", "second", "last"]
    fates = {name: entry["fate"] for name, entry in flaskd.record()["policies"].items()}
    assert (flaskd.directory / "where").read_text() == f"{flaskd.socket_path}\n"
    assert fates == {"early": "ok", "first": "failed", "second": "ok", "never": "skipped", "last": "ok"}


def test_cleanup_comes_after_the_drain(flaskd: Flaskd) -> None:
    """A policy of a phase after the drain begins when the last request has been answered."""
    flaskd.write("steps.py", "import os\ndef note(context):\n    open('cleaned', 'w').close()\n")
    flaskd.write("flaskd.yaml", "cleanup: {policies: {n: {use: call, with: {target: 'steps:note'}}}}\n")
    flaskd.start()
    held = flaskd.hold()
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    flaskd.wait_message("stopping: 1 in flight")
    assert not (flaskd.directory / "cleaned").exists()
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert (flaskd.directory / "cleaned").exists()


def test_cleanup_that_hangs_keeps_the_deadline(flaskd: Flaskd) -> None:
    """A step that never returns is abandoned with its stack, and steps in the reserve still run."""
    flaskd.write("steps.py", "import time\ndef hang(context):\n    time.sleep(60)\n")
    flaskd.write(
        "flaskd.yaml",
        """
shutdown: {deadline: 2s, reserve: 1s}
cleanup:
  policies:
    hang: {use: call, timeout: 30s, with: {target: "steps:hang"}}
    final: {use: command, with: {argv: [touch, final]}}
""",
    )
    flaskd.start()
    before = time.monotonic()
    assert flaskd.stop() == 0
    assert time.monotonic() - before < 3.0
    record = flaskd.record()["policies"]
    assert (record["hang"]["fate"], record["final"]["fate"]) == ("timed_out", "ok")
    assert "time.sleep(60)" in flaskd.log
    assert (flaskd.directory / "final").exists()


def test_the_plan_of_a_running_stop_does_not_change(flaskd: Flaskd) -> None:
    """During a stop reloads are refused and logged; the plan of its first moment runs."""
    flaskd.write("flaskd.yaml", "cleanup: {policies: {one: {use: command, with: {argv: [touch, one]}}}}\n")
    flaskd.start()
    held = flaskd.hold()
    flaskd.command("stop")
    flaskd.write("flaskd.yaml", "cleanup: {policies: {two: {use: command, with: {argv: [touch, two]}}}}\n")
    assert flaskd.command("reload") == "ERR not-now cannot reload: flaskd is stopping\n"
    for verb in ("resume", "drain"):
        fault = f"cannot {verb}: flaskd is stopping"
        assert flaskd.command(verb) == f"ERR not-now {fault}\n"
        flaskd.until(lambda: fault in flaskd.log)  # noqa: B023 - called in this iteration
    assert flaskd.command("stop").startswith("OK stopping")
    flaskd.gate.open()
    held.result()
    assert flaskd.wait() == 0
    assert (flaskd.directory / "one").exists()
    assert not (flaskd.directory / "two").exists()


def test_databases_are_closed(flaskd: Flaskd) -> None:
    """sqlalchemy.dispose closes the pooled connections of a Flask-SQLAlchemy app."""
    flaskd.write(
        "shop.py",
        """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event, text
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:////" + __file__.lstrip("/") + ".db"
db = SQLAlchemy(app)
with app.app_context():
    event.listen(db.engine, "close", lambda *_: print("closed", flush=True))
@app.get("/")
def index():
    return str(db.session.execute(text("select 41 + 1")).scalar())
""",
    )
    flaskd.write("flaskd.yaml", "cleanup: {policies: {close-db: {use: sqlalchemy.dispose}}}\n")
    flaskd.start(app="shop")
    assert get(flaskd.url) == (200, b"42")
    assert "closed" not in flaskd.log
    assert flaskd.stop() == 0
    assert "closed" in flaskd.log
    assert flaskd.record()["policies"]["close-db"]["fate"] == "ok"


def test_what_was_interpolated_is_shown_nowhere(flaskd: Flaskd) -> None:
    """Interpolated values are not in log, record, replies, STATUS and process titles when the steps with them fail."""
    secret = "hunter2-s3cret"
    flaskd.env |= {"SECRET": secret, "FILE": f"/nowhere/{secret}/x"}
    flaskd.write(
        "flaskd.yaml",
        "control: {group: '${env:SECRET}'}\nshutdown: {record: '/proc/${env:SECRET}/x.json'}\n"
        "cleanup:\n  policies:\n"
        "    program: {use: command, with: {argv: ['${env:SECRET}']}}\n"
        "    path: {use: command, with: {argv: ['${env:FILE}', '${env:SECRET}'], cwd: '${env:FILE}'}}\n"
        "    files: {use: files.remove, with: {paths: ['${env:FILE}']}}\n",
    )
    flaskd.start()
    said = [flaskd.command(each) for each in ("status", "config", "plan", "requests", "threads")]
    said += [flaskd.client(each, "--json")[1] for each in ("status", "config", "plan")]
    said.append(Path(f"/proc/{flaskd.pid}/cmdline").read_text())
    said.append(flaskd.command("stop wait"))
    assert flaskd.wait() == 0
    assert "path: failed" in said[-1]
    assert flaskd.log.count("********") >= 4
    assert [each for each in (*said, flaskd.log, *flaskd.drain_messages()) if "s3cret" in each] == []
