"""Good and bad new code for a server that goes on serving, and how each server is told to reload."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from _servers import TOUCHED, Running, Served

MODULE = "served"
"""The module that contains the app's code, in one version after another."""
EXIT_OF_BAD_CODE = 70
"""The exit code of `flaskd reload` if the new workers did not become ready."""


@dataclass(frozen=True)
class Code:
    """A kind of new code: what it does before and after it imports the app; the refusal must contain `says`."""

    name: str
    text: str
    first: str = ""
    then: str = ""
    good: bool = False
    says: str = ""

    def version(self, version: str) -> str:
        """The source of the module with this version."""
        return "\n".join(
            [self.first, "import app as plain", f"plain.VERSION = '{version}'", "app = plain.app", self.then]
        )


KINDS = [
    Code("good", "good", good=True),
    Code("slow", "3 s to import", "import time; time.sleep(3)", good=True),
    Code("syntax", "a syntax error", "def broken(:", says="SyntaxError"),
    Code("exception", "raises at import", "raise RuntimeError('no database there')", says="no database there"),
    Code("probe", "answers 500", then="app.before_request(lambda: (plain.VERSION, 500))", says="500"),
    Code("dies", "exits at import", "import os; os._exit(3)"),
    Code("hangs", "hangs at import", "import time; time.sleep(3600)"),
]
GOOD = KINDS[0]
BAD = [each for each in KINDS if not each.good]


def serving(workers: int, threads: int) -> Served:
    """How the module is served."""
    return Served(module=MODULE, workers=workers, threads=threads)


def config(start_timeout: float) -> str:
    """The configuration of flaskd: a worker must answer a request within `start_timeout` seconds."""
    return f"health: {{probe: /version}}\npool: {{start_timeout: {start_timeout:g}s}}\n"


def put(server: Running, code: Code, version: str) -> None:
    """Replace the old code by new code, in one step."""
    beside = server.directory / "new"
    beside.write_text(code.version(version), encoding="utf-8")
    beside.replace(server.directory / f"{MODULE}.py")


def versions(server: Running, times: int = 10, patience: float = 3.0) -> set[tuple[int, str]]:
    """The statuses and versions that `times` connections get, one after the other; none if nothing answers."""
    found: set[tuple[int, str]] = set()
    for _ in range(times):
        try:
            status, body = server.ask("/version", patience)
        except (OSError, ValueError):
            if not found:  # a server that does not answer is asked less often
                break
        else:
            found.add((status, body.decode(errors="replace")))
    return found


def taken_over(server: Running, old: list[int], version: str) -> bool:
    """Whether no old worker is left, and new code answers all connections."""
    if len(server.workers) < server.served.workers or set(old) & set(server.workers):
        return False
    return {told for _, told in versions(server, 4)} == {version}


def _command(server: Running, patience: float) -> subprocess.CompletedProcess[str] | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return server.flaskd("reload", patience=patience)
    return None


def _signal(server: Running, _patience: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.process.pid, signal.SIGHUP)


def _touch(server: Running, _patience: float) -> None:
    (server.directory / TOUCHED).touch()


RELOADS: dict[str, Callable[[Running, float], subprocess.CompletedProcess[str] | None]] = {
    "flaskd": _command,
    "gunicorn": _signal,
    "granian": _signal,
    "uvicorn": _signal,
    "uwsgi": _touch,
}
"""How each server is told to reload; a command is waited for, up to `patience` seconds, and returned."""
