"""What the cleanup tests share: steps made of functions, a runner for them, and waiting for processes to end."""

import os
import select
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

from patience import PATIENCE

from flaskd.cleanup import Action, Plan, Runner, Step
from flaskd.config import Phase, Section


class NoFields(Section):
    pass


@dataclass(frozen=True)
class Reason:
    kind: str = "signal"

    def __str__(self):
        return f"{self.kind}: SIGTERM"


def step(name, run=lambda _context: None, *, phase=Phase.QUIESCE, timeout=PATIENCE, **more):
    """Give a step whose action is a function of the context."""
    action = Action("test", NoFields, phase, lambda context, _fields: run(context))
    return Step(name, action, NoFields(), phase, timeout, **more)


def runner(*steps, deadline=PATIENCE, reserve=0.0, max_parallel=8, clock=time.monotonic, **more):
    """Give a runner; `deadline` is seconds from now."""
    return Runner(
        Plan(steps),
        **{"app": None, "reason": Reason()} | more,
        deadline=clock() + deadline,
        reserve=reserve,
        max_parallel=max_parallel,
        clock=clock,
    )


def run(*steps, **more):
    """Run the steps through all phases and give their results by name, in the order in which they became known."""
    return {result.name: result for result in runner(*steps, **more).run(Phase)}


def fates(results):
    """Give each step's fate as text."""
    return {name: str(result.fate) for name, result in results.items()}


class Hang:
    """An action that signals when it runs, and runs until it is released."""

    def __init__(self):
        self.entered = threading.Event()
        self.released = threading.Event()

    def __call__(self, _context):
        self.entered.set()
        self.released.wait()


@contextmanager
def hanging():
    """Give a `Hang`; afterwards no thread of the cleanup is left running."""
    hang = Hang()
    try:
        yield hang
    finally:
        hang.released.set()
        for thread in threading.enumerate():
            if thread.name.startswith("flaskd-cleanup"):
                thread.join(PATIENCE)
                assert not thread.is_alive(), thread.name


@contextmanager
def in_background(call):
    """Run `call` in a thread; gives a list that has its result when the block is left."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    try:
        yield results
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def ended(pid):
    """Whether the process ends in time (pidfd_open(2)); a zombie has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(PATIENCE * 1000))
    finally:
        os.close(descriptor)
