"""What clients of the app see, and what the log and systemd are told."""

import json
import os
import re
import socket
import stat

import pytest
from daemon_kit import Flaskd
from http_client import connect, get


def test_the_log_of_a_life(flaskd: Flaskd) -> None:
    """The log begins with the URL and the control nodes, then the app; then ready, access, stopping, stopped."""
    flaskd.start()
    get(flaskd.url, "/?a=b", Referer="http://x/", **{"User-Agent": 'say "hi"'})
    url = flaskd.url
    flaskd.settle()
    assert flaskd.stop() == 0
    lines = flaskd.log.splitlines()
    date = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info   "
    assert re.fullmatch(
        f"{date} flaskd \\(pid {flaskd.pid}\\) will serve on {url}; control: {flaskd.socket_path}, {flaskd.fifo_path}",
        lines[0],
    )
    assert re.fullmatch(
        f'{date} serving gateapp:app, the Flask app "gateapp": the module has "app", and no "application"', lines[1]
    )
    assert re.fullmatch(f"{date} ready: gateapp on {url}", lines[2])
    assert re.fullmatch(
        r'127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d \+0000\] "GET /\?a=b HTTP/1\.1" 200 5 "http://x/" "say \\x22hi\\x22"',
        lines[3],
    )
    assert "stopping (signal: SIGTERM): 0 in flight" in lines[4]
    assert re.fullmatch(f"{date} stopped: completed=0 rejected=0 cut=0 took=.*s; cleanup: none", lines[-1])


def test_json_logs(flaskd: Flaskd) -> None:
    """With `log.format: json` every line is an object, also access lines; one has the app's traceback."""
    flaskd.write("flaskd.yaml", "log: {format: json, access: json}\n")
    flaskd.start()
    assert get(flaskd.url, "/boom")[0] == 500
    assert flaskd.stop() == 0
    # Flask's own logging is left alone: text on standard error.
    entries = [json.loads(line) for line in flaskd.log.splitlines() if line.startswith("{")]
    [access] = [entry for entry in entries if entry.get("target") == "/boom"]
    assert (access["status"], access["method"], access["client"]) == (500, "GET", "127.0.0.1")
    assert access["took"] > 0
    assert any(entry.get("message", "").startswith("ready: ") and entry["level"] == "info" for entry in entries)


def test_journal_prefixes(flaskd: Flaskd) -> None:
    """With `log.format: journal` every line has a priority."""
    flaskd.write("flaskd.yaml", "log: {format: journal}\n")
    flaskd.start()
    get(flaskd.url)
    assert flaskd.stop() == 0
    assert all(re.match(r"<[0-7]>", line) for line in flaskd.log.splitlines())


def test_quiet_logs(flaskd: Flaskd) -> None:
    """With `level: error` and `access: off` nothing is logged while nothing is wrong."""
    flaskd.write("flaskd.yaml", "log: {level: error, access: off}\n")
    flaskd.start()
    get(flaskd.url)
    assert flaskd.stop() == 0
    assert flaskd.log == ""


def test_a_unix_listener(flaskd: Flaskd) -> None:
    """unix:/path serves, has its URL and mode 0660, and is removed afterwards."""
    path = flaskd.directory / "app.sock"
    flaskd.start(listen=f"unix:{path}")
    assert get(f"unix:{path}") == (200, b"hello")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert flaskd.status()["listen"] == [f"unix:{path}"]
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    assert not path.exists()
    assert flaskd.command("resume") == "OK ready\n"
    assert get(f"unix:{path}") == (200, b"hello")
    assert flaskd.stop() == 0
    assert not path.exists()


def _no_ipv6() -> str:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        return f"this machine has no IPv6 loopback: {error}"
    return ""


@pytest.mark.skipif(bool(_no_ipv6()), reason=_no_ipv6())
def test_an_ipv6_listener(flaskd: Flaskd) -> None:
    """[::1]:0 serves on IPv6."""
    flaskd.start(listen="[::1]:0")
    assert flaskd.url.startswith("http://[::1]:")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0


def test_several_listeners(flaskd: Flaskd) -> None:
    """-l can be repeated; all listeners serve, drain and resume."""
    path = flaskd.directory / "app.sock"
    flaskd.start("-l", f"unix:{path}")
    assert get(flaskd.status()["url"] if not flaskd.url.startswith("http+unix") else f"unix:{path}")[0] == 200
    assert get(f"unix:{path}") == (200, b"hello")
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    assert flaskd.command("resume") == "OK ready\n"
    assert get(f"unix:{path}") == (200, b"hello")
    assert flaskd.stop() == 0


