"""How long tests wait, and how they wait for a condition that must be polled."""

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 20.0
"""Seconds after which a test gives up; if all is well, no test waits that long."""
_LOOK = 0.01
"""Seconds between two looks."""

Found = TypeVar("Found")


def until(condition: Callable[[], Found], what: str | Callable[[], str] = "", *, patience: float = PATIENCE) -> Found:
    """Wait until the condition gives a true value, and return it; `what`, or its result, is shown if it never does."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, f"it never became so: {what() if callable(what) else what}"
        time.sleep(_LOOK)
    return found
