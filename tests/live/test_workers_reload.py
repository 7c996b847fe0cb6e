"""Reloads with workers: new code slot by slot, and faulty code that does no harm."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import shutil
import signal
import sys
import venv
from pathlib import Path

import pytest
from daemon_kit import Flaskd
from http_client import get, place_of
from workers_kit import APP, WAITS, Asking, Clients, asked, code, generations, shown, start, workers

import flaskd as package


def test_a_reload_brings_new_code_and_loses_nothing(flaskd: Flaskd) -> None:
    """All slots get new workers in the same daemon, and no request is lost or refused."""
    start(flaskd)
    before = workers(flaskd)
    code(flaskd, "two")
    with Clients(flaskd.url) as clients:
        assert flaskd.client("reload")[:2] == (0, "reloaded\n")
        assert get(flaskd.url) == (200, b"two")
    assert clients.lost == []
    assert clients.said == {b"one", b"two"}
    assert generations(flaskd) == [2, 2]
    assert not {pid for _, pid in before} & {pid for _, pid in workers(flaskd)}
    assert flaskd.stop() == 0


def test_requests_under_way_are_finished_by_the_old_workers(flaskd: Flaskd) -> None:
    """The reload is answered while a request runs in an old worker, which then answers with the old code."""
    start(flaskd)
    held = flaskd.hold()
    code(flaskd, "two")
    assert flaskd.command("reload").endswith("OK reloaded\n")
    assert get(flaskd.url) == (200, b"two")
    assert "leaving" in {each["state"] for each in shown(flaskd)}
    flaskd.gate.open()
    assert held.result() == (200, b"held by one")
    flaskd.until(lambda: len(shown(flaskd)) == 2)
    assert flaskd.stop() == 0


def test_what_an_old_worker_cannot_finish_in_time_is_cut(flaskd: Flaskd) -> None:
    """Old workers drain for shutdown.drain.timeout; after that their requests are cut and logged."""
    start(flaskd, config="shutdown: {deadline: 5s, reserve: 1s, drain: {timeout: 100ms}}\n")
    held = flaskd.hold()
    assert flaskd.command("reload").endswith(f"OK reloaded config={flaskd.directory}/flaskd.yaml\n")
    assert not isinstance(held.result(), tuple)
    flaskd.until(lambda: len(shown(flaskd)) == 2)
    assert "GET /hold" in flaskd.log
    assert flaskd.stop() == 0


def test_the_old_worker_leaves_when_the_new_one_is_ready(flaskd: Flaskd) -> None:
    """While the first new worker loads both old ones serve; while the second loads, one of each."""
    start(flaskd)
    code(flaskd, "two", "with socket.socket(socket.AF_UNIX) as gate:\n"
         "    gate.connect(os.environ['GATE'])\n    gate.sendall(b'entered')\n    gate.recv(1)\n")  # fmt: skip
    reloading = Asking(flaskd)
    flaskd.gate.entered()
    assert (generations(flaskd), flaskd.status()["state"]) == ([1, 1], "reloading")
    flaskd.gate.open()
    flaskd.gate.entered()
    assert generations(flaskd) == [2, 1]
    flaskd.gate.open()
    assert reloading.answer().endswith("OK reloaded\n")
    assert generations(flaskd) == [2, 2]
    assert flaskd.stop() == 0


def test_surge_is_how_many_slots_are_replaced_at_once(flaskd: Flaskd) -> None:
    """With pool.surge: 2 the first new worker is started alone, and then two at a time."""
    code(flaskd, "one")
    flaskd.write("flaskd.yaml", "pool: {surge: 2}\n")
    flaskd.start("-w", "4", app="shop:app")
    code(flaskd, "two", "with socket.socket(socket.AF_UNIX) as gate:\n"
         "    gate.connect(os.environ['GATE'])\n    gate.sendall(b'entered')\n    gate.recv(1)\n")  # fmt: skip
    reloading = Asking(flaskd)
    starting = lambda: [each["slot"] for each in shown(flaskd) if each["state"] == "loading"]  # noqa: E731
    flaskd.gate.entered()
    assert starting() == [0]
    flaskd.gate.open()
    flaskd.gate.entered()
    flaskd.gate.entered()
    assert starting() == [1, 2]
    flaskd.gate.open(1)
    flaskd.gate.entered()
    flaskd.gate.open()
    assert "OK reloaded" in reloading.answer()
    assert generations(flaskd) == [2, 2, 2, 2]
    assert flaskd.stop() == 0


BAD = {
    "syntax": ("(", "app-failed", 70, "SyntaxError: '(' was never closed"),
    "exception": ("raise ValueError('no shop today')", "app-failed", 70, "ValueError: no shop today"),
    "exit": ("import sys; sys.exit(3)", "app-failed", 70, "SystemExit"),
    "missing": ("import nosuchmodule", "app-failed", 70, "ModuleNotFoundError: No module named 'nosuchmodule'"),
    "no-app": ("del app", "config-invalid", 78, "shop"),
    "dies": ("os._exit(5)", "app-failed", 70, "it left with the exit code 5 before it was ready"),
    "killed": ("os.kill(os.getpid(), 9)", "app-failed", 70, "it was killed by SIGKILL before it was ready"),
    "crashes": ("os.kill(os.getpid(), 11)", "app-failed", 70, "it was killed by SIGSEGV before it was ready"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_code_changes_nothing(flaskd: Flaskd, kind: str) -> None:
    """Reply, STATUS, status and log have the error; the old workers stay, and mended code is loaded next time."""
    more, word, exit_code, why = BAD[kind]
    start(flaskd)
    before = workers(flaskd)
    code(flaskd, "bad", "\n" + more + "\n")
    with Clients(flaskd.url) as clients:
        said, out, err = flaskd.client("reload")
    assert (said, out) == (exit_code, "")
    assert why in err
    assert "; keeping the old configuration and workers" in err
    assert (clients.lost, clients.said) == ([], {b"one"})
    assert workers(flaskd) == before
    assert "STATUS=ready, but the reload failed: cannot " in "".join(flaskd.drain_messages())
    assert flaskd.status()["last_reload"]["ok"] is False
    assert why in flaskd.log
    assert f"ERR {word} " in flaskd.command("reload")
    code(flaskd, "two")
    assert flaskd.command("reload").endswith("OK reloaded\n")
    assert get(flaskd.url) == (200, b"two")
    assert flaskd.stop() == 0


def test_the_traceback_of_bad_code_is_told(flaskd: Flaskd) -> None:
    """The reply and the log have the traceback, from the app's first frame on, once."""
    start(flaskd)
    code(flaskd, "bad", "def open_shop():\n    raise ValueError('no shop today')\nopen_shop()\n")
    err = flaskd.client("reload")[2]
    assert "in open_shop" in err
    assert "raise ValueError('no shop today')" in err
    assert flaskd.log.count("raise ValueError('no shop today')") == 1
    assert flaskd.stop() == 0


