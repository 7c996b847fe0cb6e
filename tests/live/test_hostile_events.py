"""Events that fail, hang, or find no thread: flaskd leaves the state, answers, and tells systemd."""

from __future__ import annotations

import signal
import threading

import pytest
from daemon_kit import GATE_APP, Flaskd
from http_client import get

SHORT = """
import threading

@app.get("/short")
def short():
    threading.stack_size(1 << 46)  # no thread can be had: pthread_create(3) finds no room for such a stack
    return "short"

@app.get("/plenty")
def plenty():
    threading.stack_size(0)
    return "plenty"
"""
"""Views that use up the threads of this process, and release them."""


STREAMS = {
    "without isatty": "class Stream:\n    def write(self, text): sys.__stderr__.write(text)\n"
    "    def flush(self): sys.__stderr__.flush()\n",
    "whose isatty raises": "class Stream:\n    def write(self, text): sys.__stderr__.write(text)\n"
    "    def flush(self): sys.__stderr__.flush()\n    def isatty(self): raise LookupError\n"
    "    def fileno(self): raise LookupError\n    closed = property(isatty)\n",
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_reload_under_a_standard_error_of_the_app_s(flaskd: Flaskd, stream: str) -> None:
    """If the app replaces standard error by a strange object, a reload works."""
    flaskd.write("streams.py", f"import sys\n{STREAMS[stream]}sys.stderr = Stream()\n{GATE_APP}")
    flaskd.start(app="streams")
    assert flaskd.command("reload") == "OK reloaded\n"
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    assert flaskd.stop() == 0


BROKEN_PART = """
import flaskd.{module}
import {exceptions}

def broken(*args, **kwargs):
    if broken.armed:
        raise {error}
    return before(*args, **kwargs)

before = flaskd.{module}.{what}
broken.armed = False
flaskd.{module}.{what} = broken

@app.get("/break")
def arm():
    broken.armed = True
    return "armed"
"""


def broken_part(what: str, error: str) -> str:
    """An app in which a function of flaskd raises after a request for ``/break``."""
    module, _, name = what.partition(":")
    return GATE_APP + BROKEN_PART.format(module=module, what=name, error=error, exceptions="builtins")


@pytest.mark.parametrize(
    "what", ["log.setup:Logs.apply", "config.watch:FileWatch.stop", "serving.forecast:Forecast.look_around"]
)
def test_a_reload_that_breaks_is_over(flaskd: Flaskd, what: str) -> None:
    """Whatever raises in a reload: its reply is an error, systemd gets READY, the old configuration is in force."""
    flaskd.write("broken.py", broken_part(what, "LookupError"))
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start(app="broken")
    url = flaskd.url
    assert get(url, "/break") == (200, b"armed")
    flaskd.write("flaskd.yaml", "server: {threads: 3}\n")
    for _ in range(2):
        assert flaskd.command("reload").startswith("ERR failed LookupError(); keeping")
        flaskd.wait_message("RELOADING=1")
        flaskd.wait_message("READY=1\nSTATUS=ready, but the reload failed: LookupError()")
    status = flaskd.status()
    assert (status["state"], status["threads"], status["last_reload"]["ok"]) == ("ready", 2, False)
    assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    assert flaskd.stop() == 0


@pytest.mark.parametrize("error", ["LookupError", "SystemExit"])
@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("server.drain:Drain.begin", "drain wait"),
        ("serving.pipeline:Pipeline.begin_drain", "drain"),
        ("daemon:Daemon._became_ready", "resume"),
    ],
)
def test_a_drain_that_breaks_is_answered_and_ends_in_good_order(
    flaskd: Flaskd, what: str, command: str, error: str
) -> None:
    """If a drain cannot begin, its reply is an error, and flaskd stops with exit code 70."""
    flaskd.write("broken.py", broken_part(what, error))
    flaskd.start(app="broken")
    assert get(flaskd.url, "/break") == (200, b"armed")
    if command == "resume" and error == "LookupError":
        assert flaskd.command("drain wait").splitlines()[-1].startswith("OK drained")
    assert flaskd.command(command).startswith(f"ERR failed cannot do that: {error}") or command == "resume"
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() in {0, 70}
    assert flaskd.record()["cut"] == []


STOPS = [
    "serving.pipeline:Pipeline._drain_to_stop",
    "serving.inprocess:InProcess.announce_stop",
    "stopping:Stopping.step_ended",
    "stopping:Stopping.claim",
    "stopping:Stopping.join",
    "serving.forecast:DiscoveryRun",
    "serving.forecast:with_callbacks",
    "systemd.service:Service.stopping",
    "server.drain:Drain.account",
    "drains:Drains._take_waiters",
]


