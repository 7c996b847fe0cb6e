"""``logging.flush``: writes out what the app has logged.

A QueueHandler passes records to a QueueListener, whose thread is a daemon thread: records that are in the queue when
the process ends are lost. The listener is the handler's attribute ``listener``, which logging.config sets from Python
3.12 on, and which apps set themselves before that. ``logging.shutdown`` is not called, because it would also close
flaskd's own handlers.
"""

from __future__ import annotations

import logging
import queue
import sys
import time
from typing import TYPE_CHECKING, Any

from flaskd.cleanup.context import StepContext, StepFailedError
from flaskd.cleanup.model import Action
from flaskd.config import Phase, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from logging.handlers import QueueListener

_PAUSE = 0.01
"""Seconds between two tries to put the end marker into a full queue."""


class FlushFields(Settings):
    """``logging.flush`` has no fields."""


def flush_logs(context: StepContext, _fields: FlushFields) -> str:
    """Empty the queues of all queue handlers, and flush every handler of every logger.

    Later records are written at once by the thread that logs them, so these are not lost either.
    """
    listeners, handlers, faults = 0, list(_handlers()), []
    for handler in handlers:
        try:
            listeners += _end_listener(handler, context)
        except Exception as error:  # noqa: BLE001 - the app's own class may raise; the others are flushed
            faults.append(f"{_named(handler)}: {error!r}")
    for handler in handlers:
        try:
            handler.flush()
        except Exception as error:  # noqa: BLE001 - likewise
            faults.append(f"{_named(handler)}: {error!r}")
    if faults:
        raise StepFailedError(f"cannot flush {'; '.join(faults)}")
    return f"{len(handlers)} flushed, {listeners} emptied"


def _named(handler: logging.Handler) -> str:
    return handler.name or type(handler).__name__


def _handlers() -> Iterator[logging.Handler]:
    """Every handler that a logger has or that another handler passes records to; each before those it passes to."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    waiting = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    seen: set[int] = set()
    while waiting:
        handler = waiting.pop(0)
        if id(handler) not in seen and isinstance(handler, logging.Handler):
            seen.add(id(handler))
            yield handler
            waiting += getattr(getattr(handler, "listener", None), "handlers", ())
            waiting.append(getattr(handler, "target", None))  # type: ignore[arg-type]  # logging.handlers.MemoryHandler


def _end_listener(handler: Any, context: StepContext) -> bool:
    """End the listener of a queue handler once its queue is empty; False if the handler has none that runs."""
    listener = getattr(handler, "listener", None)
    library = sys.modules.get("logging.handlers")  # an app that uses its classes has imported it
    if library is None or not isinstance(listener, library.QueueListener):
        stop = getattr(listener, "stop", None)
        if stop is not None:  # a listener of the app's own class
            stop()
        return stop is not None
    if isinstance(handler, library.QueueHandler):
        handler.enqueue = listener.handle  # from now on no thread reads the queue
    thread = getattr(listener, "_thread", None)
    running = thread is not None and thread.is_alive()
    if running:
        _retry_while_full(listener.stop, context)
        if sys.version_info < (3, 12, 2):
            # gh-114706: in these versions the app's own stop(), at exit, raises if it finds no thread.
            listener._thread = thread  # noqa: SLF001
    _take_the_rest(listener)
    return running


def _retry_while_full(stop: Callable[[], None], context: StepContext) -> None:
    """Stop a listener; retries while its queue is full, because stop() does not wait for room (put_nowait)."""
    while True:
        try:
            stop()
        except queue.Full:
            if context.remaining() <= 0:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _take_the_rest(listener: QueueListener) -> None:
    """Write the records that came into the queue behind the end marker while the listener ended."""
    sentinel = getattr(listener, "_sentinel", None)
    while True:
        try:
            record = listener.dequeue(block=False)
        except queue.Empty:
            return
        if record is not sentinel:
            listener.handle(record)


ACTIONS = (
    Action(
        "logging.flush",
        FlushFields,
        Phase.FLUSH,
        flush_logs,
        summary="Empties the queues of the app's logging, and flushes its handlers.",
    ),
)
