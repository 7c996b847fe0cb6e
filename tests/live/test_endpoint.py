"""The shutdown endpoint of real processes: of flaskd and Flask's development server, and what a browser can do."""

import contextlib
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_kit import Flaskd, children, requires
from http_client import ask, get, refused
from patience import PATIENCE

import flaskd as package

REFERENCE = Path(__file__).parents[2] / "config" / "flaskd.yaml"
CHROMIUM = Path("/usr/bin/chromium")
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip

SHOP = """
import pathlib
import flaskd
from gateapp import app

@flaskd.on_stop
def close():
    with open("closed", "a") as file:
        file.write("closed")

endpoint = flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file="token").start()
if endpoint.url:
    pathlib.Path("url.new").write_text(endpoint.url)
    pathlib.Path("url.new").rename("url")
"""

CONFIG = "shutdown: {endpoint: {listen: '127.0.0.1:0', token_file: token}}\n"


@pytest.fixture
def token(flaskd: Flaskd) -> str:
    """A token, in a file in the daemon's directory."""
    return package.ShutdownEndpoint.make_token(flaskd.directory / "token").read_text().strip()


def post(url: str, token: str, **headers: str) -> tuple[int, bytes]:
    """POST to an endpoint as a program does."""
    host, _, path = url.removeprefix("http://").partition("/")
    usual = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    return ask(host, f"/{path}", "POST", b"{}", usual | headers)


# --- under flaskd ---


def test_a_post_stops_the_daemon(flaskd: Flaskd, token: str) -> None:
    """After the 202 the stop begins: running requests are answered, and the record has the reason and the plan's id."""
    flaskd.write("flaskd.yaml", CONFIG + "cleanup: {policies: {bye: {use: command, with: {argv: ['true']}}}}\n")
    flaskd.start()
    [url] = flaskd.status()["shutdown_endpoint"]
    held = flaskd.hold()
    assert url not in {flaskd.url, f"{flaskd.url}shutdown"}
    status, body = post(url, token)
    told = json.loads(body)
    assert (status, told["in_flight"], [step["name"] for step in told["steps"]]) == (202, 1, ["bye"])
    flaskd.wait_message("STOPPING=1")
    assert post(url, token) == (202, body)
    assert post(url, "no")[0] == 404
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert (flaskd.record()["reason"], flaskd.record()["plan"]) == ("endpoint: 127.0.0.1", told["plan"])
    assert flaskd.record()["policies"]["bye"]["fate"] == "ok"
    assert refused(url.removesuffix("shutdown"))
    assert token not in flaskd.log


def test_the_answer_has_what_the_app_holds(flaskd: Flaskd, token: str) -> None:
    """Found objects are among the steps of the answer; the id is that of the policies, as in the record."""
    flaskd.write("flaskd.yaml", CONFIG)
    flaskd.write("holding.py", (
        "from concurrent.futures import ThreadPoolExecutor\nfrom gateapp import app\n"
        "app.extensions['pool'] = ThreadPoolExecutor(1)\n"
    ))  # fmt: skip
    flaskd.start(app="holding")
    flaskd.until(lambda: "the app holds" in flaskd.log)
    [url] = flaskd.status()["shutdown_endpoint"]
    told = json.loads(post(url, token)[1])
    assert [step["use"] for step in told["steps"]] == ["executor.stop"]
    assert flaskd.wait() == 0
    assert flaskd.record()["plan"] == told["plan"]


def test_a_credential_is_a_token(flaskd: Flaskd, token: str) -> None:
    """A token from the directory of LoadCredential= is used."""
    flaskd.env["CREDENTIALS_DIRECTORY"] = str(flaskd.directory)
    flaskd.write("flaskd.yaml", CONFIG.replace("token_file", "credential"))
    flaskd.start()
    [url] = flaskd.status()["shutdown_endpoint"]
    assert post(url, token)[0] == 202
    assert flaskd.wait() == 0


