import configparser
import io
import json
import logging
import logging.config
import os
import re
import sys
import threading
from contextlib import contextmanager

import pytest

from flaskd.log import throttle
from flaskd.log.access import log_access
from flaskd.log.setup import Logs, bounded_by, in_journal
from flaskd.units import timestamp

MOMENT = 1_700_000_000.25
"""2023-11-14T22:13:20.250Z"""

log = logging.getLogger("flaskd.test")


class Stream(io.StringIO):
    def lines(self):
        return self.getvalue().splitlines()


class Terminal(Stream):
    def isatty(self):
        return True


@contextmanager
def logging_to(stream, log_format="text", *, level="info", access="off"):
    """Set the logs up on a standard error of the test; gives a function that configures them again.

    It is no fixture, because before each test pytest sets its own standard error and adds handlers to quiet loggers.
    """
    with pytest.MonkeyPatch.context() as patch, Logs() as logs:
        patch.setattr(sys, "stderr", stream)
        logs.apply(log_format=log_format, level=level, access=access)
        yield logs.apply


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch):
    for name in ("JOURNAL_STREAM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def without_times(lines):
    for line in lines:
        assert (line[4], line[7], line[10], line[23]) == ("-", "-", "T", "Z")
    return [line[25:] for line in lines]


def fields(**more):
    return {
        "client": "192.0.2.7", "time": MOMENT, "method": "GET", "target": "/shop?q=1", "protocol": "HTTP/1.1",
        "status": 200, "bytes": 12, "referer": "", "agent": "curl/8", "took": 0.25,
    } | more  # fmt: skip


def fail():
    try:
        raise LookupError("gone")
    except LookupError:
        log.exception("failed")


def test_times_are_rfc_3339_in_utc():
    """A moment has its date, its milliseconds and a Z."""
    assert timestamp(MOMENT) == "2023-11-14T22:13:20.250Z"
    assert timestamp(1_700_000_000) == "2023-11-14T22:13:20.000Z"


def test_text_is_time_level_and_message():
    """Text has one line for each record of flaskd and waitress; waitress' warning about its queue is dropped."""
    with logging_to(stderr := Stream()):
        log.info("ready: %s", "shop")
        log.warning("late")
        logging.getLogger("waitress").warning("odd")
        logging.getLogger("waitress.queue").warning("Task queue depth is 1")
        log.debug("not shown")
    assert without_times(stderr.lines()) == ["info    ready: shop", "warning late", "warning odd"]


@pytest.mark.parametrize(
    ("log_format", "line"), [("text", "info    worker 3: ready"), ("journal", "<6>worker 3: ready")]
)
def test_text_of_a_worker_says_which_one_it_is(log_format, line):
    """Text of a worker names the worker, once for a record with several lines."""
    with pytest.MonkeyPatch.context() as patch, Logs() as logs:
        patch.setattr(sys, "stderr", stderr := Stream())
        logs.always = {"worker": 3}
        logs.apply(level="info", log_format=log_format, access="off")
        log.info("ready\nagain")
    first, second = stderr.lines()
    assert (without_times([first]) if log_format == "text" else [first]) == [line]
    assert second.removeprefix("<6>") == "  again"


def test_an_instance_is_a_field_and_no_part_of_a_text():
    """The instance is a field in JSON, also of JSON access lines, and is not in text."""
    fields = {
        "time": 0.0,
        "client": "c",
        "method": "GET",
        "target": "/",
        "protocol": "HTTP/1.1",
        "status": 200,
        "bytes": 1,
        "referer": "",
        "agent": "",
    }
    found = {}
    for log_format, access in (("json", "json"), ("text", "json"), ("json", "common"), ("text", "common")):
        with pytest.MonkeyPatch.context() as patch, Logs() as logs:
            patch.setattr(sys, "stderr", stderr := Stream())
            logs.always = {"instance": "web-1"}
            logs.apply(level="info", log_format=log_format, access=access)
            log.info("ready")
            logs.write_access(fields)
        found[log_format, access] = [line.count("web-1") for line in stderr.lines()]
    assert found == {
        ("json", "json"): [1, 1],
        ("text", "json"): [0, 1],
        ("json", "common"): [1, 1],
        ("text", "common"): [0, 0],
    }


def test_text_shows_exceptions():
    """A traceback follows its message."""
    with logging_to(stderr := Stream()):
        fail()
    first, *more = stderr.lines()
    assert without_times([first]) == ["error   failed"]
    assert more[0] == "Traceback (most recent call last):"
    assert more[-1] == "LookupError: gone"


def test_json_is_one_object_a_line():
    """JSON has stable keys, the record's fields and its exception, always on one line."""
    with logging_to(stderr := Stream(), "json"):
        log.warning("cut\nthis", extra={"fields": {"path": "/é\n\u2028", "id": 7, "odd": {1}}})
        fail()
    first, second = (json.loads(line) for line in stderr.lines())
    assert first.pop("time")[10] == "T"
    assert first == {
        "level": "warning", "logger": "flaskd.test", "message": "cut\nthis",
        "path": "/é\n\u2028", "id": 7, "odd": "{1}",
    }  # fmt: skip
    assert second["message"] == "failed"
    assert second["exception"].endswith("LookupError: gone")


def test_the_journal_gets_a_priority_on_each_line():
    """Each line has its record's priority, because the journal makes an entry of each line: sd-daemon(3)."""
    with logging_to(stderr := Stream(), "journal", level="debug"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL, 25):
            log.log(level, "one\ntwo")
    assert stderr.lines() == [line for number in (7, 6, 4, 3, 2, 6) for line in (f"<{number}>one", f"<{number}>  two")]


def test_the_journal_gets_tracebacks_line_by_line():
    """Each line of a traceback has a priority."""
    with logging_to(stderr := Stream(), "journal"):
        fail()
    assert len(stderr.lines()) > 3
    assert all(line.startswith("<3>") for line in stderr.lines())


def test_auto_is_the_journal_when_stderr_is_the_journal(monkeypatch, tmp_path):
    """JOURNAL_STREAM counts only if it names standard error: systemd.exec(5)."""
    with (tmp_path / "journal").open("w+") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        with logging_to(stream, "auto"):
            log.info("hello")
            assert in_journal(os.environ)
            assert not in_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"})
            assert not in_journal({})
        stream.seek(0)
        assert stream.read() == "<6>hello\n"


@pytest.mark.parametrize("stream", [None, io.StringIO(), object()], ids=["none", "memory", "no file"])
def test_a_stderr_without_a_descriptor_is_not_the_journal(stream, monkeypatch):
    """If standard error has no descriptor, it is not the journal."""
    monkeypatch.setattr(sys, "stderr", stream)
    assert not in_journal({"JOURNAL_STREAM": "1:2"})


def test_auto_is_text_elsewhere():
    """Without journal and terminal the format is text."""
    with logging_to(stderr := Stream(), "auto"):
        log.error("failed")
    assert without_times(stderr.lines()) == ["error   failed"]


@pytest.mark.parametrize("log_format", ["text", "auto"])
def test_colours_are_for_terminals(log_format):
    """On a terminal important parts are coloured, and each line ends its colour."""
    with logging_to(terminal := Terminal(), log_format, level="debug"):
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(log, level)("x")
    colours = [line[: line.index("m") + 1] if "\x1b" in line else "" for line in terminal.lines()]
    assert colours == ["\x1b[2m", "", "\x1b[33m", "\x1b[31m", "\x1b[31m"]
    assert [line.endswith("\x1b[0m") for line in terminal.lines()] == [True, False, True, True, True]


def test_no_colour_where_none_is_wanted(monkeypatch):
    """With NO_COLOR there is no colour: no-color.org."""
    monkeypatch.setenv("NO_COLOR", "1")
    with logging_to(terminal := Terminal()):
        log.error("failed")
    assert without_times(terminal.lines()) == ["error   failed"]


def test_a_reload_changes_level_and_format():
    """`apply` with another configuration changes level and format."""
    with logging_to(stderr := Stream(), level="error") as apply:
        log.info("not shown")
        apply(log_format="journal", level="debug", access="off")
        log.debug("shown")
    assert stderr.lines() == ["<7>shown"]


def test_a_level_that_is_none_is_an_error():
    """An unknown level raises, because the configuration has checked it."""
    with pytest.raises(KeyError), logging_to(Stream(), level="loud"):
        pass


@pytest.mark.parametrize(
    ("access", "more", "line"),
    [
        ("common", {}, '192.0.2.7 - - [14/Nov/2023:22:13:20 +0000] "GET /shop?q=1 HTTP/1.1" 200 12'),
        ("combined", {}, '192.0.2.7 - - [14/Nov/2023:22:13:20 +0000] "GET /shop?q=1 HTTP/1.1" 200 12 "-" "curl/8"'),
        (
            "combined",
            {"referer": "http://a/", "agent": "", "client": "unix", "status": 404},
            'unix - - [14/Nov/2023:22:13:20 +0000] "GET /shop?q=1 HTTP/1.1" 404 12 "http://a/" "-"',
        ),
        (
            "common",
            {"request_id": "4bf9", "traceparent": "00-x"},
            '192.0.2.7 - - [14/Nov/2023:22:13:20 +0000] "GET /shop?q=1 HTTP/1.1" 200 12 request_id=4bf9 traceparent=00-x',
        ),
        (
            "combined",
            {"request_id": "4bf9"},
            '192.0.2.7 - - [14/Nov/2023:22:13:20 +0000] "GET /shop?q=1 HTTP/1.1" 200 12 "-" "curl/8" request_id=4bf9',
        ),
    ],
)
def test_access_lines(access, more, line):
    """Common and combined lines have the standard form; the request's id follows after it."""
    with logging_to(stderr := Stream(), access=access):
        log_access(access, fields(**more))
    assert stderr.lines() == [line]


@contextmanager
def access_logging_to(stream, log_format="text", access="combined"):
    """Give the function that gets the server's answers."""
    with pytest.MonkeyPatch.context() as patch, Logs() as logs:
        patch.setattr(sys, "stderr", stream)
        logs.apply(log_format=log_format, level="info", access=access)
        yield logs.write_access


@pytest.mark.parametrize("log_format", ["text", "json", "journal"])
@pytest.mark.parametrize("access", ["common", "combined", "json"])
def test_an_answers_line_is_that_of_the_logger(log_format, access):
    """An access line that is written without a log record is the same as with one."""
    written = []
    for write in (False, True):
        stderr = Stream()
        with access_logging_to(stderr, log_format, access) as write_access:
            write_access(fields()) if write else log_access(access, fields())
        written.append([re.sub(r'"time": "[^"]*"', "", line) for line in stderr.lines()])
    assert written[0] == written[1]
    assert len(written[0]) == 1


def test_a_handler_of_the_apps_gets_the_record_of_an_answer():
    """If the app has a handler for access lines, a log record is made for it."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    stderr = Stream()
    with access_logging_to(stderr) as write_access:
        logging.getLogger("flaskd.access").addHandler(handler)
        try:
            write_access(fields())
        finally:
            logging.getLogger("flaskd.access").removeHandler(handler)
        write_access(fields())
    assert [record.fields["status"] for record in records] == [200]
    assert len(stderr.lines()) == 2


def test_no_answer_is_told_while_the_access_log_is_off():
    """With access: off no line is written, even for a request that began before the reload."""
    stderr = Stream()
    with access_logging_to(stderr, access="off") as write_access:
        write_access(fields())
    assert stderr.lines() == []


@pytest.mark.parametrize("access", ["combined", "json"])
def test_access_lines_are_of_bounded_length(access, caplog):
    """The client's texts in an access line are cut, with a note of their length."""
    with caplog.at_level("INFO", logger="flaskd.access"):
        log_access(access, fields(target="/" + "x" * 200_000, agent="y" * 200_000, referer="z" * 200_000))
    line = caplog.records[-1].getMessage()
    assert len(line) < 4000
    assert "xxx...(200001 characters)" in line
    assert len(json.dumps(caplog.records[-1].fields)) < 4000


def test_access_lines_in_json():
    """JSON access lines have named values, and the time as RFC 3339."""
    with logging_to(stderr := Stream(), access="json"):
        log_access("json", fields(agent='"\n\x85\u2028é'))
    (line,) = stderr.lines()
    assert json.loads(line) == fields(agent='"\n\x85\u2028é', time="2023-11-14T22:13:20.250Z")


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ('x" 200 0 "forged', r"x\x22 200 0 \x22forged"),
        ("x\n127.0.0.1 - - [now]", r"x\x0A127.0.0.1 - - [now]"),
        ("x\r\x1b[31m\0\x7f", r"x\x0D\x1B[31m\x00\x7F"),
        ("x\\x22", r"x\x5Cx22"),
        ("x\x85y\u2028z", r"x\x85y\x2028z"),
        ("caf\xe9", "caf\xe9"),
    ],
)
def test_no_client_can_forge_an_access_line(sent, shown):
    """Quotes, backslashes and control characters from a client are escaped as nginx does it."""
    with logging_to(stderr := Stream(), access="combined"):
        log_access("combined", fields(target=f"/{sent}", referer=sent, agent=sent, client=sent))
    (line,) = stderr.lines()
    assert line.startswith(f"{shown} - - [")
    assert line.endswith(f'"GET /{shown} HTTP/1.1" 200 12 "{shown}" "{shown}"')


