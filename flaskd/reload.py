"""Reloads: a configuration is read, compared with the one in force, and put into force, or the old one is kept."""

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
    """A reload that only a restart could carry out."""

    code = "restart-needed"


def tell_doubts(configuration: Configuration) -> None:
    """Warn of what the configuration says and surely does not mean."""
    for each in configuration.doubts:
        log.warning(str(each))


class Reload:
    """Reloads of one daemon, in the thread of its events; `read` may be called from any.

    `load` reads the configuration, `prepare` makes what it needs, `apply` puts it into force or changes nothing and
    raises; before, where there are workers, `serving` brings it to them, with new code unless only the configuration
    is wanted. `status` says that flaskd is ready, for people.
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
        """Who waits for the end of the reload under way."""
        self._asked_again: float | None = None
        self._found: Found | None = None
        """What the workers are getting."""
        self._only_configuration = True
        self._when_ready = False
        self._watch: FileWatch | None = None
        self.is_workers = False
        """Whether it is a worker's, whose supervisor looks at the file, and says what is kept."""
        self.follows_code = False
        """Whether a saved file of the app brings new code."""
        self._code: CodeWatch | None = None
        self._made_at = time.time()
        """Before the app was imported."""

    def read(self) -> Configuration:
        """What would be in force after a reload. Raises ConfigError (any thread; a file may hang)."""
        new = load_again(self._load, self._present)
        if keys := self._present.restart_keys(new):
            raise RestartNeededError(f"{', '.join(keys)}: cannot change without a restart")
        return new

    def _read_whole(self) -> Found:
        new = self.read()
        return new, self._prepare(new)

    # --- the file ---

    def follow(self, configuration: Configuration) -> None:
        """Take a configuration as the one in force."""
        self._present = configuration
        if self._watch is not None:
            self._watch.known = configuration.digest
            (self._watch.start if configuration.values.watch else self._watch.stop)()

    def started(self) -> None:
        """The start is over: look at the files that are to be watched, and reload where SIGHUP came meanwhile."""
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
        """Look no more."""
        if self._watch is not None:
            self._watch.stop()
        if self._code is not None:
            self._code.stop()

    def file_changed(self, event: FileChanged) -> None:
        """Reload once for an edit that was seen, whatever comes of it."""
        if self._lifecycle.state is State.READY and self._watch is not None and self._watch.known != event.digest:
            self._watch.known = event.digest
            log.info(f"{self._present.path} has changed")
            self.asked(ReloadAsked(only_configuration=True))

    # --- one reload ---

    def asked(self, event: ReloadAsked) -> None:
        """Begin a reload; under Type=notify-reload the manager waits for an answer to each SIGHUP."""
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
            self._asked_again = event.since  # what is being read may be older than this wish
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
        """Take over what was read, or read again where a wish came meanwhile."""
        if not self._readings.ended(reading) or self._lifecycle.state is not State.RELOADING:
            return  # it came too late, or a stop came first; who waited was told
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
        """The workers have what was read, or keep what they had."""
        if self._found is None or self._found[0] is not event.configuration:
            return  # a stop came first, or another reload
        found, self._found = self._found if event.error is None or event.replaced else None, None
        if self._lifecycle.state is State.RELOADING:
            self._take_over(found, event.error)
        elif found is not None:  # a drain came first; there are workers that have it
            self._apply(*found)

    def _take_over(self, found: Found | None, error: BaseException | None) -> None:
        if found is not None:
            try:
                self._apply(*found)
            except Exception as failure:  # noqa: BLE001 - told below; what was before is in force
                found, error = None, failure
        if self._asked_again is not None:
            self._begin(self._asked_again)  # once for all that came meanwhile: a storm is not echoed
        else:
            self.end(error, new_in_force=found is not None)

    def reading_late(self) -> None:
        """Give a reading up that has had its time; the thread that hangs in it cannot be ended."""
        if self._readings.late:
            what = f"{self._present.path or 'the configuration'}, and what its policies need"
            self.end(FlaskdError(f"reading {what}, took longer than {LIMIT:g}s; is it a file, on a disk that answers?"))

    def end(self, error: BaseException | None, *, new_in_force: bool = False) -> None:
        """Be ready again, and tell all who wait what came of it; nothing when no reload is under way."""
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
        for reply in waiters:
            reply.error(error.code if isinstance(error, FlaskdError) else FlaskdError.code, fault + trace)

    def overtaken(self, by: str) -> None:
        """A stop or a drain came first: tell all who wait."""
        self._readings.give_up()
        self._asked_again = None
        waiters, self.waiters = self.waiters, []
        if self._code is not None:
            self._code.again()
        for reply in waiters:
            reply.error(NotNowError.code, f"the reload was overtaken by a {by}")