def test_a_probe_that_fails_changes_nothing(flaskd: Flaskd) -> None:
    """A new worker whose health.probe is answered with 500 gets no connection and no slot."""
    start(flaskd, config="health: {probe: /}\n")
    before = workers(flaskd)
    code(flaskd, "bad", "@app.before_request\ndef broken():\n    raise ValueError('no shop today')\n")
    with Clients(flaskd.url) as clients:
        exit_code, _, err = flaskd.client("reload")
    assert exit_code == 70
    assert "the probe of / was answered with 500" in err
    assert (clients.lost, clients.said) == ([], {b"one"})
    assert workers(flaskd) == before
    assert flaskd.stop() == 0


def test_an_import_that_hangs_is_given_up(flaskd: Flaskd) -> None:
    """A new worker that is not ready after pool.start_timeout is killed, and the old ones serve."""
    start(flaskd, config="pool: {start_timeout: 20s}\n")
    before = workers(flaskd)
    flaskd.write("flaskd.yaml", "pool: {start_timeout: 500ms}\n")
    code(flaskd, "bad", "import threading\nthreading.Event().wait()\n")
    exit_code, _, err = flaskd.client("reload")
    assert exit_code == 70
    assert "it was not ready after" in err
    assert workers(flaskd) == before
    assert get(flaskd.url) == (200, b"one")
    assert flaskd.stop() == 0


