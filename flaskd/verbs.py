"""The verbs of the control plane: one table with their names, words, roles and descriptions.

The control plane, the command line, the configuration and the documentation read it. It imports nothing large.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from flaskd.errors import UnknownCommandError
from flaskd.text import did_you_mean

Flags = frozenset[str]

LEVELS = ("debug", "info", "warning", "error")
"""The log levels as flaskd writes them."""


def log_level(written: str) -> str:
    """The log level that is meant: in lower case, and ``warning`` for ``warn``; other words are left as they are."""
    lower = written.lower()
    return "warning" if lower == "warn" else lower if lower in LEVELS else written


class Role(IntEnum):
    """What a client of the control plane may do; each role may do all that lower ones may."""

    VIEWER = 1
    """May look."""
    OPERATOR = 2
    """May drain, resume, reload, scale, restart workers and change the log level."""
    ADMIN = 3
    """May stop flaskd."""

    def __str__(self) -> str:
        return self.name.lower()


class Verb(NamedTuple):  # a dataclass would cost every client verb the import of inspect
    """A control command: its description, its flags, its argument, and which role may use it."""

    summary: str
    role: Role = Role.VIEWER
    flags: Flags = frozenset()
    argument: str = ""
    """The name of the argument, which is always optional; empty if the verb takes none."""
    changes: bool = False
    """Whether it changes something; then it is logged with its client, and HTTP allows only POST."""
    looks: bool = False
    """Whether it changes nothing without its argument, so that any role may use it."""
    lengthy: bool = False
    """Whether its answer may take long even without the flag ``wait``, because a file or the app is asked."""

    def usage(self, name: str) -> str:
        """How it is written: ``stop [now] [wait]``, ``log-level [LEVEL]``."""
        return " ".join(
            [name, *(f"[{flag}]" for flag in sorted(self.flags)), *([self._placeholder] * bool(self.argument))]
        )

    @property
    def _placeholder(self) -> str:
        return f"[{self.argument.upper()}]"

    def as_json(self, name: str) -> dict[str, Any]:
        """Stable keys for programs."""
        return {
            "name": name, "usage": self.usage(name), "summary": self.summary, "role": str(self.role),
            "flags": sorted(self.flags), "argument": self.argument or None, "changes": self.changes,
        }  # fmt: skip


_WAIT = frozenset({"wait"})
_STACKS = frozenset({"stacks"})
_REQUESTS = frozenset({"requests"})

FLAGS = {
    "wait": "wait until it is over; progress until then",
    "now": "cut drain and cleanup short",
    "stacks": "with the stack of each thread",
    "requests": "with each request in flight, of the same moment",
    "config": "the configuration alone: workers are not replaced",
}
"""What each flag means."""

VERBS: dict[str, Verb] = {
    "help": Verb("this list, or one verb", argument="verb"),
    "status": Verb("state, requests in flight, listeners", flags=_REQUESTS),
    "health": Verb("OK while flaskd starts, and the serving thread turns"),
    "ready": Verb("OK while new requests are welcome"),
    "drain": Verb("take no new work, finish what is in hand, stay alive", Role.OPERATOR, _WAIT, changes=True),
    "resume": Verb("undo a drain", Role.OPERATOR, _WAIT, changes=True),
    "stop": Verb("drain, run the cleanup policies, exit", Role.ADMIN, _WAIT | {"now"}, changes=True),
    "reload": Verb(
        "read the configuration anew; with workers also the code, by new workers",
        Role.OPERATOR,
        _WAIT | {"config"},
        changes=True,
        lengthy=True,
    ),
    "workers": Verb("each worker: what it does, what it uses; and those that died"),
    "scale": Verb(
        "run N workers, or auto, until a reload changes server.workers",
        Role.OPERATOR,
        _WAIT,
        argument="count",
        changes=True,
        lengthy=True,
    ),
    "restart": Verb(
        "new workers in the place of all, or of one slot",
        Role.OPERATOR,
        _WAIT,
        argument="slot",
        changes=True,
        lengthy=True,
    ),
    "check": Verb("what a reload would say, without doing it", lengthy=True),
    "requests": Verb("each request in flight, oldest first", flags=_STACKS),
    "threads": Verb("each thread and what it does", flags=_STACKS),
    "plan": Verb("the cleanup policies in their order, and what was found", lengthy=True),
    "config": Verb("the configuration in force, and where each value came from; secrets hidden"),
    "last-stop": Verb("how the stop before this run went"),
    "log-level": Verb(
        "the log level, or a new one until the next reload", Role.OPERATOR, argument="level", changes=True, looks=True
    ),
    "version": Verb("the version of flaskd that runs"),
}


def find_verb(name: str) -> Verb:
    """The verb of that name; raises UnknownCommandError, which names the most similar one."""
    if verb := VERBS.get(name):
        return verb
    raise UnknownCommandError(f'"{name}"{did_you_mean(name.lower(), VERBS) or ";"} try "help"')
