"""``executor.stop``: finishes the jobs of thread and process pools, and counts those that it must cancel."""

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
    """Take no more jobs and finish those there are until the timeout; then cancel those that have not begun.

    It calls concurrent.futures.Executor.shutdown. That has no timeout and does not count what it cancels, so the
    threads and the queue are looked at, which are private (Python 3.11 to 3.14).
    """
    inside = vars(executor)
    pending = dict(inside.get("_pending_work_items") or {})  # of a process pool; the shutdown drops them
    threads = [*filter(None, [inside.get("_executor_manager_thread")])]  # the shutdown drops it, too
    executor.shutdown(wait=False)
    threads += inside.get("_threads", ())  # after the shutdown none is added
    busy = [thread for thread in threads if not joined(thread, context.remaining)]
    if not busy:
        return None
    cancelled = _cancel_waiting(inside.get("_work_queue")) + sum(each.future.cancel() for each in pending.values())
    said = [f"{len(busy)} still busy", f"{cancelled} cancelled" if cancelled else ""]
    cut = (f"{cancelled} {'job' if cancelled == 1 else 'jobs'} not begun",) if cancelled else ()
    raise StepTimedOutError(", ".join(filter(None, said)), together(map(stack_of, busy)), cut)


def _cancel_waiting(jobs: queue.SimpleQueue[Any] | None) -> int:
    """Cancel the jobs in the queue of a thread pool, as its shutdown does, and count them."""
    count = 0
    with contextlib.suppress(queue.Empty):
        while jobs is not None:
            if (job := jobs.get_nowait()) is not None:  # None tells a thread of the pool to end
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
                # These attributes are private (Python 3.11 to 3.14); there are no public ones.
                ended=lambda executor: bool(
                    vars(executor).get("_shutdown", False) or vars(executor).get("_shutdown_thread", False)
                ),
            ),
        ),
        summary=(
            "Lets the executors of concurrent.futures take no more jobs, and finishes those that they "
            "have; what has not begun at the timeout is cancelled and counted."
        ),
    ),
)
