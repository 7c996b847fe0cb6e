"""Workers that are forked from a template (`pool.preload`): memory, new and broken code, and apps that cannot fork."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from daemon_kit import Flaskd, children
from http_client import get
from patience import until
from workers_kit import asked, generations, shown, workers

APP = """
import gc, os, subprocess, socket, threading, time
from flask import Flask

with open("imports", "a") as file:
    file.write("one more\\n")
app = Flask(__name__)
CODE = "{code}"

@app.get("/")
def index():
    return CODE if gc.isenabled() else "no garbage is looked for"

@app.get("/hold")
def hold():
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.sendall(b"entered")
        gate.recv(1)
    return "held"
"""
CONFIG = "pool: {preload: true}\nlog: {access: 'off'}\n"


def code(flaskd: Flaskd, name: str, more: str = "") -> None:
    """Write code that answers with that name; `more` comes after it."""
    flaskd.write("shop.py", APP.format(code=name) + more)


def start(flaskd: Flaskd, more: str = "", *, count: int = 2, config: str = CONFIG) -> Flaskd:
    """Start workers that serve the code "one"."""
    code(flaskd, "one", more)
    flaskd.write("flaskd.yaml", config)
    return flaskd.start("-w", str(count), app="shop:app")


def imports(flaskd: Flaskd) -> int:
    """How often the app was imported."""
    return len((flaskd.directory / "imports").read_text().splitlines())


def templates(flaskd: Flaskd) -> list[dict[str, Any]]:
    """The templates that are alive."""
    return list(asked(flaskd, "workers")["templates"])


def processes(flaskd: Flaskd) -> list[dict[str, Any]]:
    """Workers and templates."""
    return [*shown(flaskd), *templates(flaskd)]


def pids(flaskd: Flaskd) -> dict[int, int]:
    """The pids of the ready workers, by slot."""
    return dict(workers(flaskd))


def kill_worker(flaskd: Flaskd, slot: int = 1) -> None:
    """Kill the worker of a slot, and wait for another one."""
    before = pids(flaskd)[slot]
    os.kill(before, signal.SIGKILL)
    flaskd.until(lambda: pids(flaskd).get(slot, before) != before)


def is_there(pid: int) -> bool:
    """Whether there is a process with that pid, if only as a zombie."""
    return Path(f"/proc/{pid}").exists()


def runs(pid: int) -> bool:
    """Whether a process still runs; an orphan's zombie, which init reaps later, does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    return False


def made_by_each(flaskd: Flaskd, what: str) -> set[int]:
    """The pids of the processes that have made a file with that name and their pid."""
    return {int(each.name.rpartition("-")[2]) for each in flaskd.directory.glob(f"{what}-*")}