def test_one_that_dies_within_its_canary_changes_nothing(flaskd: Flaskd) -> None:
    """If the new worker dies within pool.canary, the old one has served all the time, and stays."""
    start(flaskd, config="pool: {canary: 60s}\n")
    before = workers(flaskd)
    code(flaskd, "two")
    reloading = Asking(flaskd)
    flaskd.until(lambda: generations(flaskd) == [1, 2, 1])
    [new] = [each["pid"] for each in shown(flaskd) if each["generation"] == 2]
    assert flaskd.status()["state"] == "reloading"
    os.kill(new, signal.SIGKILL)
    assert "within pool.canary: it was killed by SIGKILL; keeping the old configuration" in reloading.answer()
    assert workers(flaskd) == before
    assert get(flaskd.url) == (200, b"one")
    assert flaskd.stop() == 0


def test_a_canary_that_lives_is_followed(flaskd: Flaskd) -> None:
    """After pool.canary all slots are replaced."""
    start(flaskd, config="pool: {canary: 200ms}\n")
    code(flaskd, "two")
    assert "OK reloaded" in flaskd.command("reload")
    assert generations(flaskd) == [2, 2]
    assert flaskd.stop() == 0


def test_a_later_worker_that_fails_is_told_and_the_new_configuration_is_in_force(flaskd: Flaskd) -> None:
    """If a later worker fails, the new ones stay, the new configuration is in force, and the reply says so."""
    start(flaskd, config="server: {threads: 2}\n")
    flaskd.write("flaskd.yaml", "server: {threads: 3}\n")
    code(flaskd, "two", "if os.environ['FLASKD_WORKER'] == '1':\n    raise ValueError('only one')\n")
    answer = flaskd.command("reload")
    assert (
        "ERR app-failed cannot load shop:app: the app raised ValueError: only one; 1 had been replaced before" in answer
    )
    assert "; the new configuration is in force" in answer
    assert generations(flaskd) == [2, 1]
    assert flaskd.status()["threads"] == 2 * 3
    code(flaskd, "three")
    assert "OK reloaded" in flaskd.command("reload")
    assert generations(flaskd) == [3, 3]
    assert flaskd.stop() == 0


# --- in the middle of a reload ---


def begun(flaskd: Flaskd, second: bool = False) -> Asking:
    """A reload whose first or second new worker is importing the app."""
    code(flaskd, "two", WAITS)
    reloading = Asking(flaskd)
    flaskd.gate.entered()
    if second:
        flaskd.gate.open()
        flaskd.gate.entered()
    return reloading


@pytest.mark.parametrize("second", [False, True])
def test_a_second_reload_is_taken_at_once(flaskd: Flaskd, second: bool) -> None:
    """A second reload ends the first, whose import hangs; both are answered with the outcome of the second."""
    start(flaskd)
    first = begun(flaskd, second)
    code(flaskd, "three")
    assert Asking(flaskd).answer() == "OK reloaded\n"
    assert first.answer() == "OK reloaded\n"
    assert get(flaskd.url) == (200, b"three")
    assert len(set(generations(flaskd))) == 1
    flaskd.until(lambda: len(shown(flaskd)) == 2)
    assert flaskd.stop() == 0


@pytest.mark.parametrize("second", [False, True])
def test_a_drain_ends_a_reload(flaskd: Flaskd, second: bool) -> None:
    """A drain ends a reload at once; the reload gets an error, and after a resume all is as before."""
    start(flaskd)
    reloading = begun(flaskd, second)
    assert "OK drained" in flaskd.command("drain wait")
    assert reloading.answer() == "ERR not-now the reload was broken off by a drain\n"
    assert flaskd.command("resume") == "OK ready\n"
    assert get(flaskd.url)[1] in {b"one", b"two"}
    code(flaskd, "three")
    assert "OK reloaded" in flaskd.command("reload")
    assert get(flaskd.url) == (200, b"three")
    assert flaskd.stop() == 0