def test_the_shell_can_do_it(flaskd: Flaskd) -> None:
    """The reference configuration's commands make a token and use it, without showing it to ps(1)."""
    requires("curl", [] if shutil.which("curl") else ["curl"])
    said = " ".join(line.strip().lstrip("# ") for line in REFERENCE.read_text().splitlines())
    make, ask = (
        re.search(pattern, said) for pattern in (r"(\(umask 077; .*? > shutdown.token\))", r"(printf .*?/shutdown)")
    )
    assert make
    assert ask
    subprocess.run(["sh", "-c", make[1]], cwd=flaskd.directory, check=True)
    flaskd.write("flaskd.yaml", CONFIG.replace("token_file: token", "token_file: shutdown.token"))
    flaskd.start()
    [url] = flaskd.status()["shutdown_endpoint"]
    command = ask[1].replace("http://127.0.0.1:9090/shutdown", url)
    assert url in command
    done = subprocess.run(["sh", "-c", command], cwd=flaskd.directory, capture_output=True, text=True, check=True)
    assert '"plan": ' in done.stdout
    assert flaskd.wait() == 0


def test_a_refused_post_stops_nothing(flaskd: Flaskd, token: str) -> None:
    """A wrong token, a wrong method or a browser's header is refused and logged; the app's port has no endpoint."""
    flaskd.write("flaskd.yaml", CONFIG)
    flaskd.start()
    [url] = flaskd.status()["shutdown_endpoint"]
    assert post(url, "no")[0] == 404
    assert get(url.removesuffix("shutdown"), "/shutdown", Authorization=f"Bearer {token}")[0] == 405
    assert post(url, token, Origin="http://evil.example")[0] == 403
    assert post(f"{flaskd.url}shutdown", token)[0] == 404
    assert flaskd.status()["state"] == "ready"
    assert "refused 127.0.0.1: a wrong token" in flaskd.log
    assert flaskd.stop() == 0


def test_there_is_none_unless_configured(flaskd: Flaskd) -> None:
    """The endpoint is off by default, and then not shown."""
    flaskd.start()
    assert flaskd.status()["shutdown_endpoint"] == []
    assert "shutdown_endpoint" not in flaskd.command("status")
    assert flaskd.stop() == 0


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ("profile: production\n" + CONFIG, "flaskd.yaml:2:12 shutdown.endpoint: expected none under profile: production"),
        (CONFIG.replace("token_file: token", "token_file: no"), 'cannot read the token file "{directory}/no": No such file'),
        (CONFIG.replace("token_file: token", "credential: t"), "$CREDENTIALS_DIRECTORY is not set"),
        ("shutdown: {endpoint: {listen: '127.0.0.1:0'}}\n", "expected either token_file or credential along with listen"),
    ],
)  # fmt: skip
def test_no_token_no_route(flaskd: Flaskd, token: str, config: str, fault: str) -> None:
    """In production, or without its token, flaskd refuses to start, and says why."""
    flaskd.write("flaskd.yaml", config)
    code, said = flaskd.fails()
    assert code == 78
    assert fault.format(directory=flaskd.directory) in said
    assert "Traceback" not in said


def test_a_busy_address_is_a_fault_of_the_start(flaskd: Flaskd, token: str) -> None:
    """If the endpoint's address is in use, the start fails with 73 before the app is imported."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        flaskd.write("flaskd.yaml", CONFIG.replace(":0", f":{other.server_port}"))
        code, said = flaskd.fails()
    assert (code, f"cannot listen on 127.0.0.1:{other.server_port}" in said) == (73, True)


def test_it_is_there_before_the_app_is(flaskd: Flaskd, token: str) -> None:
    """An app that hangs in its import can be stopped, and the answer arrives."""
    flaskd.write("flaskd.yaml", CONFIG)
    flaskd.write("hanging.py", "import gateapp\ngateapp.hold()\n")
    flaskd.launch(app="hanging")
    flaskd.gate.entered()
    [url] = flaskd.status()["shutdown_endpoint"]
    assert post(url, token)[0] == 202
    assert flaskd.wait() == 0


def test_opened_in_code_it_is_the_daemons(flaskd: Flaskd, token: str) -> None:
    """An endpoint opened in code gives the same stop, record and status; registered functions run once."""
    flaskd.write("shop.py", SHOP)
    flaskd.start(app="shop")
    [url] = flaskd.status()["shutdown_endpoint"]
    held = flaskd.hold()
    assert json.loads(post(url, token)[1])["in_flight"] == 1
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert flaskd.record()["reason"] == "endpoint: 127.0.0.1"
    assert (flaskd.directory / "closed").read_text() == "closed"


def test_in_production_code_opens_none(flaskd: Flaskd, token: str) -> None:
    """Under profile: production the app's code cannot open an endpoint."""
    flaskd.write("flaskd.yaml", "profile: production\n")
    flaskd.write("shop.py", SHOP)
    code, said = flaskd.fails(app="shop")
    assert code == 70
    assert "cannot open a shutdown endpoint: flaskd runs with profile: production" in said