def zombies(flaskd: Flaskd) -> list[int]:
    """The supervisor's children that were not reaped."""
    found = []
    for each in children(flaskd.pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                found.append(each)
    return found


def test_workers_share_the_memory_of_the_app(make_flaskd: Any) -> None:
    """Four workers and their template use at most 2.2 times the memory of one, for an app of 60 MB, with gc.collect."""
    big = (
        "BIG = [[str(number)] for number in range(450_000)]\n"
        "import gc\n@app.before_request\ndef collect():\n    gc.collect()\n"
    )
    single = start(make_flaskd(), big, count=1, config="log: {access: 'off'}\n")
    alone = shown(single)[0]["memory"]
    assert single.stop() == 0
    flaskd = start(make_flaskd(), big, count=4)
    url = flaskd.url
    for _ in range(40):
        assert get(url, "/") == (200, b"one")
    memory = [each["memory"] for each in processes(flaskd)]
    assert alone > 60 << 20
    assert len(memory) == 5
    assert sum(memory) <= 2.2 * alone, memory
    assert flaskd.stop() == 0


def test_workers_of_one_template_make_other_ids(flaskd: Flaskd) -> None:
    """Workers of one template do not make the same ids from random numbers seeded before the fork."""
    more = (
        "from flask import request\n"
        "@app.get('/id')\ndef name():\n    return f\"{os.getpid()} {request.environ['flaskd.request_id']}\"\n"
    )
    start(flaskd, more, config="pool: {preload: true}\nlog: {access: 'off', request_id: true}\n")
    url, found = flaskd.url, collections.defaultdict[bytes, list[bytes]](list)
    while sum(len(names) >= 3 for names in found.values()) < 2:
        pid, name = get(url, "/id")[1].split()
        found[pid].append(name)
        assert len(found[pid]) < 1000
    names = [name for each in found.values() for name in each]
    assert len(set(names)) == len(names)
    assert flaskd.stop() == 0


def test_a_slot_is_filled_again_without_an_import(flaskd: Flaskd) -> None:
    """However long the import takes, the worker after a crash is ready at once."""
    start(flaskd, "time.sleep(3)\n")
    kill_worker(flaskd)
    took = re.findall(r"worker 1 .* is ready after ([\d.]+)s", flaskd.log)
    assert len(took) == 2
    assert float(took[0]) >= 3
    assert float(took[1]) < 1
    assert imports(flaskd) == 1
    assert flaskd.stop() == 0


def test_a_reload_brings_new_code(flaskd: Flaskd) -> None:
    """Each generation imports the app once, with one template, which ends with the generation."""
    start(flaskd)
    [before] = templates(flaskd)
    code(flaskd, "two")
    assert flaskd.client("reload")[0] == 0
    assert get(flaskd.url, "/") == (200, b"two")
    assert generations(flaskd) == [2, 2]
    assert imports(flaskd) == 2
    [after] = templates(flaskd)
    assert (before["generation"], after["generation"]) == (1, 2)
    flaskd.until(lambda: not is_there(before["pid"]))
    assert flaskd.client("scale", "3")[0] == 0
    assert flaskd.client("restart", "0")[0] == 0
    assert imports(flaskd) == 2
    assert flaskd.stop() == 0


def test_it_can_be_switched_on_and_off(flaskd: Flaskd) -> None:
    """A reload switches pool.preload on or off, with new workers."""
    start(flaskd, config="pool: {preload: false}\n")
    assert (imports(flaskd), templates(flaskd)) == (2, [])
    flaskd.write("flaskd.yaml", CONFIG)
    assert flaskd.client("reload")[0] == 0
    assert (imports(flaskd), len(templates(flaskd))) == (3, 1)
    flaskd.write("flaskd.yaml", "pool: {preload: false}\n")
    assert flaskd.client("reload")[0] == 0
    assert (imports(flaskd), templates(flaskd)) == (5, [])
    assert flaskd.stop() == 0


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("raise RuntimeError('broken')\n", "RuntimeError: broken"),
        ("os._exit(3)\n", "it left with the exit code 3 before the app was imported"),
        ("os.kill(os.getpid(), 11)\n", "it was killed by SIGSEGV before the app was imported"),
    ],
)
def test_broken_code_changes_nothing(flaskd: Flaskd, broken: str, why: str) -> None:
    """The reload fails with the reason and exit code 70; the old workers stay, and later ones have their code."""
    start(flaskd)
    [before] = templates(flaskd)
    served = pids(flaskd)
    code(flaskd, "two", broken)
    status, _, said = flaskd.client("reload")
    assert status == 70
    assert why in said
    assert pids(flaskd) == served
    kill_worker(flaskd)
    assert get(flaskd.url, "/") == (200, b"one")
    assert [each["pid"] for each in templates(flaskd)] == [before["pid"]]
    assert flaskd.stop() == 0


def test_an_import_that_hangs_is_a_failed_reload(flaskd: Flaskd) -> None:
    """After `pool.start_timeout` the reload fails, names where the import hangs, and the template has ended."""
    start(flaskd, config="pool: {preload: true, start_timeout: 30s}\n")
    flaskd.write("flaskd.yaml", "pool: {preload: true, start_timeout: 6s}\n")
    code(flaskd, "two", "def hangs():\n    time.sleep(1000)\nhangs()\n")
    assert flaskd.client("reload", "--config")[0] == 0
    status, _, said = flaskd.client("reload")
    assert status == 70
    assert "pool.start_timeout" in said
    assert "in hangs" in said
    assert [each["generation"] for each in templates(flaskd)] == [1]
    assert get(flaskd.url, "/") == (200, b"one")
    assert flaskd.stop() == 0


def test_a_start_that_fails_says_why(flaskd: Flaskd) -> None:
    """A failed start logs the traceback and exits with 70, as without a template; nothing is left."""
    code(flaskd, "one", "raise RuntimeError('broken')\n")
    flaskd.write("flaskd.yaml", CONFIG)
    status, said = flaskd.fails("-w", "2", app="shop:app")
    assert status == 70
    assert "RuntimeError: broken" in said
    assert 'File "' in said


