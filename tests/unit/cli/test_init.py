"""``flaskd init`` writes a file that passes ``flaskd check``, for an app or from another server's settings."""

import re

import pytest
from gunicorn_configs import CONFIGS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flaskd.cli import cli, reported
from flaskd.cli.init import init, rendered, translated, valid, written
from flaskd.cli.translation import Translation
from flaskd.config import load


def checked(text, tmp_path):
    """The values of a configuration that is written to a file."""
    file = tmp_path / "written.yaml"
    file.write_text(text)
    return load(file, actions={})


@pytest.fixture(autouse=True)
def directory(monkeypatch, tmp_path):
    """An empty working directory, and an environment without the variables that the files use."""
    for name in ("PORT", "WEB_CONCURRENCY", "DEBUG", "GUNICORN_BIND", "GUNICORN_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_gunicorns(directory, name):
    """Each value is in its place, settings without an equivalent are noted, and the file passes a check."""
    source, values, words = CONFIGS[name]
    (directory / "gunicorn.conf.py").write_text(source)
    done = translated("gunicorn.conf.py")
    assert done.values == values
    for word in words:
        assert any(word in note for note in done.notes), (word, done.notes)
    text = rendered(done)
    written = checked(text, directory).values
    for key, value in values.items():
        at = written
        for part in key.split("."):
            at = getattr(at, part)
        if isinstance(value, int) or value == "auto":
            assert at == value
    for note in done.notes:
        assert f"#   {note}\n" in text


def test_what_flaskd_would_refuse_is_left_out_and_told(directory):
    """Values that flaskd would refuse are left out and noted, so the file passes a check."""
    (directory / "gunicorn.conf.py").write_text("bind = ':80, not an address'\nthreads = 5000\nworkers = 2\n")
    done = translated("gunicorn.conf.py")
    assert checked(valid(done), directory).values.server.workers == 2
    assert done.values == {"server.workers": 2}
    assert done.notes[-2:] == [
        "gunicorn.conf.py:1 bind: it cannot be server.listen: expected HOST:PORT, [IPv6]:PORT, :PORT or unix:/path, "
        'got "not an address:8000"',
        "gunicorn.conf.py:2 threads: it cannot be server.threads: expected at most 1024, got 5000",
    ]


NAMES = [
    "bind",
    "workers",
    "threads",
    "timeout",
    "loglevel",
    "accesslog",
    "chdir",
    "forwarded_allow_ips",
    "preload_app",
]
VALUES = st.recursive(
    st.sampled_from(
        ["x", "''", "1", "-1.5e9", "None", "f'{x}'", "os.getenv('Q', 1)", "os.environ['Q']", "'${env:'", "b''"]
    )
    | st.text().map(repr),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda each: f"[{', '.join(each)}]")
        | st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "%", "or", "and"]), inner).map(" ".join)
        | st.tuples(st.sampled_from(["int", "str", "max", "min", "len", "open", "'{}'.format"]), inner).map(
            lambda each: f"{each[0]}({each[1]})"
        )
    ),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pairs=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=4))
@example(pairs=[("bind", repr("\x7f")), ("accesslog", repr("\ud800")), ("loglevel", repr("\uffff"))])
def test_whatever_is_set_what_is_written_passes_a_check(directory, pairs):
    """Whatever gunicorn setting is set, it is translated or noted, without a traceback, and the file passes a check."""
    (directory / "gunicorn.conf.py").write_text("".join(f"{name} = {value}\n" for name, value in pairs))
    done = translated("gunicorn.conf.py")
    checked(valid(done), directory)


def test_what_a_condition_changes_keeps_its_first_value(directory):
    """Such as a file that is for production, unless it is told otherwise; the place where it is changed is told."""
    (directory / "gunicorn.conf.py").write_text("import os\nworkers = 8\nif os.getenv('DEV'):\n    workers = 1\n")
    done = translated("gunicorn.conf.py")
    assert done.values["server.workers"] == 8
    assert 'gunicorn.conf.py:2 workers: it is set under "if", line 3, too, perhaps to another value' in done.notes


def test_a_number_of_workers_that_is_not_known_is_not_said_to_be_gunicorns(directory):
    """One is written, with a word that it was another; nothing is said of threads whose number is not known either."""
    (directory / "gunicorn.conf.py").write_text(
        "def n(x): return x\nworkers = n(8)\nthreads = n(2)\nerrorlog = n('-') or None\n"
    )
    done = translated("gunicorn.conf.py")
    assert (done.values, done.origins["server.workers"]) == (
        {"server.workers": 1}, "how many gunicorn had is not known: see below",
    )  # fmt: skip
    assert [each.partition(" ")[2].partition(": ")[0] for each in done.notes] == ["workers", "threads", "errorlog"]
    assert done.notes[-1].endswith("it is worked out when the file is run (n('-'))")


