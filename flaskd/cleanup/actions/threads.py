"""``threads.stop``: asks the app's own threads to end, and waits for them."""

from __future__ import annotations

import threading
from typing import Any

from flaskd.cleanup.context import StepContext, StepFailedError, StepTimedOutError
from flaskd.cleanup.ending import end_all, joined, no_grace
from flaskd.cleanup.model import Action
from flaskd.cleanup.targets import Target, TargetFields, look_up, look_up_targets
from flaskd.config import Phase
from flaskd.config.settings import field
from flaskd.stacks import stack_of


class ThreadsFields(TargetFields):
    """Fields of ``threads.stop``."""

    stop: Target = field(
        description="What asks the threads to end, as MODULE:ATTRIBUTE: an Event to set, or a function."
    )


def stop_threads(context: StepContext, fields: ThreadsFields) -> str | None:
    """Ask the threads to end, once, and wait for each."""
    ask = look_up(fields.stop)
    if isinstance(ask, threading.Event):
        ask.set()
    elif callable(ask):
        ask()
    else:
        raise StepFailedError(f'target "{fields.stop}": expected an Event or a function, got {type(ask).__name__}')
    return end_all("threads.stop", _join_thread, context, fields)


def _join_thread(thread: Any, context: StepContext, _fields: ThreadsFields) -> None:
    if not joined(thread, context.remaining):
        raise StepTimedOutError("still running", stack_of(thread))


ACTIONS = (
    Action(
        "threads.stop",
        ThreadsFields,
        Phase.QUIESCE,
        stop_threads,
        prepare=look_up_targets,
        grace=no_grace,
        takes="threads.stop",
        summary="Asks threads to end by an event or a function of the app, and waits for them.",
    ),
)
