"""Invalid YAML is reported in plain words, with the line and a caret; the whole output for each kind of fault."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flaskd.config import Config, load
from flaskd.config.excerpt import _SECTION, excerpt
from flaskd.config.yaml_faults import YamlFault
from flaskd.errors import ConfigError


def told(text, directory):
    path = directory / "flaskd.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path, actions={}, environ={})
    return caught.value.whole.replace(f"{path}:", "")


TABLE = [
    (
        "log: level: info",
        '1:11: expected one key in a line, got a second ":"; write the inner key in a line of its own, further in, or text that has ": " in it in quotes',
        "    1 | log: level: info",
        "      |           ^",
    ),
    (
        "server:\n  threads: 4\n    workers: 2",
        "3:5: expected a line that begins at column 3, as line 2 does, got one at column 5",
        "    3 |     workers: 2",
        "      |     ^",
    ),
    ("server\n  threads: 4", '1:7: expected a colon behind the key: "server:"', "    1 | server", "      |       ^"),
    (
        "server:\n  threads 4\n  listen: x\n",
        '2:10: expected a colon behind the key: "threads: ..."',
        "    2 |   threads 4",
        "      |          ^",
    ),
    (
        "server:\n  threads:4\n  listen: x\n",
        '2:11: expected a blank behind the colon: "threads: ..."',
        "    2 |   threads:4",
        "      |           ^",
    ),
    (
        "server:\n  threads=4\n  listen: x\n",
        '2:10: expected a colon behind the key: "threads: ..."',
        "    2 |   threads=4",
        "      |          ^",
    ),
    (
        "server:\n  listen: - a\n",
        "2:11: expected a value behind the colon, got a list entry; write it in the next line, or [a, b]",
        "    2 |   listen: - a",
        "      |           ^",
    ),
    (
        "a: ? b",
        '1:4: expected a value, got "?"; write text that begins with "?" in quotes',
        "    1 | a: ? *",
        "      |    ^",
    ),
    (
        "app:\n  target: @x",
        '2:11: expected a value, got "@"; write text that begins with "@" in quotes',
        "    2 |   target: @x",
        "      |           ^",
    ),
    (
        "app: {target: %x}",
        '1:15: expected a value, got "%"; write text that begins with "%" in quotes',
        "    1 | app: {target: %x}",
        "      |               ^",
    ),
    (
        "%x: 1",
        '1:1: expected a value, got "%"; write text that begins with "%" in quotes',
        "    1 | %x: 1",
        "      | ^",
    ),
    (
        "%YAML 2.0\n---\na: 1",
        '1:1: expected %YAML 1.2 once at most, and each %TAG once, got another line with a "%"',
        "    1 | %YAML 2.0",
        "      | ^",
    ),
    (
        "%YAML 1.1\n%YAML 1.1\n---\na: 1",
        '2:1: expected %YAML 1.2 once at most, and each %TAG once, got another line with a "%"',
        "    2 | %YAML 1.1",
        "      | ^",
    ),
    (
        "server:\n  listen: *:80",
        '2:11: expected a value, got "*"; write text that begins with "*" in quotes',
        "    2 |   listen: *:80",
        "      |           ^",
    ),
    (
        "server: {listen: * }",
        '1:18: expected a value, got "*"; write text that begins with "*" in quotes',
        "    1 | server: {listen: * }",
        "      |                  ^",
    ),
    (
        "server: {listen: *a}",
        "1:18 server.listen: expected a value, got the alias *a; write text that begins so in quotes",
        "    1 | server: {listen: *a}",
        "      |                  ^",
    ),
    (
        "app:\n  target: >foo",
        '2:12: expected the end of the line behind ">", got more; write text that begins with ">" in quotes',
        "    2 |   target: >foo",
        "      |            ^",
    ),
    (
        "app:\n  target: |0\n",
        '2:12: expected a number from 1 to 9 behind "|", got 0',
        "    2 |   target: |0",
        "      |            ^",
    ),
    (
        'app: {target: "x',
        '1:15: expected a closing quote ("), got the end of the file',
        '    1 | app: {target: "x',
        "      |               ^",
    ),
    (
        "app: {target: 'x}\nlog: {level: info}\n",
        "1:15: expected a closing quote ('), got the end of the file",
        "    1 | app: {target: 'x}",
        "      |               ^",
    ),
    (
        'app: {target: "x}\nlog: {level: "info"}\n',
        "1:15: expected a closing quote in this line, got none before line 2",
        '    1 | app: {target: "x}',
        "      |               ^",
    ),
    (
        'app:\n  target: "shop\nlog:\n  access: "off"\n',
        "2:11: expected a closing quote in this line, got none before line 4",
        '    2 |   target: "shop',
        "      |           ^",
    ),
    (
        'app: {target: "\\d"}',
        '1:17: expected a known escape, got "\\d"; write the text in single quotes, or \\\\ for each \\',
        '    1 | app: {target: "\\d"}',
        "      |                 ^",
    ),
    (
        'app: {target: "\\xZZ"}',
        '1:18: expected 2 hexadecimal digits, as in "\\x41", got something else',
        '    1 | app: {target: "\\xZZ"}',
        "      |                  ^",
    ),
    (
        'app: {target: "\\UFFFFFFFF"}',
        "1:18: expected an escape of a character that there is, got a number above 10FFFF",
        '    1 | app: {target: "\\UFFFFFFFF"}',
        "      |                  ^",
    ),
    (
        'app: {target: "\\U00110000"}',
        "1:18: expected an escape of a character that there is, got a number above 10FFFF",
        '    1 | app: {target: "\\U00110000"}',
        "      |                  ^",
    ),
    (
        "server:\n  threads: 4\n listen: x\n",
        "3:2: expected a line that begins at column 1 or 3, got one at column 2",
        "    3 |  listen: x",
        "      |  ^",
    ),
    (
        "server:\n    threads: 4\n  listen: x\n",
        "3:3: expected a line that begins at column 1 or 5, got one at column 3",
        "    3 |   listen: x",
        "      |   ^",
    ),
    (
        "server:\n  listen: a\n  - b\n",
        '3:3: expected a key, got a list entry ("-"); the entries of a list stand under its key',
        "    3 |   - b",
        "      |   ^",
    ),
    (
        "server:\n  listen:\n    - a\n    b: c\n",
        "4:5: expected a line that begins at column 1 or 3, got one at column 5",
        "    4 |     b: c",
        "      |     ^",
    ),
    (
        "server:\n  listen:\n    - a\n   - b\n",
        "4:4: expected a line that begins at column 5, got one at column 4",
        "    4 |    - b",
        "      |    ^",
    ),
    (
        'server:\n  ident: "x" y\n',
        "2:14: expected the end of the line behind the value, got more text; write all of it in quotes",
        '    2 |   ident: "x" y',
        "      |              ^",
    ),
    (
        "server: {}}\n",
        '1:11: expected the end of the line, got "}", which closes nothing',
        "    1 | server: {}}",
        "      |           ^",
    ),
    (
        "server: [x], b\n",
        '1:12: expected the end of the line, got ","; write a list in brackets: [a, b]',
        "    1 | server: [x], b",
        "      |            ^",
    ),
    ("}\n", '1:1: expected a value, got "}"', "    1 | }", "      | ^"),
    (": x\n", '1:1: expected a key before the ":", got none', "    1 | : *", "      | ^"),
    (
        "log: {level: info\nserver: {threads: 4}\n",
        '1:6: expected a closing "}" for this "{", got none before line 2',
        "    1 | log: {level: info",
        "      |      ^",
    ),
    (
        "log: {level: info",
        '1:6: expected a closing "}" for this "{", got the end of the file',
        "    1 | log: {level: info",
        "      |      ^",
    ),
    (
        "log: [a, b\n",
        '1:6: expected a closing "]" for this "[", got the end of the file',
        "    1 | log: [a, b",
        "      |      ^",
    ),
    (
        "log: {level: info format: text}",
        '1:25: expected a comma, or "}" for the "{" in line 1, column 6, got ":"; write text that has ": " in it in quotes',
        "    1 | log: {level: info format: text}",
        "      |                         ^",
    ),
    (
        "server: {\n  threads: 4\n  workers: 2\n}\n",
        '3:10: expected a comma, or "}" for the "{" in line 1, column 9, got ":"; write text that has ": " in it in quotes',
        "    3 |   workers: 2",
        "      |          ^",
    ),
    (
        "server: [a}",
        '1:11: expected "]" for the "[" in line 1, column 9, got "}"',
        "    1 | server: [a}",
        "      |           ^",
    ),
    ("server: {a: [}", '1:14: expected a value, got "}"', "    1 | server: {a: [}", "      |              ^"),
    (
        "server: {listen: [a, , b]}",
        '1:22: expected a value, got ","',
        "    1 | server: {listen: [a, , b]}",
        "      |                      ^",
    ),
    (
        "log: {level: ",
        '1:6: expected a closing "}" for this "{", got the end of the file',
        "    1 | log: {level:",
        "      |      ^",
    ),
    ("log: [", '1:6: expected a closing "]" for this "[", got the end of the file', "    1 | log: [", "      |      ^"),
    (
        "{a: b} c",
        "1:8: expected the end of the line behind the value, got more text; write all of it in quotes",
        "    1 | {a: *} *",
        "      |        ^",
    ),
    (
        "  app: {}\nlog: {}",
        "2:1: expected a line that begins at column 3, got one at column 1",
        "    2 | log: {}",
        "      | ^",
    ),
    (
        "app: {}\n  log: {}\n",
        "2:3: expected a line that begins at column 1, got one at column 3",
        "    2 |   log: {}",
        "      |   ^",
    ),
    ("app: {target: x}\n---\nlog: {}", "2:1: expected one document, got a second", "    2 | ---", "      | ^"),
    ("app: {}\n...\nlog", '3:1: expected the end of the file behind "...", got more', "    3 | log", "      | ^"),
    (
        "!!x y: 1",
        '1:1: expected a value, got the tag "tag:yaml.org,2002:x"; write text that begins so in quotes',
        "    1 | !!* *: *",
        "      | ^",
    ),
    (
        "app: !<x y\n",
        '1:6: expected a value, got "!"; write text that begins with "!" in quotes',
        "    1 | app: !<x y",
        "      |      ^",
    ),
    (
        "app: !e!x 1",
        '1:6: expected a value, got "!"; write text that begins with "!" in quotes',
        "    1 | app: !e!x 1",
        "      |      ^",
    ),
    (
        "app: !% 1",
        '1:6: expected a value, got "!"; write text that begins with "!" in quotes',
        "    1 | app: !% 1",
        "      |      ^",
    ),
    (
        "app: `x`",
        '1:6: expected a value, got "`"; write text that begins with "`" in quotes',
        "    1 | app: `x`",
        "      |      ^",
    ),
    (
        "log: {level: \x07}",
        "1:14: expected text, got the control character U+0007",
        "    1 | log: {level: \\x07}",
        "      |              ^",
    ),
    (
        "app: {target: x\x00}",
        "1:16: expected text, got a NUL character",
        "    1 | app: {target: x\\x00}",
        "      |                ^",
    ),
    (
        b"app: {}\nlog: {level: \xff}",
        "2:14: expected UTF-8, got the byte 0xff",
        "    2 | log: {level: \\xff}",
        "      |              ^",
    ),
    (
        "server:\n\tthreads: 4",
        '2:1: expected spaces, got a tab (in quotes: "\\t")',
        "    2 |     threads: 4",
        "      | ^",
    ),
    (
        "cleanup:\n  policies:\n    a: {use: command, with: {env: {PASSWORD: hunter2: x}}}\n",
        '3:53: expected a comma, or "}" for the "{" in line 3, column 35, got ":"; write text that has ": " in it in quotes',
        "    3 |     a: {***: *******, ****: {***: {********: *******: *}}}",
        "      |                                                     ^",
    ),
    (
        'cleanup:\n  policies:\n    a:\n      use: command\n      with:\n        env:\n          PASSWORD: "hunter2" x\n',
        "7:31: expected the end of the line behind the value, got more text; write all of it in quotes",
        '    7 |           PASSWORD: "*******" *',
        "      |                               ^",
    ),
    (
        'app: {target: "\u65e5\u672c\u8a9e \xe9 e\u0301 \x1b[0m',
        "1:25: expected text, got the control character U+001B",
        '    1 | app: {target: "\u65e5\u672c\u8a9e \xe9 e\u0301 \\x1B[0m',
        "      |                           ^",
    ),
    (
        "app: {target: \u65e5\u672c\u8a9ee\u0301: a: b, c}",
        '1:20: expected a comma, or "}" for the "{" in line 1, column 6, got ":"; write text that has ": " in it in quotes',
        "    1 | app: {target: \u65e5\u672c\u8a9ee\u0301: a: b, c}",
        "      |                      ^",
    ),
    (
        "log:\n  level: info\n  level: info\n",
        '3:3 log.level: expected each key once, got "level" again (first in line 2)',
        "    3 |   level: info",
        "      |   ^",
    ),
    ("- a\n- b", "1:1: expected a mapping at the top, such as version: 1, got a list", "    1 | - *", "      | ^"),
    (
        "hello",
        "1:1: expected a mapping at the top, such as version: 1, got a single value",
        "    1 | hello",
        "      | ^",
    ),
    (
        "a: 'it's'\n",
        "1:8: expected the end of the line behind the value, got more text; write all of it in quotes",
        "    1 | a: '**'*'",
        "      |        ^",
    ),
    (
        "log:\n  level: info\nserver\n",
        '3:7: expected a colon behind the key: "server:"',
        "    3 | server",
        "      |       ^",
    ),
    (
        "log:\n  level: info\n\nserver:\n  listen: [':80',\n    ':81'\n  threads: 4\n",
        '5:11: expected a closing "]" for this "[", got none before line 7',
        "    5 |   listen: [':80',",
        "      |           ^",
    ),
    ("a:\n- b\n c: d\n", '2:4: expected a colon behind the key: "KEY: VALUE"', "    2 | - *", "      |    ^"),
    ("a: |\nx\n", '2:2: expected a colon behind the key: "x:"', "    2 | x", "      |  ^"),
    (
        "log: 'a' 'b'",
        "1:10: expected the end of the line behind the value, got more text; write all of it in quotes",
        "    1 | log: 'a' 'b'",
        "      |          ^",
    ),
    (
        "app:\n  target: shop:app # x: y\n  chdir: a: b",
        '3:11: expected one key in a line, got a second ":"; write the inner key in a line of its own, further in, or text that has ": " in it in quotes',
        "    3 |   chdir: a: b",
        "      |           ^",
    ),
    (
        "a: &x\n",
        "1:4 a: expected a value, got the anchor &x; write text that begins so in quotes",
        "    1 | a: &*",
        "      |    ^",
    ),
    (
        "a: & b",
        '1:4: expected a value, got "&"; write text that begins with "&" in quotes',
        "    1 | a: & *",
        "      |    ^",
    ),
    ("? [a]\n: 1", "1:3: expected a key of text, got a list or mapping", "    1 | ? [*]", "      |   ^"),
    (
        "server:\n  listen:\n  - :80\n  threads: 4\n   workers: 3\n",
        "5:4: expected a line that begins at column 3, as line 4 does, got one at column 4",
        "    5 |    workers: 3",
        "      |    ^",
    ),
    (
        "\ufefflog: level: x",
        '1:11: expected one key in a line, got a second ":"; write the inner key in a line of its own, further in, or text that has ": " in it in quotes',
        "    1 | log: level: x",
        "      |           ^",
    ),
    (
        "log:\r\n  level: a: b\r\n",
        '2:11: expected one key in a line, got a second ":"; write the inner key in a line of its own, further in, or text that has ": " in it in quotes',
        "    2 |   level: a: b",
        "      |           ^",
    ),
]


@pytest.mark.parametrize(("text", "said", "line", "caret"), TABLE)
def test_each_kind_of_fault(text, said, line, caret, tmp_path):
    """Each fault has its place, what is wrong and what to write; then the line with a caret under the place."""
    assert told(text, tmp_path).split("\n") == [said, line, caret]


def raised_by(module):
    """The messages of a PyYAML module: what it was doing, and what it found."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Raise) and getattr(getattr(node.exc, "func", None), "id", "") in {
            "ScannerError",
            "ParserError",
        }:
            words = [
                "".join(str(each.value) for each in ast.walk(argument) if isinstance(each, ast.Constant) and each.value)
                for argument in node.exc.args
            ]
            yield words[0].replace("an %s", "an alias").replace("a %s", "a tag"), words[2].replace("%d", "2")