@pytest.mark.parametrize("second", [False, True])
def test_a_stop_ends_a_reload(flaskd: Flaskd, second: bool) -> None:
    """SIGTERM during a new worker's import ends flaskd with exit code 0, and the reload gets an error."""
    start(flaskd)
    reloading = begun(flaskd, second)
    assert flaskd.stop() == 0
    assert reloading.answer() == "ERR not-now the reload was broken off by a stop\n"


def test_a_kill_of_the_worker_that_loads_ends_the_reload(flaskd: Flaskd) -> None:
    """If the importing worker is killed, the reload fails, and nothing else changes."""
    start(flaskd)
    before = workers(flaskd)
    reloading = begun(flaskd)
    [new] = [each["pid"] for each in shown(flaskd) if each["state"] == "loading"]
    os.kill(new, signal.SIGKILL)
    assert "it was killed by SIGKILL before it was ready" in reloading.answer()
    assert workers(flaskd) == before
    assert flaskd.stop() == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_scale_is_taken_in_the_middle_of_a_reload(flaskd: Flaskd, count: int) -> None:
    """A scale during a reload is carried out at once; the reload goes on with the present slots."""
    start(flaskd)
    reloading = begun(flaskd)
    code(flaskd, "two")
    assert Asking(flaskd, f"scale {count}").answer() == f"OK scaled workers={count}\n"
    flaskd.gate.open()
    assert reloading.answer() == "OK reloaded\n"
    assert generations(flaskd) == [2] * count
    assert flaskd.stop() == 0


def test_an_old_worker_that_dies_meanwhile_is_replaced_by_the_new_one(flaskd: Flaskd) -> None:
    """If the old worker dies while its replacement loads, that takes the slot."""
    start(flaskd)
    reloading = begun(flaskd)
    code(flaskd, "two")
    os.kill(workers(flaskd)[0][1], signal.SIGKILL)
    flaskd.until(lambda: len(workers(flaskd)) == 1)
    assert get(flaskd.url) == (200, b"one")
    flaskd.gate.open()
    assert reloading.answer() == "OK reloaded\n"
    assert generations(flaskd) == [2, 2]
    assert flaskd.stop() == 0


# --- SIGHUP, and what only new workers can have ---


def test_sighup_brings_new_code(flaskd: Flaskd) -> None:
    """A SIGHUP tells systemd RELOADING=1, extends its time while workers start, and ends with READY=1."""
    start(flaskd)
    code(flaskd, "two")
    flaskd.kill(signal.SIGHUP)
    flaskd.wait_message("RELOADING=1")
    flaskd.wait_message("EXTEND_TIMEOUT_USEC=")
    flaskd.wait_message("READY=1")
    assert get(flaskd.url) == (200, b"two")
    assert flaskd.stop() == 0


def test_who_waits_for_a_reload_hears_that_it_goes_on(flaskd: Flaskd) -> None:
    """A client that waits for a reload gets a line of progress every few seconds."""
    start(flaskd)
    code(flaskd, "two")
    exit_code, out, err = flaskd.client("reload")
    assert (exit_code, out) == (0, "reloaded\n")
    assert ".. starting=1 age=" in err
    assert flaskd.stop() == 0


def test_what_only_new_workers_can_have_comes_with_a_reload(flaskd: Flaskd) -> None:
    """app.target, proxies and limits may change; keys of the daemon itself are refused, all together."""
    start(flaskd, config="server: {ident: before}\n")
    before = workers(flaskd)
    flaskd.write("flaskd.yaml", "server: {ident: after, backlog: 7}\ncontrol: {required: true}\n")
    assert flaskd.command("reload") == (
        "ERR restart-needed server.backlog, control.required: cannot change without a restart; "
        "keeping the old configuration and workers\n"
    )
    assert flaskd.client("reload")[0] == 78
    assert workers(flaskd) == before
    flaskd.write("flaskd.yaml", "server: {ident: after}\n")
    assert "OK reloaded" in flaskd.command("reload")
    assert server_header(flaskd.url) == "after"
    assert flaskd.stop() == 0


