"""What a shell completes: verbs, options and values; and the script with which it asks."""

import contextlib
import shutil
import subprocess

import pytest
from click.shell_completion import ShellComplete

from flaskd.cli import cli, completion, reported


def completed(*words):
    """The completions of the last word."""
    *before, incomplete = words
    return [each.value for each in ShellComplete(cli, {}, "flaskd", "X").get_completions(before, incomplete)]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["st"], ["status", "stop"]),
        (["stop", "--n"], ["--now", "--name"]),
        (["log-level", ""], ["debug", "info", "warning", "error"]),
        (["log-level", "W"], ["warning"]),
        (["help", "re"], ["ready", "reload", "requests", "restart", "resume"]),
        (["scale", ""], ["auto"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_values(words, values):
    """Verbs, options, log levels and shells are completed."""
    assert sorted(completed(*words)) == sorted(values)


def test_names_are_those_of_the_daemons_that_run(monkeypatch, tmp_path):
    """The names of running daemons are completed, and no others."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    here = [(tmp_path / name / "control.sock", {}) for name in ("shop", "shelf", "blog")]
    monkeypatch.setattr("flaskd.finding.running", lambda _environ: iter(here))
    assert completed("status", "--name", "sh") == ["shelf", "shop"]


def test_policies_are_those_of_the_daemon_that_is_meant(monkeypatch, tmp_path):
    """The policies of the meant daemon are completed; none if no daemon answers."""
    asked = []

    class Client:
        def __init__(self, path, timeout):
            asked.append(path)

        def request(self, verb):
            return {"policies": [{"name": "close-db"}, {"name": "warm-cache"}]}

    monkeypatch.setattr("flaskd.client.ControlClient", lambda *a, **m: contextlib.nullcontext(Client(*a, **m)))
    monkeypatch.setattr("flaskd.finding.find_socket", lambda socket, name, _environ: (socket, name))
    assert completed("plan", "--name", "shop", "--simulate-hang", "w") == ["warm-cache"]
    assert asked == [(None, "shop")]


def test_files_are_left_to_the_shell():
    """File names are left to the shell, which completes them itself."""
    (found,) = ShellComplete(cli, {}, "flaskd", "X").get_completions(["serve", "-c"], "fl")
    assert (found.value, found.type) == ("fl", "file")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_is_one_of_its_shell(capsys, shell):
    """The script asks the command with the right variable; an installed shell can read it."""
    assert reported(lambda: cli.main(["completion", shell], prog_name="flaskd", standalone_mode=False)) == 0
    script = capsys.readouterr().out
    assert f"_FLASKD_COMPLETE={shell}_complete" in script
    if found := shutil.which(shell):
        done = subprocess.run([found, "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
