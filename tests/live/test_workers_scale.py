"""Changing the number of workers, and replacing them."""

from __future__ import annotations

import os
import signal

import pytest
from daemon_kit import Flaskd
from http_client import get, refused
from workers_kit import WAITS, Asking, Clients, asked, code, generations, hold_in_both, shown, start, workers

from flaskd.process.cpus import usable


def slots(flaskd: Flaskd) -> list[int]:
    """The slots with a serving worker."""
    return [slot for slot, _ in workers(flaskd)]


def test_more_and_fewer_workers_lose_nothing(flaskd: Flaskd) -> None:
    """The reply comes when all workers are ready; removed ones stop, and no request is lost or refused."""
    start(flaskd)
    before = workers(flaskd)
    with Clients(flaskd.url) as clients:
        assert flaskd.client("scale", "3")[:2] == (0, "scaled workers=3\n")
        assert slots(flaskd) == [0, 1, 2]
        assert flaskd.command("scale 1") == "OK scaled workers=1\n"
        assert slots(flaskd) == [0]
    assert clients.lost == []
    assert workers(flaskd) == before[:1]
    assert flaskd.stop() == 0


def test_those_that_leave_finish_their_requests(flaskd: Flaskd) -> None:
    """`scale 1` is answered while a removed worker still runs a request, which is answered."""
    start(flaskd, "-t", "16")
    url = flaskd.url
    held = hold_in_both(flaskd, url)
    assert flaskd.command("scale 1") == "OK scaled workers=1\n"
    assert [each["state"] for each in shown(flaskd)] == ["ready", "leaving"]
    flaskd.gate.open()
    assert [each.result() for each in held] == [(200, b"held by one")] * len(held)
    flaskd.until(lambda: len(shown(flaskd)) == 1)
    assert flaskd.stop() == 0


def test_auto_is_what_the_cpus_are(flaskd: Flaskd) -> None:
    """`scale auto` makes as many workers as `server.workers: auto`."""
    start(flaskd)
    assert flaskd.command("scale auto").endswith(f"OK scaled workers={usable()}\n")
    assert slots(flaskd) == list(range(usable()))
    assert flaskd.stop() == 0


@pytest.mark.parametrize("wrong", ["", "0", "-1", "many", "1.5", "100000"])
def test_a_number_that_cannot_be_is_refused(flaskd: Flaskd, wrong: str) -> None:
    """A wrong number is refused, with what was expected and what was given."""
    start(flaskd)
    assert flaskd.command(f"scale {wrong}".strip()).startswith("ERR usage scale: expected a number from 1 to ")
    assert slots(flaskd) == [0, 1]
    assert flaskd.stop() == 0


def test_a_reload_keeps_the_number_unless_it_changes_the_configuration(flaskd: Flaskd) -> None:
    """The number of `scale` stays until a reload changes server.workers."""
    code(flaskd, "one")
    flaskd.write("flaskd.yaml", "server: {workers: 2}\n")
    flaskd.start(app="shop:app")
    flaskd.command("scale 3")
    flaskd.command("reload")
    assert slots(flaskd) == [0, 1, 2]
    flaskd.write("flaskd.yaml", "server: {workers: 1}\n")
    flaskd.command("reload")
    assert slots(flaskd) == [0]
    assert flaskd.stop() == 0


def test_more_workers_that_do_not_start_are_told(flaskd: Flaskd) -> None:
    """If new workers fail, the reply has the traceback, and the slot is tried again until it is filled or removed."""
    start(flaskd)
    code(flaskd, "bad", "raise ValueError('no shop today')\n")
    exit_code, _, err = flaskd.client("scale", "3")
    assert exit_code == 70
    assert "the app raised ValueError: no shop today" in err
    assert "raise ValueError('no shop today')" in err
    code(flaskd, "two")
    flaskd.until(lambda: slots(flaskd) == [0, 1, 2])
    assert flaskd.stop() == 0


def test_the_last_scale_wins_and_each_who_waits_is_told_the_truth(flaskd: Flaskd) -> None:
    """`scale 1` during `scale 3` is done at once, and the first one's reply says that there are fewer workers now."""
    start(flaskd)
    code(flaskd, "two", WAITS)
    first = Asking(flaskd, "scale 3")
    flaskd.gate.entered()
    assert flaskd.command("scale 1") == "OK scaled workers=1\n"
    assert first.answer() == "ERR not-now cannot start worker 2: there are fewer workers now\n"
    flaskd.until(lambda: [each["slot"] for each in shown(flaskd)] == [0])
    assert flaskd.stop() == 0


def test_a_drained_flaskd_can_be_scaled(flaskd: Flaskd) -> None:
    """New workers load the app and serve after the resume; removed ones stop; nothing is accepted meanwhile."""
    start(flaskd)
    url = flaskd.url
    flaskd.command("drain wait")
    assert flaskd.command("scale 3").endswith("OK scaled workers=3\n")
    assert refused(url)
    assert flaskd.status()["state"] == "drained"
    assert flaskd.command("resume") == "OK ready\n"
    flaskd.until(lambda: slots(flaskd) == [0, 1, 2])
    assert get(flaskd.url) == (200, b"one")
    flaskd.command("drain wait")
    assert flaskd.command("scale 1").endswith("OK scaled workers=1\n")
    assert flaskd.command("resume") == "OK ready\n"
    assert get(flaskd.url) == (200, b"one")
    assert slots(flaskd) == [0]
    assert flaskd.stop() == 0