def test_settings_reach_the_app(flaskd: Flaskd) -> None:
    """Headers of a trusted proxy, scheme, prefix, limits and the Server header reach the app as in Waitress."""
    flaskd.write("flaskd.yaml", "server: {trusted_proxy: 127.0.0.1, trusted_proxy_headers: [x-forwarded-for, x-forwarded-proto],"
                 " url_prefix: /shop, max_request_body_size: 1KiB, ident: corner shop}\n")  # fmt: skip
    flaskd.start()
    status, body = get(flaskd.url, "/shop/environ", **{"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https"})
    environ = json.loads(body)
    assert status == 200
    assert (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"], environ["SCRIPT_NAME"]) == (
        "192.0.2.7",
        "https",
        "/shop",
    )
    assert environ["SERVER_SOFTWARE"] == "corner shop"
    with connect(flaskd.url) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert flaskd.stop() == 0


def test_an_app_that_waits_for_proxy_headers_in_vain_is_told(flaskd: Flaskd) -> None:
    """ProxyFix without `trusted_proxy` causes a warning with the key; with the proxy's network, headers arrive."""
    flaskd.write("fixed.py", "from gateapp import app\nfrom werkzeug.middleware.proxy_fix import ProxyFix\n"
                 "app.wsgi_app = ProxyFix(app.wsgi_app)\n")  # fmt: skip
    flaskd.start(app="fixed")
    assert "never sees x-forwarded-for, x-forwarded-proto, which flaskd removes: set server.trusted_proxy" in flaskd.log
    assert json.loads(get(flaskd.url, "/environ", **{"X-Forwarded-For": "192.0.2.7"})[1])["REMOTE_ADDR"] == "127.0.0.1"
    assert flaskd.stop() == 0
    before = len(flaskd.log)
    flaskd.write("flaskd.yaml", "server: {trusted_proxy: [10.0.0.0/8, 127.0.0.0/8]}\n")
    flaskd.start(app="fixed")
    assert "ProxyFix" not in flaskd.log[before:]
    assert json.loads(get(flaskd.url, "/environ", **{"X-Forwarded-For": "192.0.2.7"})[1])["REMOTE_ADDR"] == "192.0.2.7"
    assert flaskd.stop() == 0


def test_garbage_is_collected_from_the_apps_import_on(flaskd: Flaskd) -> None:
    """Garbage collection is off during flaskd's imports, and on for the app; no object is frozen."""
    flaskd.write("collected.py", "import gc\nfrom gateapp import app\n"
                 "at_import = [gc.isenabled(), gc.get_freeze_count()]\n"
                 "app.add_url_rule('/gc', 'gc', lambda: repr([*at_import, gc.isenabled()]))\n")  # fmt: skip
    flaskd.start(app="collected")
    assert get(flaskd.url, "/gc") == (200, b"[True, 0, True]")
    assert flaskd.stop() == 0


def test_a_wildcard_address_is_announced_as_one(flaskd: Flaskd) -> None:
    """The log says that every machine may connect; the URL in the status works on this machine."""
    flaskd.start(listen="0.0.0.0:0")
    port = flaskd.status()["listen"][0].rpartition(":")[2]
    assert flaskd.log.count(f" on http://0.0.0.0:{port}/") == 2
    assert "http://127.0.0.1" not in flaskd.log
    assert get(flaskd.status()["url"]) == (200, b"hello")
    assert flaskd.stop() == 0


APPS = {
    "module:factory(args)": ("made.py", "from flask import Flask\ndef make(name, *, n=1):\n    app = Flask(name)\n"
                             "    app.add_url_rule('/', view_func=lambda: f'{name} {n}')\n    return app\n",
                             "made:make('shop', n=2)", b"shop 2"),
    "wrapped app": ("wrapped.py", "from gateapp import app as flask_app\nclass Shout:\n    def __init__(self, app):\n"
                    "        self.app = app\n    def __call__(self, environ, start_response):\n"
                    "        return [part.upper() for part in self.app(environ, start_response)]\napp = Shout(flask_app)\n",
                    "wrapped:app", b"HELLO"),
    "WSGI function": ("plain.py", "def application(environ, start_response):\n"
                      "    start_response('200 OK', [])\n    return [b'plain']\n", "plain:application", b"plain"),
    "wsgi.py by itself": ("wsgi.py", "from gateapp import app\n", None, b"hello"),
    "a stray app.run()": ("stray.py", "from gateapp import app\napp.run()\n", "stray", b"hello"),
}  # fmt: skip


@pytest.mark.parametrize("name", APPS)
def test_apps_of_all_kinds(flaskd: Flaskd, name: str) -> None:
    """Flask's syntax, wrapped apps and any WSGI callable are served."""
    file, text, target, body = APPS[name]
    flaskd.write(file, text)
    flaskd.start(app=target)
    assert get(flaskd.url) == (200, body)
    assert flaskd.stop() == 0


