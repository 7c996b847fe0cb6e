"""Cleanup in code: functions registered with `on_stop` become steps of the plan, beside the YAML file's policies."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

from flaskd.cleanup.context import StepContext, StepFailedError, in_app_context
from flaskd.cleanup.model import Action, Step
from flaskd.cleanup.plan import Plan
from flaskd.config import Phase, Settings
from flaskd.config.order import in_turn
from flaskd.values import value

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger("flaskd.cleanup")

Function = TypeVar("Function", bound=Callable[..., object])

_EXTENSION = "flaskd.on_stop"
"""The key in flask.Flask.extensions under which an app keeps the functions that are registered for it alone."""


class _NoFields(Settings):
    """A function that is registered in code has no fields."""


@value
class _Callback:
    function: Callable[..., object]
    phase: Phase
    timeout: float | None
    after: tuple[str, ...]
    always: bool


_registered: list[_Callback] = []


@overload
def on_stop(function: Function) -> Function: ...
@overload
def on_stop(
    *,
    phase: str = ...,
    timeout: float | None = ...,
    after: str | Sequence[str] = ...,
    always: bool = ...,
    app: Flask | None = ...,
) -> Callable[[Function], Function]: ...
def on_stop(
    function: Function | None = None,
    *,
    phase: str = Phase.QUIESCE,
    timeout: float | None = None,
    after: str | Sequence[str] = (),
    always: bool = False,
    app: Flask | None = None,
) -> Any:
    """Register a function to run at the stop; a decorator, with or without arguments.

    The function is called in a thread of its own, in the app's context, without arguments, or with the step's context
    if it takes one. Within a `phase` the function registered last runs first, as with `contextlib.ExitStack`. `after`
    names policies or functions of the same or an earlier phase that must have ended before it runs. `timeout` is in
    seconds, default: ``cleanup.defaults.timeout``. With `app`, the function runs only at a stop of that app; use it for
    functions that an app factory registers. Raises ValueError if the phase does not exist or the timeout is not above
    0, TypeError if the function cannot be called like that.
    """
    if function is None:
        return partial(on_stop, phase=phase, timeout=timeout, after=after, always=always, app=app)
    if not callable(function) or inspect.iscoroutinefunction(function) or _takes(function) is None:  # type: ignore[redundant-expr]
        raise TypeError(f"cannot call {function!r} at the stop: expected a plain function of no argument, or of one")
    if timeout is not None and not 0 < timeout < math.inf:
        raise ValueError(
            f"cannot call {_name(function)} at the stop: expected a timeout above 0 seconds, got {timeout!r}"
        )
    names: tuple[Any, ...] = (after,) if isinstance(after, str) else tuple(after)
    if wrong := [each for each in names if not isinstance(each, str)]:
        raise TypeError(f"cannot call {_name(function)} after {wrong[0]!r}: expected the name of a policy or function")
    callback = _Callback(function, Phase(phase), timeout, names, always)
    registered = _registered if app is None else app.extensions.setdefault(_EXTENSION, [])
    registered.append(callback)
    return function


def with_callbacks(plan: Plan, app: Flask | None, *, timeout: float, told: set[str] | None = None) -> Plan:
    """Add the functions registered so far to a plan; `timeout`, in seconds, is for those that have none of their own.

    A wish of `after` that cannot be kept is logged as a warning and added to `told`; what `told` has is not logged
    again.
    """
    callbacks = [*_registered, *(app.extensions.get(_EXTENSION, ()) if app is not None else ())]
    taken = {step.name for step in plan.steps}
    wished: dict[str, _Callback] = {}
    for callback in reversed(callbacks):
        name = _free(_name(callback.function), taken)
        taken.add(name)
        wished[name] = callback
    phases = {step.name: step.phase for step in plan.steps} | {name: each.phase for name, each in wished.items()}
    steps, lost = [], []
    for phase in Phase:
        done: list[str] = []
        # The last registered runs first, unless it comes `after` one that was registered before it.
        for name, circle in in_turn({name: each.after for name, each in wished.items() if each.phase is phase}):
            callback = wished[name]
            kept = done[-1:]
            for other in callback.after:
                if other not in phases or phases[other].position > phase.position:
                    lost.append(f'{name} cannot wait for "{other}": {_why_not(plan, other)}')
                elif circle and other in wished and phases[other] is phase and other not in done:
                    lost.append(f"{name} does not wait for {other}: {' after '.join(circle)} is a circle")
                else:
                    kept.append(other)
            done.append(name)
            steps.append(
                Step(
                    name=name,
                    action=Action("on_stop", _NoFields, phase, partial(_run, callback.function)),
                    fields=_NoFields(),
                    phase=phase,
                    timeout=timeout if callback.timeout is None else callback.timeout,
                    after=tuple(dict.fromkeys(kept)),
                    always=callback.always,
                )
            )
    for words in lost:
        if told is None or words not in told:
            log.warning(words)
    if told is not None:
        told.update(lost)
    return replace(plan, steps=(*plan.steps, *steps))


def _why_not(plan: Plan, other: str) -> str:
    if other in {step.name for step in plan.elsewhere}:
        return "that policy runs once, outside of the workers"
    return "no policy or function of its phase or before has that name"


def _run(function: Callable[..., object], context: StepContext, _fields: _NoFields) -> str | None:
    with in_app_context(context.app):
        said = function(context) if _takes(function) else function()
    if inspect.iscoroutine(said):
        said.close()
        raise StepFailedError(f"{_name(function)} returned a coroutine; expected a plain function")
    return said if isinstance(said, str) else None


def _takes(function: Callable[..., object]) -> int | None:
    """How many arguments to call it with: 0 if that is possible, else 1; None if it takes neither."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # it is written in C and has no signature
        return 0
    for count in (0, 1):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return count
    return None


def _name(function: Callable[..., object]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return "function" if name == "<lambda>" else str(name)


def _free(name: str, taken: set[str]) -> str:
    number = 1
    free = name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free
