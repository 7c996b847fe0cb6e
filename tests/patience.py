"""How long tests wait, and how they wait for what only shows by looking."""

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 20.0
"""Seconds after which a test gives up; no test waits that long if all is well."""
_LOOK = 0.01
"""Seconds between two looks."""

Found = TypeVar("Found")


def until(condition: Callable[[], Found], what: str | Callable[[], str] = "", *, patience: float = PATIENCE) -> Found:
    """Wait until the condition is true, and return its value; `what` explains a failure."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, f"it never became so: {what() if callable(what) else what}"
        time.sleep(_LOOK)
    return found