def test_a_drain_while_workers_are_added_takes_them_in(flaskd: Flaskd) -> None:
    """If a drain comes while a worker of `scale 3` loads, it accepts nothing, and serves after the resume."""
    start(flaskd)
    url = flaskd.url
    code(flaskd, "two", WAITS)
    scaling = Asking(flaskd, "scale 3")
    flaskd.gate.entered()
    assert "OK drained" in flaskd.command("drain wait")
    flaskd.gate.open()
    assert scaling.answer() == "OK scaled workers=3\n"
    assert refused(url)
    assert flaskd.command("resume") == "OK ready\n"
    flaskd.until(lambda: slots(flaskd) == [0, 1, 2])
    assert flaskd.stop() == 0


def test_a_drain_while_an_added_worker_answers_its_probe_starts_it_anew(flaskd: Flaskd) -> None:
    """If a drain comes when a new worker has listeners already, another one is started without them."""
    start(flaskd, config="health: {probe: /, probe_timeout: 60s}\n")
    url = flaskd.url
    code(flaskd, "two", WAITS.replace("with", "@app.before_request\ndef wait():\n  with").replace("\n    ", "\n      "))
    scaling = Asking(flaskd, "scale 3")
    flaskd.gate.entered()
    code(flaskd, "three")
    assert "OK drained" in flaskd.command("drain wait")
    assert scaling.answer() == "OK scaled workers=3\n"
    assert refused(url)
    assert flaskd.command("resume") == "OK ready\n"
    flaskd.until(lambda: slots(flaskd) == [0, 1, 2])
    assert flaskd.stop() == 0


def test_a_stop_ends_a_scale(flaskd: Flaskd) -> None:
    """SIGTERM while a new worker loads ends flaskd with 0, and the scale gets an error."""
    start(flaskd)
    code(flaskd, "two", WAITS)
    scaling = Asking(flaskd, "scale 3")
    flaskd.gate.entered()
    assert flaskd.stop() == 0
    assert scaling.answer() == "ERR not-now cannot start worker 2: flaskd stops\n"


# --- restart ---


def test_a_restart_replaces_all_workers_one_by_one(flaskd: Flaskd) -> None:
    """Each slot gets a new worker of the same generation, and no request is lost or refused."""
    start(flaskd)
    before = workers(flaskd)
    with Clients(flaskd.url) as clients:
        assert flaskd.client("restart")[:2] == (0, "restarted\n")
    assert clients.lost == []
    assert generations(flaskd) == [1, 1]
    assert not {pid for _, pid in before} & {pid for _, pid in workers(flaskd)}
    assert flaskd.stop() == 0


def test_a_restart_of_one_slot_leaves_the_others(flaskd: Flaskd) -> None:
    """`restart 1` replaces that worker alone."""
    start(flaskd)
    before = workers(flaskd)
    assert flaskd.client("restart", "1")[:2] == (0, "restarted slot=1\n")
    after = workers(flaskd)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert flaskd.stop() == 0


def test_a_slot_that_there_is_not_is_refused(flaskd: Flaskd) -> None:
    """A wrong slot is refused, with the slots that there are."""
    start(flaskd)
    assert flaskd.command("restart 7") == "ERR usage restart: expected a slot from 0 to 1, got 7\n"
    assert flaskd.command("restart x") == 'ERR usage restart: expected the number of a slot, got "x"; see workers\n'
    assert flaskd.stop() == 0


def test_a_restart_into_bad_code_changes_nothing(flaskd: Flaskd) -> None:
    """With faulty code the old workers stay, and the reply has the traceback."""
    start(flaskd)
    before = workers(flaskd)
    code(flaskd, "bad", "raise ValueError('no shop today')\n")
    exit_code, _, err = flaskd.client("restart")
    assert exit_code == 70
    assert "raise ValueError('no shop today')" in err
    assert workers(flaskd) == before
    assert get(flaskd.url) == (200, b"one")
    assert flaskd.stop() == 0


def test_a_reload_ends_a_restart(flaskd: Flaskd) -> None:
    """A reload ends a restart at once, and the restart gets an error."""
    start(flaskd)
    code(flaskd, "two", WAITS)
    restarting = Asking(flaskd, "restart")
    flaskd.gate.entered()
    assert flaskd.command("restart 1") == "ERR not-now cannot restart: a reload or a restart is under way\n"
    code(flaskd, "three")
    assert flaskd.command("reload").endswith("OK reloaded\n")
    assert restarting.answer() == "ERR not-now cannot go on replacing workers: a reload was asked for\n"
    assert get(flaskd.url) == (200, b"three")
    assert generations(flaskd) == [2, 2]
    assert flaskd.stop() == 0