def test_a_forked_child_does_not_keep_it(flaskd: Flaskd, token: str) -> None:
    """After the stop nothing listens there, although a process that the app forked still runs."""
    flaskd.write("flaskd.yaml", CONFIG)
    flaskd.write("forking.py", (
        "import os, signal\nfrom gateapp import app\n@app.get('/fork')\ndef fork():\n    pid = os.fork()\n"
        "    if not pid:\n        signal.pause()\n    return str(pid)\n"
    ))  # fmt: skip
    flaskd.start(app="forking")
    [url] = flaskd.status()["shutdown_endpoint"]
    pid = int(get(flaskd.url, "/fork")[1])
    try:
        assert flaskd.stop() == 0
        assert Path(f"/proc/{pid}").exists()
        assert refused(url.removesuffix("shutdown"))
    finally:
        os.kill(pid, signal.SIGKILL)


# --- in programs, with an app that opens one when it is imported ---


def program(flaskd: Flaskd, source: str) -> subprocess.Popen[bytes]:
    """A program that serves such an app; SIGINT has its usual effect on it."""
    flaskd.write("shop.py", SHOP)
    flaskd.write("program.py", source)
    with flaskd.log_file.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "program.py"], cwd=flaskd.directory, env=flaskd.env, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip


def endpoint_of(flaskd: Flaskd) -> str:
    """The address at which the app has opened it."""
    flaskd.until((flaskd.directory / "url").exists)
    return (flaskd.directory / "url").read_text()


def test_serve_takes_it_over(flaskd: Flaskd, token: str) -> None:
    """flaskd.serve() takes over the endpoint of an app that was imported before; functions run once."""
    flaskd.process = program(
        flaskd, "import sys, flaskd, shop\nsys.exit(flaskd.serve(shop.app, {'server': {'listen': '127.0.0.1:0'}}))\n"
    )
    flaskd.wait_message("READY=1")
    assert flaskd.status()["shutdown_endpoint"] == [endpoint_of(flaskd)]
    assert post(endpoint_of(flaskd), token)[0] == 202
    assert flaskd.wait() == 0
    assert flaskd.record()["reason"] == "endpoint: 127.0.0.1"
    assert (flaskd.directory / "closed").read_text() == "closed"


def test_serve_in_production_refuses_it(flaskd: Flaskd, token: str) -> None:
    """flaskd.serve() under profile: production refuses to start with an endpoint that is open already."""
    flaskd.process = program(
        flaskd, "import sys, flaskd, shop\nsys.exit(flaskd.serve(shop.app, {'profile': 'production'}))\n"
    )
    assert flaskd.process.wait(PATIENCE) == 78
    assert "cannot open a shutdown endpoint: flaskd runs with profile: production" in flaskd.log


@pytest.mark.parametrize("how", ["threading.Event().wait()", "server.join()"])
def test_a_server_in_a_thread_stops_once(flaskd: Flaskd, token: str, how: str) -> None:
    """The main thread is interrupted after the stop: requests are answered, and functions have run."""
    process = program(flaskd, (
        "import threading, flaskd, shop\nfrom pathlib import Path\ntry:\n"
        f"    with flaskd.ServerThread(shop.app) as server:\n        Path('at').write_text(server.url)\n        {how}\n"
        "except KeyboardInterrupt:\n    print(server.stop().clean, Path('closed').read_text(), flush=True)\n"
    ))  # fmt: skip
    try:
        flaskd.until(lambda: (flaskd.directory / "at").exists() and (flaskd.directory / "at").read_text() != "")
        held = flaskd.hold((flaskd.directory / "at").read_text())
        assert post(endpoint_of(flaskd), token)[0] == 202
        flaskd.until(lambda: refused((flaskd.directory / "at").read_text()))
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        assert process.wait(PATIENCE) == 0
        assert flaskd.log.endswith("True closed\n")  # waitress may log that a request waited
    finally:
        process.kill()
        process.wait()


