"""``flask daemon`` works as ``flaskd serve`` for the app that Flask's own command line names."""

import signal
import subprocess
import sys
import time

import pytest
from daemon_kit import Flaskd
from http_client import get

ENTER = "import os, socket\ngate = socket.socket(socket.AF_UNIX)\ngate.connect(os.environ['GATE'])\ngate.sendall(b'entered')\n"
OTHER = "from flask import Flask\napp = Flask('other')\napp.add_url_rule('/', view_func=lambda: 'other')\n"


def launch(flaskd: Flaskd, *words: str, program: tuple[str, ...] = ("-m", "flask")) -> None:
    """Run `flask` with these arguments, without waiting."""
    with flaskd.log_file.open("ab") as log:
        flaskd.process = subprocess.Popen(
            [sys.executable, *program, *words],
            cwd=flaskd.directory, env=flaskd.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def start(flaskd: Flaskd, *words: str, **how: tuple[str, ...]) -> None:
    launch(flaskd, *words, "daemon", "-l", "127.0.0.1:0", **how)
    flaskd.wait_message("READY=1")


def test_it_serves_drains_and_stops(flaskd: Flaskd) -> None:
    """A request in hand at SIGTERM is answered; control nodes, log and exit code are those of flaskd."""
    start(flaskd, "--app", "gateapp")
    assert flaskd.status()["app"] == "gateapp"
    flaskd.stop_holding()
    assert "debug" not in flaskd.log
    assert flaskd.record()["completed"] == 1


NAMED = {
    "FLASK_APP": ({}, {"FLASK_APP": "gateapp:app"}, [], b"hello"),
    "--app before FLASK_APP": ({}, {"FLASK_APP": "nosuch"}, ["--app", "gateapp"], b"hello"),
    "--app before the file": ({"flaskd.yaml": "app: {target: nosuch}\n"}, {}, ["--app", "gateapp:app"], b"hello"),
    "the file before the search": ({"flaskd.yaml": "app: {target: gateapp}\n", "wsgi.py": OTHER}, {}, [], b"hello"),
    "app.py": ({"app.py": OTHER}, {}, [], b"other"),
    "a factory": ({"made.py": "from gateapp import app\ndef make(name):\n    assert name == 'shop'\n    return app\n"}, {},
                  ["--app", "made:make('shop')"], b"hello"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_which_app(flaskd: Flaskd, name: str) -> None:
    """--app and FLASK_APP come before the configuration file, and that before wsgi.py and app.py."""
    files, environ, words, body = NAMED[name]
    for path, text in files.items():
        flaskd.write(path, text)
    flaskd.env.update(environ)
    start(flaskd, *words)
    assert get(flaskd.url) == (200, body)
    assert flaskd.stop() == 0


OWN = "import click\nfrom flask.cli import FlaskGroup\ndef create():\n{body}\n@click.group(cls=FlaskGroup, create_app=create)\ndef cli():\n    pass\ncli()\n"


def test_a_command_line_of_the_apps_own(flaskd: Flaskd) -> None:
    """A FlaskGroup with a factory has the command, too; flaskd sets its signal handlers, then calls the factory."""
    flaskd.write("shop.py", OWN.format(body="    from gateapp import app\n    return app"))
    start(flaskd, program=("shop.py",))
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0
    flaskd.write("shop.py", OWN.format(body="    raise OSError('disk on fire')"))
    launch(flaskd, "daemon", "-l", "127.0.0.1:0", program=("shop.py",))
    assert flaskd.wait() == 70
    assert "cannot load create: the app raised OSError: disk on fire" in flaskd.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_import_at_once(flaskd: Flaskd, number: int) -> None:
    """SIGTERM during an import that sleeps ends the process within a second, with 0."""
    flaskd.write("sleeper.py", ENTER + "import time\ntime.sleep(5)\n")
    launch(flaskd, "--app", "sleeper", "daemon", "-l", "127.0.0.1:0")
    flaskd.gate.entered()
    before = time.monotonic()
    flaskd.kill(number)
    assert flaskd.wait() == 0
    assert time.monotonic() - before < 1.0
    assert "stopped while starting" in flaskd.log


FREE = ["-l", "127.0.0.1:0"]
"""A fault that shows once the address is bound, which may be taken: the demo is at the default one."""
FAULTS = {
    "missing module": ({}, ["--app", "nosuch", "daemon", *FREE], 78, 'cannot load nosuch: there is no module "nosuch"'),
    "app that raises": (
        {"bad.py": "raise OSError('disk on fire')\n"},
        ["--app", "bad", "daemon", *FREE],
        70,
        "cannot load bad: ",
    ),
    "no app named": ({}, ["daemon", *FREE], 78, "cannot find an app: none was named"),
    "unknown key": ({"flaskd.yaml": "servr: {}\n"}, ["--app", "gateapp", "daemon"], 78, "flaskd.yaml:1:1 servr: "),
    "unknown option": ({}, ["--app", "gateapp", "daemon", "--frobnicate"], 64, 'has no option "--frobnicate"'),
    "bad name": ({}, ["--app", "gateapp", "daemon", "--name", "a/b"], 64, "expected a plain name"),
    "bad address": ({}, ["--app", "gateapp", "daemon", "-l", "nowhere"], 64, "command line server.listen"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_have_the_same_exit_codes(flaskd: Flaskd, name: str) -> None:
    """Errors have one line and the same exit codes as in ``flaskd serve``."""
    files, words, code, line = FAULTS[name]
    for path, text in files.items():
        flaskd.write(path, text)
    launch(flaskd, *words)
    assert (flaskd.wait(), line in flaskd.log) == (code, True), flaskd.log
    assert flaskd.leftovers() == []


def test_debug_mode_is_no_more_than_a_word(flaskd: Flaskd) -> None:
    """``--debug`` serves without debugger and reloader, with one line that says so."""
    start(flaskd, "--app", "gateapp", "--debug")
    status, body = get(flaskd.url, "/boom")
    assert status == 500
    assert b"debugger" not in body.lower()
    assert 'debug mode has no debugger here, "flask run --debug" has; --reload brings new code' in flaskd.log
    assert flaskd.stop() == 0


def test_both_commands_have_the_same_options() -> None:
    """Every option of ``flaskd serve`` is one of ``flask daemon``, which has no argument for the app."""
    from flaskd.cli import serve
    from flaskd.cli.flask_command import daemon

    assert [each for each in serve.params if each not in daemon.params] == [serve.params[0]]
    assert serve.params[0].name == "app"


def test_flask_reads_little_for_it() -> None:
    """Other ``flask`` commands import neither waitress nor pydantic nor PyYAML because of it."""
    code = (
        "import sys, flaskd.cli.flask_command; print(*({'waitress', 'pydantic', 'yaml', 'flask'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
