"""Warnings about values that are valid and surely not meant, with their places; and no other warnings."""

import pytest

from flaskd.cleanup import action_specs
from flaskd.config import load, load_mapping


def doubts(text, tmp_path, **more):
    path = tmp_path / "flaskd.yaml"
    path.write_text(text)
    return [str(each).removeprefix(str(path)) for each in load(path, actions={}, **{"environ": {}, **more}).doubts]


def test_the_defaults_raise_none(tmp_path):
    """The defaults give no warning, and neither does a file without contradictions."""
    assert doubts("", tmp_path) == []
    assert doubts("server: {request_timeout: 15s, queue_timeout: 5s, max_queue: 100}", tmp_path) == []


@pytest.mark.parametrize(("text", "place", "words"), [
    ("server:\n  request_timeout: 30s\n", ":2:20 server.request_timeout", ["30s", "shutdown.drain.timeout (15s)", "cuts it"]),
    ("server:\n  request_timeouts:\n    /export/*: 10m\n", ':3:16 server.request_timeouts."/export/*"', ["10m"]),
    ("shutdown: {deadline: 10s}\n", ":1:22 shutdown.deadline",
     ["a drain may take 15s (shutdown.drain.timeout)", "in a stop it has 7s", "shutdown.reserve (3s)"]),
    ("shutdown: {announce: 10s}\n", ":1:22 shutdown.announce", ["has 12s", "less shutdown.announce (10s)"]),
    ("shutdown: {drain: {timeout: 23s}}\n", ":1:29 shutdown.drain.timeout", ["has 22s"]),
    ("shutdown: {drain: {stream_grace: 20s}}\n", ":1:34 shutdown.drain.stream_grace", ["20s", "15s"]),
    ("shutdown: {drain: {keepalive_grace: 20s}}\n", ":1:37 shutdown.drain.keepalive_grace", ["20s", "15s"]),
    ("server: {max_queue: 10, connection_limit: 12}\n", ":1:21 server.max_queue", ["is 10", "12 connections", "and 4"]),
    ("server: {request_timeout: 10s}\nsystemd: {stuck_after: 10s}\n", ":2:24 systemd.stuck_after", ["flaskd is restarted"]),
    ("server: {request_timeout: 10s, workers: 2}\npool: {stuck_after: 5s}\n", ":2:21 pool.stuck_after", ["a worker is"]),
    ("pool: {max_memory: 150MiB}\n", ":1:20 pool.max_memory", ["there are none (server.workers is 0)"]),
    ("server: {workers: 0}\npool: {max_age: 1d, surge: 2}\n", ":2:17 pool.max_age", ["a limit of workers"]),
    ("pool: {preload: true}\n", ":1:17 pool.preload", ["for workers", "server.workers is 0"]),
    ("pool: {stuck_after: 1m}\n", ":1:21 pool.stuck_after", ["for workers"]),
    ("health: {probe: /x, probe_timeout: 2m}\nserver: {workers: 1}\n", ":1:36 health.probe_timeout", ["2m", "1m (pool.start"]),
    ("server: {connection_limit: 3}\n", ":1:28 server.connection_limit", ["1 of 4 threads", "at most 3 connections"]),
    ("shutdown: {exit_wait: 30s}\n", ":1:23 shutdown.exit_wait", ["30s", "25s (shutdown.deadline)"]),
    ("cleanup: {defaults: {timeout: 1m}}\n", ":1:31 cleanup.defaults.timeout", ["a step may take 1m", "25s"]),
    ("server: {max_request_body_size: 16}\n", ":1:33 server.max_request_body_size", ["16 bytes", "413", "16MiB?"]),
    ("server: {workers: 1}\npool: {max_memory: 150}\n", ":2:20 pool.max_memory", ["150 bytes", "again and again"]),
    ("control: {mode: 0666}\n", ":1:17 control.mode", ["every user of this machine may stop flaskd", "no control.roles"]),
    ("control: {mode: 0622, fifo: [status, drain], roles: {admin: root}}\n", ":1:17 control.mode", ["may drain", "control.fifo"]),
    ("control: {roles: {viewer: [root, no-such-user]}}\n", ":1:34 control.roles.viewer[1]", ['no user "no-such-user"']),
    ('control: {roles: {admin: "@no-such-group"}}\n', ":1:26 control.roles.admin", ['no group "no-such-group"', "no role"]),
    ("control: {group: no-such-group}\n", ":1:18 control.group", ['no group "no-such-group"', "only the daemon's own user"]),
])  # fmt: skip
def test_a_contradiction(tmp_path, text, place, words):
    """The warning has the place of the written value, and names both values."""
    (found,) = doubts(text, tmp_path)
    assert found.startswith(f"{place}: ")
    assert all(each in found for each in words)


