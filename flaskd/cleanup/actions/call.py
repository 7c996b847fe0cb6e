"""``call``: calls a function of the app."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

from flaskd.cleanup.context import StepContext, StepFailedError, in_app_context
from flaskd.cleanup.model import Action
from flaskd.cleanup.targets import TARGET, look_up
from flaskd.config import Phase, Settings
from flaskd.config.kind import matching
from flaskd.config.settings import field


class CallFields(Settings):
    """Fields of ``call``."""

    target: Annotated[str, matching(TARGET.pattern, "expected MODULE:FUNCTION, such as shop.jobs:stop")] = field(
        description="The function to call, as MODULE:FUNCTION; it is given the step's context."
    )


def _resolve(target: str) -> Callable[[StepContext], object]:
    """Import ``pkg.mod:function``; raises StepFailedError, which names the target and what is wrong with it."""
    found = look_up(target)
    if not callable(found) or inspect.iscoroutinefunction(found):
        kind = "coroutine function" if callable(found) else type(found).__name__
        raise StepFailedError(f'target "{target}": expected a plain function of one argument, got {kind}')
    return found  # type: ignore[no-any-return]  # any callable is accepted


def _prepare_call(fields: CallFields) -> None:
    _resolve(fields.target)


def _call(context: StepContext, fields: CallFields) -> str | None:
    function = _resolve(fields.target)
    with in_app_context(context.app):
        said = function(context)
    return said if isinstance(said, str) else None


ACTIONS = (
    Action("call", CallFields, Phase.QUIESCE, _call, prepare=_prepare_call, summary="Calls a function of the app."),
)
