"""The configuration of worker processes: how many there are, and what a reload changes."""

import pickle

import pytest
from config_cases import ACTIONS

from flaskd.cleanup.actions import action_specs
from flaskd.config import Config, InvalidConfigError, load_mapping, model, schema
from flaskd.errors import ConfigError

EVERY_KEY = {
    "app": {"target": "shop:app", "chdir": "/srv"},
    "server": {
        "listen": ":1", "connection_limit": 9, "trusted_proxy": "*", "trusted_proxy_count": 2,
        "trusted_proxy_headers": "forwarded", "url_scheme": "https", "url_prefix": "/shop", "channel_timeout": "9s",
        "max_request_body_size": 9, "max_request_header_size": 9, "backlog": 9, "ident": "", "threads": 9,
        "instance": "web-1", "served_by": True,
    },
    "pool": {
        "start_timeout": "9s", "surge": 2, "preload": True, "canary": "9s", "stuck_after": "9s",
        "max_requests": 9, "max_age": "9s", "max_memory": "9MiB",
    },
    "profile": "production",
    "control": {"mode": "0600", "group": "root", "required": True},
    "admin": {"listen": ":2", "allowed_hosts": "x", "agent": ":3"},
    "shutdown": {"record": None},
    "systemd": {"fdstore": True, "stuck_after": "9s"},
    "log": {"level": "error"},
}  # fmt: skip


def configured(workers, **sections):
    sections = {**sections, "server": {"workers": workers, **sections.get("server", {})}}
    return load_mapping(sections, actions={}, environ={})


@pytest.mark.parametrize("workers", [0, 1, 512, "auto"])
def test_workers_are_a_number_or_auto(workers):
    """A number or auto is read from a file and from the command line, and shown as it was written."""
    configuration = load_mapping({"server": {"workers": 3}}, actions={}, overrides={"server.workers": str(workers)})
    assert configuration.values.server.workers == workers
    assert f"workers: {workers}\n" in configuration.describe()


def test_auto_is_a_worker_for_each_cpu(monkeypatch):
    """Auto is one worker for each CPU that may be used; a number is used as it is."""
    monkeypatch.setattr(model, "usable", lambda: 7)
    assert [configured(workers).values.count_workers() for workers in (0, 3, "auto")] == [0, 3, 7]
    assert Config().count_workers() == 0


def test_the_schema_takes_numbers_and_auto():
    """The schema accepts numbers and auto, and says which keys need new workers."""
    definitions = schema({})["$defs"]
    found = definitions["ServerConfig"]["properties"]
    number, word = found["workers"]["anyOf"]
    assert (number["anyOf"][0]["maximum"], word["anyOf"][0]["enum"]) == (512, ["auto"])
    marks = {name: (part.get("restart", False), part.get("new_workers", False)) for name, part in found.items()}
    assert (marks["backlog"], marks["ident"], marks["threads"]) == ((True, False), (True, True), (False, False))


def test_without_workers_every_such_key_needs_a_restart():
    """Without workers all keys about serving the app need a restart, and those of the pool have no effect."""
    old, new = configured(0), configured(0, **EVERY_KEY)
    assert old.restart_keys(new) == [
        "app.target", "app.chdir", "profile", "server.listen", "server.connection_limit", "server.trusted_proxy",
        "server.trusted_proxy_count", "server.trusted_proxy_headers", "server.url_scheme", "server.url_prefix",
        "server.max_request_body_size", "server.max_request_header_size", "server.channel_timeout", "server.backlog",
        "server.ident", "control.mode", "control.group", "control.required", "admin.listen", "admin.allowed_hosts",
        "admin.agent", "shutdown.record", "systemd.fdstore",
    ]  # fmt: skip
    assert old.renewal_keys(new) == []


def test_new_workers_can_have_what_serves_the_app():
    """With workers before and after, only the daemon's own keys need a restart; keys for new workers are named apart."""
    old, new = configured("auto"), configured(2, **EVERY_KEY)
    assert old.restart_keys(new) == [
        "app.chdir", "profile", "server.listen", "server.backlog", "control.mode", "control.group", "control.required",
        "admin.listen", "admin.allowed_hosts", "admin.agent", "shutdown.record", "systemd.fdstore",
    ]  # fmt: skip
    assert old.renewal_keys(new) == [
        "app.target", "server.connection_limit", "server.trusted_proxy", "server.trusted_proxy_count",
        "server.trusted_proxy_headers", "server.url_scheme", "server.url_prefix", "server.max_request_body_size",
        "server.max_request_header_size", "server.channel_timeout", "server.ident", "pool.preload",
    ]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [(2, 4), (2, "auto"), ("auto", 1)])
