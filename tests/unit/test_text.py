"""Text from others, as it is shown."""

import pytest

from flaskd.text import (
    bounded,
    did_you_mean,
    entry,
    escaped,
    lines,
    listed,
    nearest_first,
    printable,
    quoted,
    shortened,
    table,
    text_of,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, caf\xe9 \u2713", "plain, caf\xe9 \u2713"),
        ("a\nb\r\tc", r"a\x0Ab\x0D\x09c"),
        ("\x1b[31m\x9b\x7f\0", r"\x1B[31m\x9B\x7F\x00"),
        ("\u202edlrow\u2066\u200b\ufeff\u2028", r"\x202Edlrow\x2066\x200B\xFEFF\x2028"),
        ("\ud800", r"\xD800"),
    ],
)
def test_what_is_not_printable_is_shown_by_its_number(text, shown):
    """Control, bidirectional and invisible characters and lone surrogates are shown by their number, without effect."""
    assert escaped(text) == shown


def test_other_characters_can_be_escaped_too():
    """Further characters can be escaped, such as those that end a field, even in printable text."""
    assert escaped('say "no"', '"\\') == r"say \x22no\x22"
    assert escaped('a"\n', '"') == r"a\x22\x0A"


def test_an_entry_is_indented_after_its_first_line():
    """Only line feeds separate lines, and tabs stay."""
    assert entry("one\ntwo\n\n\tthree\r\u2028x\n") == "one\n  two\n\n  \tthree\\x0D\\x2028x"
    assert lines("a\x0bb\nc") == [r"a\x0Bb", "c"]


def test_what_is_too_long_is_cut():
    """A text that is too long is cut, with a note of how much is missing."""
    assert bounded("x" * 70_000) == "x" * 65536 + "... (4464 more characters)"
    assert bounded("x" * 65536) == "x" * 65536


def test_the_text_of_an_exception_may_raise():
    """The text of an exception may raise, because it is code of the app."""

    class RudeError(Exception):
        def __str__(self):
            raise LookupError

    assert text_of(RudeError()) == "its text cannot be read"
    assert text_of(ValueError("a\nb\u2028")) == r"a\x0Ab\x2028"


def test_another_character_can_stand_for_what_is_not_printable():
    """A character that is not printable can be replaced by another; the text keeps its length."""
    assert printable("a\nb\x1b\u202e\u2713", "?") == "a?b??\u2713"
    assert printable("plain", "?") == "plain"


def test_what_is_quoted_is_one_short_line_without_passwords():
    """Backslashes are doubled, so that escapes and real backslashes differ; passwords are left out."""
    assert quoted("a\n\\") == r'"a\n\\"'
    assert quoted("x" * 61) == f'"{"x" * 60}..."'
    assert quoted("redis://shop:hunter2@db/0") == '"redis://shop:********@db/0"'


def test_the_nearest_name_is_meant():
    """A wrong name gets a suggestion if a known one is similar, else none."""
    names = ["threads", "listen", "backlog"]
    assert did_you_mean("thread", names) == '; did you mean "threads"?'
    assert did_you_mean("zzz", names) == ""
    assert nearest_first("backlgo", names).startswith("backlog, ")
    assert nearest_first("x", [str(number) for number in range(30)]).endswith(", ...")


def test_a_list_ends_with_how_many_more_there_are():
    """A list of names ends with how many more there are."""
    assert listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed(["a", "b", "c"], 1) == "a and 2 more"


def test_what_somebody_else_wrote_is_shortened():
    """A long text from others is shortened, with a note of its length."""
    assert shortened("x" * 1001) == "x" * 1000 + "...(1001 characters)"
    assert shortened("x" * 1000) == "x" * 1000


def test_columns_are_as_wide_as_what_stands_in_them():
    """No line of a table ends with blanks, and a table may be empty."""
    assert table([("NAME", "N"), ("a", ""), ("longer", "1")]) == ["NAME    N", "a", "longer  1"]
    assert table([("a", "b")], indent=2, gap=1, least=4) == ["  a    b"]
    assert table([]) == []
