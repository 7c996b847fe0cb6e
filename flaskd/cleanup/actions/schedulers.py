"""``apscheduler.stop``, and the pause before it."""

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
"""The state of a scheduler that begins jobs (APScheduler 3: STATE_RUNNING)."""


class SchedulerFields(TargetFields):
    """Fields of ``apscheduler.stop``."""

    wait: bool = field(True, description="Wait for the jobs that run; false: leave them to themselves.")


def pause_scheduler(scheduler: Any, _context: StepContext, _fields: SchedulerFields) -> None:
    """Begin no more rounds (APScheduler 3: BaseScheduler.pause, which waits for nothing)."""
    if scheduler.running:
        scheduler.pause()


def stop_scheduler(scheduler: Any, context: StepContext, fields: SchedulerFields) -> None:
    """Shut it down (APScheduler 3: BaseScheduler.shutdown, which knows no timeout and refuses a second time).

    Paused first, should it not be: a shutdown in the middle of a round makes its thread raise.
    """
    pause_scheduler(scheduler, context, fields)
    if scheduler.running:
        _wait_for_round(scheduler)
        _let_stop_again(scheduler)
        scheduler.shutdown(wait=fields.wait)


def _wait_for_round(scheduler: Any) -> None:
    """Wait for the round that its thread is at: to be asked for the jobs of a store that it does not have does that."""
    scheduler.get_jobs(jobstore=_NO_STORE)


def _let_stop_again(scheduler: Any) -> None:
    """Make further shutdowns harmless: the app's own, at exit (atexit) or in a function of its own, would raise."""
    shutdown = scheduler.shutdown

    class OfThisScheduler:
        """Equal to all callbacks at exit that are its shutdown: the method, or a partial of it."""

        __hash__ = None  # type: ignore[assignment]  # it is compared alone

        def __eq__(self, callback: object) -> bool:
            return callback == shutdown or (type(callback) is partial and self == callback.func)

    def shut_down_if_running(*args: Any, **kwargs: Any) -> None:
        if scheduler.running:
            shutdown(*args, **kwargs)

    atexit.unregister(OfThisScheduler())  # type: ignore[arg-type]  # which compares its callbacks with it
    scheduler.shutdown = shut_down_if_running


PAUSE = live_action("apscheduler.pause", Phase.ANNOUNCE, pause_scheduler, SchedulerFields, takes="apscheduler.stop")
"""What ``apscheduler.stop`` does first; no policy can `use` it."""

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
                # Private, and all there is (APScheduler 3): a pool that belongs to the scheduler is shut down with it.
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
    """Pause the schedulers that run of those that these steps end; none begins a job from then on.

    `paused` gets them, also where one of them raises.
    """
    things = {id(each): each for step in steps if step.action.takes == PAUSE.takes for _, each in objects_of(step)}
    with AppCode():
        running = [each for each in things.values() if each.state == _RUNNING]  # not those that the app has paused
        paused += running
        with ExitStack() as last_first:  # one that raises keeps no other from it
            for each in running:
                last_first.callback(_wait_for_round, each)
            for each in running:
                last_first.callback(each.pause)


def resume_all(schedulers: Iterable[Any]) -> None:
    """Let those that were paused go on; jobs that were due meanwhile are run by their own rules for that."""
    with AppCode():
        for each in schedulers:
            if each.running:
                each.resume()
