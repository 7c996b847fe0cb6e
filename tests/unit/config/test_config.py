"""The configuration: reading, refusing, interpolating, showing."""

import json
import os
import random
import re
import threading
import time
from pathlib import Path

import pytest
import yaml
from config_cases import ACTIONS, REFUSED, WRONG, policies
from pydantic import BaseModel, Field, SecretStr

from flaskd.cleanup import action_specs
from flaskd.config import (
    ActionSpec,
    Config,
    Configuration,
    Duration,
    InvalidConfigError,
    OneOrMany,
    Phase,
    Section,
    Size,
    load,
    load_again,
    load_mapping,
    model,
    schema,
)
from flaskd.errors import ConfigError

REFERENCE = Path(__file__).parents[3] / "config" / "flaskd.yaml"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Write a file named flaskd.yaml into the working directory and load it."""
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes, **more) -> Configuration:
        path = Path("flaskd.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path, actions=ACTIONS, **{"environ": {}, **more})

    return read


@pytest.mark.parametrize(
    ("host", "name"),
    [("web-1.example", "web-1.example"), ("w\u00fcb\n", "w?b?"), ("", "localhost"), ("x" * 200, "x" * 128)],
)
def test_an_instance_is_called_like_its_host(read, monkeypatch, host, name):
    """The default instance is the host's name, if a header may contain it; answers name it only if configured."""
    monkeypatch.setattr(model.socket, "gethostname", lambda: host)
    config = read("server: {served_by: true}").values
    assert (config.instance, config.served_by) == (name, name)
    config = read("server: {instance: eu-1/web}").values
    assert (config.instance, config.served_by) == ("eu-1/web", "")


@pytest.fixture
def faults(read):
    """Load a file that must be refused, and return the lines without the file's name."""

    def faults(text: str | bytes, **more) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read(text, **more)
        assert len(caught.value.faults) == len(str(caught.value).splitlines())
        return [line.removeprefix("flaskd.yaml:") for line in str(caught.value).splitlines()]

    return faults


# --- what the file may be, and what not ---


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("app: {target: x}  #\ta comment", "x"),
        ("#\tone\n\t# two\n \t \napp:\n  \t# three\n  target: x\t# four\n\t", "x"),
        ("app:\t# why\n  target:\tx\t\n", "x"),
        ("app:\n  target: |-\n    a\tb\n    \tc\n", "a\tb\n\tc"),
        ("app:\n  target: >-  #\tfolded\n    a\tb\n    c\n", "a\tb c"),
        ("app:\n  target: a\tb \t c\t\n", "a\tb \t c"),
        ("app: {target:\t'a\tb'\t,\tchdir: y\t}", "a\tb"),
        ("app: {\n\ttarget: x\n}", "x"),
        ('app:\n  target: "a\t\n\t b"\n', "a b"),
        ("---\t# start\napp: {target: x}", "x"),
    ],
)
def test_tabs_where_yaml_has_them(read, text, target):
    """In comments, block scalars, text and between values, tabs are accepted as in YAML 1.2.2 (sections 5.5, 6.1)."""
    assert read(text).values.app.target == target


@pytest.mark.parametrize(("text", "line"), REFUSED)
def test_refused_files(faults, text, line):
    """YAML that a configuration does not need is refused at its place, and quickly."""
    start = time.monotonic()
    assert faults(text) == [line]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "---\n...\n", "\ufeff", "server:\ncleanup: ~\n"])
def test_empty_files_are_all_defaults(read, text):
    """A file without a key, or with an empty section, means the defaults."""
    assert read(text).values == Config()


def test_a_byte_order_mark_moves_nothing(faults):
    """A UTF-8 byte order mark is skipped, and places are those that an editor shows."""
    assert faults("\ufefflog: {level: x}")[0].startswith("1:14 log.level: ")