def server_header(url: str) -> str | None:
    """The Server header of a response."""
    with contextlib.closing(http.client.HTTPConnection(*place_of(url))) as connection:
        connection.request("GET", "/")
        return connection.getresponse().getheader("Server")


def test_the_app_may_be_another_one(flaskd: Flaskd) -> None:
    """A reload with another app.target starts workers with that app; a missing one is refused."""
    code(flaskd, "one")
    flaskd.write("other.py", APP.format(code="other"))
    flaskd.write("flaskd.yaml", "app: {target: 'shop:app'}\n")
    flaskd.start("-w", "2", app=None)
    flaskd.write("flaskd.yaml", "app: {target: 'nosuch:app'}\n")
    exit_code, _, err = flaskd.client("reload")
    assert (exit_code, "nosuch" in err) == (78, True)
    flaskd.write("flaskd.yaml", "app: {target: 'other:app'}\n")
    assert "OK reloaded" in flaskd.command("reload")
    assert get(flaskd.url) == (200, b"other")
    assert flaskd.status()["app"] == "other:app"
    assert flaskd.stop() == 0


@pytest.mark.parametrize(("before", "after"), [("2", "0"), ("0", "2")])
def test_no_reload_leads_from_workers_to_none(flaskd: Flaskd, before: str, after: str) -> None:
    """A change of server.workers between 0 and a number needs a restart, in both directions."""
    code(flaskd, "one")
    flaskd.write("flaskd.yaml", f"server: {{workers: {before}}}\n")
    flaskd.start(app="shop:app")
    flaskd.write("flaskd.yaml", f"server: {{workers: {after}}}\n")
    assert "ERR restart-needed server.workers: cannot change without a restart" in flaskd.command("reload")
    assert flaskd.stop() == 0


@pytest.mark.parametrize("verb", ["reload", "reload config"])
def test_another_number_of_workers_comes_with_a_reload(flaskd: Flaskd, verb: str) -> None:
    """server.workers can change from 2 to 3 to 1; the reply comes when the new ones are ready."""
    code(flaskd, "one")
    flaskd.write("flaskd.yaml", "server: {workers: 2}\n")
    flaskd.start(app="shop:app")
    for count in (3, 1):
        flaskd.write("flaskd.yaml", f"server: {{workers: {count}}}\n")
        assert "OK reloaded" in flaskd.command(verb)
        assert [slot for slot, _ in workers(flaskd)] == list(range(count))
    flaskd.write("flaskd.yaml", "server: {workers: auto}\n")
    assert "OK reloaded" in flaskd.command(verb)
    assert len(workers(flaskd)) >= 1
    assert flaskd.stop() == 0


def test_the_command_line_wins_at_a_reload_too(flaskd: Flaskd) -> None:
    """-w wins over the file at a reload, too, even over a value that would need a restart."""
    start(flaskd, config="server: {workers: 4}\n")
    for count in (3, 0):
        flaskd.write("flaskd.yaml", f"server: {{workers: {count}}}\n")
        assert "OK reloaded" in flaskd.command("reload")
        assert len(workers(flaskd)) == 2
    assert flaskd.stop() == 0


# --- the configuration alone ---


def test_a_reload_of_the_configuration_alone_keeps_the_workers(flaskd: Flaskd) -> None:
    """A reload of the configuration alone changes threads, log and policies in each worker, but not the code."""
    start(flaskd, config="server: {threads: 2}\n")
    before, count = workers(flaskd), len(threads(flaskd))
    code(flaskd, "two")
    flaskd.write(
        "flaskd.yaml",
        "server: {threads: 3}\nlog: {level: debug}\n"
        "cleanup: {policies: {bye: {use: call, with: {target: 'note:write'}}}}\n",
    )
    flaskd.write(
        "note.py", "import os\ndef write(context):\n    open('bye-' + os.environ['FLASKD_WORKER'], 'w').close()\n"
    )
    assert flaskd.client("reload", "--config")[0] == 0
    assert workers(flaskd) == before
    assert get(flaskd.url) == (200, b"one")
    flaskd.until(lambda: len(threads(flaskd)) == count + 2)
    assert flaskd.stop() == 0
    assert (flaskd.directory / "bye-0").exists()
    assert (flaskd.directory / "bye-1").exists()