@pytest.mark.parametrize("log_format", ["text", "journal"])
def test_no_client_can_forge_a_line_through_waitress(log_format):
    """Waitress logs decoded paths, in which %0A is a line feed; this cannot forge a line."""
    with logging_to(stderr := Stream(), log_format):
        logging.getLogger("waitress").error("Exception while serving %s", '/\nERROR "forged"\x1b[0m')
    (line,) = stderr.lines()
    assert line.endswith(r'Exception while serving /\x0AERROR "forged"\x1B[0m')


@pytest.mark.parametrize(("log_format", "start"), [("text", ""), ("journal", "<6>")])
@pytest.mark.parametrize("access", ["common", "combined"])
def test_access_lines_in_a_log_for_people(log_format, start, access):
    """An access line has its own date; for the journal it has its priority, like every line."""
    with logging_to(stderr := Stream(), log_format, access=access):
        log_access(access, fields())
    (line,) = stderr.lines()
    assert line.startswith(f"{start}192.0.2.7 - - [")


@pytest.mark.parametrize("access", ["common", "combined"])
def test_access_lines_in_a_json_log(access):
    """In a JSON log an access line is a JSON object with the line as its message, and the values by name."""
    with logging_to(stderr := Stream(), "json", access=access):
        log_access(access, fields())
    (line,) = stderr.lines()
    entry = json.loads(line)
    assert (entry["logger"], entry["status"], entry["took"]) == ("flaskd.access", 200, 0.25)
    assert entry["message"].startswith("192.0.2.7 - - [")