def test_a_missing_file_is_one_clear_line(tmp_path):
    """A file that cannot be read is named, with the reason and the next step."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "no.yaml", actions=ACTIONS)
    reason = "No such file or directory; check the path given with -c or in $FLASKD_CONFIG"
    assert str(caught.value) == f"cannot read {tmp_path / 'no.yaml'}: {reason}"


@pytest.fixture
def again(tmp_path, monkeypatch):
    """Start with a file that has a value, write another text to it, and read it again."""
    monkeypatch.chdir(tmp_path)

    def again(text: str, first: str = "watch: true\n") -> Configuration:
        path = Path("flaskd.yaml")

        def read() -> Configuration:
            return load(path, actions=ACTIONS, overrides={"server.threads": 3}, environ={})

        path.write_text(first)
        old = read()
        path.write_text(text)
        return load_again(read, old)

    return again


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "---\n", "---\n...\n", "\ufeff", "server:\ncleanup: ~\n", "{}"]
)
def test_a_source_that_lost_its_values_is_no_reload(again, text):
    """A reload refuses a file that was truncated, or has only comments left, unless it was empty at the start."""
    with pytest.raises(ConfigError, match=r"cannot reload flaskd\.yaml: there is no value in it, .* version: 1"):
        again(text)
    assert again(text, first="# to be written\n").values.server.threads == 3
    assert again("version: 1").values.watch is False


def test_a_source_that_vanished_is_no_reload(again, tmp_path):
    """A reload of a deleted file says that it cannot be read."""
    path = tmp_path / "gone.yaml"
    path.write_text("watch: true")
    old = load(path, actions=ACTIONS)
    path.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.yaml: No such file"):
        load_again(lambda: load(path, actions=ACTIONS), old)


def test_a_source_that_can_be_read_once_is_no_reload(tmp_path):
    """A reload from a pipe is refused without waiting, because its content was read at the start."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=["watch: true"])
    writer.start()
    old = load(path, actions=ACTIONS)
    writer.join()
    with pytest.raises(ConfigError, match=r"cannot reload .*pipe: it is a pipe, which can be read only once"):
        load_again(lambda: load(path, actions=ACTIONS), old)
    reader, writing = os.pipe()
    os.write(writing, b"watch: true")
    os.close(writing)
    path = Path(f"/dev/fd/{reader}")  # like /dev/stdin, and like a shell's <(command)
    old = load(path, actions=ACTIONS)
    with pytest.raises(ConfigError, match="it is a pipe"):
        load_again(lambda: load(path, actions=ACTIONS), old)
    os.close(reader)


def test_dev_null_can_be_read_again():
    """A reload of /dev/null gives the defaults again."""
    old = load(Path(os.devnull), actions=ACTIONS)
    assert load_again(lambda: load(Path(os.devnull), actions=ACTIONS), old).values == old.values


# --- what the values may not be ---


@pytest.mark.parametrize(("text", "lines"), WRONG)
def test_faults_name_place_expectation_and_value(faults, text, lines):
    """Each fault is one line: the place, the key, what was expected, what was written."""
    assert faults(text) == lines


def test_a_field_of_an_action_that_stands_beside_with(tmp_path):
    """A key of the actions that come with flaskd is answered with its place; a path is not proposed for any text."""
    path = tmp_path / "flaskd.yaml"
    path.write_text(policies("a: {use: command, argv: [ls]}", "b: {use: command, with: ls}"))
    with pytest.raises(InvalidConfigError) as caught:
        load(path, actions=action_specs())
    assert [each.message for each in caught.value.faults][1:] == [
        'expected a known key, got "argv"; write cleanup.policies.NAME.with.argv',
        'expected a mapping, got "ls"; such as with: {argv: ..., cwd: ...}',
    ]


def test_all_faults_come_at_once_and_sorted(faults):
    """Faults of every kind are reported together, from the top of the file to its end."""
    text = "sever: {}\nserver: {threads: x}\nserver: {}\napp: {target: '${env:NO}', chdir: 1}\nlog: {level: x}\n"
    places = [line.split(" ")[0] for line in faults(text + policies("a: {use: x, after: b}"))]
    assert places == ["1:1", "2:19", "3:1", "4:15", "5:14", "8:14", "8:24"]


def test_a_flood_of_faults_is_cut(read):
    """A file with thousands of faults is answered quickly, with the first ones and their number."""
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read(policies(*(f"p{i}: {{use: command, after: q{i}, z: 1}}" for i in range(5000))))
    assert len(caught.value.faults) == 50
    assert str(caught.value).splitlines()[-1] == "... and 14950 more"
    assert time.monotonic() - start < 20


def test_garbage_is_never_anything_but_a_fault(read):
    """Any bytes give a configuration or a ConfigError."""
    chance = random.Random(7)
    good = REFERENCE.read_bytes()
    for _ in range(300):
        data = bytearray(good[:3000] if chance.random() < 0.5 else good[-1500:])
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data))
            data[at : at + chance.randint(0, 3)] = chance.choice(
                [
                    b"[",
                    b"{",
                    b'"',
                    b"&a ",
                    b"*a",
                    b"!!x ",
                    b"\n",
                    b"\x00",
                    b"\xff",
                    b": ",
                    b"- ",
                    b"${",
                    b"~",
                    b"|",
                    b"1e9",
                ]
            )
        try:
            read(bytes(data))
        except ConfigError:
            continue


# --- what the values become ---


def test_text_fields_take_what_was_written(read):
    """A text field has 3.10 and 0660 as text; other fields have YAML 1.2's values."""
    values = read(
        "app: {target: 1e3, chdir: 2024}\nserver: {ident: no, threads: 0x10, url_prefix: /}\n"
        "control: {mode: 0o640, group: 010}\nlog: {access: off}\n"
        + policies("a: {use: command, with: {argv: [22:22, 3.10, true, ~, 2001-01-01], env: {X: on, Y: 0x1F}}}")
    ).values
    assert (values.app.target, values.app.chdir.name, values.server.ident) == ("1e3", "2024", "no")
    assert (values.server.threads, values.server.url_prefix, values.log.access) == (16, "", "off")
    assert (values.control.mode, values.control.mode_bits, values.control.group) == ("0640", 0o640, "010")
    fields = values.cleanup.policies["a"].with_
    assert fields.argv == ["22:22", "3.10", "true", "~", "2001-01-01"]
    assert fields.env == {"X": "on", "Y": "0x1F"}


