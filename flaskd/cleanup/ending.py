"""What the actions on live objects share: each ends the objects that its policy names, else those that were found.

Several objects are ended at the same time, so that one that hangs does not hold up the others. Ending an object twice
does no harm. The calls are methods of the objects themselves: no library is imported for them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flaskd.cleanup.context import StepContext, StepFailedError, StepTimedOutError
from flaskd.cleanup.model import Action, Step
from flaskd.cleanup.targets import TargetFields, look_up_targets, targets
from flaskd.process.forks import AppCode
from flaskd.process.threads import AppThread
from flaskd.stacks import stack_of, together
from flaskd.text import listed

if TYPE_CHECKING:
    from flaskd.cleanup.found import Found
    from flaskd.cleanup.kinds import Kind
    from flaskd.config import Fields, Phase

End = Callable[[Any, StepContext, Any], str | None]
"""Ends one object within the time of the context; returns a text for the log or None, raises to fail."""

_AT_A_TIME = 8
"""How many objects of one step are ended at the same time."""
LOOK = 0.1
"""Seconds after which a waiting step looks whether the stop was hurried."""
_MOST_NAMED = 3


def live_action(
    name: str,
    phase: Phase,
    end: End,
    fields: type[TargetFields] = TargetFields,
    *,
    kinds: tuple[Kind, ...] = (),
    takes: str = "",
    needs: Mapping[str, str] = MappingProxyType({}),
    first: Action | None = None,
    summary: str = "",
) -> Action:
    """Make an action of `end`, which ends one live object; `kinds` are those that discovery finds for it."""
    takes = takes or name
    run = partial(end_all, takes, end)
    return Action(
        name,
        fields,
        phase,
        run,
        look_up_targets,
        no_grace,
        needs=needs,
        takes=takes,
        first=first,
        kinds=kinds,
        summary=summary,
    )


def no_grace(_fields: object) -> float:
    """0: the action ends at its timeout, and only needs the moment in which it reports what hangs."""
    return 0.0


def objects_of(step: Step) -> list[tuple[str, Any]]:
    """The objects that a step ends and that exist now, each with its name."""
    return _wanted(step.action.takes, step.found, step.fields)


def _wanted(use: str, found: Sequence[Found] | None, fields: Fields) -> list[tuple[str, Any]]:
    if getattr(fields, "target", None):
        return targets(fields)
    return [(each.name, thing) for each in found or () if each.use == use and (thing := each.object) is not None]


class _SideBySide:
    """Ends several objects at the same time, in threads of its own."""

    def __init__(self, end: End, things: list[tuple[str, Any]], context: StepContext, fields: Fields) -> None:
        self._end, self._context, self._fields = end, context, fields
        self._names = [name for name, _ in things]
        self._left: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._over: queue.SimpleQueue[tuple[int, str | BaseException | None] | None] = queue.SimpleQueue()
        self._at: dict[int, threading.Thread] = {}
        for place, (name, thing) in enumerate(things):
            self._left.put((place, name, thing))

    def _work(self) -> None:
        while True:
            try:
                place, _, thing = self._left.get_nowait()
            except queue.Empty:
                return
            self._at[place] = threading.current_thread()
            try:
                with AppCode():
                    outcome: str | BaseException | None = self._end(thing, self._context, self._fields)
            except BaseException as error:  # noqa: BLE001 - a driver may raise anything; the step fails with it
                outcome = error
            self._over.put((place, outcome))

    def run(self) -> dict[int, str | BaseException | None]:
        """What became of each object that was ended in time, by its place in the list."""
        self._context.on_hurry = lambda: self._over.put(None)
        threads: list[threading.Thread] = []
        for number in range(min(len(self._names), _AT_A_TIME)):
            name = f"flaskd-cleanup-{self._context.policy}-{number}"
            thread = AppThread(target=self._work, name=name)
            try:
                thread.start()
                threads.append(thread)
            except RuntimeError:  # no thread can be had: this one does the work
                self._work()
        ended: dict[int, str | BaseException | None] = {}
        while len(ended) < len(self._names):
            try:  # an object that watches its own time has a moment to report
                word = self._over.get(timeout=self._context.remaining() + self._context.slack / 2)
            except queue.Empty:
                break
            if word is not None:
                ended[word[0]] = word[1]
        if len(ended) == len(self._names):
            for each in threads:  # they have done their work and end at once
                each.join(1)
        return ended

    def stacks(self, silent: list[int], late: list[StepTimedOutError]) -> str:
        """The stacks of the threads here that hang, and those that timed-out objects have reported of theirs."""
        threads = [self._at[place] for place in silent if place in self._at]
        return together([*(stack_of(each, below=__file__) for each in threads), *(each.trace for each in late)])


def end_all(use: str, end: End, context: StepContext, fields: Fields) -> str | None:
    """End all objects. One that fails or hangs is named in the error; the others are ended all the same."""
    things = _wanted(use, context.found, fields)
    if not things:
        return "there is nothing to end"
    names = [name for name, _ in things]
    ending = _SideBySide(end, things, context, fields)
    ended = ending.run()
    silent = [place for place in range(len(things)) if place not in ended]
    faults = [each for each in ended.values() if isinstance(each, BaseException)]
    late = [each for each in faults if isinstance(each, StepTimedOutError)]
    if len(things) == len(faults) == 1 and not late:
        raise faults[0]
    said = [f"{names[place]}: {_words(outcome)}" for place, outcome in sorted(ended.items()) if outcome]
    if silent or late:
        said += [f"not over: {listed([names[place] for place in silent], _MOST_NAMED)}"] if silent else []
        cut = tuple(
            f"{names[place]}: {work}"
            for place, each in sorted(ended.items())
            if isinstance(each, StepTimedOutError)
            for work in each.cut
        )
        raise StepTimedOutError("; ".join([context.overrun(), *said]), ending.stacks(silent, late), cut)
    if faults:
        raise StepFailedError("; ".join(said))
    return "; ".join(said if len(said) == len(things) else [listed(names, _MOST_NAMED), *said])


def _words(outcome: str | BaseException) -> str:
    if isinstance(outcome, (str, StepFailedError)):
        return str(outcome)
    return f"{type(outcome).__name__}: {outcome}"


def joined(thread: threading.Thread, until: Callable[[], float]) -> bool:
    """Wait for the thread as long as `until` gives seconds; True if it has ended."""
    while thread.is_alive() and (left := until()) > 0:
        thread.join(min(left, LOOK))
    return not thread.is_alive()
