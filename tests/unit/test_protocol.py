import inspect
import os
from pathlib import Path

import pytest

from flaskd import errors
from flaskd.control.replies import STATUSES
from flaskd.present import record_lines
from flaskd.protocol import EXIT_CODES, Discard, damage, runtime_directories, summary

ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.FlaskdError)]


@pytest.fixture
def _temporary(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize(
    ("uid", "environ", "expected"),
    [
        (0, {}, ["/run/shop", "TMP/shop-0"]),
        (0, {"XDG_RUNTIME_DIR": "/xdg"}, ["/run/shop", "/xdg/shop", "TMP/shop-0"]),
        (0, {"RUNTIME_DIRECTORY": "/rt"}, ["/rt", "/run/shop", "TMP/shop-0"]),
        (0, {"RUNTIME_DIRECTORY": "/rt:/rt/two"}, ["/rt", "/run/shop", "TMP/shop-0"]),
        (7, {}, ["/run/shop", "TMP/shop-7"]),
        (7, {"XDG_RUNTIME_DIR": "/xdg"}, ["/xdg/shop", "/run/shop", "TMP/shop-7"]),
        (7, {"RUNTIME_DIRECTORY": "/rt", "XDG_RUNTIME_DIR": "/xdg"}, ["/rt", "/xdg/shop", "/run/shop", "TMP/shop-7"]),
        (7, {"RUNTIME_DIRECTORY": "", "XDG_RUNTIME_DIR": ""}, ["/run/shop", "TMP/shop-7"]),
    ],
)
@pytest.mark.usefixtures("_temporary")
def test_the_order_of_runtime_directories(uid, environ, expected, monkeypatch, tmp_path):
    """The service manager's directory comes first, then root's or the user's own, the temporary one last."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    places = list(runtime_directories("shop", environ))
    assert places == [Path(place.replace("TMP", str(tmp_path))) for place in expected]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_has_its_exit_code(error):
    """A client that got an error's code exits like a process that ends with that error."""
    assert EXIT_CODES[error.code] == error.exit_code


def test_lost_work_alone_is_exit_code_1():
    """Only lost work gives exit code 1; not ready, not alive and other refusals have other codes."""
    assert [code for code in STATUSES.keys() - {"method"} if EXIT_CODES.get(code, 1) == 1] == []


def test_every_error_has_a_code_of_its_own():
    """Each kind of error has a different code."""
    assert len({error.code for error in ERRORS}) == len(ERRORS)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("usage", 64), ("unknown-command", 64), ("no-daemon", 69), ("app-failed", 70), ("cannot-bind", 73),
        ("not-now", 75), ("not-ready", 75), ("forbidden", 77), ("config-invalid", 78), ("restart-needed", 78),
        ("failed", 1),
    ],
)  # fmt: skip
def test_exit_codes_as_they_are_documented(code, exit_code):
    """Scripts rely on these numbers."""
    assert EXIT_CODES[code] == exit_code


def test_nobody_hears_a_discarded_reply():
    """A discarded reply accepts every call."""
    reply = Discard()
    reply.progress({"in_flight": 1})
    reply.ok("drained", {"cut": []}, lines=["cut GET /"], hint="undo: resume")
    reply.error("not-now", "flaskd is stopping")


WHOLE = {
    "reason": "signal: SIGTERM", "started": "T", "took": 1.5, "completed": 2, "rejected": 0,
    "cut": [{"method": "GET", "path": "/", "phase": "running", "age": 2.0, "reason": "the deadline came"}],
    "background": [{"name": "export", "age": 1, "thread": "T"}],
    "policies": {"one": {"fate": "ok", "took": 0, "why": ""}},
}  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        [], {}, {"reason": 1}, {**WHOLE, "took": "long"}, {**WHOLE, "completed": None}, {**WHOLE, "cut": 5},
        {**WHOLE, "cut": [1]}, {**WHOLE, "cut": [{}]}, {**WHOLE, "background": [{}]}, {**WHOLE, "policies": []},
        {**WHOLE, "policies": {"one": 1}}, {**WHOLE, "policies": {"one": {"fate": "ok", "took": "x", "why": ""}}},
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_no_record(record):
    """JSON that no stop has written counts as damaged, with a reason, and is never shown as a stop without losses."""
    why = damage(record)
    assert why
    assert summary({"damaged": why}) == {
        **dict.fromkeys(("reason", "started", "took", "completed", "rejected", "cut", "failed")), "damaged": why,
    }  # fmt: skip


def test_what_can_be_shown_is_a_record():
    """A whole record, and one with missing optional parts, can be shown."""
    for record in (WHOLE, {"reason": "x"}):
        assert damage(record) == ""
        assert record_lines(record)[0] == f"reason: {record['reason']}"
