"""Ctrl-C with a real browser: with a tab that streams, was closed, was never opened, or reconnects repeatedly."""

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from daemon_kit import Flaskd, Terminal, requires
from http_client import refused
from patience import PATIENCE

CHROMIUM = shutil.which("chromium")
QUIET = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync", "no-first-run"]  # fmt: skip

TABS = """
import itertools, time
from flask import Flask, Response

app = Flask(__name__)
PAGE = '''<!doctype html><script>
let heard = 0, failures = 0
function listen(path) {
  const source = new EventSource(path)
  source.onmessage = () => heard++
  source.onerror = () => failures++
}
async function poll(path) {
  for (;;) {
    try { await fetch(path); heard++ } catch { failures++ }
    await new Promise(resolve => setTimeout(resolve, 20))
  }
}
%s
</script>'''

app.add_url_rule("/reconnects", "reconnects", lambda: PAGE % "listen('/short')")
app.add_url_rule("/ignores", "ignores", lambda: PAGE % "listen('/endless')")
app.add_url_rule("/polls", "polls", lambda: PAGE % "poll('/ping')")
app.add_url_rule("/ping", "ping", lambda: "pong")

@app.get("/short")
def short():
    return Response("retry: 20\\ndata: x\\n\\n", mimetype="text/event-stream")

@app.get("/endless")
def endless():
    def events():
        for number in itertools.count():
            yield f"retry: 20\\ndata: {number}\\n\\n"
            time.sleep(0.02)
    return Response(events(), mimetype="text/event-stream")
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium; Playwright makes its profile directory, and removes it afterwards."""
    missing = [] if CHROMIUM else ["the command chromium"]
    missing += [] if importlib.util.find_spec("playwright") else ["the Python package playwright"]
    requires("chromium", missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{each}" for each in QUIET])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A tab in a window with a new session."""
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    yield page
    context.close()


@pytest.fixture
def serve(flaskd: Flaskd) -> Iterator[Callable[[str], Terminal]]:
    """Serves an app on a terminal."""
    made: list[Terminal] = []

    def run(app: str) -> Terminal:
        flaskd.env["FLASKD_DEMO_DB"] = str(flaskd.directory / "demo.db")
        flaskd.write("tabs.py", TABS)
        flaskd.write("flaskd.yaml", "shutdown: {drain: {stream_grace: 500ms}}\n")
        made.append(Terminal(flaskd, app=app))
        flaskd.wait_message("READY=1")
        return made[-1]

    yield run
    for each in made:
        each.close()


def ctrl_c(terminal: Terminal, within: float) -> None:
    """Type Ctrl-C once; flaskd exits with 0 within that many seconds, and has cut nothing."""
    url = terminal.flaskd.url
    before = time.monotonic()
    terminal.type(b"\x03")
    terminal.read_until(b"stopped: ")
    assert terminal.flaskd.wait() == 0
    assert time.monotonic() - before < within
    assert terminal.flaskd.record()["cut"] == []
    assert refused(url)


def streams(tab: Any, url: str) -> None:
    """Open the demo's page, and wait until its stream runs."""
    tab.goto(url)
    tab.wait_for_selector("body[data-state=serving]")


@pytest.mark.parametrize("how", ["never opened", "open", "closed", "left"])
def test_one_ctrl_c_is_enough(serve: Callable[[str], Terminal], tab: Any, how: str) -> None:
    """One Ctrl-C stops flaskd in every case; an open tab's stream ends with a goodbye."""
    terminal = serve("flaskd.demo:app")
    url = terminal.flaskd.url
    if how != "never opened":
        streams(tab, url)
    if how == "closed":
        tab.close()
    elif how == "left":
        tab.goto("about:blank")
    elif how == "open":
        tab.evaluate("window.heard = []; new MutationObserver(() => heard.push(document.body.dataset.state))"
                     ".observe(document.body, {attributes: true})")  # fmt: skip
    ctrl_c(terminal, within=4)
    if how == "open":
        tab.wait_for_selector("body[data-state=closed]")
        assert tab.evaluate("heard") == ["draining", "closed"]


def test_the_stream_alone(serve: Callable[[str], Terminal], tab: Any) -> None:
    """A script that reads ``/stream`` gets it whole, with the goodbye and a proper end."""
    terminal = serve("flaskd.demo:app")
    url = terminal.flaskd.url
    tab.goto(url)
    tab.evaluate("void fetch('/stream').then(async answer => {"
                 "for await (const part of answer.body) window.seen = (window.seen || '') + new TextDecoder().decode(part);"
                 "window.ended = true })")  # fmt: skip
    tab.wait_for_function("window.seen")
    ctrl_c(terminal, within=4)
    tab.wait_for_function("window.ended")
    assert tab.evaluate("seen").endswith('event: bye\ndata: {"why": "draining"}\n\n')


def test_what_the_page_waits_for_is_answered(serve: Callable[[str], Terminal], tab: Any) -> None:
    """A slow request of the page is finished after Ctrl-C, while the page shows that flaskd drains."""
    terminal = serve("flaskd.demo:app")
    streams(tab, terminal.flaskd.url)
    tab.fill("#slow input", "3")
    tab.click("#slow button")
    terminal.flaskd.until(lambda: terminal.flaskd.status()["in_flight"] == 2)
    ctrl_c(terminal, within=8)
    tab.wait_for_selector("#slow-list .answered")
    assert tab.inner_text("#slow-list .outcome").startswith("answered in 3.")


@pytest.mark.parametrize("page", ["reconnects", "ignores", "polls"])
def test_a_tab_that_does_not_let_go(serve: Callable[[str], Terminal], tab: Any, page: str) -> None:
    """A tab that reconnects every 20 ms, or whose stream never ends, does not keep flaskd running."""
    terminal = serve("tabs:app")
    tab.goto(f"{terminal.flaskd.url}{page}")
    tab.wait_for_function("heard > 5")
    ctrl_c(terminal, within=4)
    before = tab.evaluate("failures")
    tab.wait_for_function(f"failures > {before + 2}")


def test_the_page_follows_a_drain_and_a_resume(serve: Callable[[str], Terminal], tab: Any) -> None:
    """The page shows draining, then closed while its request still runs, and after a resume serving again."""
    terminal = serve("flaskd.demo:app")
    streams(tab, terminal.flaskd.url)
    tab.fill("#slow input", "60")
    tab.click("#slow button")
    terminal.flaskd.until(lambda: terminal.flaskd.status()["in_flight"] == 2)
    assert terminal.flaskd.command("drain").startswith("OK draining")
    tab.wait_for_selector("body[data-state=draining]")
    tab.wait_for_selector("body[data-state=closed] #slow-list .pending")
    assert terminal.flaskd.command("resume") == "OK ready\n"
    tab.wait_for_selector("body[data-state=serving]")


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844), (320, 640)])
def test_the_page_fits(serve: Callable[[str], Terminal], tab: Any, width: int, height: int) -> None:
    """On a desktop and on a phone nothing is wider than the screen, and no script fails."""
    terminal = serve("flaskd.demo:app")
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.set_viewport_size({"width": width, "height": height})
    streams(tab, terminal.flaskd.url)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert errors == []
