"""``executor.stop``: the jobs of thread and process pools are finished, or cancelled and counted."""

from __future__ import annotations

import contextlib
import queue
from typing import Any

from flaskd.cleanup.context import StepContext, StepTimedOutError
from flaskd.cleanup.ending import joined, live_action
from flaskd.cleanup.kinds import Kind
from flaskd.cleanup.targets import TargetFields
from flaskd.config import Phase
from flaskd.stacks import stack_of, together


def stop_executor(executor: Any, context: StepContext, _fields: TargetFields) -> str | None:
    """Take no more jobs, and finish those it has until the timeout; then cancel what has not begun.

    (concurrent.futures.Executor.shutdown.) Its threads and its queue are private (Python 3.11 to 3.14); without a look
    at them there is no waiting with a timeout, and no telling what was cancelled.
    """
    inside = vars(executor)
    pending = dict(inside.get("_pending_work_items") or {})  # of processes; forgotten by the shutdown
    threads = [*filter(None, [inside.get("_executor_manager_thread")])]  # likewise
    executor.shutdown(wait=False)
    threads += inside.get("_threads", ())  # none is added any more
    busy = [thread for thread in threads if not joined(thread, context.remaining)]
    if not busy:
        return None
    cancelled = _cancel_waiting(inside.get("_work_queue")) + sum(each.future.cancel() for each in pending.values())
    said = [f"{len(busy)} still busy", f"{cancelled} cancelled" if cancelled else ""]
    cut = (f"{cancelled} {'job' if cancelled == 1 else 'jobs'} not begun",) if cancelled else ()
    raise StepTimedOutError(", ".join(filter(None, said)), together(map(stack_of, busy)), cut)


def _cancel_waiting(jobs: queue.SimpleQueue[Any] | None) -> int:
    """Cancel the jobs in the queue of an executor of threads, as its shutdown does, but count them."""
    count = 0
    with contextlib.suppress(queue.Empty):
        while jobs is not None:
            if (job := jobs.get_nowait()) is not None:  # which is the word to end
                count += job.future.cancel()
    if jobs is not None:
        jobs.put(None)
    return count


ACTIONS = (
    live_action(
        "executor.stop",
        Phase.QUIESCE,
        stop_executor,
        kinds=(
            Kind(
                ("concurrent.futures.thread:ThreadPoolExecutor", "concurrent.futures.process:ProcessPoolExecutor"),
                # Private (Python 3.11 to 3.14): there is no public way to ask.
                ended=lambda executor: bool(
                    vars(executor).get("_shutdown", False) or vars(executor).get("_shutdown_thread", False)
                ),
            ),
        ),
    ),
)
