"""The built-in actions in a real stop: cache, log queue, Consul, webhook, files, and another package's action."""

import json
import signal
import sys
from pathlib import Path

import pytest
from daemon_kit import Flaskd
from http_client import get

sys.path.insert(0, str(Path(__file__).parent.parent))
from entry_points_kit import install, install_example
from http_endpoint import endpoint


def test_the_demo_keeps_its_cache(make_flaskd) -> None:
    """`flaskd serve flaskd.demo:app` shows the same colour after a restart; a file that was changed is refused."""
    flaskd = make_flaskd()
    flaskd.env["FLASKD_DEMO_DB"] = str(flaskd.directory / "demo.db")
    flaskd.write("flaskd.yaml", "cleanup: {policies: {warm-cache: {use: cache.persist}}}\n")
    flaskd.start(app="flaskd.demo:app")
    before = json.loads(get(flaskd.url, "/cached")[1])
    assert flaskd.stop() == 0
    assert flaskd.record()["policies"]["warm-cache"]["detail"] == "1 entry"
    assert {path.name: path.stat().st_mode & 0o777 for path in flaskd.state.iterdir()} == {
        "cache.bin": 0o600, "cache.key": 0o600, "last-stop.json": 0o600,
    }  # fmt: skip
    flaskd.start(app="flaskd.demo:app")
    after = json.loads(get(flaskd.url, "/cached")[1])
    assert (after["hue"], after["created"]) == (before["hue"], before["created"])
    assert flaskd.stop() == 0
    with (flaskd.state / "cache.bin").open("ab") as file:
        file.write(b"x")
    flaskd.start(app="flaskd.demo:app")
    assert (
        f"refused {flaskd.state}/cache.bin: it was changed, is not whole, or was signed with another key" in flaskd.log
    )
    assert json.loads(get(flaskd.url, "/cached")[1])["created"] >= before["created"]
    assert flaskd.stop() == 0


QUEUED = """
import atexit, logging, logging.handlers, queue, time
from gateapp import app

class Slow(logging.FileHandler):
    def emit(self, record):
        time.sleep(0.002)
        super().emit(record)

handler = logging.handlers.QueueHandler(queue.SimpleQueue())
handler.listener = logging.handlers.QueueListener(handler.queue, Slow("app.log"))
handler.listener.start()
atexit.register(logging.getLogger("shop").info, "the very last")
log = logging.getLogger("shop")
log.setLevel(logging.INFO)
log.addHandler(handler)

@app.get("/log")
def write():
    for number in range(200):
        log.info("record %d", number)
    return "logged"

def late(context):
    log.info("in the final phase")
"""


def test_no_record_of_a_queue_handler_is_lost(flaskd: Flaskd) -> None:
    """Records in the queue at the stop, records after the flush, and flaskd's own last lines are all written."""
    flaskd.write("queued.py", QUEUED)
    flaskd.write(
        "flaskd.yaml",
        "cleanup: {policies: {logs: {use: logging.flush}, late: {use: call, phase: final, with: {target: 'queued:late'}}}}\n",
    )
    flaskd.start(app="queued")
    assert get(flaskd.url, "/log") == (200, b"logged")
    assert flaskd.stop() == 0
    lines = (flaskd.directory / "app.log").read_text().splitlines()
    assert lines == [*(f"record {number}" for number in range(200)), "in the final phase", "the very last"]
    assert "cleanup flush/logs: ok" in flaskd.log
    assert " stopped: completed=" in flaskd.log
    assert "Traceback" not in flaskd.log