def test_a_note_does_not_ask_for_what_was_translated(directory):
    """What is said beside a value that was taken over is not to write that value."""
    (directory / "gunicorn.conf.py").write_text(
        "max_requests = 9\nmax_requests_jitter = 2\nthreads = 2\nworker_connections = 5\nchdir = '/'\npythonpath = '/'\n"
        "forwarded_allow_ips = '*'\nproxy_protocol = True\nworker_class = 'gevent'\n"
    )
    done = translated("gunicorn.conf.py")
    assert done.values.keys() > {"pool.max_requests", "server.threads", "app.chdir", "server.trusted_proxy"}
    assert [each for each in done.notes if "write " in each] == []


def test_text_is_read_back_as_it_was(directory):
    """What YAML takes for a line break, or takes only with an escape, stays a part of the text."""
    odd = "a \x85b\u2028c\x7f\U0001f600 ${d}"
    assert checked(f"version: 1\napp: {{chdir: {written(odd)}}}\n", directory).values.app.chdir == directory / odd


def test_every_note_has_its_line(directory):
    """Every note has the file and the line."""
    (directory / "gunicorn.conf.py").write_text("\npidfile = 'x'\nbind = len(x)\n")
    first, second, *_ = translated("gunicorn.conf.py").notes
    assert first.startswith("gunicorn.conf.py:2 pidfile: ")
    assert second == ("gunicorn.conf.py:3 bind: it depends on x, which is not set here; it would be server.listen")


def test_a_file_is_read_and_never_run(directory):
    """The file is read and never run, even if it would do something at once."""
    (directory / "gunicorn.conf.py").write_text("open('was_run', 'w')\nworkers = open('was_run', 'w') and 2\n")
    translated("gunicorn.conf.py")
    assert not (directory / "was_run").exists()


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("gunicorn -w 4 -b :8000 app:app", {"server.workers": 4, "server.listen": ":8000", "app.target": "app:app"}),
        (
            "exec PYTHONPATH=src /venv/bin/gunicorn --bind=0.0.0.0:80 --bind unix:/run/x.sock --workers=2 "
            "--threads 8 --access-logfile - 'shop:create_app()'",
            {
                "server.workers": 2,
                "server.threads": 8,
                "server.listen": ["0.0.0.0:80", "unix:/run/x.sock"],
                "log.access": "combined",
                "app.target": "shop:create_app()",
            },
        ),
        (
            "waitress-serve --listen=127.0.0.1:8080 --listen=*:80 --threads=8 --url-prefix=/shop "
            "--channel-timeout=60 --trusted-proxy=127.0.0.1 --trusted-proxy-headers='x-forwarded-for x-forwarded-proto' "
            "shop:app",
            {
                "server.listen": ["127.0.0.1:8080", ":80"],
                "server.threads": 8,
                "server.url_prefix": "/shop",
                "server.channel_timeout": "60s",
                "server.trusted_proxy": "127.0.0.1",
                "server.trusted_proxy_headers": ["x-forwarded-for", "x-forwarded-proto"],
                "app.target": "shop:app",
            },
        ),
        (
            "python3 -m waitress --port=80 --call shop:create_app",
            {"server.listen": "0.0.0.0:80", "app.target": "shop:create_app()"},
        ),
        ("flask --app shop run -h 0.0.0.0 -p 80 --debug", {"server.listen": "0.0.0.0:80", "app.target": "shop"}),
    ],
)
def test_a_command_line(directory, line, values):
    """The options of a command line become keys of a configuration that passes a check."""
    done = translated(line)
    assert done.values == values
    checked(rendered(done), directory)


def test_a_long_command_line(directory):
    """A command line may be longer than a file's name can be."""
    done = translated(f"gunicorn {'--env NAME=value ' * 400} -w 3 shop:app")
    assert (done.values["server.workers"], done.values["app.target"]) == (3, "shop:app")


def test_a_note_about_an_option_names_it_as_it_is_typed(directory):
    """A note about an option names it with its dashes, as on gunicorn's command line."""
    notes = translated("gunicorn -k gevent -p x.pid --access-logfile x.log app:app").notes
    assert [note.partition(":")[0] for note in notes] == ["--worker-class", "--pid", "--access-logfile"]


@pytest.mark.parametrize("line", ["gunicorn --reload app:app", "flask --app app run --reload"])
def test_a_reloader_is_answered_with_flaskds_own(directory, line):
    """--reload is answered with the option of flaskd serve, and sets no key."""
    notes = [note for note in translated(line).notes if note.startswith("--reload: ")]
    assert [note.partition(", ")[2].partition(" takes")[0] for note in notes] == ["flaskd serve --reload"]


