"""The control commands: one table, and what stands behind each entry."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flaskd.errors import UnknownCommandError
from flaskd.lifecycle import StopReason
from flaskd.protocol import Reply, as_text, record_lines

if TYPE_CHECKING:
    from flaskd.daemon import Daemon

Flags = frozenset[str]


@dataclass(frozen=True)
class Verb:
    """A control command: what it does, what it is for, and the flags it knows."""

    run: Callable[[Daemon, Flags, str, Reply], None]
    summary: str
    flags: Flags = frozenset()
    changes: bool = False


def _drain(daemon: Daemon, flags: Flags, _peer: str, reply: Reply) -> None:
    daemon.drain(reply, wait="wait" in flags)


def _stop(daemon: Daemon, flags: Flags, peer: str, reply: Reply) -> None:
    daemon.stop(StopReason("control", peer), reply, wait="wait" in flags, now="now" in flags)


def _health(daemon: Daemon, _flags: Flags, _peer: str, reply: Reply) -> None:
    if daemon.turning(timeout=1.0):
        reply.ok("healthy")
    else:
        reply.error("unhealthy", "the serving thread does not turn")


def _ready(daemon: Daemon, _flags: Flags, _peer: str, reply: Reply) -> None:
    state = daemon.state
    if state in {"ready", "reloading"}:
        reply.ok("ready")
    else:
        reply.error("not-ready", f"flaskd is {state}")


def _status(daemon: Daemon, _flags: Flags, _peer: str, reply: Reply) -> None:
    fields = daemon.status()
    lines = [f"{key}: {_shown(value)}" for key, value in fields.items() if value not in (None, "", [])]
    reply.ok(str(fields["state"]), detail=fields, lines=lines)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return as_text(value) if isinstance(value, Mapping) else str(value)


def _plan(daemon: Daemon, _flags: Flags, _peer: str, reply: Reply) -> None:
    plan = daemon.plan()
    reply.ok("plan", detail=plan, lines=str(plan["text"]).splitlines())


def _config(daemon: Daemon, _flags: Flags, _peer: str, reply: Reply) -> None:
    text = daemon.configuration.describe()
    reply.ok("config", detail={"yaml": text}, lines=text.splitlines())


def _version(_daemon: Daemon, _flags: Flags, _peer: str, reply: Reply) -> None:
    from flaskd import __version__  # noqa: PLC0415 - the package's top is above this layer, but its version is a fact

    reply.ok(__version__, detail={"version": __version__})


def _help(_daemon: Daemon, _flags: Flags, _peer: str, reply: Reply) -> None:
    usages = {name: " ".join([name, *(f"[{flag}]" for flag in sorted(verb.flags))]) for name, verb in VERBS.items()}
    width = max(map(len, usages.values()))
    lines = [f"{usages[name]:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    verbs = [{"name": name, "flags": sorted(verb.flags), "summary": verb.summary} for name, verb in VERBS.items()]
    reply.ok("help", detail={"verbs": verbs}, lines=lines)


def _last_stop(daemon: Daemon, _flags: Flags, _peer: str, reply: Reply) -> None:
    record = daemon.last_stop()
    if record is None:
        reply.error("no-record", "no stop has been recorded yet")
    else:
        reply.ok("last-stop", detail=record, lines=record_lines(record))


_WAIT = frozenset({"wait"})

VERBS: dict[str, Verb] = {
    "help": Verb(_help, "this list"),
    "status": Verb(_status, "state, requests in flight, listeners"),
    "health": Verb(_health, "OK while the serving thread turns"),
    "ready": Verb(_ready, "OK while new requests are welcome"),
    "drain": Verb(_drain, "take no new work, finish what is in hand, stay alive", _WAIT, changes=True),
    "resume": Verb(lambda daemon, _f, _p, reply: daemon.resume(reply), "undo a drain", _WAIT, changes=True),
    "stop": Verb(_stop, "drain, run the cleanup policies, exit", _WAIT | {"now"}, changes=True),
    "reload": Verb(
        lambda daemon, _f, _p, reply: daemon.reload(reply), "read the configuration anew", _WAIT, changes=True
    ),
    "plan": Verb(_plan, "the cleanup policies in their order, and what was found"),
    "config": Verb(_config, "the configuration in force, secrets hidden"),
    "last-stop": Verb(_last_stop, "how the stop before this run went"),
    "version": Verb(_version, "flaskd's version"),
}


def find_verb(name: str) -> Verb:
    """The verb of that name; raises UnknownCommandError with the nearest one."""
    if verb := VERBS.get(name):
        return verb
    near = difflib.get_close_matches(name, VERBS, n=1)
    meant = f'; did you mean "{near[0]}"?' if near else ";"
    raise UnknownCommandError(f'"{name}"{meant} try "help"')