def test_every_fault_of_pyyaml_has_words():
    """The table of words has every fault that the installed PyYAML's scanner and parser raise."""
    found = [*raised_by(yaml.scanner), *raised_by(yaml.parser)]
    assert len(found) > 30
    for context, problem in found:
        known = [
            say for part, pattern, say in YamlFault.WORDS if (part or "") in context and re.search(pattern, problem)
        ]
        assert known, (context, problem)


def test_what_has_no_words_is_still_shown(tmp_path, monkeypatch):
    """A fault that only a later PyYAML has keeps PyYAML's own words, with its line and a caret."""
    monkeypatch.setattr(YamlFault, "WORDS", ())
    assert told("log: level: info", tmp_path) == (
        "1:11: expected YAML, got something else: mapping values are not allowed here\n"
        "    1 | log: level: info\n"
        "      |           ^"
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([
    "server:", "threads: 4", "listen", ":", " ", "  ", "\n", "- ", "[", "]", "{", "}", ",", '"', "'", "|", ">", "*a", "&a", "!x", "%",
    "@", "`", "?", "#", "\\", "\t", "---", "...", "\u65e5", "\u2028", "\x85", "\r", "\\U00110000",
]), max_size=14))  # fmt: skip
def test_the_caret_is_in_the_line(tmp_path_factory, parts):
    """Any text gives a configuration, or faults with places that the file has."""
    path = tmp_path_factory.getbasetemp() / "flaskd.yaml"
    path.write_text(text := "".join(parts), newline="")
    try:
        load(path, actions={}, environ={})
    except ConfigError as error:
        for each in error.faults:
            assert 1 <= each.line <= len(re.split(r"\r\n|[\n\r\x85\u2028]", text)), each
            assert each.message.startswith("expected "), each