def test_no_mode_shuts_the_owner_out_or_prefers_others_to_the_group(read):
    """A mode is accepted if its owner may read and write and others may do no more than the group."""
    text, _ = schema(ACTIONS)["$defs"]["ControlConfig"]["properties"]["mode"]["anyOf"]
    pattern = re.compile(text["pattern"])
    for mode in range(0o1000):
        owner, group, others = mode >> 6, mode >> 3 & 7, mode & 7
        good = owner & 0o6 == 0o6 and others | group == group
        for text in (f"{mode:03o}", f"0{mode:03o}", f"0o{mode:03o}"):
            assert bool(pattern.search(text)) is good, text
            if good:
                assert read(f"control: {{mode: {text}}}").values.control.mode_bits == mode
            else:
                with pytest.raises(InvalidConfigError, match=r"control\.mode: expected a file mode that lets"):
                    read(f"control: {{mode: {text}}}")
    assert pattern.search("${env:MODE}")


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o660, 0o644, 0o666, 0o700, 0o770, 0o777])
def test_a_mode_that_became_decimal_is_refused(read, bits):
    """A mode written in decimal (by PyYAML, or 0o660 in a mapping) is refused and not read as another mode."""
    for written in (yaml.safe_dump({"control": {"mode": bits}}), {"control": {"mode": bits}}):
        with pytest.raises(InvalidConfigError, match=re.escape(f"({bits} is 0{bits:o} in decimal), got {bits}")):
            read(written) if isinstance(written, str) else load_mapping(written, actions=ACTIONS)


def test_units_become_seconds_and_bytes(read):
    """Durations are seconds, sizes are bytes, and a single entry may stand for a list."""
    values = read(
        "server: {listen: unix:/run/x, channel_timeout: 1m, max_request_body_size: 10kB, backlog: 7,\n"
        "  max_request_header_size: 4096, trusted_proxy: '*', trusted_proxy_headers: X-Forwarded-For}"
    ).values.server
    assert (values.listen, values.channel_timeout, values.backlog) == (["unix:/run/x"], 60.0, 7)
    assert (values.max_request_body_size, values.max_request_header_size) == (10_000, 4096)
    assert values.trusted_proxy_headers == ["x-forwarded-for"]


@pytest.mark.parametrize(
    ("text", "deadline", "reserve"),
    [("{}", 25, 3), ("{deadline: 2s}", 2, 0.4), ("{deadline: 3s}", 3, 0.6), ("{deadline: 4s}", 4, 3)],
)
def test_the_default_reserve_fits_the_deadline(read, text, deadline, reserve):
    """With a short deadline alone the default reserve is shorter, too."""
    shutdown = read(f"shutdown: {text}").values.shutdown
    assert (shutdown.deadline, shutdown.reserve) == pytest.approx((deadline, reserve))


def test_policies_are_complete_and_in_order(read):
    """Each policy has its phase, fields and defaults; the file's order is kept."""
    text = "  defaults: {timeout: 9s, retries: 2}\n  policies:"
    found = read(
        policies("z: {use: sqlalchemy.dispose, timeout: 1s}", "a: {use: command, phase: flush, with: {argv: [x]}}",
                 "m: {use: call, with: {target: a:b}, after: z, phase: final, on_failure: abort}")
        .replace("  policies:", text)
    ).values.cleanup.policies  # fmt: skip
    assert list(found) == ["z", "a", "m"]
    assert [policy.phase for policy in found.values()] == [Phase.CLOSE, Phase.FLUSH, Phase.FINAL]
    assert [(p.timeout, p.retries, p.on_failure) for p in found.values()] == [
        (1.0, 2, "continue"), (9.0, 2, "continue"), (9.0, 2, "abort"),
    ]  # fmt: skip
    assert isinstance(found["z"].with_, Section)
    assert found["a"].with_.kill_grace == 2.0
    assert (found["m"].with_.target, found["m"].after) == ("a:b", ["z"])
    assert [phase.position for phase in Phase] == list(range(7))


def test_chdir_is_relative_to_the_file(tmp_path):
    """A relative directory is relative to the configuration file, wherever flaskd is started."""
    (tmp_path / "flaskd.yaml").write_text("app: {chdir: shop}")
    assert load(tmp_path / "flaskd.yaml", actions=ACTIONS).values.app.chdir == tmp_path / "shop"


# --- interpolation and secrets ---


