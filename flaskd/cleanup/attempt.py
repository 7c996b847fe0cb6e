"""One attempt at one step: its thread, its result, and its stack while it hangs."""

from __future__ import annotations

import queue
import traceback
from typing import TYPE_CHECKING

from flaskd.cleanup.context import StepContext, StepFailedError, StepTimedOutError
from flaskd.cleanup.discovery import discover
from flaskd.cleanup.model import Fate, Verdict
from flaskd.process.forks import AppCode
from flaskd.process.threads import AppThread
from flaskd.stacks import stack_of
from flaskd.text import escaped, traceback_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from flaskd.cleanup.model import Step

_MOST_FRAMES = 60
_LONGEST_TEXT = 4000
_LONGEST_TRACE = 32_000


class Spare:
    """A thread made in advance that runs steps one after the other; for a stop at which no other can be started."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = AppThread(target=self._run, name="flaskd-cleanup-spare")
        self._user: Attempt | None = None

    def start(self) -> None:
        """Start the thread; raises RuntimeError if no thread can be had."""
        self.thread.start()

    @property
    def free(self) -> bool:
        """Whether the step that it ran last is over."""
        return self.thread.is_alive() and (self._user is None or self._user.verdict is not None)

    def run(self, attempt: Attempt, work: Callable[[], None]) -> None:
        """Let the thread run an attempt's work next."""
        self._user = attempt
        self._work.put(work)

    def dismiss(self) -> None:
        """Let the thread end as soon as it is free."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class Attempt:
    """A step that runs in a daemon thread of its own; `over` is called in that thread once `verdict` is known.

    If no thread can be had, it runs in the thread of `spare`, if that is given and free.
    """

    def __init__(self, step: Step, context: StepContext, over: Callable[[], None], spare: Spare | None = None) -> None:
        self.step = step
        self.context = context
        self.verdict: Verdict | None = None
        self.thread = AppThread(target=self._work, name=f"flaskd-cleanup-{step.name}")
        self._over, self._spare = over, spare
        self._grace = step.action.grace(step.fields) if step.action.grace else None

    def start(self) -> bool:
        """Start it; False if no thread can be had."""
        try:
            self.thread.start()
        except RuntimeError:
            if self._spare is None or not self._spare.free:
                return False
            self.thread = self._spare.thread
            self._spare.run(self, self._work)
        return True

    def fail(self, why: str) -> None:
        """Set the verdict of an attempt that could not be started."""
        self.verdict = Verdict(Fate.FAILED, why)
        self._over()

    def given_up_at(self) -> float:
        """The moment at which the runner abandons it."""
        return self.context.given_up_at(self._grace)

    def abandoned(self) -> Verdict:
        """The verdict on an attempt that is abandoned: its thread runs on, and nothing waits for it."""
        return Verdict(Fate.TIMED_OUT, f"{self.context.overrun()}; abandoned", trace=self.step.redact(self.stack()))

    def join(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for the thread of an attempt that is over; do not wait for one that hangs."""
        if self.verdict is not None and self.thread.ident is not None and not self._in_spare:
            self.thread.join(max(0.0, timeout))

    @property
    def alive(self) -> bool:
        """Whether a thread still works for it."""
        return self.verdict is None if self._in_spare else self.thread.is_alive()

    @property
    def _in_spare(self) -> bool:
        """Whether it runs in the spare thread, which does not end with it."""
        return self._spare is not None and self.thread is self._spare.thread

    def stack(self) -> str:
        """Where its thread is now, from the action's first frame on; empty if the thread has ended."""
        return stack_of(self.thread, below=__file__)

    def _work(self) -> None:
        try:
            verdict = self._judged()
            # Log, record, replies and STATUS must not show what was interpolated.
            redact = self.step.redact
            why, detail = (_line(redact(text)) for text in (verdict.why, verdict.detail))
            cut = tuple(_line(redact(each)) for each in verdict.cut)
            self.verdict = Verdict(verdict.fate, why, detail, redact(verdict.trace)[-_LONGEST_TRACE:], cut)
        except BaseException as error:  # noqa: BLE001 - for example, the text of an exception may raise
            self.verdict = Verdict(Fate.FAILED, type(error).__name__)
        finally:
            self._over()

    def _judged(self) -> Verdict:
        """Run the action. SystemExit and the like fail the step, and end nothing else."""
        step = self.step
        try:
            with AppCode():
                if step.takes and self.context.found is None:  # discovery has not run
                    self.context.found = discover(self.context.app)
                detail = step.action.run(self.context, step.fields)
        except StepTimedOutError as error:
            return Verdict(Fate.TIMED_OUT, str(error), trace=error.trace, cut=error.cut)
        except StepFailedError as error:
            return Verdict(Fate.FAILED, str(error))
        except BaseException as error:  # noqa: BLE001 - see above
            # The text is made here, in the step's own time, because the text of an exception is the user's code, too.
            said = "".join(traceback.format_exception_only(error))
            inner = error.__traceback__.tb_next if error.__traceback__ else None
            return Verdict(Fate.FAILED, said, trace=traceback_of(error, inner, limit=-_MOST_FRAMES))
        return Verdict(Fate.OK, detail=str(detail) if detail else "")


def _line(text: str) -> str:
    """The text as one line of limited length, with control characters escaped."""
    return escaped(" | ".join(filter(None, map(str.strip, text.splitlines()))))[:_LONGEST_TEXT]