# --- the line ---


@pytest.mark.parametrize(
    ("text", "column", "shown"),
    [
        ("log: \u65e5\u672c x", 9, ["log: \u65e5\u672c x", "          ^"]),
        ("log: e\u0301\u0301 x", 10, ["log: e\u0301\u0301 x", "       ^"]),
        ("log:\tx\ty", 8, ["log:    x    y", "             ^"]),
        ("log: \u202e x", 8, ["log: \\x202E x", " " * 12 + "^"]),
        ("log: " + "x" * 100, 6, ["log: " + "x" * 67 + "...", "     ^"]),
        ("log: " + "x" * 500, 300, ["..." + "x" * 72 + "...", "   " + " " * 36 + "^"]),
        ("log: " + "x" * 500, 506, ["..." + "x" * 72, "   " + " " * 72 + "^"]),
    ],
)
def test_the_caret_stands_under_its_column(text, column, shown):
    """Wide characters take two columns, combining ones none; tabs are blanks; of a long line a part is shown."""
    assert excerpt(text, 1, column).split("\n") == [f"    1 | {shown[0]}", f"      | {shown[1]}"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cleanup:\n  policies:\n    a:\n      with: {env: {PASSWORD: hunter2: x}}", "      with: {***: {********: *******: *}}"),
        ("cleanup:\n  policies:\n    a: {use: command, with: {token: hunter2: x}}", "    a: {***: *******, ****: {*****: *******: *}}"),
        ("cleanup:\n  policies:\n    a:\n      use: command: x", "      use: command: x"),
        ("cleanup:\n  policies:\n    a:\n      with:\n        urls:\n        - 'https://hooks.example.com/x' y",
         "        - '*****://*****.*******.***/*' *"),
        ("token: hunter2: x", "token: *******: *"),
        ("{app: hunter2", "{app: *******"),
        ("cleanup:\n  policies:\n    a:\n      hunter2\n      use: command", "      *******"),
        ("cleanup:\n  policies:\n    a:\n      hunter2:x\n      use: command", "      *******:*"),
        ("cleanup: {}\nserver:\n  # of the proxy\n  listen: a: b", "  listen: a: b"),
    ],
)  # fmt: skip
def test_what_may_be_a_secret_is_not_shown(text, shown, tmp_path):
    """Values under `cleanup`, and outside of sections, become asterisks, because the line goes to log and clients."""
    assert f" | {shown}\n" in told(text, tmp_path)
    assert "hunter2" not in told(text, tmp_path)