def test_interpolation_fills_in_text_numbers_and_units(read, tmp_path):
    """Environment, files and credentials can be interpolated in any value, whole or in part; $${ is a plain ${."""
    (tmp_path / "token").write_text("s3cret\n")
    (tmp_path / "cred").mkdir()
    (tmp_path / "cred" / "pw").write_bytes(b"hunter2\r\n")
    environ = {"N": "8", "T": "9s", "B": "false", "E": "", "CREDENTIALS_DIRECTORY": str(tmp_path / "cred")}
    values = read(
        'server: {threads: "${env:N}", ident: "a-${env:N}-$${env:N}", connection_limit: "1${env:N}0"}\n'
        'health: {probe_timeout: "${env:T}"}\ncontrol: {required: "${env:B}", group: "${env:E:-web}"}\n'
        + policies('a: {use: login, with: {password: "${cred:pw}", user: "${file:token}", tls: "${env:X:-false}"}}'),
        environ=environ,
    ).values
    assert (values.server.threads, values.server.ident, values.server.connection_limit) == (8, "a-8-${env:N}", 180)
    assert (values.health.probe_timeout, values.control.required, values.control.group) == (9.0, False, "web")
    fields = values.cleanup.policies["a"].with_
    assert (fields.password, fields.user, fields.tls) == ("hunter2", "s3cret", False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${env:NO}", "expected the environment variable NO, which is not set"),
        ("${cred:x}", 'expected the credential "x", but $CREDENTIALS_DIRECTORY is not set'),
        ("${env:BAD}", 'expected text from "${env:BAD}", got text that is not Unicode (a lone surrogate)'),
        ("${env:X", 'expected a closing }, got "${env:X"; a plain ${ is written $${'),
        ("${HOME}", ("expected ${env:NAME}, ${env:NAME:-default}, ${file:PATH} or ${cred:NAME} "
                    '(a plain ${ is written $${), got "${HOME}"')),
    ],
)  # fmt: skip
def test_an_interpolation_that_fails_is_a_fault(faults, value, message):
    """An interpolation that fails is one fault at its place."""
    lines = faults(f"app: {{target: x}}\nserver: {{threads: '{value}'}}", environ={"BAD": "\udc80"})
    assert lines == [f"2:19 server.threads: {message}"]


def test_a_missing_secret_file_is_named(faults, tmp_path):
    """The fault names the file that cannot be read; a credential's name cannot lead out of the directory."""
    lines = faults("app: {target: '${file:no}', chdir: '${cred:../x}'}", environ={"CREDENTIALS_DIRECTORY": "/"})
    assert lines[0] == f'1:15 app.target: expected a readable file, got "{tmp_path}/no": No such file or directory'
    assert '"${cred:../x}"' in lines[1]


SECRET = "tr0ub4dor"


@pytest.mark.parametrize(
    "text",
    [
        "server: {threads: '${env:S}', listen: ['x${env:S}'], url_scheme: '${env:S}'}",
        "health: {probe_timeout: '${env:S}', probe: 'a${env:S}'}\ncontrol: {mode: '${env:S}'}",
        "server: {max_request_body_size: '${env:S}', trusted_proxy_headers: ['${env:S}']}\nlog: '${env:S}'",
        policies("a: {use: '${env:S}', after: '${env:S}', phase: '${env:S}'}", "tr0ub4do: {use: login}"),
        policies("a: {use: login, with: {password: '${env:P}', port: '${env:S}', tls: '${env:S}'}}"),
        policies("a: {use: call, with: {target: '${env:S}'}}"),
    ],
)
def test_faults_never_show_secrets(faults, text):
    """No fault shows an interpolated value, not even in the words of another package."""
    lines = faults(text, environ={"S": SECRET, "P": "tr0"})
    assert lines
    assert not any("tr0" in line.replace("tr0ub4do,", "").replace("known: tr0ub4do", "") for line in lines)
    assert all("********" in line or "another value" in line or "policies.tr0ub4do" in line for line in lines)


def test_describe_never_shows_secrets(read):
    """`describe` masks interpolated values, and values derived from them."""
    configuration = read(
        "server: {ident: 'x-${env:S}', listen: '${env:L}'}\nshutdown: {deadline: '${env:D}'}\n"
        "cleanup:\n  defaults: {timeout: '${env:D}'}\n  policies:\n"
        "    a: {use: command, with: {argv: [curl, '${env:S}'], env: {K: '${env:S}'}}}\n"
        "    b: {use: login, timeout: 1s, with: {password: '${env:S}'}}\n",
        environ={"S": SECRET, "L": "127.0.0.1:4711", "D": "2718ms"},
    )
    for text in (configuration.describe(), repr(configuration)):
        assert SECRET not in text
        assert "4711" not in text
        assert "2.718" not in text
    shown = yaml.safe_load(configuration.describe())
    assert shown["server"]["ident"] == shown["shutdown"]["reserve"] == "********"
    assert shown["cleanup"]["policies"]["a"]["timeout"] == "********"
    assert shown["cleanup"]["policies"]["a"]["with"]["argv"] == ["curl", "********"]
    assert shown["cleanup"]["policies"]["b"]["timeout"] == "1s"


