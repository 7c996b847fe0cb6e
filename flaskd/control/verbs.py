"""What each verb of the table in `flaskd.verbs` does.

The functions run in the control thread and never wait: questions that take a while are passed to another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaskd.config.fields import MAX_WORKERS
from flaskd.errors import UsageError
from flaskd.inbox import DrainAsked, ReloadAsked, RestartAsked, ResumeAsked, ScaleAsked, StopAsked
from flaskd.lifecycle import StopReason
from flaskd.present import record_lines, request_lines, status_lines, thread_lines, worker_lines
from flaskd.process.cpus import usable
from flaskd.protocol import Reply
from flaskd.text import table
from flaskd.verbs import FLAGS, LEVELS, VERBS, find_verb, log_level
from flaskd.version import __version__

if TYPE_CHECKING:
    from flaskd.config import Configuration
    from flaskd.control.commands import Command
    from flaskd.daemon import Daemon
    from flaskd.ledger import InFlight


def _help(_daemon: Daemon, command: Command, reply: Reply) -> None:
    if name := command.argument:
        verb = find_verb(name)
        lines = [f"{verb.usage(name)}: {verb.summary}", *(f"  {flag}: {FLAGS[flag]}" for flag in sorted(verb.flags))]
        lines.append(f"  needs the role {verb.role}" + (", when something changes" if verb.changes else ""))
        reply.ok(
            "help",
            detail={"verb": verb.as_json(name), "flags": {flag: FLAGS[flag] for flag in verb.flags}},
            lines=lines,
        )
        return
    reply.ok(
        "help",
        detail={"verbs": [verb.as_json(name) for name, verb in VERBS.items()], "flags": FLAGS},
        lines=table([(verb.usage(name), verb.summary) for name, verb in VERBS.items()]),
    )


def _status(daemon: Daemon, command: Command, reply: Reply) -> None:
    now = daemon.snapshot()
    fields = now.as_json()
    lines = status_lines(fields)
    if "requests" in command.flags:
        fields["requests"] = entries = [each.as_json() for each in now.serving.requests]
        lines += request_lines(entries)
    reply.ok(str(fields["state"]), detail=fields, lines=lines)


def _health(daemon: Daemon, _command: Command, reply: Reply) -> None:
    if why := daemon.wedged:
        reply.error("unhealthy", why)
    else:
        reply.ok("healthy")


def _ready(daemon: Daemon, _command: Command, reply: Reply) -> None:
    state = daemon.state
    if state in {"ready", "reloading"}:
        if why := daemon.serving.unready:
            reply.error("not-ready", why)
        else:
            reply.ok("ready")
    else:
        reply.error("not-ready", f"flaskd is {state}")


def _drain(daemon: Daemon, command: Command, reply: Reply) -> None:
    daemon.ask(DrainAsked("wait" in command.flags, str(command.peer), reply=reply))


def _stop(daemon: Daemon, command: Command, reply: Reply) -> None:
    reason = StopReason("control", str(command.peer))
    daemon.ask(StopAsked(reason, "wait" in command.flags, "now" in command.flags, reply=reply))


def _requests(daemon: Daemon, command: Command, reply: Reply) -> None:
    if "stacks" in command.flags:
        daemon.questions.stacks.ask(reply, _tell_requests)
    else:
        _tell_requests(reply, daemon.serving.requests())


def _tell_requests(reply: Reply, found: Sequence[InFlight]) -> None:
    entries = [each.as_json() for each in found]
    reply.ok("requests", {"in_flight": len(entries)}, detail={"requests": entries}, lines=request_lines(entries))


def _threads(daemon: Daemon, command: Command, reply: Reply) -> None:
    questions = daemon.questions
    (questions.thread_stacks if "stacks" in command.flags else questions.threads).ask(reply, _tell_threads)


def _tell_threads(reply: Reply, entries: Sequence[dict[str, Any]]) -> None:
    reply.ok("threads", {"threads": len(entries)}, detail={"list": entries}, lines=thread_lines(entries))


def _tell_plan(reply: Reply, plan: dict[str, Any]) -> None:
    reply.ok("plan", detail=plan, lines=str(plan["text"]).splitlines())


def _tell_valid(reply: Reply, new: Configuration) -> None:
    reply.ok("valid", {"config": str(new.path)} if new.path else {})


def _config(daemon: Daemon, _command: Command, reply: Reply) -> None:
    configuration = daemon.configuration
    assert configuration is not None
    text = configuration.annotated()
    reply.ok("config", detail={"yaml": text, "origins": configuration.origins}, lines=text.splitlines())


def _last_stop(daemon: Daemon, _command: Command, reply: Reply) -> None:
    record, previous = daemon.holdings.last_stop, daemon.holdings.state.previous
    if previous is not None:  # otherwise the stop before it would look like the latest one
        record = {**(record or {}), "previous": previous}
    if record is None:
        reply.error("no-record", "no stop has been recorded yet")
    else:
        reply.ok("last-stop", detail=record, lines=record_lines(record))


def _log_level(daemon: Daemon, command: Command, reply: Reply) -> None:
    before, level = daemon.logs.level, log_level(command.argument)
    if not level:
        reply.ok(before, detail={"level": before})
        return
    if level not in LEVELS:
        raise UsageError(f'log-level: expected one of {", ".join(LEVELS)}, got "{level}"')
    daemon.logs.set_level(level)
    daemon.serving.set_log_level(level)
    reply.ok(level, {"before": before}, detail={"level": level}, hint="until the next reload")


def _workers(daemon: Daemon, _command: Command, reply: Reply) -> None:
    daemon.questions.workers.ask(reply, lambda reply, entries: _tell_workers(daemon, reply, entries))


def _tell_workers(daemon: Daemon, reply: Reply, entries: Sequence[dict[str, Any]]) -> None:
    deaths = daemon.serving.deaths()
    workers, templates = ([each for each in entries if (each["slot"] is None) is of] for of in (False, True))
    now = daemon.serving.snapshot()
    fields = {"workers": len(workers), "wanted": now.wanted, "died": now.deaths}
    limits: dict[str, Any] = {"recycled": now.recycled, "trouble": now.trouble or None}
    detail = {"list": workers, "templates": templates, "deaths": deaths, **limits}
    reply.ok("workers", fields, detail=detail, lines=worker_lines(entries, deaths, wanted=now.wanted, **limits))


def _scale(daemon: Daemon, command: Command, reply: Reply) -> None:
    asked = command.argument
    if asked == "auto":
        daemon.ask(ScaleAsked(usable(), reply=reply))
    elif asked.isascii() and asked.isdecimal() and 1 <= int(asked) <= MAX_WORKERS:
        daemon.ask(ScaleAsked(int(asked), reply=reply))
    else:
        raise UsageError(f'scale: expected a number from 1 to {MAX_WORKERS}, or auto, got "{asked}"')


def _restart(daemon: Daemon, command: Command, reply: Reply) -> None:
    slot = command.argument
    if slot and not (slot.isascii() and slot.isdecimal()):
        raise UsageError(f'restart: expected the number of a slot, got "{slot}"; see workers')
    daemon.ask(RestartAsked(int(slot) if slot else None, reply=reply))


def _reload(daemon: Daemon, command: Command, reply: Reply) -> None:
    daemon.ask(ReloadAsked(only_configuration="config" in command.flags, reply=reply))


def _version(_daemon: Daemon, _command: Command, reply: Reply) -> None:
    reply.ok(__version__, detail={"version": __version__})


RUN: Mapping[str, Callable[[Daemon, Command, Reply], None]] = {
    "help": _help,
    "status": _status,
    "health": _health,
    "ready": _ready,
    "drain": _drain,
    "resume": lambda daemon, _, reply: daemon.ask(ResumeAsked(reply=reply)),
    "stop": _stop,
    "reload": _reload,
    "workers": _workers,
    "scale": _scale,
    "restart": _restart,
    "check": lambda daemon, _, reply: daemon.questions.check.ask(reply, _tell_valid),
    "requests": _requests,
    "threads": _threads,
    "plan": lambda daemon, _, reply: daemon.questions.plan.ask(reply, _tell_plan),
    "config": _config,
    "last-stop": _last_stop,
    "log-level": _log_level,
    "version": _version,
}