def test_a_command_line_wins_over_the_file_that_gunicorn_reads(directory):
    """A command line wins over gunicorn.conf.py, or over the file that it names."""
    (directory / "gunicorn.conf.py").write_text("workers = 2\nthreads = 3\n")
    (directory / "other.py").write_text("workers = 5\n")
    assert translated("gunicorn -w 7 app:app").values == {
        "server.workers": 7, "server.threads": 3, "app.target": "app:app",
    }  # fmt: skip
    assert translated("gunicorn -c other.py app:app").values["server.workers"] == 5


@pytest.mark.parametrize(
    ("files", "target"),
    [
        ({"wsgi.py": "app = 1"}, None),
        ({"main.py": "from flask import Flask\napp = Flask(__name__)"}, "main:app"),
        ({"shop/__init__.py": "def create_app():\n    raise SystemExit"}, "shop:create_app()"),
        ({"shop/wsgi.py": "application = 1", "shop/__init__.py": "def create_app(): pass"}, "shop.wsgi:application"),
        ({"broken.py": "def", "main.py": "def"}, None),
        ({}, None),
    ],
)
def test_the_app_that_is_here_is_found_and_not_imported(directory, files, target):
    """If flaskd finds the app by itself, no target is written, and the app is not imported."""
    for name, source in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(source)
    init(None, "flaskd.yaml", force=False)
    assert load(directory / "flaskd.yaml", actions={}).values.app.target == target


def test_what_stands_behind_a_hash_is_the_default(directory):
    """Each commented key, if its # is removed, changes nothing."""
    text = rendered(Translation())
    shown = re.sub(r"^( +)# (\w+: )", r"\1\2", text, flags=re.MULTILINE)
    assert shown.count("\n  ") > 10
    assert checked(shown, directory).values == checked("version: 1\n", directory).values
    assert checked(text, directory).values == checked("version: 1\n", directory).values


def said(capsys, *words):
    """The exit code, the output and the standard error of a command line."""
    code = reported(lambda: cli.main(["init", *words], prog_name="flaskd", standalone_mode=False))
    return code, *capsys.readouterr()


def test_a_file_that_is_there_is_not_overwritten(directory, capsys):
    """An existing file is overwritten only with --force; with - no file is written."""
    (directory / "flaskd.yaml").write_text("mine")
    code, out, err = said(capsys)
    assert (code, out) == (64, "")
    assert err.startswith("flaskd: cannot write flaskd.yaml: it is there already; --force overwrites it")
    code, out, _ = said(capsys, "-")
    assert code == 0
    assert out.startswith("# flaskd.yaml: ")
    assert (directory / "flaskd.yaml").read_text() == "mine"
    assert said(capsys, "--force")[0] == 0
    assert (directory / "flaskd.yaml").read_text() == out


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("nowhere.conf.py", "cannot read nowhere.conf.py: No such file"),
        ("broken.py", "cannot read broken.py: invalid syntax, line 2"),
        ("uvicorn app:app", 'cannot translate "uvicorn": it serves ASGI apps'),
        ("apache", 'cannot translate "apache": expected a gunicorn.conf.py that is there'),
        ("waitress-serve --listen", 'cannot translate: "--listen" has no value'),
        ("gunicorn -w", 'cannot translate: "-w" has no value'),
        ("gunicorn 'x", 'cannot read "gunicorn \'x": No closing quotation'),
    ],
)
def test_what_cannot_be_translated_is_one_line(directory, capsys, source, why):
    """A source that cannot be translated is one line of error, and no file is written."""
    (directory / "broken.py").write_text("\nworkers = = 2\n")
    code, out, err = said(capsys, "--from", source)
    assert (code, out) == (64, "")
    assert err.startswith(f"flaskd: {why}")
    assert err.count("\n") == 1
    assert not (directory / "flaskd.yaml").exists()


def test_a_configuration_in_python_is_answered_with_what_translates_it(directory, capsys):
    """``flaskd serve -c gunicorn.conf.py`` is answered with the command that translates it."""
    code = reported(lambda: cli.main(["check", "-c", "gunicorn.conf.py"], prog_name="flaskd", standalone_mode=False))
    assert code == 64
    assert '"flaskd init --from gunicorn.conf.py" makes a flaskd.yaml of it' in capsys.readouterr().err


def test_options_that_flaskd_would_refuse_are_left_out_and_told(directory):
    """Options of a command line that flaskd would refuse are left out and noted."""
    done = translated("waitress-serve --channel-timeout=long --threads=none --asyncore-use-poll --listen=:80 shop:app")
    assert checked(valid(done), directory).values.app.target == "shop:app"
    assert done.values == {"server.listen": ":80", "app.target": "shop:app"}
    assert [note.partition(":")[0] for note in done.notes] == ["--asyncore-use-poll", "--threads", "--channel-timeout"]