def test_describe_hides_what_is_often_a_secret_in_plain_text():
    """Headers, a webhook's path and query, a command's environment and URL passwords are masked, but not their places."""
    configuration = load_mapping(
        {"cleanup": {"policies": {
            "hook": {"use": "webhook", "with": {"url": "https://hooks.example:8443/s3cret?t=s3cret", "headers": {"Authorization": "s3cret"}}},
            "bare": {"use": "webhook", "with": {"url": "http://hooks.example/"}},
            "run": {"use": "command", "with": {"argv": ["x", "--to=https://me:s3cret@s3cret@host/a", "a:b@c"], "env": {"K": "s3cret"}}},
        }}},
        actions=action_specs(),
    )  # fmt: skip
    for text in (configuration.describe(), configuration.annotated()):
        assert "s3cret" not in text
    hook, bare, run = (
        each["with"] for each in yaml.safe_load(configuration.describe())["cleanup"]["policies"].values()
    )
    assert (hook["url"], hook["headers"]) == ("https://hooks.example:8443/********", {"Authorization": "********"})
    assert bare["url"] == "http://hooks.example/"
    assert run["argv"] == ["x", "--to=https://me:********@host/a", "a:b@c"]
    assert run["env"] == {"K": "********"}
    used = configuration.values.cleanup.policies
    assert used["hook"].with_.headers["Authorization"] == used["run"].with_.env["K"] == "s3cret"


def test_faults_never_show_the_password_of_a_url():
    """A webhook's URL may have no password; the fault says what to do without repeating it."""
    hook = {"use": "webhook", "with": {"url": "https://bob:s3cret@hooks.example/x"}}
    with pytest.raises(ConfigError) as caught:
        load_mapping({"cleanup": {"policies": {"hook": hook}}}, actions=action_specs())
    assert str(caught.value).endswith(
        "expected a URL such as https://hooks.example.com/stopped, without user and password (headers can have "
        "Authorization), got ********"
    )


@pytest.mark.parametrize(
    ("use", "fields"),
    [
        ("webhook", {"url": "htps://hooks.example/s3cret"}),
        ("webhook", {"url": ["https://hooks.example/s3cret"]}),
        ("webhook", {"url": "http://x", "headers": {"Authorization": "s3cret\n"}}),
        ("webhook", {"url": "http://x", "headers": {"Authorization": ["s3cret"]}}),
        ("webhook", {"url": "http://x", "headers": "Authorization: s3cret"}),
        ("command", {"argv": ["x"], "env": {"TOKEN": ["s3cret"]}}),
        ("command", {"argv": ["x"], "env": "TOKEN=s3cret"}),
        ("cache.persist", {"key": "s3cret"}),
        ("cache.persist", {"key": ["s3cret"]}),
        ("cache.persist", {"key": ""}),
        ("consul.deregister", {"service_id": "a", "token": ["s3cret"]}),
    ],
)
def test_faults_show_nothing_that_the_configuration_hides(use, fields):
    """A fault does not show values that are hidden, because faults go into the log, the status and answers."""
    with pytest.raises(ConfigError) as caught:
        load_mapping({"cleanup": {"policies": {"it": {"use": use, "with": fields}}}}, actions=action_specs())
    assert "s3cret" not in str(caught.value)
    assert "another value" not in str(caught.value)
    assert re.search(
        r"with\.\S+: expected .*, got (\[?\*{8}\]?|a list)(; such as \w+: \{NAME: \.\.\.\})?$", str(caught.value)
    )


def test_faults_show_nothing_that_a_field_of_an_action_hides():
    """What an action's author marks as secret is not shown, also inside of a field."""

    class Inner(BaseModel):
        pin: SecretStr
        length: int

    class Fields(BaseModel):
        inner: Inner

    spec = ActionSpec(Fields, Phase.CLOSE)
    fields = {"inner": {"pin": ["s3cret"], "length": "long"}}
    with pytest.raises(ConfigError) as caught:
        load_mapping({"cleanup": {"policies": {"it": {"use": "mine", "with": fields}}}}, actions={"mine": spec})
    assert [each.message for each in caught.value.faults] == [
        "expected text, got [********]",
        'expected an integer, got "long"',
    ]


# --- the command line, mappings, reload ---


def test_the_command_line_wins(read):
    """Overrides win over the file, even if it has no such section; None means not given."""
    overrides = {"server.listen": ["0.0.0.0:80"], "server.threads": "8", "app.target": "${x}:y", "log.level": None}
    values = read("server: {threads: x}\napp:\nlog: {level: error}", overrides=overrides).values
    assert (values.server.listen, values.server.threads) == (["0.0.0.0:80"], 8)
    assert (values.app.target, values.log.level) == ("${x}:y", "error")
    assert load(None, actions={}, overrides={"server.threads": 3}).values.server.threads == 3


