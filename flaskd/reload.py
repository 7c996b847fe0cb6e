"""Reloads: flaskd reads a configuration, compares it with the one in force, and puts it into force or keeps the old."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flaskd.cleanup import Plan
from flaskd.config import Configuration, FileWatch, load_again
from flaskd.errors import ConfigError, FlaskdError, NotNowError, described
from flaskd.inbox import FileChanged, Inbox, ReadingLate, ReloadAsked
from flaskd.lifecycle import Event, Lifecycle, State
from flaskd.notices import Notices, Refused, ReloadBegan, ReloadEnded, SignalRefused
from flaskd.protocol import Reply
from flaskd.readings import LIMIT, Reading, ReadingOver, Readings
from flaskd.serving.api import Renewed, Serving
from flaskd.serving.code import CodeWatch

log = logging.getLogger("flaskd.daemon")

Found = tuple[Configuration, Plan]
"""A configuration that was read, and the plan that was prepared for it."""


class RestartNeededError(ConfigError):
    """The new configuration changes keys that need a restart."""

    code = "restart-needed"


def tell_doubts(configuration: Configuration) -> None:
    """Log a warning for each value that is valid but probably not meant."""
    for each in configuration.doubts:
        log.warning(str(each))


class Reload:
    """The reloads of one daemon, in the thread of its events; only `read` is for any thread.

    `load` reads the configuration, `prepare` makes what it needs, `apply` puts it into force, or raises and changes
    nothing. If there are workers, `serving` brings it to them before, with new code unless only the configuration is to
    change. `status` returns the status line of a ready flaskd.
    """

    def __init__(
        self,
        load: Callable[[], Configuration],
        *,
        prepare: Callable[[Configuration], Plan],
        apply: Callable[[Configuration, Plan], None],
        serving: Callable[[], Serving],
        status: Callable[[], str],
        lifecycle: Lifecycle,
        notices: Notices,
        inbox: Inbox,
    ) -> None:
        self._load, self._prepare, self._apply, self._status = load, prepare, apply, status
        self._serving = serving
        self._lifecycle, self._notices, self._inbox = lifecycle, notices, inbox
        self._present: Configuration
        self._readings: Readings[Found] = Readings(self._read_whole, lambda reading: inbox.post(ReadingOver(reading)))
        self.waiters: list[Reply] = []
        """The replies that wait for the end of the reload under way."""
        self._asked_again: float | None = None
        self._found: Found | None = None
        """The configuration and plan that are being brought to the workers."""
        self._only_configuration = True
        self._when_ready = False
        self._watch: FileWatch | None = None
        self.is_workers = False
        """Whether this is in a worker, whose supervisor watches the file, and logs outcomes."""
        self.follows_code = False
        """Whether a saved file of the app leads to a reload (``flaskd serve --reload``)."""
        self._code: CodeWatch | None = None
        self._made_at = time.time()
        """A time.time() before the app was imported."""

    def read(self) -> Configuration:
        """Read the configuration that a reload would put into force (any thread; reading may hang).

        Raises ConfigError, RestartNeededError if it changes keys that need a restart.
        """
        new = load_again(self._load, self._present)
        if keys := self._present.restart_keys(new):
            raise RestartNeededError(f"{', '.join(keys)}: cannot change without a restart")
        return new

    def _read_whole(self) -> Found:
        new = self.read()
        return new, self._prepare(new)

    # --- the file ---

    def follow(self, configuration: Configuration) -> None:
        """Take a configuration as the one in force, and watch its file if it says so."""
        self._present = configuration
        if self._watch is not None:
            self._watch.known = configuration.digest
            (self._watch.start if configuration.values.watch else self._watch.stop)()

    def started(self) -> None:
        """After the start, begin to watch files, and reload if a SIGHUP came during the start."""
        if self._present.path is not None and not self.is_workers:
            self._watch = FileWatch(
                self._present.path,
                changed=lambda digest: self._inbox.post(FileChanged(digest)),
                wanted=lambda: self._lifecycle.state is State.READY,
            )
            self.follow(self._present)
        if self.follows_code:
            self._code = CodeWatch(
                lambda: self._serving().source_files(),
                changed=lambda: self._inbox.post(ReloadAsked()),
                wanted=lambda: self._lifecycle.state in {State.READY, State.RELOADING},
                since=self._made_at,
            )
            self._code.start()
        if self._when_ready:
            self.asked(ReloadAsked())

    def close(self) -> None:
        """Stop watching files."""
        if self._watch is not None:
            self._watch.stop()
        if self._code is not None:
            self._code.stop()

    def file_changed(self, event: FileChanged) -> None:
        """Reload for an edit of the file, once, whatever the outcome."""
        if self._lifecycle.state is State.READY and self._watch is not None and self._watch.known != event.digest:
            self._watch.known = event.digest
            log.info(f"{self._present.path} has changed")
            self.asked(ReloadAsked(only_configuration=True))

    # --- one reload ---

    def asked(self, event: ReloadAsked) -> None:
        """Begin a reload. With Type=notify-reload, systemd waits for an answer to each SIGHUP."""
        before = self._lifecycle.state
        if event.signalled and before is State.STARTING:
            self._when_ready = True
            log.info("SIGHUP: the configuration is read again when flaskd is ready")
            return
        try:
            self._lifecycle.handle(Event.RELOAD)
        except NotNowError as error:
            self._notices.tell(Refused(str(error)))
            event.reply.error(error.code, str(error))
            if event.signalled and before in {State.DRAINING, State.DRAINED}:
                self._notices.tell(SignalRefused(event.since, before, str(error)))
            return
        self.waiters.append(event.reply)
        if before is State.RELOADING:
            self._asked_again = event.since  # the reading under way may have begun before an edit
            self._only_configuration &= event.only_configuration
            self._serving().break_off_renewal("another reload was asked for")
        else:
            self._only_configuration = event.only_configuration
            self._begin(event.since)

    def _begin(self, since: float) -> None:
        self._asked_again = self._found = None
        if self._code is not None:
            self._code.since = time.time()
        self._notices.tell(ReloadBegan(since))
        try:
            self._inbox.post_at(self._readings.begin(), ReadingLate())
        except FlaskdError as error:
            self.end(FlaskdError(f"cannot read the configuration: {error}"))

    def reading_over(self, reading: Reading[Found]) -> None:
        """Put what was read into force, or read again if another reload was asked for meanwhile."""
        if not self._readings.ended(reading) or self._lifecycle.state is not State.RELOADING:
            return  # it came too late, or a stop came first, and the replies were answered
        if reading.found is None or not self._serving().renews:
            self._take_over(reading.found, reading.error)
        elif self._asked_again is not None:
            self._begin(self._asked_again)
        else:
            self._found = reading.found
            new, _ = reading.found
            only = self._only_configuration and not self._present.renewal_keys(new)
            self._serving().renew(new, only_configuration=only)

    def renewed(self, event: Renewed) -> None:
        """Go on after the workers have taken what was read, or have kept the old configuration."""
        if self._found is None or self._found[0] is not event.configuration:
            return  # a stop came first, or another reload
        found, self._found = self._found if event.error is None or event.replaced else None, None
        if self._lifecycle.state is State.RELOADING:
            self._take_over(found, event.error)
        elif found is not None:  # a drain came first, but some workers have it
            self._apply(*found)

    def _take_over(self, found: Found | None, error: BaseException | None) -> None:
        if found is not None:
            try:
                self._apply(*found)
            except Exception as failure:  # noqa: BLE001 - reported below; the old configuration is in force
                found, error = None, failure
        if self._asked_again is not None:
            self._begin(self._asked_again)  # one more reload for all that were asked for meanwhile
        else:
            self.end(error, new_in_force=found is not None)

    def reading_late(self) -> None:
        """Give up a reading that takes longer than `LIMIT` seconds; its thread hangs, and cannot be ended."""
        if self._readings.late:
            what = f"{self._present.path or 'the configuration'}, and what its policies need"
            self.end(FlaskdError(f"reading {what}, took longer than {LIMIT:g}s; is it a file, on a disk that answers?"))

    def end(self, error: BaseException | None, *, new_in_force: bool = False) -> None:
        """Be ready again, and answer all replies with the outcome; do nothing if no reload is under way."""
        if self._lifecycle.state is not State.RELOADING:
            return
        self._readings.give_up()
        waiters, self.waiters = self.waiters, []
        self._lifecycle.handle(Event.RELOADED)
        path = self._present.path
        if error is None:
            self._notices.tell(ReloadEnded(str(path or "the defaults"), self._status()))
            if not self.is_workers:
                tell_doubts(self._present)
            for reply in waiters:
                reply.ok("reloaded", {"config": str(path)} if path else {})
            return
        known = isinstance(error, FlaskdError)
        kept = f"; keeping the old configuration{' and workers' * self._serving().renews}"
        kept = "; the new configuration is in force" if new_in_force else "" if self.is_workers else kept
        fault = f"{error if known else described(error)}{kept}"
        trace = f"\n{error.details}".rstrip() if isinstance(error, FlaskdError) else ""
        if self._code is not None:
            self._code.add_those_of(trace)
        self._notices.tell(ReloadEnded(str(path), self._status(), fault, None if known else error, trace))
        code, detail = (error.code, error.for_programs) if isinstance(error, FlaskdError) else (FlaskdError.code, {})
        for reply in waiters:
            reply.error(code, fault + trace, detail=detail)

    def overtaken(self, by: str) -> None:
        """Answer all replies with an error, because a stop or a drain came first."""
        self._readings.give_up()
        self._asked_again = None
        waiters, self.waiters = self.waiters, []
        if self._code is not None:
            self._code.again()
        for reply in waiters:
            reply.error(NotNowError.code, f"the reload was broken off by a {by}")
