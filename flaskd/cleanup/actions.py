"""The actions that a policy can `use`: what each is called, takes and does.

Those of other packages join them as entry points.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import AfterValidator, BaseModel, Field

from flaskd.cleanup.cache import PersistFields, persist_cache, restore_cache
from flaskd.cleanup.catalogue import Catalogue, View, origin
from flaskd.cleanup.command import CommandFields, run_command
from flaskd.cleanup.context import StepContext, StepFailedError
from flaskd.cleanup.logflush import FlushFields, flush_logs
from flaskd.cleanup.removal import RemoveFields, remove_files
from flaskd.cleanup.web import ConsulFields, WebhookFields, call_webhook, deregister, prepare_web
from flaskd.config import ActionSpec, Phase, Section

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from importlib.metadata import EntryPoint
    from pathlib import Path

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Action:
    """One thing a policy can do.

    `run` is called in a thread of its own with the context and the validated fields; it returns a short
    detail for the log, or None, and raises to fail. `prepare` imports what `run` will need, when the daemon
    starts or reloads; it raises to refuse the configuration. `grace` is for an action that watches its own
    time: the seconds it may need after its timeout to end what it started (without it, the runner abandons an
    action at its timeout). `restore` is called at the start, before READY, with the Flask app, the state directory
    (None: there is none to use) and the fields; it returns what it did, for the log, and raises to tell that it did
    not. `fault` is why it cannot be used at all, empty when it can; a policy that uses it is refused with these words.
    """

    name: str
    fields: type[BaseModel]
    default_phase: Phase
    run: Callable[[StepContext, Any], str | None]
    prepare: Callable[[Any], None] | None = None
    grace: Callable[[Any], float] | None = None
    restore: Callable[[Any, Path | None, Any], str] | None = None
    fault: str = ""


def _target(text: str) -> str:
    if not _TARGET.fullmatch(text):
        raise ValueError("expected MODULE:FUNCTION, such as shop.jobs:stop")
    return text


class CallFields(Section):
    """Fields of ``call``."""

    target: Annotated[str, AfterValidator(_target)] = Field(
        description="The function to call, as MODULE:FUNCTION; it is given the step's context."
    )


class DisposeFields(Section):
    """Fields of ``sqlalchemy.dispose``: none."""


def _resolve(target: str) -> Callable[[StepContext], object]:
    """Import ``pkg.mod:function``; raises StepFailedError naming the target and what is wrong with it."""
    module, _, attribute = target.partition(":")
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        raise StepFailedError(f'cannot import target "{target}": {type(error).__name__}: {error}') from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        kind = "coroutine function" if callable(found) else type(found).__name__
        raise StepFailedError(f'target "{target}": expected a plain function of one argument, got {kind}')
    return found  # type: ignore[no-any-return]  # any callable will do


def _prepare_call(fields: CallFields) -> None:
    _resolve(fields.target)


def in_app_context(app: Any) -> AbstractContextManager[Any]:
    """The app's own context, in which `current_app` and the extensions work; nothing where there is no Flask app."""
    return nullcontext() if app is None else app.app_context()


def _call(context: StepContext, fields: CallFields) -> str | None:
    function = _resolve(fields.target)
    with in_app_context(context.app):
        said = function(context)
    return said if isinstance(said, str) else None


def _dispose(context: StepContext, _fields: DisposeFields) -> str:
    """Close the checked-in connections of every engine of Flask-SQLAlchemy (3.x: `SQLAlchemy.engines`)."""
    app = context.app
    if app is None:
        raise StepFailedError("there is no Flask app to take the engines from")
    extension = getattr(app, "extensions", {}).get("sqlalchemy")
    if extension is None:
        raise StepFailedError('the app has no extension "sqlalchemy" (Flask-SQLAlchemy)')
    if not hasattr(type(extension), "engines"):
        raise StepFailedError('the app\'s extension "sqlalchemy" has no engines; Flask-SQLAlchemy 3 or newer is needed')
    with app.app_context():
        engines = extension.engines
        faults = [fault for key, engine in engines.items() if (fault := _fault_of_dispose(key, engine))]
    if faults:
        raise StepFailedError("; ".join(faults))
    return f"{len(engines)} engine{'' if len(engines) == 1 else 's'}"


def _fault_of_dispose(key: str | None, engine: Any) -> str:
    """Dispose one engine; one that cannot must not keep the others open, so its error is returned as text."""
    try:
        engine.dispose()
    except Exception as error:  # noqa: BLE001 - a driver may raise anything
        return f"engine {key or 'default'}: {type(error).__name__}: {error}"
    return ""


def _brought(entry_point: EntryPoint) -> Action:
    """The action that another package brings; one that cannot be loaded becomes one with a fault."""
    try:
        action = entry_point.load()
        if not isinstance(action, Action):
            raise TypeError(f"expected a flaskd.cleanup.Action, got {type(action).__name__}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of others runs here
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return _unusable(entry_point.name, f"cannot load it from {origin(entry_point)}: {why}")
    return replace(action, name=entry_point.name)


def _unusable(name: str, fault: str) -> Action:
    def run(_context: StepContext, _fields: Any) -> NoReturn:
        raise StepFailedError(fault)

    return Action(name, Section, Phase.FINAL, run, fault=fault)


ACTIONS: Mapping[str, Action] = Catalogue(
    {
        each.name: each
        for each in (
            Action("command", CommandFields, Phase.FINAL, run_command, grace=operator.attrgetter("kill_grace")),
            Action("call", CallFields, Phase.QUIESCE, _call, prepare=_prepare_call),
            Action("cache.persist", PersistFields, Phase.PERSIST, persist_cache, restore=restore_cache),
            Action("consul.deregister", ConsulFields, Phase.ANNOUNCE, deregister, prepare=prepare_web),
            Action("files.remove", RemoveFields, Phase.FINAL, remove_files),
            Action("logging.flush", FlushFields, Phase.FLUSH, flush_logs),
            Action("webhook", WebhookFields, Phase.FINAL, call_webhook, prepare=prepare_web),
            Action("sqlalchemy.dispose", DisposeFields, Phase.CLOSE, _dispose),
        )
    },
    _brought,
)
"""Name → action, for everything that a policy can `use`."""


def action_specs(actions: Mapping[str, Action] = ACTIONS) -> Mapping[str, ActionSpec]:
    """What `flaskd.config` needs to know of each action: the model of its fields, its phase, and its fault if any."""
    return View(actions, lambda each: ActionSpec(each.fields, each.default_phase, each.fault))