@pytest.mark.parametrize("log_format", ["text", "json", "journal"])
def test_json_access_lines_are_never_wrapped(log_format):
    """A JSON access line is the same in every log."""
    with logging_to(stderr := Stream(), log_format, access="json"):
        log_access("json", fields())
    (line,) = stderr.lines()
    assert json.loads(line) == fields(time="2023-11-14T22:13:20.250Z")


def test_access_off_writes_nothing():
    """With access: off there are no access lines at any level."""
    with logging_to(stderr := Stream(), level="debug"):
        log_access("common", fields())
    assert stderr.lines() == []


def test_access_lines_do_not_depend_on_the_level():
    """With level error access lines are still written, each once."""
    with logging_to(stderr := Stream(), level="error", access="common"):
        log_access("common", fields())
    assert len(stderr.lines()) == 1


def test_everything_is_put_back():
    """At the end levels, propagation and handlers are restored; the root logger is never changed."""
    loggers = [logging.getLogger(name) for name in ("flaskd", "waitress", "flaskd.access", None)]

    def seen():
        return [(each.level, each.propagate, list(each.handlers)) for each in loggers]

    before = seen()
    with logging_to(Stream(), "json", level="debug", access="json"):
        *ours, root = seen()
        assert all(now != then for now, then in zip(ours, before[:3], strict=True))
        assert root == before[3]
    assert seen() == before


