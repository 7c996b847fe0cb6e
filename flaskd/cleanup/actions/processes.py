"""``processes.stop``: terminates child processes of the app, and kills those that do not end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flaskd.cleanup.context import StepContext, StepTimedOutError
from flaskd.cleanup.ending import LOOK, live_action
from flaskd.cleanup.targets import TargetFields
from flaskd.config import Duration, Phase
from flaskd.config.settings import field


class ProcessesFields(TargetFields):
    """Fields of ``processes.stop``."""

    kill_grace: Duration = field(2.0, description="How long after SIGTERM a process gets SIGKILL.", ge=0)


def stop_process(process: Any, context: StepContext, fields: ProcessesFields) -> str | None:
    """End a multiprocessing.Process or a subprocess.Popen: SIGTERM, and SIGKILL after `kill_grace` seconds."""
    if _over(process, 0):
        return None
    process.terminate()
    kill_at = context.budget.now() + fields.kill_grace
    if _ends(process, lambda: min(kill_at - context.budget.now(), context.remaining() - 2 * LOOK)):
        return None
    process.kill()
    if _ends(process, context.remaining):
        return "killed"
    raise StepTimedOutError(f"pid {process.pid} was killed and is not gone")


def _ends(process: Any, until: Callable[[], float]) -> bool:
    """Wait for the process as long as `until` gives seconds; True if it has ended."""
    while not (over := _over(process, max(0.0, min(until(), LOOK)))) and until() > 0:
        pass
    return over


def _over(process: Any, timeout: float) -> bool:
    library = sys.modules.get("subprocess")  # an app that uses Popen has imported it
    if library is not None and isinstance(process, library.Popen):
        try:
            process.wait(timeout)
        except library.TimeoutExpired:
            return False
        return True
    process.join(timeout)
    return process.exitcode is not None


ACTIONS = (
    live_action(
        "processes.stop",
        Phase.QUIESCE,
        stop_process,
        ProcessesFields,
        summary="Ends children of multiprocessing and subprocess: SIGTERM, and SIGKILL after a grace.",
    ),
)