def test_the_slot_that_is_restarted_may_be_scaled_away(flaskd: Flaskd) -> None:
    """If the slot is removed meanwhile, the restart's reply says so."""
    start(flaskd)
    code(flaskd, "two", WAITS)
    restarting = Asking(flaskd, "restart 1")
    flaskd.gate.entered()
    assert flaskd.command("scale 1") == "OK scaled workers=1\n"
    assert restarting.answer() == "ERR not-now cannot restart: there is no worker 1 any more\n"
    assert flaskd.stop() == 0


def test_a_drain_ends_a_restart(flaskd: Flaskd) -> None:
    """A drain ends a restart, which gets an error, and the old workers serve after the resume."""
    start(flaskd)
    before = workers(flaskd)
    code(flaskd, "two", WAITS)
    restarting = Asking(flaskd, "restart")
    flaskd.gate.entered()
    assert "OK drained" in flaskd.command("drain wait")
    assert restarting.answer().startswith("ERR not-now ")
    assert flaskd.command("restart") == "ERR not-now cannot restart: flaskd is drained\n"
    assert flaskd.command("resume") == "OK ready\n"
    assert workers(flaskd) == before
    assert flaskd.stop() == 0


def test_sigterm_replaces_a_worker(flaskd: Flaskd) -> None:
    """A worker that gets SIGTERM finishes its requests while another one takes its slot; nothing is lost."""
    start(flaskd)
    before = workers(flaskd)
    with Clients(flaskd.url) as clients:
        os.kill(before[0][1], signal.SIGTERM)
        flaskd.until(lambda: len(workers(flaskd)) == 2 and workers(flaskd)[0] != before[0])
    assert clients.lost == []
    assert workers(flaskd)[1] == before[1]
    assert asked(flaskd, "workers")["died"] == 0
    assert flaskd.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_other_signals_do_nothing_to_a_worker(flaskd: Flaskd, number: int) -> None:
    """SIGINT, SIGHUP and SIGQUIT, which a terminal sends to all processes, do nothing to a worker."""
    start(flaskd)
    before = workers(flaskd)
    for _, pid in before:
        os.kill(pid, number)
    assert asked(flaskd, "threads")["list"]
    assert get(flaskd.url) == (200, b"one")
    assert workers(flaskd) == before
    assert flaskd.stop() == 0


# --- without workers ---


def test_verbs_of_workers_answer_where_there_are_none(flaskd: Flaskd) -> None:
    """With server.workers: 0, verbs for workers say that the app runs in the daemon itself."""
    code(flaskd, "one")
    flaskd.start(app="shop:app")
    none = "there are no workers (server.workers is 0): the app runs in the daemon itself"
    assert flaskd.command("scale 2") == f"ERR not-now cannot scale: {none}\n"
    assert flaskd.command("restart") == f"ERR not-now cannot restart: {none}\n"
    assert flaskd.command("restart 0") == f"ERR not-now cannot restart: {none}\n"
    assert "OK workers workers=0" in flaskd.command("workers")
    assert flaskd.command("reload") == "OK reloaded\n"
    assert flaskd.command("reload config") == "OK reloaded\n"
    assert flaskd.stop() == 0


# --- what the last stop kept ---

CACHE = """
from flask_caching import Cache
cache = Cache(app, config={"CACHE_TYPE": "SimpleCache"})

@app.get("/cached")
def cached():
    return cache.get("by") or "nothing"

@app.get("/fill")
def fill():
    cache.set("by", os.environ["FLASKD_GENERATION"], timeout=0)
    return "filled"
"""


def test_a_cache_is_kept_by_the_stop_and_brought_back_at_the_start_alone(flaskd: Flaskd) -> None:
    """cache.persist acts at the stop and the next start, each worker with its own cache; not at a replacement."""
    path = "{use: cache.persist, with: {path: 'cache-{worker}.bin'}}"
    flaskd.write("flaskd.yaml", f"cleanup: {{policies: {{warm: {path}}}}}\n")
    code(flaskd, "one", CACHE)
    flaskd.start("-w", "1", app="shop:app")
    get(flaskd.url, "/fill")
    assert "OK reloaded" in flaskd.command("reload")
    assert not list(flaskd.state.glob("cache-*"))
    assert get(flaskd.url, "/cached") == (200, b"nothing")
    get(flaskd.url, "/fill")
    flaskd.until(lambda: len(shown(flaskd)) == 1)
    assert flaskd.stop() == 0
    assert [each.name for each in flaskd.state.glob("cache-*")] == ["cache-0.bin"]
    flaskd.drain_messages()
    flaskd.start("-w", "1", app="shop:app")
    assert get(flaskd.url, "/cached") == (200, b"2")
    assert flaskd.command("restart").endswith("OK restarted\n")
    assert get(flaskd.url, "/cached") == (200, b"nothing")
    assert flaskd.stop() == 0
    [kept] = flaskd.state.glob("cache-*")
    for each in (kept, flaskd.state / "cache.key"):
        each.unlink()