def test_a_server_process_stops_once(flaskd: Flaskd, token: str) -> None:
    """The owner of a ServerProcess sees a proper end, with the steps of one stop."""
    flaskd.write("shop.py", SHOP)
    with package.ServerProcess("shop:app", chdir=flaskd.directory, env=flaskd.env) as process:
        held = flaskd.hold(process.url)
        assert post(endpoint_of(flaskd), token)[0] == 202
        flaskd.until(lambda: refused(process.url))
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        process.join(PATIENCE)
        assert process.exitcode == 0
        report = process.stop()
    assert report is not None
    assert report.clean
    assert (flaskd.directory / "closed").read_text() == "closed"


# --- under flask run ---


class FlaskRun:
    """`flask run` in a flaskd fixture's directory, on a port that the kernel chooses."""

    def __init__(self, place: Flaskd, *args: str, **popen: Any) -> None:
        self._place = place
        place.write("shop.py", SHOP)
        argv = [sys.executable, "-m", "flask", "--app", "shop", "run", "--port", "0", *args]
        with place.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=place.directory, env=place.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **popen
            )
        self.until(
            lambda: re.search(r"Running on (http://\S+)", place.log) is not None or self.process.poll() is not None
        )
        self.until((place.directory / "url").exists)
        found = re.search(r"Running on (http://\S+)", place.log)
        assert found, place.log
        self.url = found[1] + "/"
        self.endpoint = (place.directory / "url").read_text()
        assert get(self.url)[0] == 200  # a reloader's parent binds before its child serves

    def until(self, condition: Any) -> None:
        self._place.until(condition)

    def close(self) -> None:
        if self.process.poll() is None:
            for pid in children(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(place: Flaskd, *args: str, **popen: Any) -> Iterator[FlaskRun]:
    server = FlaskRun(place, *args, **popen)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("option", ["--no-reload", "--reload"])
def test_a_post_stops_flask_run(flaskd: Flaskd, token: str, option: str) -> None:
    """Under `flask run` requests are answered, functions run, and every process ends, the reloader's parent, too."""
    flaskd.log_file.touch()
    with running(flaskd, option) as server:
        below = children(server.process.pid)
        assert len(below) == (option == "--reload")
        held = flaskd.hold(server.url)
        told = [post(server.endpoint, token)]
        server.until(lambda: get(server.url, "/")[0] == 503)
        told.append(post(server.endpoint, token))
        assert [status for status, _ in told] == [202, 202]
        first, second = (json.loads(body) for _, body in told)
        assert (first["plan"], first["steps"]) == (second["plan"], second["steps"])
        assert first["in_flight"] >= 1  # a client may have its answer slightly before its request is over
        assert not (flaskd.directory / "closed").exists()
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        assert server.process.wait(PATIENCE) == 0
        assert (flaskd.directory / "closed").read_text() == "closed"
        assert not any(Path(f"/proc/{pid}").exists() for pid in below)
        assert refused(server.url)
        assert refused(server.endpoint.removesuffix("shutdown"))
    assert "Traceback" not in flaskd.log


def test_an_open_stream_does_not_keep_flask_run(flaskd: Flaskd, token: str) -> None:
    """An event stream ends between two events after its grace, and is not cut."""
    flaskd.log_file.touch()
    with (flaskd.directory / "gateapp.py").open("a") as file:
        file.write(
            "import time\n@app.get('/events')\ndef events():\n    def produce():\n        while True:\n"
            "            yield 'data: more\\n\\n'\n            time.sleep(0.02)\n"
            "    return app.response_class(produce(), mimetype='text/event-stream')\n"
        )
    with running(flaskd, "--no-reload") as server:
        with contextlib.closing(http.client.HTTPConnection(server.url.split("/")[2], timeout=PATIENCE)) as connection:
            connection.request("GET", "/events")
            events = connection.getresponse()
            assert events.readline() == b"data: more\n"
            assert post(server.endpoint, token)[0] == 202
            assert events.read().endswith(b"data: more\n\n")
        assert server.process.wait(PATIENCE) == 0
    assert "cut" not in flaskd.log


def test_the_reloader_takes_the_endpoint_along(flaskd: Flaskd, token: str) -> None:
    """After an edit the reloader's new child has an endpoint, which stops parent and child."""
    flaskd.log_file.touch()
    with running(flaskd, "--reload") as server:
        [before] = children(server.process.pid)
        (flaskd.directory / "url").unlink()
        flaskd.write("shop.py", SHOP + "\n# edited\n")
        server.until((flaskd.directory / "url").exists)
        assert children(server.process.pid) != [before]
        assert get(server.url)[0] == 200
        assert post((flaskd.directory / "url").read_text(), token)[0] == 202
        assert server.process.wait(PATIENCE) == 0


def test_a_process_that_ignores_ctrl_c_ends(flaskd: Flaskd, token: str) -> None:
    """A process that ignores SIGINT, as in a script's background, is terminated after its work is done."""
    flaskd.log_file.touch()
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    with running(flaskd, "--no-reload", preexec_fn=ignore) as server:
        assert post(server.endpoint, token)[0] == 202
        assert server.process.wait(PATIENCE) == -signal.SIGTERM
        assert (flaskd.directory / "closed").exists()


def test_other_commands_of_flask_open_nothing(flaskd: Flaskd, token: str) -> None:
    """`flask routes` imports the app without opening the endpoint, even while it is served elsewhere."""
    flaskd.write("shop.py", SHOP)
    argv = [sys.executable, "-m", "flask", "--app", "shop", "routes"]
    done = subprocess.run(argv, cwd=flaskd.directory, env=flaskd.env, capture_output=True, text=True, check=True)
    assert "/hold" in done.stdout
    assert not (flaskd.directory / "url").exists()


# --- a browser ---

PAGE = """
<form id="form" method="post" enctype="text/plain" target="frame" action="{url}"><input name="x" value="y"></form>
<iframe name="frame"></iframe>
<script>
window.attempt = async () => {{
  const said = [];
  const tries = [
    {{mode: "no-cors", method: "POST", body: "{{}}"}},
    {{mode: "no-cors", method: "POST", body: "{{}}", headers: {{"Content-Type": "text/plain"}}}},
    {{mode: "cors", method: "POST", body: "{{}}"}},
    {{mode: "cors", method: "POST", body: "{{}}", headers: {{"Content-Type": "application/json",
                                                            "Authorization": "Bearer {token}"}}}},
    {{mode: "cors", method: "POST", body: "{{}}", credentials: "include"}},
  ];
  for (const one of tries) {{
    try {{ said.push((await fetch("{url}", one)).type); }} catch (error) {{ said.push(error.name); }}
  }}
  said.push(navigator.sendBeacon("{url}", "{{}}"));
  const framed = new Promise(resolve => document.querySelector("iframe").addEventListener("load", resolve));
  document.getElementById("form").submit();
  await framed;
  return said;
}};
</script>
"""


@contextlib.contextmanager
def site(page: str) -> Iterator[str]:
    """Another site; gives its origin."""

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = page.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://localhost:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser page with a profile of its own."""
    from playwright.sync_api import sync_playwright

    profile = tempfile.mkdtemp(prefix="flaskd-chromium-")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch_persistent_context(
                profile, executable_path=CHROMIUM, headless=True, args=SWITCHES
            )
            try:
                yield browser.new_page()
            finally:
                browser.close()
    finally:
        shutil.rmtree(profile, ignore_errors=True)


def test_a_page_in_a_browser_cannot_stop_it(flaskd: Flaskd, token: str) -> None:
    """Whatever a page of another origin sends, even with the token, is refused, and the server goes on."""
    missing = [] if CHROMIUM.exists() else ["the command chromium"]
    try:
        import playwright  # noqa: F401
    except ImportError:
        missing.append("playwright")
    requires("chromium", missing)
    flaskd.write("flaskd.yaml", CONFIG)
    flaskd.start()
    [url] = flaskd.status()["shutdown_endpoint"]
    with site(PAGE.format(url=url, token=token)) as origin, chromium() as page:
        page.goto(origin)
        said = page.evaluate("window.attempt()")
        page.goto(f"{url}?token={token}")
        shown = page.inner_text("body").strip()
    assert said == ["opaque", "opaque", "TypeError", "TypeError", "TypeError", True]
    assert shown == "not found"
    assert flaskd.status()["state"] == "ready"
    assert "asked to stop" not in flaskd.log
    assert flaskd.log.count("shutdown endpoint: refused 127.0.0.1") >= 7
    assert post(url, token)[0] == 202
    assert flaskd.wait() == 0
