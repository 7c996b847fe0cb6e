"""The help of the command, its verbs in groups, and examples."""

import shlex

import click
import pytest
from click.testing import CliRunner

from flaskd.cli import cli, reported
from flaskd.cli.pages import GROUPS, examples

EXAMPLES = [line for verb in ("", *cli.commands) for line in examples(verb)]


def out(*words):
    """The output of a command line."""
    done = CliRunner().invoke(cli, [*words], standalone_mode=False, prog_name="flaskd")
    assert done.exception is None, done.exc_info
    return done.output


def test_each_verb_is_in_one_group():
    """Each verb is in exactly one group of the help."""
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(cli.commands)


def test_the_command_alone_prints_its_help():
    """The help has groups; its first example runs the demo and names the extra that it needs."""
    text = out()
    assert text == out("--help") == out("help")
    for title in GROUPS:
        assert f"\n{title}:\n" in text
    first = text.partition("Examples:\n")[2].splitlines()[0]
    assert first.split()[:3] == ["flaskd", "serve", "flaskd.demo:app"]
    assert 'pip install "flaskd[demo]"' in first


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_the_help_of_a_verb_is_as_it_is_typed_in_a_shell(verb):
    """``help VERB`` and ``VERB --help`` are the same, with at least one example of the verb."""
    text = out("help", verb)
    assert text == out(verb, "--help")
    assert text.startswith(f"Usage: flaskd {verb} [OPTIONS]")
    assert f"flaskd {verb}" in text.partition("Examples:\n")[2]


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_can_be_typed(line):
    """Each example has options and arguments that its verb accepts."""
    words = shlex.split(line.partition(" && ")[0].partition(" > ")[0].partition(" | ")[0].removeprefix("sudo "))
    assert words[0] == "flaskd"
    with click.Context(cli, info_name="flaskd") as above:
        cli.commands[words[1]].make_context(words[1], words[2:], parent=above)


@pytest.mark.parametrize(
    ("word", "meant"), [("start", "serve"), ("kill", "stop --now"), ("statsu", "status"), ("Drain", "drain")]
)
@pytest.mark.parametrize("before", [[], ["help"]])
def test_a_verb_that_is_not_there_is_answered_with_one_that_is(capsys, before, word, meant):
    """An unknown verb is answered with a similar one, in one line, with exit code 64."""
    code = reported(lambda: cli.main([*before, word], prog_name="flaskd", standalone_mode=False))
    assert (code, capsys.readouterr().err) == (
        64,
        f'flaskd: there is no command "{word}"; did you mean "{meant}"? try "flaskd --help"\n',
    )