def test_faults_of_the_command_line_say_so(faults):
    """A fault in an override names the command line, and comes after those of the file."""
    lines = faults("log: {level: x}\nserver: 5", overrides={"app.target": "", "server.threads": 0, "log.x": 1})
    assert lines[1] == "2:9 server: expected a mapping, got 5; such as server: {threads: 5}"
    assert lines[2] == 'command line app.target: expected text that is not empty, got ""'
    assert lines[3].startswith('command line log.x: expected a known key, got "x"; known keys: ')
    assert faults("", overrides={"server.threads": 0}) == ["command line server.threads: expected at least 1, got 0"]


def test_a_mapping_is_read_like_a_file(tmp_path, monkeypatch):
    """Code may give a mapping, with paths and tuples; its text stays text."""
    monkeypatch.chdir(tmp_path)
    data = {"app": {"chdir": Path("x")}, "server": {"listen": (":80",), "threads": 2}, "control": {"required": True}}
    configuration = load_mapping(data, actions={}, overrides={"server.threads": 3})
    assert (configuration.values.app.chdir, configuration.path) == (tmp_path / "x", None)
    assert (configuration.values.server.threads, configuration.values.control.required) == (3, True)


def test_faults_of_a_mapping_have_no_lines():
    """A mapping's faults name the key; values that YAML cannot hold, or that contain themselves, are faults."""
    data = {"server": {"threads": "8", 1: 2, "ident": {3}}, "health": {"probe_timeout": 5}, "log": {}}
    data["log"]["level"] = data
    with pytest.raises(ConfigError) as caught:
        load_mapping(data, actions={})
    assert "<mapping> server: expected keys of text, got a key of type int" in str(caught.value)
    assert 'server.threads: expected an integer, got "8" as text; write it without quotes' in str(caught.value)
    assert "server.ident: expected what YAML can hold, got a value of type set" in str(caught.value)
    assert "expected at most 32 levels, got more" in str(caught.value)


def test_restart_keys_are_those_a_reload_cannot_change(read):
    """`restart_keys` names only keys that differ and need a restart."""
    old = read("")
    live = "server: {threads: 9}\nlog: {level: error}\nhealth: {probe: /}\nshutdown: {deadline: 9s}\n"
    assert old.restart_keys(read(live + policies("a: {use: login}"))) == []
    new = read(
        "app: {target: x, chdir: y}\nprofile: production\nserver: {listen: ':1', ident: x}\ncontrol: {mode: 600}"
    )
    names = ["app.target", "app.chdir", "profile", "server.listen", "server.ident", "control.mode"]
    assert old.restart_keys(new) == names
    assert new.restart_keys(new) == []


def test_the_endpoint_can_change_with_a_restart_only(read):
    """A change of the endpoint needs a restart, and names each key; the idle stop changes at a reload."""
    old = read("")
    new = read("shutdown: {idle: {after: 1s, ignore: /x}, endpoint: {listen: ':1', token_file: t, allowed_hosts: x}}")
    keys = [f"shutdown.endpoint.{name}" for name in ("listen", "token_file", "allowed_hosts")]
    assert old.restart_keys(new) == keys


def test_the_token_file_is_relative_to_the_configuration(read, tmp_path):
    """The token file is relative to the configuration file; port 0 and a profile without an endpoint are no faults."""
    endpoint = "{listen: '127.0.0.1:0', token_file: t, allowed_hosts: LocalHost:1}"
    values = read(f"server: {{listen: '127.0.0.1:0'}}\nshutdown: {{endpoint: {endpoint}}}").values.shutdown.endpoint
    assert (values.token_file, values.allowed_hosts) == (tmp_path / "t", ["localhost:1"])
    assert read("profile: production\nshutdown: {endpoint: {listen: ~}}").values.shutdown.endpoint.listen is None


# --- describe, schema, reference ---