@pytest.mark.parametrize("text", [
    "server: {request_timeout: 10s, workers: 2}\nsystemd: {stuck_after: 5s}\n",
    "server: {request_timeouts: {/export/*: null}}\n",
    "shutdown: {drain: {timeout: 22s}}\n",
    "shutdown: {deadline: 40s, drain: {timeout: 35s}}\nserver: {request_timeout: 35s}\n",
    "server: {max_queue: 8, connection_limit: 12}\n",
    "server: {workers: auto}\npool: {max_memory: 150MiB, max_requests: 100, preload: true, stuck_after: 1m}\n",
    "server: {connection_limit: 4, max_request_body_size: 1024}\n",
    "control: {mode: 0666, roles: {viewer: '@root'}}\n",
    "control: {mode: 0622, roles: {viewer: [0, '@0']}, fifo: [status], group: '0'}\n",
    "control: {mode: 0664, group: root}\n",
    "shutdown: {deadline: 5s, drain: {timeout: 1s}, reserve: 1s}\n",
])  # fmt: skip
def test_what_is_none(tmp_path, text):
    """A key without effect on the others, and values that just fit, give no warning."""
    assert doubts(text, tmp_path) == []


def test_one_from_the_command_line(tmp_path):
    """A warning about the command line has no line number, and names the command line."""
    (found,) = doubts("", tmp_path, overrides={"server.request_timeout": "30s"})
    assert found.startswith("command line server.request_timeout: a request may take 30s")


def test_a_step_that_may_take_longer_than_the_stop(tmp_path):
    """A policy is named if its own timeout is too long, but not if it is disabled, because then it never runs."""
    path = tmp_path / "flaskd.yaml"
    policy = "{{use: files.remove, timeout: 1m, enabled: {}, with: {{paths: [x]}}}}"
    path.write_text(f"cleanup: {{policies: {{a: {policy.format('true')}, b: {policy.format('false')}}}}}\n")
    (found,) = load(path, actions=action_specs(), environ={}).doubts
    assert (found.key, found.message[:36]) == ("cleanup.policies.a.timeout", "a step may take 1m (cleanup.policies")


def test_an_interpolated_name_is_not_shown(tmp_path):
    """The doubt about an unknown user or group does not show an interpolated name."""
    text = "control: {group: '${env:WHO}', roles: {admin: '@${env:WHO}'}}"
    found = doubts(text, tmp_path, environ={"WHO": "no-such-group"})
    assert [each.partition(", as is interpolated here, ")[2] for each in found] == [
        "so it has no role",
        "so only the daemon's own user and root may control it",
    ]
    assert "no-such-group" not in "".join(found)


def test_a_secret_is_not_shown():
    """No warning shows an interpolated value."""
    data = {"shutdown": {"deadline": "${env:DEADLINE}"}}
    configuration = load_mapping(data, actions={}, environ={"DEADLINE": "5s"})
    assert configuration.values.shutdown.deadline == 5
    assert configuration.doubts == ()
