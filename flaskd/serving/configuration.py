"""The one way to read a configuration: for ``flaskd check``, a start, a reload, and servers in code."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flaskd.cleanup import action_specs
from flaskd.config import load, load_mapping
from flaskd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flaskd.config import Configuration

    Source = Mapping[str, object] | str | os.PathLike[str] | None
    """The path of a file, or a mapping in the shape of one; None: all defaults."""


def read(source: Source, overrides: Mapping[str, object] | None = None) -> Configuration:
    """Read a configuration with all cleanup actions; `overrides` are dotted keys that win. Raises ConfigError."""
    if source is None or isinstance(source, str | os.PathLike):
        return load(None if source is None else Path(source), actions=action_specs(), overrides=overrides)
    return load_mapping(source, actions=action_specs(), overrides=overrides)


def reader(
    source: Source, overrides: Mapping[str, object] | None = None, *, follows_code: bool = False
) -> Callable[[], Configuration]:
    """Make a function that reads the configuration, at the start and at each reload.

    It works even after the working directory has changed to `app.chdir`. `follows_code` is for
    ``flaskd serve --reload``: then there is at least one worker, and it raises UsageError under profile: production.
    """
    if isinstance(source, str | os.PathLike):
        source = Path(source).absolute()
    return partial(_read_to_follow_code if follows_code else read, source, overrides)


def _read_to_follow_code(source: Source, overrides: Mapping[str, object] | None) -> Configuration:
    configuration = read(source, overrides)
    values = configuration.values
    if values.profile == "production":
        raise UsageError("cannot serve with --reload under profile: production; there, flaskd reload brings new code")
    if values.server.workers:
        return configuration
    server = values.server.model_copy(update={"workers": 1})  # not by reading it again: a pipe gives its content once
    return dataclasses.replace(configuration, values=values.model_copy(update={"server": server}))


def reads_once(load: Callable[[], Configuration]) -> tuple[Callable[[], Configuration], Configuration | None]:
    """Read the configuration now; returns a function that returns it, or raises its error, at the first call.

    At later calls the function reads it anew. The configuration is None if it cannot be read.
    """
    try:
        first = load()
    except Exception as error:  # noqa: BLE001 - raised where it is reported
        return _then(error, load), None
    return _then(first, load), first


def _then(first: Configuration | Exception, load: Callable[[], Configuration]) -> Callable[[], Configuration]:
    waiting = [first]

    def read() -> Configuration:
        if not waiting:
            return load()
        outcome = waiting.pop()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return read