def leaves(tree, prefix=()):
    """The path of every value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def test_describe_reads_back_the_same(read):
    """`flaskd config` prints a valid file with the same values, odd texts included."""
    odd = ["no", "1e3", "0o17", "$${env:X}", "a: b", "x\ty", "é\u2028", "", "~", "********", "- x", "#", "'\""]
    first = read(
        "app: {chdir: .}\nshutdown: {deadline: 61.25s, reserve: 1ms}\nserver: {max_request_body_size: 1000}\n"
        + policies(f"a: {{use: command, with: {{argv: {json.dumps(odd)}}}}}", "b: {use: login, with: {user: '8'}}")
    )
    second = read(first.describe())
    assert second.values == first.values
    assert second.describe() == first.describe()


def test_the_schema_knows_every_key_and_describes_it():
    """The JSON Schema is plain JSON, describes every key, and writes defaults as people do."""
    found = schema(ACTIONS)
    assert json.loads(json.dumps(found)) == found
    definitions = found["$defs"]
    real = schema(action_specs())
    known = {key for part in (real, *real["$defs"].values()) for key in part.get("properties", {})}
    reference = yaml.safe_load(REFERENCE.read_text())
    for path in leaves(reference):
        assert known.issuperset(set(path) - reference["cleanup"]["policies"].keys() - {"LANG"})
    own = [found, *(part for name, part in definitions.items() if name.endswith("Config") or name == "Policy")]
    assert all("description" in field or "$ref" in field for part in own for field in part["properties"].values())
    assert definitions["ShutdownConfig"]["properties"]["deadline"]["default"] == "25s"
    assert definitions["ServerConfig"]["properties"]["max_request_body_size"]["default"] == "1GiB"
    policy = definitions["Policy"]
    assert [each["const"] for each in policy["properties"]["use"]["anyOf"][:-1]] == sorted(ACTIONS)
    assert {"if", "then"} == set(policy["allOf"][0])
    assert definitions["CallFields"]["additionalProperties"] is False


def test_actions_of_other_packages_declare_their_fields_with_pydantic():
    """Pydantic models with flaskd's units and lists are read, refused, shown and described like flaskd's sections."""

    class Fields(Section):
        wait: Duration = Field(default=2.0, gt=0, description="How long.")
        most: Size = Field(default=1024, description="How much.")
        paths: OneOrMany[str] = Field(min_length=1, description="Which.")

    actions = {"mine": ActionSpec(Fields, Phase.CLOSE)}

    def given(**fields):
        return load_mapping({"cleanup": {"policies": {"a": {"use": "mine", "with": fields}}}}, actions=actions)

    fields = given(wait="1m", paths="x").values.cleanup.policies["a"].with_
    assert (fields.wait, fields.most, fields.paths) == (60.0, 1024, ["x"])
    assert (Fields(paths=["x"], wait=5.0).wait, Fields(paths="x").paths) == (5.0, ["x"])
    shown = yaml.safe_load(given(wait="1m", paths="x").describe())["cleanup"]["policies"]["a"]["with"]
    assert shown == {"wait": "1m", "most": "1KiB", "paths": ["x"]}
    with pytest.raises(InvalidConfigError) as caught:
        given(wait="0s", most="x", paths=[], path="y")
    assert [fault.message for fault in caught.value.faults] == [
        'expected more than 0, got "0s"',
        'expected a size such as 64MiB, got "x"',
        "expected a list of at least 1, got an empty list",
        'expected a known key, got "path"; did you mean "paths"?; known keys: paths, wait, most',
    ]
    described = schema(actions)["$defs"]["Fields"]["properties"]
    assert (described["wait"]["default"], described["most"]["default"]) == ("2s", "1KiB")
    assert described["paths"]["anyOf"][0] == {"type": "string"}


def test_the_schema_confuses_no_two_models_of_one_name():
    """A model of another package may have the name of one of flaskd's sections in the schema."""

    class DrainConfig(BaseModel):
        mine: int

    whole = schema({"mine": ActionSpec(DrainConfig, Phase.CLOSE)})
    (rule,) = whole["$defs"]["Policy"]["allOf"]
    name = rule["then"]["properties"]["with"]["$ref"].removeprefix("#/$defs/")
    assert "mine" in whole["$defs"][name]["properties"]
    assert "timeout" in whole["$defs"]["DrainConfig"]["properties"]


def test_the_values_of_a_section_never_change():
    """Values never change; a copy may have others, compares by value, and knows which were given."""
    drain = Config().shutdown.drain
    for change in (lambda: setattr(drain, "timeout", 1.0), lambda: delattr(drain, "timeout")):
        with pytest.raises(AttributeError, match="the values of a configuration never change"):
            change()
    other = drain.model_copy(update={"timeout": 1.0})
    assert (drain.timeout, other.timeout, other.model_fields_set) == (15.0, 1.0, {"timeout"})
    assert drain == type(drain)() != other
    with pytest.raises(TypeError, match="DrainConfig has no field timeuot"):
        type(drain)(timeuot=1.0)


def test_the_schema_takes_what_is_taken():
    """The schema accepts the mode of discovery alone, as the file does."""
    discovery = schema(ACTIONS)["$defs"]["CleanupConfig"]["properties"]["discovery"]
    words, whole = discovery["anyOf"]
    assert words["anyOf"][0]["enum"] == ["auto", "report", "off"]
    assert whole == {"$ref": "#/$defs/DiscoveryConfig"}