def test_ready_comes_after_the_probe(flaskd: Flaskd) -> None:
    """With `health.probe` the app answers before READY, on a connection that no log and no count shows."""
    flaskd.write(
        "probed.py",
        "from gateapp import app\n@app.get('/ping')\ndef ping():\n    print('pinged', flush=True)\n    return 'pong'\n",
    )
    flaskd.write("flaskd.yaml", "health: {probe: /ping}\n")
    flaskd.start(app="probed")
    assert "pinged" in flaskd.log
    assert "/ping" not in flaskd.log
    assert flaskd.status()["completed"] == 0
    assert flaskd.stop() == 0


def test_a_probe_that_is_not_answered_in_time(flaskd: Flaskd) -> None:
    """If the app does not answer its probe, the start fails with exit code 70."""
    flaskd.write("flaskd.yaml", "health: {probe: /hold, probe_timeout: 200ms}\nshutdown: {drain: {timeout: 200ms}}\n")
    code, log = flaskd.fails()
    assert code == 70
    assert "cannot get ready: /hold did not answer the probe within 0.2s" in log
    assert not any("READY=1" in message for message in flaskd.drain_messages())


def test_the_service_manager_is_told_in_order(flaskd: Flaskd) -> None:
    """The messages to systemd: STATUS, then READY with STATUS in one datagram, then STOPPING, at the end the report."""
    flaskd.start()
    assert flaskd.stop() == 0
    messages = [each for each in flaskd.drain_messages() if not each.startswith("EXTEND_TIMEOUT_USEC=")]  # it is slow
    assert messages[0] == "STATUS=starting"
    assert messages[1].startswith("READY=1\nSTATUS=ready: gateapp on 127.0.0.1:")
    assert messages[2] == "STOPPING=1\nSTATUS=stopping (signal: SIGTERM): 0 in flight\nEXTEND_TIMEOUT_USEC=5000000"
    assert messages[-1].startswith("STATUS=stopped: completed=0 rejected=0 cut=0")


def test_nothing_breaks_without_a_service_manager(flaskd: Flaskd) -> None:
    """Without NOTIFY_SOCKET, or with one that is not read, flaskd serves and stops."""
    for address in (None, str(flaskd.directory / "nobody")):
        flaskd.env.pop("NOTIFY_SOCKET", None)
        if address:
            flaskd.env["NOTIFY_SOCKET"] = address
        flaskd.launch()
        flaskd.until(lambda: "ready: gateapp" in flaskd.log)
        assert get(flaskd.url) == (200, b"hello")
        assert flaskd.stop() == 0
        flaskd.log_file.write_text("")


def test_serve_in_a_program(flaskd: Flaskd) -> None:
    """flaskd.serve(app, mapping) serves an app object, returns the exit code, and restores signal handlers."""
    flaskd.write("program.py", "import signal, sys, flaskd\nfrom gateapp import app\nbefore = signal.getsignal(signal.SIGTERM)\n"
                 "code = flaskd.serve(app, {'server': {'listen': '127.0.0.1:0'}})\n"
                 "assert signal.getsignal(signal.SIGTERM) is before\nprint('returned', code)\nsys.exit(code)\n")  # fmt: skip
    import subprocess
    import sys

    with flaskd.log_file.open("ab") as log:
        flaskd.process = subprocess.Popen(
            [sys.executable, "program.py"], cwd=flaskd.directory, env=flaskd.env, stdout=log, stderr=log
        )
    flaskd.wait_message("READY=1")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0
    assert "returned 0" in flaskd.log


def test_many_connections(flaskd: Flaskd) -> None:
    """More than 1024 descriptors are no trouble: the loop polls, and the limit of open files is raised when it is needed.

    What the app starts before that has the limit that flaskd was started with.
    """
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 4096:
        pytest.skip(f"the hard limit of open files is {hard}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections = []
    try:
        flaskd.write("asking.py", "import subprocess\nfrom gateapp import app\n@app.get('/limit')\ndef limit():\n"
                     "    return subprocess.run(['sh', '-c', 'ulimit -Sn'], capture_output=True).stdout\n")  # fmt: skip
        flaskd.start(app="asking", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)))
        url = flaskd.url
        assert get(url, "/limit") == (200, b"256\n")
        connections.extend(connect(url) for _ in range(1500))
        flaskd.until(lambda: flaskd.status()["connections"] == 1500)
        assert get(url) == (200, b"hello")
        assert flaskd.stop() == 0
    finally:
        for each in connections:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert os.environ.get("NOTIFY_SOCKET") is None
