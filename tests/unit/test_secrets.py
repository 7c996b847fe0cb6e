"""What was interpolated into a configuration is never shown: not in an action's message, not in the log."""

import io
import json
import logging
import sys

import pytest
from cleanup_kit import run
from http_endpoint import endpoint

from flaskd.cleanup import Fate, action_specs, build_plan
from flaskd.config import load_mapping
from flaskd.errors import ConfigError
from flaskd.log.setup import Logs
from flaskd.text import MASK, Redactor

SECRET = "hunter2-s3cret"
FILE = f"/nowhere/{SECRET}/x"


def plan(use, environ, **fields):
    """The plan of one policy, with a configuration that is read as from a file."""
    data = {"cleanup": {"policies": {"it": {"use": use, "phase": "final", "with": fields}}}}
    configuration = load_mapping(data, actions=action_specs(), environ={"S": SECRET, "F": FILE, **environ})
    return build_plan(configuration.values.cleanup)


def perform(use, environ=(), **fields):
    """Run one policy and give its result."""
    (step,) = plan(use, dict(environ), **fields).steps
    return run(step)["it"]


CASES = {
    "a program that is not there": ("command", {"argv": ["${env:S}"]}, "cannot run"),
    "a path of a program": ("command", {"argv": ["${env:F}"]}, "cannot run"),
    "a part of a program's name": ("command", {"argv": ["no-${env:S}-such"]}, "cannot run"),
    "a program named by a default": ("command", {"argv": ["${env:NONE:-hunter2-s3cret}"]}, "cannot run"),
    "a directory to work in": ("command", {"argv": ["true"], "cwd": "${env:F}"}, "cannot run"),
    "what a program says": ("command", {"argv": ["sh", "-c", 'echo "no $0"; exit 3', "--x=${env:S}"]}, "exit code 3"),
    "what it says of its environment": (
        "command", {"argv": ["sh", "-c", "echo $T; exit 3"], "env": {"T": "${env:S}"}}, "exit code 3"
    ),
    "a webhook's host": ("webhook", {"url": "http://hunter2-s3cret.invalid/${env:S}"}, "cannot reach it"),
    "an agent that is not there": ("consul.deregister", {"service_id": "${env:S}", "address": "127.0.0.1:1"}, "reach"),
    "a file's directory": ("files.remove", {"paths": ["${env:F}"]}, 'cannot remove "/nowhere'),
}  # fmt: skip


@pytest.mark.parametrize(("use", "fields", "words"), CASES.values(), ids=CASES)
def test_no_failed_step_shows_what_was_interpolated(use, fields, words):
    """The reason of a failed step has a mask in place of the value."""
    result = perform(use, **fields)
    assert result.fate is Fate.FAILED
    assert words in result.why
    assert SECRET not in repr(result)


def test_a_secret_that_is_cut_with_the_output_is_not_shown_in_part():
    """A secret in a program's output is masked before the output is cut."""
    script = 'printf "%s" "$0"; head -c 1990 /dev/zero | tr "\\0" x; exit 1'
    result = perform("command", argv=["sh", "-c", script, "${env:S}"])
    assert "s3cret" not in result.why


def test_what_a_step_says_of_its_success_shows_it_neither():
    """A successful step does not show it either; a value written in the file itself is shown."""
    with endpoint() as place:
        shown = perform("consul.deregister", service_id="shop-1", address=place.url)
        hidden = perform("consul.deregister", service_id="${env:S}", address=place.url)
    assert (shown.detail, hidden.detail) == ("deregistered shop-1", f"deregistered {MASK}")


def test_a_target_that_cannot_be_imported_is_not_shown():
    """A target that cannot be imported is shown neither whole nor as its module."""
    with pytest.raises(ConfigError) as caught:
        plan("call", {"T": "hunter2_s3cret:stop"}, target="${env:T}").prepare()
    assert "cleanup.policies.it: cannot import" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_plan_shows_no_field():
    """The plan shows no fields, neither for people nor for programs."""
    assert SECRET not in json.dumps(plan("command", {}, argv=["${env:S}"]).describe())


@pytest.mark.parametrize("log_format", ["text", "json", "journal"])
def test_the_log_shows_nothing_that_was_interpolated(log_format, monkeypatch):
    """No message shows it, except addresses that flaskd listens on and the app that it serves."""
    data = {
        "app": {"target": "${env:APP}", "chdir": "/srv/${env:S}"},
        "health": {"probe": "/${env:S}"},
        "control": {"group": "${env:G}"},
        "server": {"listen": "127.0.0.1:${env:PORT}"},
        "shutdown": {"record": "${env:S}.json"},
    }
    environ = {"S": SECRET, "G": "agents", "PORT": "8123", "APP": "shop:app"}
    hide = load_mapping(data, actions=action_specs(), environ=environ).redact
    with monkeypatch.context() as patched, Logs() as logs:
        patched.setattr(sys, "stderr", stderr := io.StringIO())
        logs.apply(level="info", log_format=log_format, access="off", hide=hide)
        log = logging.getLogger("flaskd.test")
        log.info(f"shop:app on 127.0.0.1:8123: cannot change into /srv/{SECRET}; no group agents; reagents")
        try:
            raise OSError(2, "gone", f"{SECRET}.json")
        except OSError:
            log.exception("failed")
    said = stderr.getvalue()
    assert SECRET not in said
    assert f"shop:app on 127.0.0.1:8123: cannot change into {MASK}; no group {MASK}; reagents" in said


def test_what_is_too_short_is_no_secret():
    """A short secret is masked only as a word of its own; one or two characters are not masked."""
    redact = Redactor(["8", "no", "shop", "hunter2-s3cret", "/srv/shop/run/x", "a\nlonger line"])
    assert redact("8 no shop shopping xhunter2-s3cretx /srv/shop/run: longer line") == (
        f"8 no {MASK} shopping x{MASK}x {MASK}: {MASK}"
    )
    assert Redactor()("anything") == "anything"
