"""The configuration is read once before flaskd starts, and that reading counts as the first one."""

import pytest

from flaskd.errors import ConfigError
from flaskd.serving.configuration import reader, reads_once


def test_the_first_reading_is_not_repeated(tmp_path):
    """A change of the file comes with the second call: a file that is a pipe gives its content once."""
    file = tmp_path / "flaskd.yaml"
    file.write_text("server: {threads: 3}\n")
    load, first = reads_once(reader(file))
    file.write_text("server: {threads: 5}\n")
    assert load() is first
    assert first.values.server.threads == 3
    assert [load().values.server.threads for _ in range(2)] == [5, 5]


def test_an_error_is_raised_where_it_is_reported(tmp_path):
    """The first call raises it; later ones read the file as it is then."""
    file = tmp_path / "flaskd.yaml"
    file.write_text("server: {threads: many}\n")
    load, first = reads_once(reader(file))
    assert first is None
    file.write_text("server: {threads: 5}\n")
    with pytest.raises(ConfigError, match="server.threads"):
        load()
    assert load().values.server.threads == 5