def test_the_apps_own_log_is_left_alone(caplog):
    """The app's records go to the app's handlers, and flaskd's records do not."""
    with logging_to(stderr := Stream()):
        logging.getLogger("shop").warning("from the app")
        log.warning("from flaskd")
    assert [each.getMessage() for each in caplog.records] == ["from the app"]
    assert without_times(stderr.lines()) == ["warning from flaskd"]


def dict_config(**more):
    logging.config.dictConfig({"version": 1, **more})


def file_config():
    parser = configparser.ConfigParser()
    parser.read_string(
        "[loggers]\nkeys=root\n[handlers]\nkeys=null\n[formatters]\nkeys=\n"
        "[logger_root]\nhandlers=null\n[handler_null]\nclass=NullHandler\nargs=()\n"
    )
    logging.config.fileConfig(parser)  # disable_existing_loggers is True


def each_logger(change):
    for logger in [logging.getLogger(), *logging.root.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            change(logger)


SILENCERS = {
    "dictConfig": dict_config,
    "dictConfig names ours": lambda: dict_config(
        loggers={name: {"level": "CRITICAL", "handlers": []} for name in ("flaskd", "flaskd.test", "waitress")}
    ),
    "fileConfig": file_config,
    "disable": lambda: logging.disable(logging.CRITICAL),
    "levels": lambda: each_logger(lambda logger: logger.setLevel(logging.CRITICAL)),
    "no propagation": lambda: each_logger(lambda logger: setattr(logger, "propagate", False)),
    "disabled": lambda: each_logger(lambda logger: setattr(logger, "disabled", True)),
    "no handlers": lambda: each_logger(lambda logger: logger.handlers.clear()),
    "a filter": lambda: each_logger(lambda logger: logger.addFilter(lambda _record: False)),
    "a filter that raises": lambda: each_logger(lambda logger: logger.addFilter(lambda _record: 1 / 0)),
    "shutdown": logging.shutdown,
}


@pytest.fixture
def _put_back():
    """Undo what an app does to all loggers, because the other tests need them."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    loggers = [each for each in loggers if isinstance(each, logging.Logger)]
    before = [(each, each.level, each.propagate, each.disabled, each.handlers[:], each.filters[:]) for each in loggers]
    yield
    logging.disable(logging.NOTSET)
    for each, level, propagate, disabled, handlers, filters in before:
        each.setLevel(level)
        each.propagate, each.disabled, each.handlers, each.filters = propagate, disabled, handlers, filters


@pytest.mark.usefixtures("_put_back")
@pytest.mark.parametrize("silence", SILENCERS.values(), ids=SILENCERS)
def test_no_logging_set_up_of_the_app_silences_flaskd(silence):
    """Whatever an app does to all loggers, flaskd, its access log and waitress go on, each line once."""
    with logging_to(stderr := Stream(), access="common"):
        silence()
        log.info("what was cut")
        logging.getLogger("waitress").error("odd")
        log_access("common", fields())
        log.debug("not shown")
    first, second, third = stderr.lines()
    assert without_times([first, second]) == ["info    what was cut", "error   odd"]
    assert third.endswith('"GET /shop?q=1 HTTP/1.1" 200 12')


def test_handlers_that_the_app_gives_to_flaskd_get_its_lines_too():
    """A handler that the app adds to flaskd's logger gets the records after flaskd; if it raises, nothing else fails."""

    class Kept(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())
            raise LookupError

        def handle(self, record):
            self.emit(record)

    seen, kept, ours = [], Kept(), logging.getLogger("flaskd")
    with logging_to(stderr := Stream()):
        ours.addHandler(kept)
        log.warning("one")
        ours.setLevel(logging.ERROR)
        log.warning("two")
        logging.disable(logging.CRITICAL)
        log.error("three")
        logging.disable(logging.NOTSET)
        ours.removeHandler(kept)
    assert seen == ["one"]
    fault = "warning a log handler or filter of the app's raised LookupError; flaskd's lines go on without it"
    assert without_times(stderr.lines()) == ["warning one", fault, "warning two", "error   three"]


def test_what_listens_to_all_logging_hears_flaskd_too(monkeypatch):
    """If the app replaces Logger.callHandlers, as Sentry does, it gets each record once, and the log as well."""
    real, seen = logging.Logger.callHandlers, []

    def listening(self, record):
        seen.append(record.getMessage())
        real(self, record)

    monkeypatch.setattr(logging.Logger, "callHandlers", listening)
    with logging_to(stderr := Stream()):
        log.error("one")
    assert seen == ["one"]
    assert without_times(stderr.lines()) == ["error   one"]


def test_what_is_made_late_is_logged_as_well():
    """A logger that is made below flaskd's while flaskd runs writes to flaskd's log, and to its own afterwards."""
    late = f"flaskd.late{id(object())}"
    with pytest.MonkeyPatch.context() as patch, Logs() as logs:
        patch.setattr(sys, "stderr", stderr := Stream())
        logs.apply(log_format="text", level="info", access="off")
        logging.getLogger(late).info("one")
        logs.reclaim()
        logging.getLogger(late).info("two")
    assert without_times(stderr.lines()) == ["info    one", "info    two"]


class Moody(Stream):
    """An object in place of standard error that has no descriptor, and raises when written to."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def isatty(self):
        raise LookupError

    def fileno(self):
        raise LookupError

    def write(self, text):
        if self.error is None:
            return super().write(text)
        error, self.error = self.error, None
        raise error


@pytest.mark.parametrize("log_format", ["auto", "json", "journal"])
@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_stderr_that_raises_anything_does_not_end_the_log(error, log_format, capfd):
    """If standard error raises, that line goes to the original descriptor, and the next one is tried as before."""
    with logging_to(moody := Moody(error), log_format):
        log.error("one")
        log.error("two")
    assert "one" in capfd.readouterr().err
    assert ["two" in line for line in moody.lines()] == [True]


FORGED = "gone\n2026-01-01T00:00:00.000Z error   forged\x1b[31m\u202e\u2028\r\x9b2J"
SHOWN = r"gone\x0A2026-01-01T00:00:00.000Z error   forged\x1B[31m\x202E\x2028\x0D\x9B2J"


@pytest.mark.parametrize("log_format", ["text", "journal"])
def test_the_text_of_an_exception_is_one_line(log_format):
    """The text of an exception, its causes, notes and groups is one line each, with control characters escaped."""
    with logging_to(stderr := Stream(), log_format):
        try:
            try:
                raise ExceptionGroup(FORGED, [LookupError(FORGED), SyntaxError(FORGED)])
            except ExceptionGroup as cause:
                cause.add_note(FORGED)
                raise RuntimeError(FORGED) from cause
        except RuntimeError:
            log.exception("failed")
    lines = stderr.lines()
    assert stderr.getvalue().replace("\n", "").isprintable()
    assert sum(SHOWN in line for line in lines) == 5
    assert not any(line.removeprefix("<3>").startswith("2026-01-01") for line in lines)


@pytest.mark.parametrize("log_format", ["text", "journal"])
def test_a_message_is_one_entry(log_format):
    """Further lines of a message are indented, so that none looks like another entry; control characters are escaped."""
    with logging_to(stderr := Stream(), log_format):
        log.error(f"cannot run it: {FORGED}")
    _, second = stderr.lines()
    assert second.removeprefix("<3>") == r"  2026-01-01T00:00:00.000Z error   forged\x1B[31m\x202E\x2028\x0D\x9B2J"


def test_a_message_without_end_is_cut():
    """A very long message is cut, with a note of how much is missing."""
    with logging_to(stderr := Stream()):
        log.error("x" * 10_000_000)
    (line,) = stderr.lines()
    assert len(line) < 70_000
    assert line.endswith("x... (9934464 more characters)")


def test_lines_that_others_cause_at_will_are_bounded_and_counted():
    """Fifty lines of a kind are written in ten seconds, the rest is counted; other kinds are not affected."""
    with logging_to(stderr := Stream()):
        for number in range(1000):
            log.warning(f"refused {number}", extra=bounded_by("refusals"))
        log.warning("another", extra=bounded_by("others"))
        log.warning("unbounded")
    lines = without_times(stderr.lines())
    assert lines[:50] == [f"warning refused {number}" for number in range(50)]
    assert lines[50:] == [
        "warning another",
        "warning unbounded",
        "warning 950 more refusals in 0s: counted, and not listed one by one",
    ]


def test_what_was_counted_is_told_though_nothing_more_is_logged(monkeypatch):
    """The count is logged when its window is over, even if nothing else is logged."""
    monkeypatch.setattr(throttle, "WINDOW", 0.0)
    monkeypatch.setattr(throttle, "BURST", 0)
    told = threading.Event()

    class Told(Stream):
        def write(self, text):
            if "1 more refusals" in text:
                told.set()
            return super().write(text)

    with logging_to(Told()):
        log.warning("refused", extra=bounded_by("refusals"))
        assert told.wait(10)


class Broken(io.StringIO):
    def write(self, _text):
        raise BrokenPipeError(32, "Broken pipe")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("log_format", ["auto", "json", "journal"])
@pytest.mark.parametrize("stream", [None, closed(), Broken()], ids=["none", "closed", "broken"])
def test_a_stderr_that_went_away_costs_the_line(stream, log_format):
    """If the reader of standard error is gone, neither a line nor `apply` raises."""
    with logging_to(stream, log_format, access="common"):
        log.error("anybody?")
        log_access("common", fields())
        logging.getLogger("waitress").error("anybody?")


def test_a_pipe_that_nobody_reads_costs_the_line():
    """If a log reader dies, its lines are lost, and nothing else."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        with logging_to(stream):
            log.error("anybody?")
            log.error("anybody?")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, writer)  # the rest of the stream's buffer goes there
        os.close(null)


