"""The actions that a policy can `use`: what each is called, takes and does.

Those of other packages join them as entry points.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from flaskd.cleanup import live
from flaskd.cleanup.cache import PersistFields, persist_cache, restore_cache, use_up_cache
from flaskd.cleanup.catalogue import Catalogue, View, origin
from flaskd.cleanup.command import CommandFields, prepare_command, run_command
from flaskd.cleanup.context import StepContext, StepFailedError
from flaskd.cleanup.logflush import FlushFields, flush_logs
from flaskd.cleanup.model import Action
from flaskd.cleanup.removal import RemoveFields, remove_files
from flaskd.cleanup.web import ConsulFields, WebhookFields, call_webhook, deregister, prepare_web
from flaskd.config import ActionSpec, Phase, Settings
from flaskd.config.kinds import checked
from flaskd.config.settings import field
from flaskd.process.forks import AppCode

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint


def _target(text: str) -> str:
    if not live.TARGET.fullmatch(text):
        raise ValueError("expected MODULE:FUNCTION, such as shop.jobs:stop")
    return text


class CallFields(Settings):
    """Fields of ``call``."""

    target: Annotated[str, checked(_target)] = field(
        description="The function to call, as MODULE:FUNCTION; it is given the step's context."
    )


def _resolve(target: str) -> Callable[[StepContext], object]:
    """Import ``pkg.mod:function``; raises StepFailedError naming the target and what is wrong with it."""
    found = live.look_up(target)
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


def _no_grace(_fields: object) -> float:
    """Ask for no time beyond the timeout but the moment that it takes to say what hangs."""
    return 0.0


def _live(
    name: str,
    phase: Phase,
    end: live.End,
    fields: type[live.LiveFields] = live.LiveFields,
    *,
    takes: str = "",
    needs: Mapping[str, str] = MappingProxyType({}),
    first: Action | None = None,
) -> Action:
    """An action on live objects, given what ends one of them."""
    run, takes = live.ending(takes or name, end), takes or name
    return Action(name, fields, phase, run, live.look_up_targets, _no_grace, needs=needs, takes=takes, first=first)


def _brought(entry_point: EntryPoint) -> Action:
    """The action that another package brings; one that cannot be loaded becomes one with a fault."""
    try:
        with AppCode():
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

    return Action(name, Settings, Phase.FINAL, run, fault=fault)


ACTIONS: Mapping[str, Action] = Catalogue(
    {
        each.name: each
        for each in (
            Action(
                "command",
                CommandFields,
                Phase.FINAL,
                run_command,
                prepare=prepare_command,
                grace=operator.attrgetter("kill_grace"),
            ),
            Action("call", CallFields, Phase.QUIESCE, _call, prepare=_prepare_call),
            Action(
                "cache.persist",
                PersistFields,
                Phase.PERSIST,
                persist_cache,
                restore=restore_cache,
                use_up=use_up_cache,
                keeps="path",
            ),
            Action("consul.deregister", ConsulFields, Phase.ANNOUNCE, deregister, prepare=prepare_web),
            Action("files.remove", RemoveFields, Phase.FINAL, remove_files),
            Action("logging.flush", FlushFields, Phase.FLUSH, flush_logs),
            Action("webhook", WebhookFields, Phase.FINAL, call_webhook, prepare=prepare_web),
            _live("sqlalchemy.dispose", Phase.CLOSE, live.dispose, needs={"sqlalchemy": "sqlalchemy"}),
            _live("psycopg_pool.close", Phase.CLOSE, live.close_pool, needs={"psycopg_pool": "psycopg-pool"}),
            _live("redis.close", Phase.CLOSE, live.close_redis, needs={"redis": "redis"}),
            # Last: telemetry and policies may go over such a client, and a closed one is of no use to them.
            _live("http_client.close", Phase.FINAL, live.close_http, needs={"httpx": "httpx", "requests": "requests"}),
            _live(
                "apscheduler.stop",
                Phase.QUIESCE,
                live.stop_scheduler,
                live.SchedulerFields,
                needs={"apscheduler": "apscheduler"},
                first=_live(
                    "apscheduler.pause",
                    Phase.ANNOUNCE,
                    live.pause_scheduler,
                    live.SchedulerFields,
                    takes="apscheduler.stop",
                ),
            ),
            _live("executor.stop", Phase.QUIESCE, live.stop_executor),
            Action(
                "threads.stop",
                live.ThreadsFields,
                Phase.QUIESCE,
                live.stop_threads,
                prepare=live.look_up_targets,
                grace=_no_grace,
                takes="threads.stop",
            ),
            _live("processes.stop", Phase.QUIESCE, live.stop_process, live.ProcessesFields),
            _live("sentry.flush", Phase.FLUSH, live.flush_sentry, needs={"sentry_sdk": "sentry-sdk"}),
            _live(
                "otel.shutdown", Phase.FLUSH, live.shut_down_telemetry, needs={"opentelemetry.sdk": "opentelemetry-sdk"}
            ),
        )
    },
    _brought,
)
"""Name → action, for everything that a policy can `use`."""


def action_specs(actions: Mapping[str, Action] = ACTIONS) -> Mapping[str, ActionSpec]:
    """What `flaskd.config` needs to know of each action: the model of its fields, its phase, its fault, its needs."""
    return View(actions, lambda each: ActionSpec(each.fields, each.default_phase, each.fault, each.needs, each.keeps))