def test_the_reference_shows_every_key_with_its_default():
    """config/flaskd.yaml is valid, has every key and no other, and shows the defaults."""
    configuration = load(REFERENCE, actions=action_specs(), environ={})
    shown, defaults = (set(leaves(yaml.safe_load(text))) for text in (
        REFERENCE.read_text(), load(None, actions=ACTIONS).describe()))  # fmt: skip
    policy = {path[3:] for path in shown if path[:3] == ("cleanup", "policies", "close-db")}
    assert {path for path in shown if path[1:2] != ("policies",)} == defaults - {("cleanup", "policies")}
    assert configuration.values.model_copy(
        update={"cleanup": configuration.values.cleanup.model_copy(update={"policies": {}})}
    ) == Config()  # fmt: skip
    described = yaml.safe_load(configuration.describe())["cleanup"]["policies"]
    assert policy == set(leaves(described["close-db"]))
    alone = {"cleanup": {"policies": {"a": {"use": "sqlalchemy.dispose"}}}}
    plain = load_mapping(alone, actions=action_specs()).describe()
    assert described["close-db"] == {**yaml.safe_load(plain)["cleanup"]["policies"]["a"], "enabled": False}
    assert not any(policy.enabled for policy in configuration.values.cleanup.policies.values())


def test_where_each_value_came_from(tmp_path):
    """Each written value is shown with its place, and those of the command line as such; secrets stay hidden."""
    path = tmp_path / "f.yaml"
    path.write_text("server:\n  listen: ':1'\n  threads: ${env:N}\nlog: {level: debug}\n")
    found = load(path, actions={}, overrides={"app.target": "shop:app"}, environ={"N": "7"})
    assert found.origins == {
        "server.listen": f"{path}:2:11",
        "server.threads": f"{path}:3:12, ${{env:N}}",
        "log.level": f"{path}:4:14",
        "app.target": "command line",
    }
    lines = [line.strip() for line in found.annotated().splitlines()]
    assert lines[0] == "# what has no remark is a default"
    assert "target: shop:app  # command line" in lines
    assert f'- ":1"  # {path}:2:11' in lines or f"- :1  # {path}:2:11" in lines
    assert f"threads: '********'  # {path}:3:12, ${{env:N}}" in lines
    assert "workers: 0" in lines
    assert yaml.safe_load(found.annotated()) == yaml.safe_load(found.describe())


def test_a_state_path_may_be_written_in_full():
    """If $STATE_DIRECTORY is known, an absolute path under it counts as the relative one; without a record it is free."""
    kept = {"a": {"use": "cache.persist", "with": {"path": "/state/cache.bin"}}, "b": {"use": "cache.persist"}}
    data = {"cleanup": {"policies": kept}}
    load_mapping(data, actions=ACTIONS, environ={})
    with pytest.raises(ConfigError, match=r'b\.with\.path: expected a file of its own, got "cache.bin" by default'):
        load_mapping(data, actions=ACTIONS, environ={"STATE_DIRECTORY": "/state:/more"})
    named = {"use": "cache.persist", "with": {"path": "last-stop.json"}}
    load_mapping({"shutdown": {"record": None}, "cleanup": {"policies": {"a": named}}}, actions=ACTIONS, environ={})


@pytest.mark.parametrize(("text", "owner"), [
    ("server: {listen: [':8000', ':8001', ':8000']}", "server.listen[0]"),
    ("server: {listen: ':8000'}\nadmin: {listen: ':8000'}", "server.listen"),
    ("server: {listen: '127.0.0.1:8000'}\nadmin: {agent: ['0.0.0.0:8000']}", "server.listen"),
    ("server: {listen: 'localhost:8000'}\nadmin: {listen: '127.0.0.1:8000'}", "server.listen"),
    ("server: {listen: '[::]:8000'}\nadmin: {listen: '[::1]:8000'}", "server.listen"),
    ("admin: {listen: 'unix:/run/a', agent: 'unix:/run/a'}", "admin.listen"),
    ("server: {listen: 'fd:http'}\nadmin: {listen: 'fd:http'}", "server.listen"),
    ("admin: {listen: 'a.example:1'}\nshutdown: {endpoint: {listen: 'a.example:1', token_file: t}}", "admin.listen"),
])  # fmt: skip
def test_two_listeners_on_one_address(faults, text, owner):
    """The kernel gives it to one of them: the second is a fault, which names the first."""
    (line,) = faults(text)
    assert re.search(rf": expected an address of its own, got \S+, which is that of {re.escape(owner)}$", line)


@pytest.mark.parametrize("text", [
    "server: {listen: [':0', ':0', '127.0.0.1:0']}",
    "server: {listen: ['0.0.0.0:8000', '[::]:8000']}",
    "server: {listen: ['127.0.0.1:8000', '127.0.0.2:8000', '127.0.0.1:8001', 'unix:/run/a', 'unix:/run/b']}",
])  # fmt: skip
def test_addresses_that_do_not_meet(read, text):
    """Port 0 is another one each time, IPv4 and IPv6 are listened on apart, and each loopback address is its own."""
    assert read(text).values.server.listen