def threads(flaskd: Flaskd) -> list[dict]:
    """The threads of all workers."""
    return list(asked(flaskd, "threads")["list"])


def test_a_configuration_that_a_worker_cannot_take_is_refused_by_all(flaskd: Flaskd) -> None:
    """If one worker cannot take the configuration, the reply says which and why, and all keep the old one."""
    start(flaskd, config="server: {threads: 2}\n")
    before = len(threads(flaskd))
    flaskd.write(
        "flaskd.yaml", "server: {threads: 3}\ncleanup: {policies: {p: {use: call, with: {target: 'note:f'}}}}\n"
    )
    flaskd.write("note.py", "import os\nif os.environ.get('FLASKD_WORKER') == '1':\n    raise ValueError('not me')\n"
                 "def f():\n    pass\n")  # fmt: skip
    answer = flaskd.command("reload config")
    assert answer.startswith("ERR ")
    assert "worker 1" in answer
    assert "not me" in answer
    assert flaskd.status()["threads"] == 2 * 2
    assert "p" not in asked(flaskd, "plan")["text"].split()
    flaskd.until(lambda: len(threads(flaskd)) == before)
    assert get(flaskd.url) == (200, b"one")
    assert flaskd.stop() == 0


def test_a_watched_edit_is_the_configuration_alone_where_that_is_enough(flaskd: Flaskd) -> None:
    """With watch: true a change of threads needs no new workers; other changes start new ones."""
    start(flaskd, config="watch: true\nserver: {threads: 2}\n")
    before = workers(flaskd)
    flaskd.write("flaskd.yaml", "watch: true\nserver: {threads: 3}\n")
    flaskd.until(lambda: flaskd.status()["threads"] == 2 * 3)
    assert workers(flaskd) == before
    flaskd.write("flaskd.yaml", "watch: true\nserver: {threads: 3, ident: another}\n")
    flaskd.until(lambda: generations(flaskd) == [2, 2])
    flaskd.until(lambda: flaskd.status()["state"] == "ready")
    assert flaskd.stop() == 0


# --- another place on the disk ---


def test_a_package_that_is_swapped_by_a_rename_is_taken(flaskd: Flaskd) -> None:
    """New workers import a package from a directory that was exchanged by renaming its link."""
    for name in ("one", "two"):
        flaskd.write(f"release-{name}/lib.py", f"NAME = {name!r}\n")
    current = flaskd.directory / "current"
    current.symlink_to("release-one")
    flaskd.env["PYTHONPATH"] = str(current)
    flaskd.write("shop.py", "from flask import Flask\nimport lib\napp = Flask(__name__)\n"
                 "@app.get('/')\ndef index():\n    return lib.NAME\n")  # fmt: skip
    flaskd.start("-w", "2", app="shop:app")
    assert get(flaskd.url) == (200, b"one")
    (flaskd.directory / "next").symlink_to("release-two")
    (flaskd.directory / "next").rename(current)
    shutil.rmtree(flaskd.directory / "release-one")
    assert flaskd.command("reload").endswith("OK reloaded\n")
    assert get(flaskd.url) == (200, b"two")
    assert flaskd.stop() == 0


def environment(flaskd: Flaskd, name: str, lib: str) -> Path:
    """A virtual environment with one more library than this one."""
    place = flaskd.directory / name
    venv.create(place, symlinks=True)
    [site] = place.glob("lib/python*/site-packages")
    (site / "lib.py").write_text(f"NAME = {lib!r}\n")
    here = [str(Path(package.__file__).parents[1]), *filter(os.path.isdir, sys.path)]
    (site / "here.pth").write_text("\n".join(here))
    return site


