"""A worker's end of the wire: it carries out what the supervisor asks for, and reports what happens here."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flaskd.config import Config
from flaskd.errors import ConfigError, FlaskdError, described
from flaskd.inbox import DrainAsked, ReloadAsked, ResumeAsked, StopAsked
from flaskd.lifecycle import StopReason
from flaskd.pool import messages as say
from flaskd.pool.wire import Wire, WireClosedError
from flaskd.serving.api import Work
from flaskd.serving.inprocess import InProcess
from flaskd.sockets import Address, Listener

if TYPE_CHECKING:
    from flaskd.daemon import Daemon

log = logging.getLogger("flaskd.pool")

_ALONE = StopReason("failure", "the supervisor is gone")


class Link:
    """The control plane of a worker's daemon (`flaskd.holdings.Plane`): what it is asked for comes over the wire.

    `configuration` is the last one from the supervisor; `listeners` are those that it passed, once `passed` is set.
    """

    def __init__(self, wire: Wire, begin: say.Begin) -> None:
        self._wire, self.begin = wire, begin
        self.nodes: list[str] = []
        self.configuration = begin.configuration
        self.listeners: list[Listener] = []
        self.passed = threading.Event()
        self.announced = False
        """Whether the whole service is about to stop."""
        self.leaves = True
        """Whether other workers go on when this one stops."""
        self.drains = False
        """Whether the service drains, or is drained."""
        self._told_to_stop = False
        self._daemon: Daemon
        self._answers: dict[int, tuple[threading.Event, list[say.Answer]]] = {}
        self._numbers = 0
        self._lock = threading.Lock()
        self._ending = False
        self._over = os.eventfd(0)
        """Readable once `close` was called: the listening thread is to end."""
        self._schedulers: threading.Thread | None = None
        """The thread that last paused the app's schedulers or let them go on."""
        self._thread = threading.Thread(target=self._listen, name="flaskd-supervisor", daemon=True)

    def serve(self, daemon: Daemon) -> None:
        """Set the daemon that the messages are for."""
        self._daemon = daemon

    # --- the plane ----------------------------------------------------------------------------------------------------

    def open(self, config: Config, passed: Sequence[Listener]) -> None:  # noqa: ARG002 - of a plane
        """Begin to listen to the supervisor."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening: the listening thread would keep the app's objects from being finalized.

        The wire itself stays open until the process ends: its end tells the supervisor so.
        """
        self._ending = True
        if self._thread.ident is not None:
            os.eventfd_write(self._over, 1)
            self._thread.join()

    def remove_nodes(self) -> None:
        """Do nothing: a worker has no control nodes."""

    def forget(self) -> None:
        """In a forked child, close its copy of the wire."""
        self._wire.forget()
        os.close(self._over)

    # --- to the supervisor (any thread) -------------------------------------------------------------------------------

    def tell(self, message: object) -> None:
        """Send a message; if the supervisor is gone, do nothing: the listening thread notices that."""
        with contextlib.suppress(WireClosedError):
            self._wire.send(message)

    def want(self, what: str, reason: StopReason) -> None:
        """Ask for something that only the supervisor can do; if it is gone, stop this worker."""
        try:
            self._wire.send(say.Wants(what, reason))
        except WireClosedError:
            self._daemon.ask(StopAsked(reason))

    def stops(self, reason: StopReason) -> None:
        """If the supervisor did not ask for this worker's stop, tell it, so that it can start another worker now."""
        if not self._told_to_stop:
            self.tell(say.Leaves(reason))

    def open_endpoint(self, address: Address, token: bytes, allowed_hosts: tuple[str, ...], timeout: float) -> Address:
        """Have the supervisor open a shutdown endpoint; returns its address, or raises the supervisor's error."""
        event, answers = threading.Event(), list[say.Answer]()
        with self._lock:
            self._numbers += 1
            number = self._numbers
            self._answers[number] = event, answers
        self.tell(say.OpenEndpoint(number, address, token, allowed_hosts))
        if not event.wait(timeout):
            raise FlaskdError("cannot open a shutdown endpoint: the supervisor does not answer")
        if (error := answers[0].error) is not None:
            raise error
        there: Address = answers[0].value
        return there

    # --- from the supervisor (a thread of its own) --------------------------------------------------------------------

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._wire, select.POLLIN)
        poll.register(self._over, select.POLLIN)
        try:
            while self._wire.has_message or self._over not in dict(poll.poll()):
                message, descriptors = self._wire.receive()
                try:
                    self._heard(message, descriptors)
                except BaseException:  # for example from the app's objects; the next message must be read
                    log.exception("cannot do what the supervisor asks for")
        except WireClosedError:
            if not self._ending:
                self._alone()

    def _alone(self) -> None:
        """Finish the requests in hand and end, because the supervisor is gone."""
        log.error("the supervisor is gone: this worker finishes its requests, and ends")
        self._told_to_stop = True
        self._share(leave=False)
        self._daemon.ask(StopAsked(_ALONE))

    def _share(self, *, leave: bool) -> None:
        """Note whether other workers go on accepting from the listeners (`leave`), before the next event is handled.

        Listeners that are kept outside of flaskd are shared in any case.
        """

        def share() -> None:
            for each in self._daemon.holdings.listeners:
                each.shared = leave or each.kept

        self._daemon.inbox.post(Work(share))

    def _heard(self, message: Any, descriptors: Sequence[int]) -> None:  # noqa: C901, PLR0912 - one case for each
        daemon = self._daemon
        match message:
            case say.Serve(listeners):
                self.listeners = _listeners(listeners, descriptors)
                self.passed.set()
            case say.DrainNow():
                self.drains = True
                self._share(leave=False)
                daemon.ask(DrainAsked())
            case say.CloseListeners():
                serving = daemon.serving
                assert isinstance(serving, InProcess)
                daemon.inbox.post(Work(serving.close_listeners))  # runs after the drain that was asked for before
            case say.Resume(listeners):
                self.listeners = _listeners(listeners, descriptors)
                self.drains = False
                daemon.ask(ResumeAsked())
            case say.Announce():
                self.announced = True
                self._share(leave=False)
                daemon.inbox.post(Work(daemon.serving.announce_stop))  # after that: shared ones would be left
            case say.StopNow(reason, within, leave):
                self.leaves, self._told_to_stop = leave, True
                self._share(leave=leave)
                daemon.ask(StopAsked(reason, within=within))
            case say.Hurry(reason):
                daemon.ask(StopAsked(reason, now=True))
            case say.Renew(number, configuration):
                self.configuration = configuration
                daemon.ask(ReloadAsked(reply=_Renewed(self, number)))
            case say.PauseSchedulers(number):
                self._at_schedulers(number)
            case say.ResumeSchedulers():
                self._at_schedulers()
            case say.LogLevel(level):
                daemon.logs.set_level(level)
            case say.Ask(number, what):
                self._answer(number, what, stacks=message.stacks)
            case say.Answer(number):
                event, answers = self._answers.pop(number)
                answers.append(message)
                event.set()

    def _at_schedulers(self, number: int = 0) -> None:
        """Pause the app's schedulers and answer; with number 0, let them go on. In a thread, because both may wait."""
        before, serving = self._schedulers, self._daemon.serving
        assert isinstance(serving, InProcess)

        def run() -> None:
            if before is not None:
                before.join()
            error = None
            try:
                if number or not self._told_to_stop:  # a stop under way has paused them itself
                    serving.pause_schedulers(on=number > 0)
            except BaseException as failure:  # raised by the app's own objects
                log.exception(f"cannot {'pause' if number else 'resume'} the app's schedulers")
                error = FlaskdError(described(failure))
            if number:
                self.tell(say.Answer(number, error=error))

        self._schedulers = threading.Thread(target=run, name="flaskd-schedulers", daemon=True)
        self._schedulers.start()

    def _answer(self, number: int, what: str, *, stacks: bool) -> None:
        serving = self._daemon.serving

        def answer() -> None:
            value: Any = None
            error: FlaskdError | None = None
            try:
                match what:
                    case "requests":
                        value = serving.requests(stacks=stacks)
                    case "threads":
                        value = serving.threads(stacks=stacks)
                    case "files":
                        value = serving.source_files()
                    case "stop":
                        value = serving.describe_stop()
                    case "plan":
                        value = serving.plan(self._daemon.configuration or self.configuration)
            except BaseException as failure:  # noqa: BLE001 - from the app's own objects; sent as the answer
                error = failure if isinstance(failure, FlaskdError) else FlaskdError(described(failure))
            self.tell(say.Answer(number, value, error))

        if what == "plan":  # it may take long
            threading.Thread(target=answer, name="flaskd-plan", daemon=True).start()
        else:
            answer()


class _Renewed:
    """The reply to a reload that the supervisor asked for with `Renew`; it is sent as an `Answer`."""

    def __init__(self, link: Link, number: int) -> None:
        self._link, self._number = link, number

    def progress(self, fields: object) -> None:
        """Do nothing: only the outcome is sent."""

    def ok(self, *_: object, **__: object) -> None:
        """Tell the supervisor that the configuration is in force."""
        self._link.tell(say.Answer(self._number))

    def error(self, code: str, message: str, *, detail: object = None) -> None:  # noqa: ARG002 - for programs
        """Tell the supervisor why the configuration is not in force."""
        kind = ConfigError if code == ConfigError.code else FlaskdError
        self._link.tell(say.Answer(self._number, error=kind(f"worker {self._link.begin.slot}: {message}")))


def _listeners(passed: Sequence[say.Passed], descriptors: Sequence[int]) -> list[Listener]:
    found = []
    for each, descriptor in zip(passed, descriptors, strict=True):
        # Shared: if this worker ends, others go on accepting there, unless the supervisor says that they do not.
        listener = Listener(each.address, socket.socket(fileno=descriptor), shared=True, copied=True)
        listener.kept, listener.stored = each.kept, each.stored
        found.append(listener)
    return found