@pytest.mark.parametrize(
    ("holds", "told"),
    [
        ("threading.Thread(target=time.sleep, args=(999,), name='ticker', daemon=True).start()", 'the thread "ticker"'),
        (
            "import _thread; _thread.start_new_thread(time.sleep, (999,))",
            "a thread that Python's threading does not know",
        ),
        ("import asyncio; loop = asyncio.new_event_loop()", "made an event loop"),
        (
            "there = socket.create_server(('127.0.0.1', 0)); here = socket.create_connection(there.getsockname())",
            "opened a connection to 127.0.0.1:",
        ),
        (
            "import sqlite3; base = sqlite3.connect('shop.db'); base.execute('create table if not exists t (a)')",
            "opened the SQLite database /",
        ),
        ("LEADS = os.environ.get('FLASKD_WORKER', '0') == '0'", "asked for FLASKD_WORKER"),
    ],
    ids=["thread", "another", "loop", "connection", "sqlite", "slot"],
)
def test_what_cannot_be_forked_is_told(flaskd: Flaskd, holds: str, told: str) -> None:
    """Each worker imports an app that starts threads, opens connections or reads its slot on import."""
    start(flaskd, f"{holds}\n")
    assert told in flaskd.log
    assert "each worker imports the app itself" in flaskd.log
    assert get(flaskd.url, "/") == (200, b"one")
    assert imports(flaskd) == 3  # the template and two workers
    assert templates(flaskd) == []
    kill_worker(flaskd)
    assert imports(flaskd) == 4
    assert flaskd.log.count("each worker imports the app itself") == 1
    assert flaskd.stop() == 0


def test_a_thread_that_has_ended_is_none(flaskd: Flaskd) -> None:
    """An app whose threads have ended after the import, or that sends datagrams, is forked."""
    start(
        flaskd,
        "threading.Thread(target=time.sleep, args=(0.1,)).start()\n"
        "talks = socket.socket(type=socket.SOCK_DGRAM); talks.connect(('127.0.0.1', 9))\n",
    )
    assert imports(flaskd) == 1
    assert flaskd.stop() == 0


def test_a_template_that_is_killed_harms_no_worker(flaskd: Flaskd) -> None:
    """The template's end is logged, workers stay, and the next worker gets a new template with the code on the disk."""
    start(flaskd)
    served = pids(flaskd)
    [template] = templates(flaskd)
    os.kill(template["pid"], signal.SIGKILL)
    flaskd.until(lambda: "the template of generation 1" in flaskd.log and "killed by SIGKILL" in flaskd.log)
    assert pids(flaskd) == served
    kill_worker(flaskd)
    assert imports(flaskd) == 2
    assert len(templates(flaskd)) == 1
    assert flaskd.stop() == 0


def test_signals_do_not_end_a_template(flaskd: Flaskd) -> None:
    """SIGTERM, SIGINT, SIGQUIT and SIGHUP do not end a template, even if the app has set handlers for them."""
    start(flaskd, "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n")
    [template] = templates(flaskd)
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        os.kill(template["pid"], each)
    kill_worker(flaskd)
    assert [each["pid"] for each in templates(flaskd)] == [template["pid"]]
    assert imports(flaskd) == 1
    assert flaskd.stop() == 0


def test_sigterm_replaces_a_worker_that_was_forked(flaskd: Flaskd) -> None:
    """SIGTERM to a forked worker replaces it: the next one is ready before it ends."""
    start(flaskd)
    before = pids(flaskd)
    os.kill(before[1], signal.SIGTERM)
    flaskd.until(lambda: pids(flaskd).get(1, before[1]) != before[1])
    flaskd.until(lambda: not is_there(before[1]))
    assert pids(flaskd)[0] == before[0]
    assert imports(flaskd) == 1
    assert flaskd.stop() == 0


def test_orphans_of_the_app_are_reaped(flaskd: Flaskd) -> None:
    """An orphan of a child of the app is reaped by the supervisor."""
    start(
        flaskd,
        "@app.get('/orphan')\n"
        "def orphan():\n"
        "    return subprocess.run(['sh', '-c', 'sleep 0.2 >&- & echo $!'], stdout=subprocess.PIPE).stdout\n",
    )
    status, said = get(flaskd.url, "/orphan")
    assert status == 200
    flaskd.until(lambda: not is_there(int(said)))
    assert zombies(flaskd) == []
    assert flaskd.stop() == 0


def test_a_step_of_the_service_has_its_exit_code(flaskd: Flaskd) -> None:
    """The supervisor, which reaps orphans, gets the exit code of a cleanup command all the same."""
    step = "cleanup: {policies: {say: {use: command, with: {argv: [sh, -c, 'sleep 1.5; exit 7']}}}}\n"
    start(flaskd, config=CONFIG + step)
    flaskd.stop()
    [fate] = [each for name, each in flaskd.record()["policies"].items() if "say" in name]
    assert "7" in json.dumps(fate)


def test_nothing_is_left_when_the_supervisor_is_killed(flaskd: Flaskd) -> None:
    """When the supervisor is killed, the template ends at once, and workers when they have finished their requests."""
    start(flaskd)
    there = [each["pid"] for each in processes(flaskd)]
    flaskd.kill(signal.SIGKILL)
    flaskd.wait()
    until(lambda: not any(map(runs, there)), lambda: f"\n{flaskd.log}")


