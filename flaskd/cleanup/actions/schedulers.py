"""``apscheduler.stop``: ends schedulers; they are paused first, when the stop begins."""

from __future__ import annotations

import atexit
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from flaskd.cleanup.context import StepContext
from flaskd.cleanup.ending import live_action, objects_of
from flaskd.cleanup.kinds import Kind
from flaskd.cleanup.model import Step
from flaskd.cleanup.targets import TargetFields
from flaskd.config import Phase
from flaskd.config.settings import field
from flaskd.process.forks import AppCode

_NO_STORE = "flaskd: none"
_RUNNING = 1
"""The state of a running scheduler (APScheduler 3: STATE_RUNNING)."""


class SchedulerFields(TargetFields):
    """Fields of ``apscheduler.stop``."""

    wait: bool = field(True, description="Wait for the jobs that run; false: do not wait for them.")


def pause_scheduler(scheduler: Any, _context: StepContext, _fields: SchedulerFields) -> None:
    """Let the scheduler begin no more jobs (APScheduler 3: BaseScheduler.pause, which waits for nothing)."""
    if scheduler.running:
        scheduler.pause()


def stop_scheduler(scheduler: Any, context: StepContext, fields: SchedulerFields) -> None:
    """Shut it down (APScheduler 3: BaseScheduler.shutdown, which has no timeout and raises if called twice).

    A scheduler that is not paused is paused first: its thread would raise if it were shut down while it starts jobs.
    """
    pause_scheduler(scheduler, context, fields)
    if scheduler.running:
        _wait_for_round(scheduler)
        _let_stop_again(scheduler)
        scheduler.shutdown(wait=fields.wait)


def _wait_for_round(scheduler: Any) -> None:
    """Wait until its thread has started the jobs that are due: get_jobs takes the lock that the thread holds then."""
    scheduler.get_jobs(jobstore=_NO_STORE)


def _let_stop_again(scheduler: Any) -> None:
    """Make further shutdowns do nothing, because the app's own, at exit (atexit) or in a function, would raise."""
    shutdown = scheduler.shutdown

    class OfThisScheduler:
        """Equal to those exit callbacks that are this scheduler's shutdown: the method itself, or a partial of it."""

        __hash__ = None  # type: ignore[assignment]  # it is only compared

        def __eq__(self, callback: object) -> bool:
            return callback == shutdown or (type(callback) is partial and self == callback.func)

    def shut_down_if_running(*args: Any, **kwargs: Any) -> None:
        if scheduler.running:
            shutdown(*args, **kwargs)

    atexit.unregister(OfThisScheduler())  # type: ignore[arg-type]  # unregister compares callbacks with ==
    scheduler.shutdown = shut_down_if_running


PAUSE = live_action("apscheduler.pause", Phase.ANNOUNCE, pause_scheduler, SchedulerFields, takes="apscheduler.stop")
"""``apscheduler.stop`` runs it first, in the phase announce; no policy can `use` it."""

ACTIONS = (
    live_action(
        "apscheduler.stop",
        Phase.QUIESCE,
        stop_scheduler,
        SchedulerFields,
        needs={"apscheduler": "apscheduler"},
        first=PAUSE,
        kinds=(
            Kind(
                ("apscheduler.schedulers.base:BaseScheduler",),
                ended=lambda scheduler: not scheduler.running,
                # `_pool` is private (APScheduler 3): a scheduler's own pool is shut down together with the scheduler.
                owns=lambda scheduler: [
                    getattr(each, "_pool", None) for each in vars(scheduler).get("_executors", {}).values()
                ],
            ),
        ),
        summary=(
            "Pauses the schedulers of APScheduler at the start of the stop, so that no job begins, "
            "and shuts them down after the drain."
        ),
    ),
)


def pause_all(steps: Iterable[Step], paused: list[Any]) -> None:
    """Pause those running schedulers that these steps end, so that they begin no more jobs.

    `paused` gets each paused scheduler, also if pausing another one raises.
    """
    things = {id(each): each for step in steps if step.action.takes == PAUSE.takes for _, each in objects_of(step)}
    with AppCode():
        running = [each for each in things.values() if each.state == _RUNNING]  # the app's pauses stay
        paused += running
        with ExitStack() as last_first:  # if one raises, the others are paused all the same
            for each in running:
                last_first.callback(_wait_for_round, each)
            for each in running:
                last_first.callback(each.pause)


def resume_all(schedulers: Iterable[Any]) -> None:
    """Resume paused schedulers; for jobs that were due meanwhile each follows its own rules on misfires."""
    with AppCode():
        for each in schedulers:
            if each.running:
                each.resume()
