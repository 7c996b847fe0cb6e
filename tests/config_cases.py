"""For test_config.py: actions for tests, and tables of configurations with the lines that answer them."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, field_validator

from flaskd.config import ActionSpec, Duration, Phase, Section


class CommandFields(Section):
    argv: list[str] = Field(min_length=1)
    env: dict[str, str] = Field({})
    cwd: Path | None = None
    kill_grace: Duration = 2.0


class CallFields(BaseModel):
    target: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]


class LoginFields(Section):
    user: str | int = "root"
    password: str = "none yet"
    port: int = 5432
    tls: bool = True

    @field_validator("password")
    @classmethod
    def _long(cls, password):
        if len(password) < 4:
            raise ValueError(f"{password!r} is too short")
        return password


class KeepFields(Section):
    path: str = "cache.bin"


ACTIONS = {
    "command": ActionSpec(CommandFields, Phase.FINAL),
    "call": ActionSpec(CallFields, Phase.QUIESCE),
    "login": ActionSpec(LoginFields, Phase.CLOSE),
    "sqlalchemy.dispose": ActionSpec(Section, Phase.CLOSE),
    "cache.persist": ActionSpec(KeepFields, Phase.PERSIST, keeps="path"),
}


def policies(*lines: str) -> str:
    """Write a file with cleanup policies; the first of the lines given is the third of the file."""
    return "\n".join(["cleanup:", "  policies:", *(f"    {line}" for line in lines)])


REFUSED = [
    ("- 1", "1:1: expected a mapping at the top, such as version: 1, got a list"),
    ("hello", "1:1: expected a mapping at the top, such as version: 1, got a single value"),
    ("app: {}\n---\nlog: {}", "2:1: expected one document, got a second"),
    ("app:\n\ttarget: x", '2:1: expected spaces, got a tab (in quotes: "\\t")'),
    ("app:\n \ttarget: x", '2:2: expected spaces, got a tab (in quotes: "\\t")'),
    ("app:\n  target: x\n\tchdir: y", '3:1: expected spaces, got a tab (in quotes: "\\t")'),
    ("\tapp: {}", '1:1: expected spaces, got a tab (in quotes: "\\t")'),
    ("app: {target: x\0}", "1:16: expected text, got a NUL character"),
    ('app: {target: "\\0"}', "1:15 app.target: expected text, got a NUL character"),
    ('app: {target: "\\udc80"}', "1:15 app.target: expected text, got text that is not Unicode (a lone surrogate)"),
    (b"app: {}\nlog: {level: \xff}", "2:14: expected UTF-8, got the byte 0xff"),
    ("app: {}".encode("utf-16"), " expected UTF-8, got UTF-16"),
    ("log: {level: \x07}", "1:14: expected text, got the control character U+0007"),
    ("log: &a {}", "1:6 log: expected a value, got the anchor &a; write text that begins so in quotes"),
    ("log: *a", "1:6 log: expected a value, got the alias *a; write text that begins so in quotes"),
    ("log: !x {}", '1:6 log: expected a value, got the tag "!x"; write text that begins so in quotes'),
    (
        "server: {threads: !!int 8}",
        '1:19 server.threads: expected a value, got the tag "tag:yaml.org,2002:int"; write text that begins so in quotes',
    ),
    ("? [a]\n: 1", "1:3: expected a key of text, got a list or mapping"),
    ("? " * 50_000, "1:3: expected a key of text, got a list or mapping"),
    ("#" * 300 * 1024, " expected a file of at most 256 KiB, got a larger one"),
    ("log: " + "[" * 50_000, "1:37 log[0][0]: expected at most 32 levels, got more"),
    (
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)),
        "1:4 a: expected a value, got the anchor &a; write text that begins so in quotes",
    ),
]

VERBS = (
    "help, status, health, ready, drain, resume, stop, reload, workers, scale, restart, check, requests, threads, plan, config, last-stop, "
    "log-level, version"
)
SECTIONS = "server, version, systemd, health, profile, control, cleanup, shutdown, watch, app, pool, log, admin"
PEER = "expected an IP address, a network such as 10.0.0.0/8, localhost or *"
PROXY = "expected server.trusted_proxy to be set along with this"
LISTEN = "expected HOST:PORT, [IPv6]:PORT, :PORT or unix:/path"


PATTERN = "expected a path without a query, with * at its end at most"

LISTENS = "server.listen or admin.listen or shutdown.endpoint.listen"

WRONG = [
    ("version: 2", ["1:10 version: expected 1, got 2"]),
    ("sever: {}", [f'1:1 sever: expected a known key, got "sever"; did you mean "server"?; known keys: {SECTIONS}']),
    (
        "log:\n  level: info\n  format: text\n  level: error",
        ['4:3 log.level: expected each key once, got "level" again (first in line 2)'],
    ),
    ("server: 5", ["1:9 server: expected a mapping, got 5; such as server: {threads: 5}"]),
    ("server: :80", ['1:9 server: expected a mapping, got ":80"; such as server: {listen: ":80"}']),
    ("app: shop:app", ['1:6 app: expected a mapping, got "shop:app"; such as app: {target: "shop:app"}']),
    ("log: DEBUG", ['1:6 log: expected a mapping, got "DEBUG"; such as log: {level: "DEBUG"}']),
    ("shutdown: 30s", ['1:11 shutdown: expected a mapping, got "30s"; such as shutdown: {deadline: "30s"}']),
    ("shutdown: {drain: 9s}", ['1:19 shutdown.drain: expected a mapping, got "9s"; such as drain: {timeout: "9s"}']),
    (
        "server: nothing of it",
        ['1:9 server: expected a mapping, got "nothing of it"; such as server: {listen: ..., threads: ...}'],
    ),
    ("threads: 5", ['1:1 threads: expected a known key, got "threads"; write server.threads']),
    (
        "listen: x\nport: 80\nserver: {level: x}",
        [
            f'1:1 listen: expected a known key, got "listen"; write {LISTENS}',
            f'2:1 port: expected a known key, got "port"; write {LISTENS}',
            '3:10 server.level: expected a known key, got "level"; write log.level',
        ],
    ),
    (
        'server: {instance: "web 1"}',
        [('1:20 server.instance: expected a name of 1 to 128 printable ASCII characters without blanks, got "web 1"')],
    ),
    ("server: {threads: 0}", ["1:19 server.threads: expected at least 1, got 0"]),
    ("server: {threads: 1025}", ["1:19 server.threads: expected at most 1024, got 1025"]),
    ("server: {threads: 4.0}", ["1:19 server.threads: expected an integer, got 4.0"]),
    ("server: {threads: ~}", ["1:19 server.threads: expected an integer, got null"]),
    ("server: {threads: }", ["1:18 server.threads: expected an integer, got nothing"]),
    ('server: {threads: "8"}', ['1:19 server.threads: expected an integer, got "8" as text; write it without quotes']),
    (f"server: {{threads: {'9' * 5000}}}", [f'1:19 server.threads: expected an integer, got "{"9" * 60}..."']),
    ("server: {workers: 513}", ["1:19 server.workers: expected 0 to 512, or auto, got 513"]),
    ("server: {workers: -1}", ["1:19 server.workers: expected 0 to 512, or auto, got -1"]),
    ("server: {workers: true}", ["1:19 server.workers: expected 0 to 512, or auto, got true"]),
    ("server: {workers: [auto]}", ['1:19 server.workers: expected 0 to 512, or auto, got ["auto"]']),
    (
        'server: {workers: "2"}',
        ['1:19 server.workers: expected 0 to 512, or auto, got "2" as text; write it without quotes'],
    ),
    (
        "pool: {start_timeout: 0s, surge: 0, canary: 0s, stuck_after: 0s}",
        [
            '1:23 pool.start_timeout: expected more than 0, got "0s"',
            "1:34 pool.surge: expected at least 1, got 0",
            '1:45 pool.canary: expected more than 0, got "0s"',
            '1:62 pool.stuck_after: expected more than 0, got "0s"',
        ],
    ),
    (
        "pool: {max_requests: 0, max_age: 0s, max_memory: 0}",
        [
            "1:22 pool.max_requests: expected at least 1, got 0",
            '1:34 pool.max_age: expected more than 0, got "0s"',
            "1:50 pool.max_memory: expected at least 1, got 0",
        ],
    ),
    ("server: {listen: 8000}", [f"1:18 server.listen: {LISTEN}, got 8000"]),
    (
        'server: {listen: [":80", "[::1", "[1.2.3.4]:80", "1.2.3:80", "a b:1"]}',
        [
            f'1:26 server.listen[1]: {LISTEN}, got "[::1"',
            '1:34 server.listen[2]: expected an IPv6 address and a port, got "[1.2.3.4]:80"',
            '1:50 server.listen[3]: expected an IPv4 address and a port, got "1.2.3:80"',
            f'1:62 server.listen[4]: {LISTEN}, got "a b:1"',
        ],
    ),
    (
        "shutdown: {idle: {after: 0s, ignore: [/x*, '/*/x', '/x?*', x]}}",
        [
            '1:26 shutdown.idle.after: expected more than 0, got "0s"',
            f'1:44 shutdown.idle.ignore[1]: {PATTERN}, got "/*/x"',
            f'1:52 shutdown.idle.ignore[2]: {PATTERN}, got "/x?*"',
            '1:60 shutdown.idle.ignore[3]: expected a path that starts with / and holds no blanks, got "x"',
        ],
    ),
    (
        "shutdown: {endpoint: {listen: 'fd:x', credential: a/b, token_file: t, allowed_hosts: http://x}}",
        [
            f'1:31 shutdown.endpoint.listen: {LISTEN}, got "fd:x"',
            '1:51 shutdown.endpoint.credential: expected the name of a systemd credential, without /, got "a/b"',
            "1:86 shutdown.endpoint.allowed_hosts: expected a Host header, such as 127.0.0.1:9090 or localhost:9090, "
            'got "http://x"',
        ],
    ),
    *(
        (f"shutdown: {{endpoint: {text}}}", [f"1:22 shutdown.endpoint: expected {fault}"])
        for text, fault in (
            ("{listen: ':1'}", "either token_file or credential along with listen"),
            ("{listen: ':1', token_file: t, credential: c}", "either token_file or credential along with listen"),
            ("{token_file: t}", "listen along with the other keys"),
            ("{allowed_hosts: a}", "listen along with the other keys"),
        )
    ),
    (
        "profile: production\nshutdown:\n  endpoint: {listen: ':1', token_file: t}",
        [
            "3:3 shutdown.endpoint: expected none under profile: production, got one; "
            "there, use signals or the control socket"
        ],
    ),
    (
        "server: {listen: [':1', ':2']}\nshutdown: {endpoint: {listen: ':2', token_file: t}}",
        ['2:31 shutdown.endpoint.listen: expected an address of its own, got ":2", which is that of server.listen[1]'],
    ),
    ("server: {listen: ':99999'}", ['1:18 server.listen: expected a port of at most 65535, got ":99999"']),
    (
        "server: {trusted_proxy: [proxy.internal, '[::1]', 10.0.0.1/8, '10.0.0.1, 10.0.0.2', '127.0.0.1:80', '']}",
        [
            f'1:26 server.trusted_proxy[0]: {PEER}, got "proxy.internal"',
            f'1:42 server.trusted_proxy[1]: {PEER}, got "[::1]"',
            "1:51 server.trusted_proxy[2]: expected the address of a whole network, such as 10.0.0.0/8, "
            'or of one machine, got "10.0.0.1/8"',
            f'1:63 server.trusted_proxy[3]: {PEER} (several are a list), got "10.0.0.1, 10.0.0.2"',
            f'1:85 server.trusted_proxy[4]: {PEER}, got "127.0.0.1:80"',
            f'1:101 server.trusted_proxy[5]: {PEER}, got ""',
        ],
    ),
    (
        "server: {trusted_proxy_count: 2, trusted_proxy_headers: [forwarded]}",
        [
            f"1:31 server.trusted_proxy_count: {PROXY}, got 2",
            f'1:57 server.trusted_proxy_headers: {PROXY}, got ["forwarded"]',
        ],
    ),
    (
        "server: {trusted_proxy: '*', trusted_proxy_headers: [forwarded, x-forwarded-for]}",
        [
            (
                "1:53 server.trusted_proxy_headers: expected either forwarded or x-forwarded-* headers, not both, "
                'got ["forwarded", "x-forwarded-for"]'
            )
        ],
    ),
    (
        "server: {max_request_body_size: 64M}",
        ['1:33 server.max_request_body_size: expected a size such as 64MiB, got "64M"'],
    ),
    (
        f"server: {{max_request_body_size: {'9' * 500}GiB}}",
        [f'1:33 server.max_request_body_size: expected a size such as 64MiB, got "{"9" * 60}..."'],
    ),
    (
        "log: {level: warnig}",
        ['1:14 log.level: expected one of debug, info, warning, error, got "warnig"; did you mean "warning"?'],
    ),
    (
        "health: {probe: ping}",
        ['1:17 health.probe: expected a path that starts with / and holds no blanks, got "ping"'],
    ),
    (
        "health: {probe_timeout: 5}",
        ["1:25 health.probe_timeout: expected a duration such as 5s (a unit is missing), got 5"],
    ),
    ("health: {probe_timeout: 0}", ["1:25 health.probe_timeout: expected more than 0, got 0"]),
    ("health: {probe_timeout: 367d}", ['1:25 health.probe_timeout: expected a duration of at most 366d, got "367d"']),
    (
        'control: {roles: {viewer: ["@"], adm: [x]}}',
        [
            """1:28 control.roles.viewer[0]: expected a user's name or number, or a group's after an @, got "@\"""",
            '1:34 control.roles.adm: expected a known key, got "adm"; did you mean "admin"?; '
            "known keys: admin, operator, viewer",
        ],
    ),
    ("control: {roles: [x]}", ['1:18 control.roles: expected a mapping, got ["x"]; such as roles: {viewer: ["x"]}']),
    (
        "server:\n- threads: 4\n- listen: ':80'",
        ["2:1 server: expected a mapping, got a list; write its keys under server without the dashes, each key once"],
    ),
    ("server: [':80']", ['1:9 server: expected a mapping, got [":80"]; such as server: {listen: [":80"]}']),
    (
        "shutdown: {drain: [9]}",
        ["1:19 shutdown.drain: expected a mapping, got [9]; such as drain: {timeout: ..., keepalive_grace: ...}"],
    ),
    (
        "server:\n  threads:4",
        ['2:3 server: expected a mapping, got "threads:4"; write a blank behind the colon: "threads: ..."'],
    ),
    ("log: off", ['1:6 log: expected a mapping, got "off"; such as log: {access: "off"}']),
    (
        "cleanup: {policies: [{use: command}]}",
        ["1:21 cleanup.policies: expected a mapping, got a list; such as policies: {NAME: ...}"],
    ),
    (
        "server: {max-queue: 4}",
        ['1:10 server.max-queue: expected a known key, got "max-queue"; did you mean "max_queue"?'],
    ),
    ("trusted-proxy: x", ['1:1 trusted-proxy: expected a known key, got "trusted-proxy"; write server.trusted_proxy']),
    (
        "timeout: 30s\ngraceful_timeout: 9s",
        [
            '1:1 timeout: expected a known key, got "timeout"; write server.request_timeout or shutdown.drain.timeout '
            "or cleanup.defaults.timeout",
            '2:1 graceful_timeout: expected a known key, got "graceful_timeout"; write shutdown.drain.timeout',
        ],
    ),
    ("control: {fifo: {a: b}}", ["1:17 control.fifo: expected a list, got a mapping"]),
    ("control: {fifo: drian}", [f'1:17 control.fifo: expected one of {VERBS}, got "drian"']),
    ("admin: {listen: nowhere}", [f'1:17 admin.listen: {LISTEN}, got "nowhere"']),
    (
        "control: {mode: 0999, required: yes}",
        [
            '1:17 control.mode: expected a file mode from 0000 to 0777, such as "0660", got 0999',
            '1:33 control.required: expected true or false, got "yes"; write true',
        ],
    ),
    (
        "control: {mode: 432}",
        [
            '1:17 control.mode: expected a file mode that lets its owner read and write, such as "0660" '
            "(432 is 0660 in decimal), got 432"
        ],
    ),
    (
        "control: {mode: 384}",
        ['1:17 control.mode: expected a file mode from 0000 to 0777, such as "0660" (384 is 0600 in decimal), got 384'],
    ),
    (
        "control: {mode: '0460'}",
        ['1:17 control.mode: expected a file mode that lets its owner read and write, such as "0660", got "0460"'],
    ),
    (
        "control: {mode: 0o606}",
        [
            "1:17 control.mode: expected a file mode that lets others do no more than the group, "
            'such as "0660", got 0o606'
        ],
    ),
    (
        "shutdown: {deadline: 10s, reserve: 10s}",
        ['1:36 shutdown.reserve: expected less than shutdown.deadline, got "10s"'],
    ),
    ("shutdown: {exit_codes: {degraded: -1}}", ["1:35 shutdown.exit_codes.degraded: expected at least 0, got -1"]),
    (
        policies("close-db:", "  use: sqlalchemy.dispos", "  timeout: soon"),
        [
            (
                '4:12 cleanup.policies.close-db.use: expected an action, got "sqlalchemy.dispos"; '
                'did you mean "sqlalchemy.dispose"?; known: sqlalchemy.dispose, cache.persist, call, login, command'
            ),
            '5:16 cleanup.policies.close-db.timeout: expected a duration such as 5s, got "soon"',
        ],
    ),
    (
        policies("a: {phase: close}", "b:", "c: [1]"),
        [
            "3:5 cleanup.policies.a.use: expected a value (it has no default), got nothing",
            "4:5 cleanup.policies.b.use: expected a value (it has no default), got nothing",
            "5:8 cleanup.policies.c: expected a mapping, got [1]; such as c: {use: ..., phase: ...}",
        ],
    ),
    (
        policies("a: {use: command, with: {argv: [], arg: 1}}", "b: {use: call}"),
        [
            "3:36 cleanup.policies.a.with.argv: expected a list of at least 1, got an empty list",
            (
                '3:40 cleanup.policies.a.with.arg: expected a known key, got "arg"; did you mean "argv"?; '
                "known keys: argv, kill_grace, env, cwd"
            ),
            "4:5 cleanup.policies.b.with.target: expected a value (it has no default), got nothing",
        ],
    ),
    (
        policies("a: {use: call, with: {target: 3.10, x: 1}}", "b: {use: login, with: {user: [1]}}"),
        [
            r"3:35 cleanup.policies.a.with.target: expected text that matches ^[\w.]+:[\w.]+$, got 3.10",
            '3:41 cleanup.policies.a.with.x: expected a known key, got "x"; known keys: target',
            "4:34 cleanup.policies.b.with.user: expected text or an integer, got [1]",
        ],
    ),
    (
        policies("A: {use: login}", '"x\\ny": {use: login}'),
        [
            f'{at}: expected a name of a-z, 0-9, dots, hyphens and underscores, a letter or digit first, got "{name}"'
            for at, name in (("3:5 cleanup.policies.A", "A"), ('4:5 cleanup.policies."x\\ny"', "x\\ny"))
        ],
    ),
    (
        policies("a: {use: login, after: clos, when: {reason: [signl], outcome: bad}}", "close: {use: login}"),
        [
            (
                '3:28 cleanup.policies.a.after: expected the name of a policy, got "clos"; did you mean "close"?; '
                "known: close"
            ),
            (
                "3:50 cleanup.policies.a.when.reason[0]: expected one of signal, control, endpoint, idle, failure, reload, recycle, "
                'got "signl"; did you mean "signal"?'
            ),
            '3:67 cleanup.policies.a.when.outcome: expected one of clean, degraded, got "bad"',
        ],
    ),
    (
        policies("a: {use: login, after: [a, b]}", "b: {use: login, phase: flush}"),
        [
            "3:29 cleanup.policies.a.after[0]: expected another policy, got the policy itself",
            '3:32 cleanup.policies.a.after[1]: expected a policy of phase close or before, got "b" of phase flush',
        ],
    ),
    (
        policies("c: {use: login, after: a}", "a: {use: login, after: b}", "b: {use: login, after: [c]}"),
        ["3:28 cleanup.policies.c.after: expected an order, got a circle: c after a after b after c"],
    ),
    (
        "shutdown: {record: ./running.json}\n"
        + policies(
            "a: {use: cache.persist}",
            "b: {use: cache.persist, with: {path: sub/../cache.bin}}",
            "c: {use: cache.persist, with: {path: /else/cache.key}}",
            "d: {use: cache.persist, with: {path: cache.key}}",
            "e: {use: cache.persist, enabled: false}",
            "f: {use: cache.persist}",
        ),
        [
            (
                '1:20 shutdown.record: expected a file of its own, got "./running.json", which is the mark of a '
                "running flaskd"
            ),
            (
                '5:42 cleanup.policies.b.with.path: expected a file of its own, got "sub/../cache.bin", which is that '
                "of cleanup.policies.a.with.path"
            ),
            '7:42 cleanup.policies.d.with.path: expected a file of its own, got "cache.key", which is a cache\'s key',
            (
                '9:14 cleanup.policies.f.with.path: expected a file of its own, got "cache.bin" by default, which is '
                "that of cleanup.policies.a.with.path"
            ),
        ],
    ),
    (
        policies("a: {use: cache.persist, with: {path: last-stop.json}}"),
        [
            (
                '3:42 cleanup.policies.a.with.path: expected a file of its own, got "last-stop.json", which is that '
                "of shutdown.record"
            )
        ],
    ),
]