def test_sections_without_secrets_are_those_of_the_model():
    """The line of every section but `cleanup` is shown unchanged, because these have no hidden values."""
    named = set(_SECTION.pattern.split(")")[0].strip("(").split("|"))
    assert named == Config.model_fields.keys() - {"cleanup"}
    assert not any(each.kind.hides for name, section in Config.model_fields.items() if name in named
                   for each in getattr(section.annotation, "model_fields", {}).values())  # fmt: skip


# --- where it is told ---


@pytest.mark.parametrize("verb", [("check",), ("plan", "--simulate-hang", "x", "-c"), ("serve", "-c")])
def test_a_verb_shows_the_line(verb, tmp_path):
    """A verb writes the line to standard error; its exit code is that of a faulty configuration."""
    (tmp_path / "flaskd.yaml").write_text("server:\n  listen: [':8000'\n  threads: 4\n")
    done = subprocess.run(
        [sys.executable, "-m", "flaskd", *verb, "flaskd.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    said, line, caret = done.stderr.splitlines()
    assert said.endswith('flaskd.yaml:2:11: expected a closing "]" for this "[", got none before line 3')
    assert line.endswith("    2 |   listen: [':8000'")
    assert caret.index("^") == line.index("[")


def test_for_programs_it_is_line_and_column(tmp_path):
    """`check --json` has line and column as numbers, and the message without the line."""
    (tmp_path / "flaskd.yaml").write_text("log: level: info\n")
    done = subprocess.run(
        [sys.executable, "-m", "flaskd", "check", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    (fault,) = json.loads(done.stdout)["faults"]
    assert (fault["path"], fault["line"], fault["column"], fault["key"]) == ("flaskd.yaml", 1, 11, "")
    assert fault["message"].startswith("expected one key in a line")
