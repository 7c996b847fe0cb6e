"""What is said of a command line that cannot be understood: what to write instead, in one line, with exit code 64."""

import flask.cli
import pytest
from foreign_options import OPTIONS
from waitress.adjustments import Adjustments

from flaskd import cli
from flaskd.cli import foreign
from flaskd.config import InvalidConfigError, load
from flaskd.config.model import Config


def said(capsys, *words):
    """The exit code of a command line, and what it says on standard error."""
    code = cli.reported(lambda: cli.cli.main(list(words), prog_name="flaskd", standalone_mode=False))
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "instead"),
    {
        "--bind 0.0.0.0:8000": "write --listen HOST:PORT",
        "--bind=:8000": "write --listen HOST:PORT",
        "-b :8000": "write --listen HOST:PORT",
        "--host 0.0.0.0 --port 80": "write --listen HOST:PORT",
        "-p 8000": "write --listen HOST:PORT",
        "--uds /run/x.sock": "write --listen unix:/path",
        "--reload-dir src": "--reload takes new code",
        "--debug": "--reload takes new code",
        "--timeout 30": "write server.request_timeout",
        "-k gthread": "write --threads N",
        "--worker-class sync": "write --threads N",
        "--preload": "write pool.preload: true",
        "--graceful-timeout 30": "write shutdown.drain.timeout",
        "--max-requests 1000": "write pool.max_requests",
        "--access-logfile -": "write log.access",
        "--log-level debug": "write log.level",
        "--pid x.pid": '"flaskd list"',
        "--daemon": '"flaskd units"',
        "-D": '"flaskd units"',
        "--chdir /srv": "write app.chdir",
        "--certfile x.pem": "docs/proxy.md",
        "--forwarded-allow-ips *": "write server.trusted_proxy",
        "--root-path /shop": "write server.url_prefix",
    }.items(),
)
def test_an_option_of_another_server_is_answered_with_flaskds_own(capsys, words, instead):
    """In one line that names the option, with exit code 64."""
    code, err = said(capsys, "serve", "shop:app", *words.split(" "))
    assert code == 64
    [line] = err.splitlines()
    option = words.partition(" ")[0].partition("=")[0]
    assert line.startswith(f'flaskd: flaskd serve has no option "{option}"; ')
    assert instead in line


def test_every_option_of_another_server_has_an_answer():
    """Of gunicorn, uWSGI, uvicorn, granian and hypercorn, of the Waitress that is installed, and of ``flask run``."""
    own = {option for each in cli.serve.params for option in each.opts}
    waitress = {f"--{name.replace('_', '-')}" for name, _ in Adjustments._params}  # noqa: SLF001
    flask_run = {option for each in flask.cli.run_command.params for option in [*each.opts, *each.secondary_opts]}
    wanted = {*waitress, *flask_run, *(option for options in OPTIONS.values() for option in options.split())}
    assert sorted(wanted - own - {"-h"} - foreign.FOR_SERVE.keys()) == []


@pytest.mark.parametrize("app", ["shop:app", "shop.wsgi:create_app()", "app.py", "./wsgi.py"])
def test_an_app_where_a_command_is_expected(capsys, app):
    """It is answered with the command that serves it."""
    assert said(capsys, app) == (
        64,
        f'flaskd: there is no command "{app}"; did you mean "serve {app}"? try "flaskd --help"\n',
    )


def test_every_key_that_is_named_is_there():
    """What is written as a key of the configuration in an answer is one of the model."""
    sections = Config.model_fields
    names = [word.strip(".,:;") for advice in foreign.FOR_SERVE.values() for word in advice.split()]
    keys = [name.split(".") for name in names if name.partition(".")[0] in sections and "." in name]
    assert len(keys) > 20
    for key in keys:
        at = Config
        for part in key:
            assert part in at.model_fields, ".".join(key)
            at = at.model_fields[part].annotation


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["stop", "--force"], '; did you mean "--now"?'),
        (["drain", "--force"], '; see "flaskd drain --help"'),
        (["stop", "--wiat"], '; did you mean "--wait"?'),
        (["requests", "--stack"], '; did you mean "--stacks"?'),
        (["serve", "--thread", "4"], '; did you mean "--threads"?'),
        (["status", "--zzz"], '; see "flaskd status --help"'),
    ],
)
def test_an_option_that_a_verb_has_not_is_answered_with_one_that_means_the_same(capsys, words, end):
    """Or with none: an option that only looks alike is not proposed."""
    code, err = said(capsys, *words)
    verb, option = words[:2]
    assert (code, err) == (64, f'flaskd: flaskd {verb} has no option "{option}"{end}\n')


def test_a_value_of_the_command_line_that_is_at_fault_is_a_wrong_command_line():
    """64, whatever key it is of; where the file has a fault, too, it is 78."""
    with pytest.raises(InvalidConfigError) as caught:
        load(None, actions={}, overrides={"server.threads": "many"})
    assert caught.value.exit_code == 64


def test_a_file_that_is_at_fault_is_a_wrong_configuration(tmp_path):
    """78, also where the command line is at fault as well."""
    file = tmp_path / "flaskd.yaml"
    file.write_text("server: {backlog: x}\n")
    with pytest.raises(InvalidConfigError) as caught:
        load(file, actions={}, overrides={"server.threads": "many"})
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("written", "level"), [("DEBUG", "debug"), ("warn", "warning"), ("Warn", "warning"), ("Error", "error")]
)
def test_log_levels_are_taken_in_any_case(tmp_path, written, level):
    """In the configuration, and ``warn`` is ``warning``."""
    file = tmp_path / "flaskd.yaml"
    file.write_text(f"log: {{level: {written}}}\n")
    assert load(file, actions={}).values.log.level == level


def test_a_log_level_that_is_none_is_shown_as_it_was_written(tmp_path):
    """With those that there are."""
    file = tmp_path / "flaskd.yaml"
    file.write_text("log: {level: LOUD}\n")
    with pytest.raises(InvalidConfigError, match='expected one of debug, info, warning, error, got "LOUD"'):
        load(file, actions={})
