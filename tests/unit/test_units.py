"""Durations and sizes."""

import pytest

from flaskd.config import write_duration, write_size
from flaskd.units import format_duration, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("0s", 0.0),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        (" 5s ", 5.0),
        ("2m", 120.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1d", 86400.0),
    ],
)
def test_durations_are_read(text, seconds):
    """A duration becomes seconds."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "soon", "-1s", "1 s", "1S", "1.s", ".5s", "5 minutes", "1e3s", "5s!", "9" * 400 + "d"]
)
def test_other_durations_are_refused(text):
    """A malformed duration is refused with an example of one."""
    with pytest.raises(ValueError, match=r"^expected a duration such as 5s"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["5", "1.5", "00"])
def test_a_missing_unit_is_named(text):
    """The error for a number without a unit says that the unit is missing."""
    with pytest.raises(ValueError, match="a unit is missing"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.25, "250ms"), (4.1, "4.1s"), (5, "5s"), (120, "2m"), (5400, "1h30m"), (90061, "1d1h1m1s")],
)
def test_durations_are_written(seconds, text):
    """Seconds are written in the units that people use."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("10kB", 10_000),
        ("1 MB", 1_000_000),
        ("1.5KiB", 1536),
        ("64MiB", 64 * 1024**2),
        ("2GiB", 2 * 1024**3),
        ("1GB", 10**9),
    ],
)
def test_sizes_are_read(text, size):
    """A size becomes bytes."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1mib", "64M", "1e3", "1 2", "64MiB/s"])
def test_other_sizes_are_refused(text):
    """A malformed size is refused with an example of one."""
    with pytest.raises(ValueError, match=r"^expected a size such as 64MiB"):
        parse_size(text)


@pytest.mark.parametrize("seconds", [0.0, 0.0001, 0.25, 0.9996, 1.0, 1.2345, 59.96, 61.25, 90.5, 3600.0, 86400.0])
def test_exact_durations_survive_writing(seconds):
    """A duration that `flaskd config` writes is read back as the same number."""
    assert parse_duration(write_duration(seconds)) == seconds


@pytest.mark.parametrize("size", [0, 1, 1000, 1024, 1536, 65536, 64 * 1024**2, 3 * 1024**3, 10**9 + 1])
def test_exact_sizes_survive_writing(size):
    """A size that `flaskd config` writes is read back as the same number."""
    assert parse_size(write_size(size)) == size
