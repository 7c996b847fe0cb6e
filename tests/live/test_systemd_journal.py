"""flaskd's entries in a real journal."""

from __future__ import annotations

import re

from http_client import Answer, get
from patience import until
from systemd_kit import Systemd

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
LISTEN = "server: {listen: '127.0.0.1:PORT'}\n"


def test_entries_have_fields(each_systemd: Systemd) -> None:
    """Access lines have ids and duration, cleanup its policy, phase and fate, the end its ledger; all have priorities."""
    systemd = each_systemd
    policies = "{fine: {use: command, with: {argv: ['true']}}, bad: {use: command, with: {argv: ['false']}}}"
    drain = "shutdown: {drain: {timeout: 200ms}}\n"
    named = "server: {listen: '127.0.0.1:PORT', trusted_proxy: 127.0.0.1}\nlog: {request_id: true}\n"
    noted = systemd.flaskd("noted", named + drain + f"cleanup: {{policies: {policies}}}\n").start()
    get(noted.url, "/?q=1", **{"User-Agent": "a test", "X-Request-ID": "4bf9-35", "traceparent": TRACEPARENT})
    Answer(noted.url, "/hang")
    until(lambda: noted.status()["in_flight"] == 1)
    systemd.ctl("stop", noted.unit)
    entries = noted.entries()

    def one(**fields: str) -> dict[str, str]:
        found = [each for each in entries if fields.items() <= each.items()]
        assert len(found) == 1, (fields, found)
        return found[0]

    access = one(FLASKD_LOGGER="flaskd.access", FLASKD_TARGET="/?q=1")
    assert access["FLASKD_REQUEST_ID"] == "1"
    assert (access["FLASKD_X_REQUEST_ID"], access["FLASKD_TRACEPARENT"]) == ("4bf9-35", TRACEPARENT)
    assert 0 < float(access["FLASKD_TOOK"]) < 10
    assert (access["FLASKD_STATUS"], access["FLASKD_AGENT"], access["PRIORITY"]) == ("200", "a test", "6")
    assert '"GET /?q=1 HTTP/1.1" 200 5 "-" "a test" request_id=4bf9-35' in access["MESSAGE"]
    cut = one(FLASKD_REASON="the deadline came")
    assert (cut["FLASKD_REQUEST_ID"], cut["FLASKD_PHASE"], cut["PRIORITY"]) == ("2", "running", "4")
    assert re.fullmatch("[0-9a-f]{32}", cut["FLASKD_X_REQUEST_ID"])
    assert "in hang" in cut["MESSAGE"]  # the stack, in the same entry
    assert "\n" in cut["MESSAGE"]
    assert one(FLASKD_POLICY="fine")["PRIORITY"] == "6"
    bad = one(FLASKD_POLICY="bad", FLASKD_FATE="failed")
    assert (bad["FLASKD_PHASE"], bad["PRIORITY"]) == ("final", "3")
    stopped = [each for each in entries if each["MESSAGE"].startswith("stopped: completed=0 rejected=0 cut=1")]
    assert [each["FLASKD_COMPLETED"] for each in stopped] == ["0"]
    assert {each["_SYSTEMD_UNIT"] for each in (access, cut, bad)} == {noted.unit}


def test_logs_survive_a_restart_of_the_journal(each_systemd: Systemd) -> None:
    """Entries go to the process that listens on the journal's socket at that time."""
    systemd = each_systemd
    noted = systemd.flaskd("journal-restarts", LISTEN).start()
    systemd.ctl("restart", "systemd-journald.service")
    get(noted.url, "/?after=1")
    until(lambda: "/?after=1" in noted.journal(), "an access line")
    systemd.ctl("stop", noted.unit)