def test_a_mistake_in_a_log_call_is_shown():
    """A wrong log call is reported by logging; only errors of the stream are ignored."""
    with logging_to(stderr := Stream()):
        log.error("%d", "no number")
    assert stderr.lines()[0] == "--- Logging error ---"


def test_json_is_json_whatever_the_encoding():
    """If standard error's encoding lacks characters, JSON lines are still valid JSON."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace", write_through=True)
    with logging_to(stream, "json", access="json"):
        log.error("café ✓ \ud800")
        log_access("json", fields(agent="é"))
    first, second = (json.loads(line) for line in raw.getvalue().splitlines())
    assert first["message"] == "café ✓ \ud800"
    assert second["agent"] == "é"


class _Raising(logging.Handler):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def handle(self, record):
        raise self.error


@pytest.mark.parametrize(
    "error", [ValueError(), SystemExit(), KeyboardInterrupt()], ids=lambda each: type(each).__name__
)
@pytest.mark.parametrize("where", ["factory", "no record", "filter", "handler"])
def test_what_raises_in_the_app_s_part_of_logging_costs_no_line(capfd, error, where):
    """Whatever a factory, filter or handler of the app raises, each line is written, and the fault is logged once."""

    def raising(*_args, **_kwargs):
        raise error

    log, factory, handler = logging.getLogger("flaskd.tried"), logging.getLogRecordFactory(), _Raising(error)
    try:
        with Logs() as logs:
            logs.apply(level="info", log_format="text", access="off")
            if where in {"factory", "no record"}:
                logging.setLogRecordFactory(raising if where == "factory" else lambda *_args, **_kwargs: None)
            elif where == "filter":
                log.addFilter(raising)
                log.addHandler(logging.NullHandler())
            else:
                log.addHandler(handler)
            for number in range(2):
                log.warning("line %d", number, extra={"fields": {"a": 1}})
            logs.flush(5)
    finally:
        logging.setLogRecordFactory(factory)
        log.filters.clear()
        log.handlers.clear()
    said = capfd.readouterr().err
    assert said.count("line 0") == said.count("line 1") == 1
    assert said.count("flaskd's lines go on without it") == 1