def test_a_reload_changes_how_many_workers_there_are(before, after):
    """A reload can change the number of workers, without replacing any."""
    old, new = configured(before), configured(after)
    assert (old.restart_keys(new), old.renewal_keys(new)) == ([], [])


@pytest.mark.parametrize(("before", "after"), [(0, 2), ("auto", 0)])
def test_between_workers_and_none_there_is_a_restart(before, after):
    """A change between workers and none needs a restart, and no worker is replaced for it."""
    old, new = configured(before), configured(after, app={"target": "x:y"})
    assert old.restart_keys(new) == ["app.target", "server.workers"]
    assert old.renewal_keys(new) == []


def test_a_configuration_goes_to_workers_as_it_is():
    """A configuration is the same after pickling, even with fields of actions, and knows which fields were given."""
    policies = {"logs": {"use": "logging.flush"}, "bye": {"use": "call", "with": {"target": "shop:bye"}}}
    here = load_mapping(
        {"server": {"workers": 2}, "cleanup": {"policies": policies}}, actions=action_specs(), environ={}
    )
    there = pickle.loads(pickle.dumps(here))
    assert there.values == here.values
    for name, policy in here.values.cleanup.policies.items():
        assert there.values.cleanup.policies[name].with_.model_fields_set == policy.with_.model_fields_set


def test_an_app_in_hand_cannot_have_workers():
    """An app given as an object with workers is a fault: it says where workers were asked for, and what to do."""
    configured(0).refuse_given_app()
    with pytest.raises(ConfigError, match="<mapping> server.workers: expected 0 .* got auto: .*app.target") as caught:
        configured("auto").refuse_given_app()
    assert caught.value.exit_code == 78
    hidden = load_mapping({"server": {"workers": "${env:N}"}}, actions={}, environ={"N": "37"})
    with pytest.raises(ConfigError, match="server.workers: expected 0") as caught:
        hidden.refuse_given_app()
    assert "37" not in str(caught.value)


# --- files that each worker keeps ---


def kept(workers, *paths, **environ):
    """Read a configuration with a policy that keeps a file for each path."""
    policies = {f"p{number}": {"use": "cache.persist", "with": {"path": path}} for number, path in enumerate(paths)}
    data = {"server": {"workers": workers}, "cleanup": {"policies": policies}}
    return load_mapping(data, actions=ACTIONS, environ=environ)


@pytest.mark.parametrize("workers", [2, 512, "auto"])
def test_more_than_one_worker_keep_more_than_one_file(workers):
    """With several workers the path must contain the worker's number, because each would overwrite the file."""
    kept(workers, "cache-{worker}.bin", "{worker}/other", "/abs/{worker}")
    with pytest.raises(InvalidConfigError) as caught:
        kept(workers, "a/cache.bin", "cache-{wroker}")
    assert [fault.message for fault in caught.value.faults] == [
        f'expected a path with {{worker}} in it such as "{such}", for each worker keeps a file of its own, got "{got}"'
        for such, got in (("a/cache-{worker}.bin", "a/cache.bin"), ("cache-{wroker}-{worker}", "cache-{wroker}"))
    ]
    plain = {"server": {"workers": workers}, "cleanup": {"policies": {"a": {"use": "cache.persist"}}}}
    with pytest.raises(ConfigError, match='with.path: expected a path with .*, got "cache.bin" by default'):
        load_mapping(plain, actions=ACTIONS, environ={})


@pytest.mark.parametrize("workers", [0, 1])
def test_one_worker_needs_no_number(workers):
    """With one worker the path may contain the number."""
    kept(workers, "cache.bin", "cache-{worker}")


def test_a_path_that_is_a_secret_is_not_shown():
    """A path that is a secret is not shown, and neither is a suggestion made from it."""
    path = "${env:P}"
    with pytest.raises(InvalidConfigError) as caught:
        load_mapping(
            {
                "server": {"workers": 2},
                "cleanup": {"policies": {"a": {"use": "cache.persist", "with": {"path": path}}}},
            },
            actions=ACTIONS,
            environ={"P": "hidden/cache"},
        )
    assert "hidden" not in str(caught.value)
    assert "expected a path with {worker} in it, for" in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("cache-{worker}", "cache-7", True),
        ("cache-7", "cache-{worker}", True),
        ("cache-{worker}", "cache-{worker}", True),
        ("a/../cache-{worker}", "cache-{worker}", True),
        ("cache-{worker}", "cache-x", False),
        ("cache-{worker}", "other-{worker}", False),
        ("cache.{worker}", "cachex7", False),
    ],
)
def test_a_number_may_be_any(one, other, meet):
    """Two policies keep the same file if their paths are equal for the number of any worker."""
    if meet:
        with pytest.raises(ConfigError, match="expected a file of its own, .* which is that of cleanup.policies.p0"):
            kept(0, one, other)
    else:
        kept(0, one, other)