def test_a_stop_leaves_no_process(flaskd: Flaskd) -> None:
    """A stop ends workers and template, and waits for no import."""
    start(flaskd)
    there = [each["pid"] for each in processes(flaskd)]
    assert flaskd.stop() == 0
    assert not any(map(is_there, there))


def test_a_stop_in_the_middle_of_an_import(flaskd: Flaskd) -> None:
    """A stop during a reload whose template imports the app ends at once, and leaves nothing."""
    start(flaskd)
    flaskd.write("shop.py", "import os, time; open('began', 'w').write(str(os.getpid())); time.sleep(1000)\n")
    with flaskd.control() as control:
        control.sendall(b"reload\n")
        flaskd.until(lambda: (flaskd.directory / "began").exists() and (flaskd.directory / "began").read_text() != "")
        assert flaskd.stop() == 0
    assert not is_there(int((flaskd.directory / "began").read_text()))


def test_a_template_ends_with_the_supervisor_in_the_middle_of_an_import(flaskd: Flaskd) -> None:
    """When the supervisor is killed during an import, the template ends at once."""
    flaskd.write("shop.py", "import os, time; open('began', 'w').write(str(os.getpid())); time.sleep(1000)\n")
    flaskd.write("flaskd.yaml", CONFIG)
    flaskd.launch("-w", "2", app="shop:app")
    began = flaskd.directory / "began"
    flaskd.until(lambda: began.exists() and began.read_text() != "")
    flaskd.kill(signal.SIGKILL)
    flaskd.wait()
    until(lambda: not runs(int(began.read_text())))


def test_a_worker_is_where_the_app_wants_to_be(flaskd: Flaskd) -> None:
    """Working directory, path and signal handlers that the app sets on import are the same in its workers."""
    start(
        flaskd,
        "import signal, sys\nos.mkdir('deeper'); os.chdir('deeper'); sys.path.append('/mine')\n"
        "signal.signal(signal.SIGUSR1, lambda *_: open('heard', 'w').close())\n"
        "@app.get('/where')\ndef where():\n"
        "    return f'{os.path.basename(os.getcwd())} {sys.path[-1]} {os.environ[\"FLASKD_WORKER\"]}'\n",
        config=CONFIG + "app: {chdir: .}\n",
    )
    url = flaskd.url
    found: set[object] = set()
    for number in (0, 1):
        os.kill(pids(flaskd)[number], signal.SIGUSR1)
        flaskd.until((flaskd.directory / "deeper/heard").exists)
        (flaskd.directory / "deeper/heard").unlink()
    until(lambda: found.add(get(url, "/where")) or len(found) == 2)  # type: ignore[func-returns-value]
    assert found == {(200, b"deeper /mine 0"), (200, b"deeper /mine 1")}
    assert flaskd.stop() == 0


def test_discovery_finds_what_was_made_before_the_fork(flaskd: Flaskd) -> None:
    """Each worker closes an engine that the app made on import, although the garbage collector does not see it."""
    start(
        flaskd,
        "import sqlalchemy\nengine = sqlalchemy.create_engine('sqlite:///:memory:')\n"
        "@app.get('/query')\ndef query():\n"
        "    with engine.connect() as connection:\n"
        "        return str(connection.execute(sqlalchemy.text('select 41 + 1')).scalar())\n"
        "@sqlalchemy.event.listens_for(engine, 'engine_disposed')\ndef disposed(engine):\n"
        "    open(f'disposed-{os.getpid()}', 'w').close()\n",
    )
    served = set(pids(flaskd).values())
    assert get(flaskd.url, "/query") == (200, b"42")
    assert "sqlalchemy.dispose" in flaskd.command("plan")
    assert imports(flaskd) == 1
    assert flaskd.stop() == 0
    assert made_by_each(flaskd, "disposed") == served


def test_words_and_on_stop_of_the_import_are_not_lost(flaskd: Flaskd) -> None:
    """What the app logs on import is in the log once; functions that it registers run in each worker."""
    start(
        flaskd,
        "import atexit, flaskd\nprint('imported now')\n"
        "@flaskd.on_stop\ndef put_away():\n    open(f'put-away-{os.getpid()}', 'w').close()\n"
        "atexit.register(lambda: open(f'at-exit-{os.getpid()}', 'w').close())\n",
    )
    served = set(pids(flaskd).values())
    assert flaskd.stop() == 0
    assert flaskd.log.count("imported now") == 1
    assert made_by_each(flaskd, "put-away") == made_by_each(flaskd, "at-exit") == served
