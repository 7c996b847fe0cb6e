"""The admin listener's page in a real browser: what it shows during the life of a daemon, and its layout."""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from daemon_kit import Flaskd
from http_client import Answer
from test_browser import chromium, tab

__all__ = ["chromium", "tab"]

pytestmark = pytest.mark.usefixtures("errors")

HOSTILE = "<script>window.hurt=1</script><img src=x onerror=window.hurt=1>"
APP = """
from gateapp import app, hold

app.add_url_rule("/hold/<path:name>", "hold_by_name", lambda name: hold())
app.name = app.import_name = "<script>window.hurt=1</script>"
"""


@pytest.fixture
def errors(tab: Any) -> Iterator[None]:
    """Fails the test if the browser reports errors in the tab (script errors, violations of the policy)."""
    found: list[str] = []
    tab.on("pageerror", lambda error: found.append(str(error)))
    tab.on("console", lambda message: found.append(message.text) if message.type in {"error", "warning"} else None)
    yield
    assert [each for each in found if "net::ERR_" not in each] == []  # flaskd may end before the tab


def serve(flaskd: Flaskd, more: str = "", *arguments: str) -> str:
    """Serve an app with two threads and an admin listener; gives the address of the page."""
    flaskd.write("flaskd.yaml", f"admin: {{listen: '127.0.0.1:0'}}\n{more}")
    flaskd.write("hostileapp.py", APP)
    flaskd.start("-t", "2", *arguments, app="hostileapp:app")
    return f"http://{flaskd.status()['admin'][0]}/"


def test_the_page_tells_what_is_in_flight_while_every_thread_is_busy(flaskd: Flaskd, tab: Any) -> None:
    """The page loads while all threads are busy, says that and what to do, and shows hostile paths as text."""
    url = serve(flaskd)
    held = [Answer(flaskd.url, f"/hold/{quote(HOSTILE)}") for _ in range(2)]
    flaskd.gate.entered()
    flaskd.gate.entered()
    waiting = Answer(flaskd.url, "/")
    flaskd.until(lambda: flaskd.status()["queued"] == 1)
    tab.goto(url)
    tab.wait_for_selector("body[data-state=ready][data-look=wait]")
    assert tab.inner_text("#headline") == "Serving; every thread is busy"
    assert tab.inner_text("#next") == "flaskd requests --stacks\nwhere the requests are in the app's code"
    assert [tab.inner_text(f"#tile-{each} .fact") for each in ("flight", "queue", "threads")] == ["3", "1", "2 of 2"]
    rows = tab.locator("#requests tbody tr")
    assert rows.count() == 3
    assert "/hold/" in rows.nth(0).inner_text()
    assert "from 127.0.0.1" in rows.nth(0).inner_text()
    assert tab.evaluate("window.hurt") is None
    assert tab.locator("main script, main img").count() == 0
    flaskd.gate.open()
    assert [each.result()[0] for each in (*held, waiting)] == [200] * 3
    tab.wait_for_selector("body[data-look=good]")
    assert tab.inner_text("#requests-more") == "nothing is in flight"
    tab.wait_for_function("document.getElementById('latency').textContent.startsWith('50 % ≤ ')")
    tab.reload()  # the figures of the last minute come from flaskd, and not from what the page has seen
    tab.wait_for_selector("body[data-look=good]")
    assert re.match(r"3 answers in the last ", tab.inner_text("#latency-more"))
    assert tab.inner_text("#latency").startswith("50 % ≤ ")
    assert flaskd.stop() == 0


def test_what_a_client_or_a_file_names_is_text(flaskd: Flaskd, tab: Any) -> None:
    """Every text in the JSON becomes text of the page, and never an element."""
    url = serve(flaskd)

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: spoil(each, name) for name, each in value.items()}
        return f"{value}{HOSTILE}" if isinstance(value, str) and key != "state" else value

    def answer(route: Any) -> None:
        told = route.fetch().json()
        status = told["status"]
        status |= {"trouble": "t", "last_reload": {"time": "t", "ok": False, "fault": "f"}, "previous": "p"}
        status["drain"] = {"time": "t", "by": "b"}
        status |= {"last_stop": {"started": "t", "reason": "r", "took": 1, "cut": 1, "failed": 1}, "reason": "r"}
        status |= {"workers": {"ready": 1, "wanted": 1, "died": 1, "recycled": {HOSTILE: 1}}, "limited": {HOSTILE: 2}}
        status["state"] = next(states)
        status = spoil(status)
        status |= {"background": [{"name": HOSTILE}], "cleanup": [HOSTILE], "listen": [HOSTILE]}
        request = {"id": 1, "method": HOSTILE, "path": HOSTILE, "client": HOSTILE, "phase": HOSTILE, "age": 1.0}
        worker = {"slot": 0, "state": HOSTILE, "pid": 1, "generation": 1, "in_flight": 0, "answered": 0, "memory": 1}
        request |= {"thread": HOSTILE, "request_id": HOSTILE, "sent": 3, "worker": 0, "gone": True}
        step = {"fate": HOSTILE, "took": 1.0, "why": HOSTILE}
        told |= {
            "status": status,
            "requests": [request],
            "workers": [worker],
            "trace": HOSTILE,
            "steps": {f"a{HOSTILE}": step},
        }
        route.fulfill(json=told)

    states = iter(["ready", "drained", "stopping", *["drained"] * 1000])
    tab.route("**/events", lambda route: route.abort())
    tab.route("**/page.json", answer)
    tab.goto(url)
    for state in ("ready", "drained", "stopping"):
        tab.wait_for_selector(f"body[data-state={state}]")
        assert tab.evaluate("window.hurt") is None
        assert tab.locator("body script").count() == 1
        assert tab.locator("body img").count() == 0
        assert HOSTILE in tab.inner_text("#before")
        tab.evaluate("void lost()")
    tab.unroute_all(behavior="wait")
    assert flaskd.stop() == 0