def test_consul_is_told_before_the_drain_and_the_team_after_it(flaskd: Flaskd) -> None:
    """The service is deregistered while requests still run, the webhook is sent at the end, and its secret is not shown."""
    secret = "T0P-SECRET-TOKEN"
    credentials = flaskd.directory / "credentials"
    credentials.mkdir()
    (credentials / "hook").write_text(secret)
    flaskd.env["CREDENTIALS_DIRECTORY"] = str(credentials)
    with endpoint() as consul, endpoint() as hook:
        with endpoint() as gone:  # its port is free afterwards, and differs from the others
            closed = gone.url
        flaskd.env["CONSUL_HTTP_ADDR"] = consul.url
        flaskd.write(
            "flaskd.yaml",
            f"""
cleanup:
  policies:
    leave: {{use: consul.deregister, with: {{service_id: shop-1}}}}
    tell: {{use: webhook, with: {{url: "{hook.url}/${{cred:hook}}", json: {{text: "${{cred:hook}}"}},
            headers: {{Authorization: "Bearer ${{cred:hook}}"}}}}}}
    refused: {{use: webhook, after: tell, with: {{url: "{closed}/${{cred:hook}}"}}}}
""",
        )
        flaskd.start()
        held = flaskd.hold()
        flaskd.kill(signal.SIGTERM)
        assert consul.entered.wait(20)
        assert not hook.asked
        assert held.is_alive()
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        assert flaskd.wait() == 0
    assert [each[:2] for each in consul.asked] == [("PUT", "/v1/agent/service/deregister/shop-1")]
    ((method, path, headers, body),) = hook.asked
    assert (method, path, headers["Authorization"]) == ("POST", f"/{secret}", f"Bearer {secret}")
    assert json.loads(body) == {"text": secret}
    record = flaskd.record()["policies"]
    assert [record[name]["fate"] for name in ("leave", "tell", "refused")] == ["ok", "ok", "failed"]
    assert secret not in flaskd.log
    assert secret not in json.dumps(record)


def test_a_service_that_does_not_answer_keeps_nobody(flaskd: Flaskd) -> None:
    """A webhook whose receiver does not answer is given up at its timeout."""
    with endpoint() as hook:
        hook.silent.set()
        flaskd.write(
            "flaskd.yaml",
            f"cleanup: {{policies: {{tell: {{use: webhook, timeout: 300ms, with: {{url: '{hook.url}'}}}}}}}}\n",
        )
        flaskd.start()
        assert flaskd.stop() == 0
    entry = flaskd.record()["policies"]["tell"]
    assert entry["fate"] == "timed_out"
    assert entry["took"] < 1.0


def test_files_are_removed(flaskd: Flaskd) -> None:
    """Relative patterns are relative to the working directory."""
    for name in ("tmp/a.pid", "tmp/b.pid", "tmp/c.txt"):
        flaskd.write(name, "")
    flaskd.write("flaskd.yaml", "cleanup: {policies: {tidy: {use: files.remove, with: {paths: 'tmp/*.pid'}}}}\n")
    flaskd.start()
    assert flaskd.stop() == 0
    assert [path.name for path in (flaskd.directory / "tmp").iterdir()] == ["c.txt"]


def test_an_action_of_another_package(flaskd: Flaskd) -> None:
    """The action of an installed package is checked, planned, run and recorded."""
    flaskd.env["PYTHONPATH"] = str(install_example(flaskd.directory / "site"))
    policy = "cleanup: {policies: {receipt: {use: receipts.print, with: {path: receipts.txt%s}}}}\n"
    flaskd.write("flaskd.yaml", policy % ", copies: ten")
    code, _, err = flaskd.client("check")
    assert code == 78
    assert "flaskd.yaml:1:88 cleanup.policies.receipt.with.copies: expected an integer" in err
    flaskd.write("flaskd.yaml", policy % "")
    flaskd.start()
    assert "receipts.print" in flaskd.command("plan")
    assert '"copies"' in flaskd.client("schema")[1]
    assert flaskd.stop() == 0
    assert (flaskd.directory / "receipts.txt").read_text() == "receipt: stopped for signal: SIGTERM\n"
    assert flaskd.record()["policies"]["receipt"]["detail"] == "1 printed"


@pytest.mark.parametrize("used", [True, False])
def test_a_broken_package(flaskd: Flaskd, used: bool) -> None:
    """A broken package is a fault, with its place, of the policy that uses it only; the schema leaves it out."""
    flaskd.env["PYTHONPATH"] = str(install(flaskd.directory / "site", "broken", {"broken.it": "flaskd_nowhere:it"}))
    flaskd.write("flaskd.yaml", "cleanup: {policies: {it: {use: broken.it}}}\n" if used else "")
    if used:
        code, log = flaskd.fails()
        assert code == 78
        assert 'flaskd.yaml:1:32 cleanup.policies.it.use: expected an action that can be used, got "broken.it": ' in log
        assert "No module named 'flaskd_nowhere'" in log
        assert "Traceback" not in log
        return
    flaskd.start()
    assert "flaskd_nowhere" not in flaskd.log
    code, out, err = flaskd.client("schema")
    assert (code, "broken.it" in out) == (0, False)
    assert 'the action "broken.it" is not in the schema: cannot load it from broken (flaskd_nowhere:it)' in err
    assert flaskd.stop() == 0
