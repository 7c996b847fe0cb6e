"""The log of a real daemon, whatever the app does to logging and to standard error."""

import fcntl
import os
import signal

import pytest
from daemon_kit import Flaskd
from http_client import get

SILENCERS = {
    "dictConfig": "logging.config.dictConfig({'version': 1})",
    "its own": "logging.config.dictConfig({'version': 1, 'loggers': {'flaskd': {'level': 'CRITICAL', 'handlers': []}}})",
    "disable": "logging.disable(logging.CRITICAL)",
    "every logger": "[each.setLevel('CRITICAL') or setattr(each, 'propagate', False) or each.handlers.clear()"
    " for each in map(logging.getLogger, list(logging.root.manager.loggerDict))]",
    "a stderr that raises": "setattr(sys, 'stderr', Raising())",
    "no stderr": "setattr(sys, 'stderr', None)",
    "a closed stderr": "sys.stderr.close()",
}


@pytest.mark.parametrize("where", ["import", "view"])
@pytest.mark.parametrize("silence", SILENCERS.values(), ids=SILENCERS)
def test_no_app_silences_the_log(flaskd: Flaskd, silence: str, where: str) -> None:
    """Whatever the app does on import or in a view, access log, cut request and last line are written."""
    flaskd.write(
        "silent.py",
        "import logging, logging.config, sys\nfrom gateapp import app\n"
        "class Raising:\n    def write(self, text):\n        raise RuntimeError(text)\n    def flush(self):\n        pass\n"
        f"def silence():\n    {silence}\n    return 'silent'\napp.get('/silence')(silence)\n"
        + ("silence()\n" if where == "import" else ""),
    )
    flaskd.write("flaskd.yaml", "log: {access: common}\nshutdown: {drain: {timeout: 200ms}}\n")
    flaskd.start(app="silent")
    assert get(flaskd.url, "/silence") == (200, b"silent")
    assert get(flaskd.url) == (200, b"hello")
    held = flaskd.hold()
    assert flaskd.stop() == 0
    assert '"GET / HTTP/1.1" 200' in flaskd.log
    assert "cut GET /hold" in flaskd.log
    assert (
        flaskd.log.splitlines()[-1].partition(" info ")[2].strip().startswith("stopped: completed=0 rejected=0 cut=1")
    )
    flaskd.gate.open()
    held.result()


def test_a_non_blocking_stderr_loses_nothing(flaskd: Flaskd) -> None:
    """If standard error is non-blocking (O_NONBLOCK, open(2)), a late reader gets every line whole."""
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, False)
    flaskd.write("flaskd.yaml", "log: {access: common}\n")
    flaskd.start(stderr=writing)
    os.close(writing)
    url = flaskd.url
    for number in range(300):  # five times the size of the pipe
        assert get(url, f"/{number}")[0] == 404
    flaskd.kill(signal.SIGTERM)
    with os.fdopen(reading) as log:
        lines = log.read().splitlines()
    assert flaskd.wait() == 0
    asked = [line.split('"')[1] for line in lines if "HTTP/1.1" in line]
    assert sorted(asked) == sorted(f"GET /{n} HTTP/1.1" for n in range(300))
    assert not [line for line in lines if "lost" in line]