@pytest.mark.parametrize("error", ["LookupError", "SystemExit"])
@pytest.mark.parametrize("what", STOPS)
def test_a_stop_whose_parts_break_is_over_all_the_same(flaskd: Flaskd, what: str, error: str) -> None:
    """Whatever raises in a stop: its steps run, the record is written, and it ends long before the deadline."""
    flaskd.write("broken.py", broken_part(what, error))
    flaskd.write("flaskd.yaml", "cleanup: {policies: {mark: {use: command, with: {argv: [touch, mark]}}}}\n")
    flaskd.start(app="broken")
    assert get(flaskd.url, "/break") == (200, b"armed")
    flaskd.command("stop")
    assert flaskd.wait(10) in {0, 70}
    assert flaskd.record()["policies"]["mark"]["fate"] == "ok"


def test_a_reload_without_a_thread_is_refused(flaskd: Flaskd) -> None:
    """If no thread can be started for reading, the reply is an error, and the old configuration is in force."""
    flaskd.write("short.py", GATE_APP + SHORT)
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start(app="short")
    url = flaskd.url
    assert get(url, "/short") == (200, b"short")
    assert flaskd.command("reload").startswith("ERR failed cannot read the configuration: no thread can be had; raise ")
    assert flaskd.command("check").startswith("ERR failed cannot check: no thread can be had; raise ")
    flaskd.wait_message("READY=1\nSTATUS=ready, but the reload failed: ")
    assert flaskd.status()["state"] == "ready"
    assert get(url, "/plenty") == (200, b"plenty")
    assert flaskd.command("reload").startswith("OK reloaded")
    assert flaskd.stop() == 0


LIMITED = """
import threading
from flaskd.process.threads import AppThread

start = AppThread.start

def limited(self):
    number = self.name.removeprefix("flaskd-thread-")
    threading.stack_size(1 << 46 if number.isdecimal() and int(number) > 6 else 0)
    try:
        start(self)
    finally:
        threading.stack_size(0)

AppThread.start = limited
"""


def test_more_threads_than_can_be_had_are_no_valid_reload(flaskd: Flaskd) -> None:
    """If more `threads` cannot be started, the error names the key, and all stays as it was."""
    flaskd.write("limited.py", GATE_APP + LIMITED)
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start(app="limited")
    flaskd.write("flaskd.yaml", "server: {threads: 50}\nhealth: {path: /healthz}\n")
    answer = flaskd.command("reload")
    assert answer.startswith("ERR cannot-bind server.threads: 6 of 50: no thread can be had; raise TasksMax=")
    assert flaskd.status()["threads"] == 2
    flaskd.until(lambda: flaskd.command("threads").count("flaskd-thread") == 3)  # one thread leads
    assert get(flaskd.url, "/healthz")[0] == 404
    flaskd.write("flaskd.yaml", "server: {threads: 5}\n")
    assert flaskd.command("reload").startswith("OK reloaded")
    flaskd.until(lambda: flaskd.command("threads").count("flaskd-thread") == 6)
    held = [flaskd.hold() for _ in range(5)]
    flaskd.gate.open()
    assert [each.result()[0] for each in held] == [200] * 5
    assert flaskd.stop() == 0


def test_a_configuration_that_cannot_be_read_to_its_end_is_given_up(flaskd: Flaskd) -> None:
    """If the import of a policy's module hangs, `reload` gets an error after a while, and flaskd is ready again."""
    flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start()
    flaskd.write("hanging.py", "import threading\nthreading.Event().wait()\n")
    flaskd.write("flaskd.yaml", "cleanup: {policies: {bye: {use: call, with: {target: 'hanging:bye'}}}}\n")
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(flaskd.command("reload")))
    asking.start()
    flaskd.wait_message("RELOADING=1")
    flaskd.wait_message("READY=1\nSTATUS=ready, but the reload failed: reading ")
    asking.join()
    assert answers[0].startswith("ERR failed reading ")
    assert "took longer than 10s" in answers[0]
    assert flaskd.status()["state"] == "ready"
    flaskd.write("flaskd.yaml", "server: {threads: 3}\n")
    assert flaskd.command("reload").startswith("OK reloaded")
    assert flaskd.status()["threads"] == 3
    assert flaskd.stop() == 0