def test_a_virtual_environment_is_replaced_between_two_generations(flaskd: Flaskd) -> None:
    """New workers run in an exchanged virtual environment; if it has another flaskd, they are refused."""
    environment(flaskd, "venv-one", "one")
    environment(flaskd, "venv-two", "two")
    other = environment(flaskd, "venv-three", "three")
    shutil.copytree(Path(package.__file__).parent, other / "flaskd", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "flaskd" / "version.py").write_text('"""Another one."""\n\n__version__ = "99.1"\n')
    current = flaskd.directory / "venv"
    current.symlink_to("venv-one")
    flaskd.write("shop.py", "from flask import Flask\nimport lib\napp = Flask(__name__)\n"
                 "@app.get('/')\ndef index():\n    return lib.NAME\n")  # fmt: skip
    flaskd.start(
        "-w", "2", app="shop:app", prefix=["sh", "-c", 'shift; exec "$0" "$@"', str(current / "bin" / "python")]
    )

    def replace(name: str) -> None:
        (flaskd.directory / "next").symlink_to(name)
        (flaskd.directory / "next").rename(current)

    assert get(flaskd.url) == (200, b"one")
    replace("venv-two")
    shutil.rmtree(flaskd.directory / "venv-one")
    assert flaskd.command("reload").endswith("OK reloaded\n")
    assert get(flaskd.url) == (200, b"two")
    before = workers(flaskd)
    replace("venv-three")
    answer = flaskd.command("reload")
    assert f"it is flaskd 99.1, and this is {package.__version__}: restart flaskd; keeping the old" in answer
    assert workers(flaskd) == before
    assert get(flaskd.url) == (200, b"two")
    shutil.rmtree(flaskd.directory / "venv-three")
    assert "ERR cannot-bind cannot start worker 0: " in flaskd.command("reload")
    assert get(flaskd.url) == (200, b"two")
    assert flaskd.stop() == 0


SCHEDULER = """
from apscheduler.schedulers.background import BackgroundScheduler

def note():
    with open("jobs", "a") as file:
        file.write(f"{os.getpid()}\\n")

scheduler = BackgroundScheduler()
scheduler.add_job(note, "interval", seconds=0.1)
if os.environ["FLASKD_WORKER"] == "0":
    scheduler.start()
"""


THREE_RUNS = """
import time
while scheduler.running and open("jobs").read().split().count(str(os.getpid())) < 3:
    time.sleep(0.01)
"""
"""Code whose import lasts until its job has run three times."""


def test_one_worker_alone_runs_the_jobs(flaskd: Flaskd) -> None:
    """During reloads and a stop, no job of an old worker begins after one of the new worker."""

    def turns() -> list[str]:
        """The workers whose jobs have run, in order, without repetitions."""
        return [pid for pid, _ in itertools.groupby((flaskd.directory / "jobs").read_text().split())]

    config = "log: {access: 'off'}\ncleanup: {discovery: {mode: auto}}\n"
    code(flaskd, "one", SCHEDULER)
    flaskd.write("flaskd.yaml", config)
    flaskd.start("-w", "2", app="shop:app")
    [old] = (str(pid) for slot, pid in workers(flaskd) if slot == 0)
    code(flaskd, "two", SCHEDULER + THREE_RUNS + "1 / 0\n")
    assert flaskd.client("reload")[0] == 70
    flaskd.until(lambda: len(turns()) == 3)
    assert turns()[0] == turns()[2] == old
    code(flaskd, "three", SCHEDULER + THREE_RUNS)
    assert flaskd.client("reload")[0] == 0
    [new] = (str(pid) for slot, pid in workers(flaskd) if slot == 0)
    flaskd.until(lambda: len(shown(flaskd)) == 2)
    flaskd.until(lambda: turns()[-1] == new)
    assert flaskd.stop() == 0
    assert (turns()[2:], turns().count(new)) == ([old, new], 1)