def test_the_page_says_who_drained_and_how_to_undo_it(flaskd: Flaskd, tab: Any) -> None:
    """Through a failed reload, a drain, a resume and a stop the page shows the state, who asked, and what to do."""
    url = serve(flaskd, "server: {threads: 2}\n", "-c", "flaskd.yaml")
    tab.goto(url)
    tab.wait_for_selector("body[data-state=ready][data-look=good]")
    assert tab.title() == f"ready: {flaskd.status()['name']}"
    flaskd.write("flaskd.yaml", f"admin: {{listen: '{flaskd.status()['admin'][0]}'}}\nserver: {{thraeds: 2}}\n")
    assert flaskd.client("reload")[0] != 0
    tab.wait_for_selector("#fault:not([hidden])")
    assert re.search(r"flaskd\.yaml:2:\d+ server\.thraeds: expected a known key", tab.inner_text("#fault"))
    assert tab.inner_text("#next dt >> nth=0").startswith("flaskd check /")
    assert flaskd.client("drain")[0] == 0
    tab.wait_for_selector("body[data-state=drained]")
    assert re.match(r"Asked for by uid=\d+ pid=\d+ \S+ at ", tab.inner_text("#sentence"))
    assert tab.inner_text("#next dt >> nth=0") == "flaskd resume"
    assert tab.inner_text("[role=status] h2") == "Drained"
    tab.focus("#pause")
    tab.keyboard.press("Enter")
    assert tab.get_attribute("#pause", "aria-pressed") == "true"
    assert flaskd.client("resume")[0] == 0
    tab.keyboard.press("Enter")
    tab.wait_for_selector("body[data-state=ready]")
    assert flaskd.stop() == 0
    tab.wait_for_selector("body[data-state=silent]")
    assert re.match(r"flaskd (was stopping, and )?has not answered since ", tab.inner_text("#sentence"))


def test_the_page_shows_a_stop_as_it_goes(flaskd: Flaskd, tab: Any) -> None:
    """It shows the steps that are over and that run, then that the stop has ended, and where its result is."""
    steps = {"first": "'exit 3'", "second": "'cat hold'"}
    policies = [
        f"{name}: {{use: command, phase: close, timeout: 20s, with: {{argv: [sh, -c, {command}]}}}}"
        for name, command in steps.items()
    ]
    url = serve(flaskd, f"cleanup: {{max_parallel: 1, policies: {{{', '.join(policies)}}}}}\n", "-c", "flaskd.yaml")
    os.mkfifo(flaskd.directory / "hold")
    tab.goto(url)
    tab.wait_for_selector("body[data-state=ready]")
    assert flaskd.client("stop")[0] == 0
    with (flaskd.directory / "hold").open("w"):  # returns when the second step reads
        tab.wait_for_selector("#steps .runs")
        assert re.match(r"first\nfailed, .* s, .*exit code 3", tab.inner_text("#steps li >> nth=0"))
        assert tab.inner_text("#steps li >> nth=1") == "second\nrunning"
        assert tab.inner_text("#sentence").startswith("Reason: control: uid=")
        assert re.match(r"stopping for .* s; .* left at most", tab.inner_text("#since"))
    flaskd.wait()
    tab.wait_for_selector("body[data-state=silent]")
    assert tab.inner_text("#headline") == "Stopped, as far as this page can tell"
    assert tab.inner_text("#next dt").startswith("flaskd last-stop")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_status_page_fits(flaskd: Flaskd, tab: Any, width: int) -> None:
    """On a desktop and a phone, with workers and a long path, nothing is wider than the screen; it has a dark mode."""
    url = serve(flaskd, "server: {workers: 1}\n")
    held = Answer(flaskd.url, "/hold/" + 300 * "x")
    flaskd.gate.entered()
    tab.set_viewport_size({"width": width, "height": 800})
    tab.goto(url)
    tab.wait_for_selector("#requests tbody tr")
    tab.wait_for_selector("#workers tbody tr")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 22, 26)" != light
    flaskd.gate.open()
    assert held.result()[0] == 200
    assert flaskd.stop() == 0
