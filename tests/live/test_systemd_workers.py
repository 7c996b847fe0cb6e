"""Worker processes under a real service manager: what it sees, what it waits for, and when it restarts the service."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from http_client import Answer, get, refused
from patience import PATIENCE, until
from systemd_kit import LONG, PROJECT, Instance, Systemd
from systemd_load import Load, activated

TIMES = 30 if LONG else 3
KILLS = 10 if LONG else 2
SLOW = 90.0
"""Seconds within which a service with workers starts or stops on a busy machine; usually it is much quicker."""
WORKERS = "server: {listen: '127.0.0.1:PORT', workers: 2, threads: 2}\n"
PATIENT = (
    "shutdown: {drain: {keepalive_grace: 5s}}\n"  # on a busy machine a client may take long until its next request
)
STORED_WORKERS = WORKERS + "systemd: {fdstore: true}\n"
QUICK_TO_BITE = "[Service]\nWatchdogSec=2\n"
SLOW_APP = """
import pathlib, sys, time
sys.path.append("/srv/app")
from shop import app
time.sleep(float(pathlib.Path("/srv/NAME/import").read_text()))
"""


def workers(instance: Instance) -> list[dict[str, Any]]:
    """The workers as shown to programs."""
    return list(json.loads(instance.client("workers", "--json"))["list"])


def pids(instance: Instance) -> set[int]:
    """The pids of all workers where the service runs."""
    return {each["pid"] for each in workers(instance)}


def processes(instance: Instance) -> set[int]:
    """All processes of the service, from its control group."""
    group = f"/sys/fs/cgroup{instance.show('ControlGroup')}/cgroup.procs"
    return set(map(int, instance.systemd.run("cat", group).stdout.split()))


def kill(systemd: Systemd, number: str, found: set[int]) -> None:
    """Send a signal to processes of the service."""
    systemd.run("bash", "-c", f"kill -{number} {' '.join(map(str, found))}")


def alive(systemd: Systemd, found: set[int]) -> list[str]:
    """Those of the processes that still run."""
    return systemd.run("bash", "-c", f"ls -d {' '.join(f'/proc/{each}' for each in found)}", check=False).stdout.split()


def end(instance: Instance) -> None:
    """Stop what the test started."""
    instance.systemd.ctl("stop", instance.socket, instance.unit, check=False)


def slow_app(systemd: Systemd, name: str, config: str, *, service: str = "") -> Instance:
    """An instance whose app's import takes as long as a file says, which `takes` writes."""
    instance = systemd.flaskd(name, service=service)
    systemd.write(f"/srv/{name}/slow.py", SLOW_APP.replace("NAME", name))
    whole = f"app: {{target: 'slow:app', chdir: /srv/{name}}}\n"
    systemd.write(f"/etc/flaskd/{name}.yaml", whole + config.replace("PORT", str(instance.port)))
    takes(instance, 0)
    return instance


def takes(instance: Instance, seconds: float) -> None:
    """Set how long the import of a `slow_app` takes from now on."""
    instance.systemd.write(f"/srv/{instance.name}/import", str(seconds))


def stays(instance: Instance, seconds: float) -> None:
    """Check for some time that the service does not restart; only time can show that."""
    before, ended = (instance.pid, instance.show("NRestarts")), time.monotonic() + seconds
    until(lambda: time.monotonic() > ended, patience=seconds + 1)
    assert (instance.pid, instance.show("NRestarts")) == before, instance.journal()


@pytest.mark.parametrize("preload", [False, True], ids=["started", "forked"])
def test_a_life_with_workers_as_it_is_shipped(each_systemd: Systemd, preload: bool) -> None:
    """In the shipped sandbox workers serve and report their memory, a reload replaces them, a stop leaves none."""
    systemd = each_systemd
    life = systemd.flaskd(f"life-w{preload:d}", WORKERS + "pool: {preload: true}\n" * preload).start()
    assert life.show("StatusText") == f"ready: shop on 127.0.0.1:{life.port}"
    first = workers(life)
    assert [each["slot"] for each in first] == [0, 1]
    assert all(each["memory"] > 1 << 20 and each["cpu"] is not None for each in first), [
        (each["memory"], each["cpu"]) for each in first
    ]
    titles = [systemd.run("cat", f"/proc/{each['pid']}/comm").stdout for each in first]
    assert titles == ["flaskd-worker-0\n", "flaskd-worker-1\n"]
    until(lambda: len({get(life.url, "/pid")[1] for _ in range(20)}) == 2, "both serve")
    systemd.ctl("reload", life.unit, timeout=SLOW)
    assert life.show("ActiveState") == "active"
    new = {each["pid"] for each in workers(life) if each["generation"] == 2}
    assert len(new) == 2
    until(lambda: pids(life) == new, "the old ones end")
    answer = Answer(life.url, "/sleep/2")
    until(lambda: life.status()["in_flight"] == 1, "a request in flight")
    life.client("drain")
    until(lambda: life.show("StatusText").startswith("draining: 1 in flight"), lambda: life.show("StatusText"))
    assert answer.result() == (200, b"slept")
    until(lambda: life.show("StatusText").startswith("drained: completed=1 rejected=0 cut=0"))
    life.client("resume")
    assert life.show("StatusText").startswith("ready: shop")
    everybody = processes(life)
    assert {life.pid} | new <= everybody
    assert len(everybody) == 3 + preload  # and a template
    systemd.ctl("stop", life.unit)
    assert (life.show("Result"), life.show("ExecMainStatus")) == ("success", "0")
    assert alive(systemd, everybody) == []
    journal = life.journal()
    assert "stopped: completed=0 rejected=0 cut=0" in journal
    assert "Killing process" not in journal  # the manager found no process left


def test_a_worker_that_is_killed_does_not_end_the_service(each_systemd: Systemd) -> None:
    """A worker killed as by the OOM killer is replaced, the service stays active, the journal names what was lost."""
    systemd = each_systemd
    killed = systemd.flaskd("killed-w", WORKERS).start()
    assert killed.show("OOMPolicy") == "continue"
    lost = Answer(killed.url, "/hang")
    until(lambda: killed.status()["in_flight"] == 1, "a request in flight")
    (one,) = (each["pid"] for each in workers(killed) if each["in_flight"])
    before = pids(killed)
    kill(systemd, "KILL", {one})
    until(lambda: len(pids(killed) - before) == 1, killed.journal)
    assert isinstance(lost.result(), Exception)
    until(lambda: all(each["state"] == "ready" for each in workers(killed)), killed.journal)
    assert (killed.show("ActiveState"), killed.show("NRestarts")) == ("active", "0")
    assert get(killed.url) == (200, b"hello")
    (told,) = (
        each
        for each in killed.entries()
        if each["MESSAGE"].startswith("worker ") and "is gone: it was killed by SIGKILL" in each["MESSAGE"]
    )
    assert (told["FLASKD_WORKER"], told["PRIORITY"]) in {("0", "3"), ("1", "3")}
    assert [each["FLASKD_PATH"] for each in killed.entries() if each["MESSAGE"].startswith("cut ")] == ["/hang"]
    end(killed)


def test_workers_that_take_longer_than_the_manager_waits(each_systemd: Systemd) -> None:
    """With TimeoutStartSec=2 a start and a reload with an import of 5 s succeed, by ExecReload= and by SIGHUP."""
    systemd = each_systemd
    service = "[Service]\nTimeoutStartSec=2\nRestart=no\n"
    if int(systemd.run("systemctl", "--version").stdout.split()[1]) >= 253:
        service += (PROJECT / "systemd/drop-ins/notify-reload.conf").read_text()
    for name, text in (("slow-w", "[Service]\nTimeoutStartSec=2\nRestart=no\n"), ("slow-h", service)):
        slow = slow_app(systemd, name, WORKERS, service=text)
        takes(slow, 5)
        systemd.ctl("start", slow.unit, timeout=SLOW)
        assert slow.show("StatusText").startswith("ready: slow:app")
        before = pids(slow)
        systemd.ctl("reload", slow.unit, timeout=SLOW)
        assert slow.show("StatusText").startswith("ready: slow:app"), slow.journal()
        assert {each["generation"] for each in workers(slow) if each["pid"] not in before} == {2}
        assert get(slow.url) == (200, b"hello")
        end(slow)


def test_a_stop_of_workers_gets_time_up_to_its_deadline(each_systemd: Systemd) -> None:
    """With TimeoutStopSec=2, requests and cleanup of workers and service end well if the deadline allows it."""
    systemd = each_systemd

    def serving(name: str, seconds: int, more: str = "") -> Instance:
        step = f"{{use: command, with: {{argv: [sleep, '{seconds}']}}, scope: SCOPE, timeout: 20s, always: true}}"
        steps = "each: " + step.replace("SCOPE", "worker") + ", once: " + step.replace("SCOPE", "service")
        config = WORKERS + f"cleanup: {{policies: {{{steps}}}}}\n" + more
        return systemd.flaskd(name, config, service="[Service]\nTimeoutStopSec=2\n").start()

    longer, hung = serving("longer-w", 3), serving("hung-w", 60, "shutdown: {deadline: 6s}\n")
    answer = Answer(longer.url, "/sleep/4")
    until(lambda: longer.status()["in_flight"] == 1, "a request in flight")
    systemd.ctl("stop", "--no-block", hung.unit)
    systemd.ctl("stop", longer.unit)
    assert answer.result() == (200, b"slept")
    fates = {"each (worker 0)": "ok", "each (worker 1)": "ok", "once": "ok"}
    for each in (longer, hung):
        each.until_state("inactive")
        assert each.show("Result") == "success", each.journal()
        assert each.fates() == fates
        fates = dict.fromkeys(fates, "timed_out")


def test_workers_that_never_come_fail_the_start(each_systemd: Systemd) -> None:
    """After `pool.start_timeout` the start fails, although the manager would wait longer, and STATUS says why."""
    systemd = each_systemd
    config = WORKERS + "pool: {start_timeout: 3s}\n"
    never = slow_app(systemd, "never-w", config, service="[Service]\nRestart=no\n")
    takes(never, 600)
    began = time.monotonic()
    assert systemd.run("systemctl", "start", never.unit, check=False).returncode
    assert time.monotonic() - began < 20
    assert (never.show("Result"), never.show("ExecMainStatus")) == ("exit-code", "70")
    assert "pool.start_timeout" in never.show("StatusText"), never.journal()


def test_a_reload_with_broken_code_fails_and_is_explained(each_systemd: Systemd) -> None:
    """`systemctl reload` with broken code fails, STATUS has the reason, and the old workers serve on."""
    systemd = each_systemd
    broken = slow_app(systemd, "broken-w", WORKERS).start()
    before = pids(broken)
    systemd.write("/srv/broken-w/slow.py", "import nosuchmodule\n")
    failed = systemd.run("systemctl", "reload", broken.unit, check=False, timeout=SLOW)
    assert failed.returncode
    status = broken.show("StatusText")
    assert status.startswith("ready, but the reload failed: "), status
    assert "nosuchmodule" in status
    assert "keeping the old configuration and workers" in status
    assert (broken.show("ActiveState"), broken.show("SubState")) == ("active", "running")
    assert pids(broken) == before
    assert get(broken.url) == (200, b"hello")
    assert "ModuleNotFoundError: No module named 'nosuchmodule'" in broken.journal()
    end(broken)


def test_stopped_workers_are_a_wedge_only_when_all_are(each_systemd: Systemd) -> None:
    """If all workers got SIGSTOP, the manager restarts the service; if only one of two did, it does not."""
    systemd = each_systemd
    frozen = systemd.flaskd("frozen-w", WORKERS, service=QUICK_TO_BITE).start()
    main, both = frozen.pid, pids(frozen)
    kill(systemd, "STOP", both)
    until(
        lambda: frozen.show("MainPID") not in {str(main), "0"} and frozen.show("ActiveState") == "active",
        frozen.journal,
        patience=SLOW,
    )
    assert frozen.show("NRestarts") == "1"
    assert get(frozen.url) == (200, b"hello")
    assert alive(systemd, {main, *both}) == []
    kill(systemd, "STOP", {min(pids(frozen))})
    stays(frozen, 9)
    assert frozen.show("ActiveState") == "active"
    end(frozen)


def test_a_service_without_a_ready_worker_is_no_wedge(each_systemd: Systemd) -> None:
    """Drained, reloading slowly, and while the only worker restarts after a crash, the manager does not restart it."""
    systemd = each_systemd
    config = WORKERS.replace("workers: 2", "workers: 1")
    quiet = slow_app(systemd, "quiet-w", config, service=QUICK_TO_BITE).start()
    quiet.client("drain", "--wait")
    stays(quiet, 4)
    quiet.client("resume")
    takes(quiet, 6)
    systemd.ctl("reload", quiet.unit, timeout=SLOW)
    kill(systemd, "KILL", pids(quiet))
    stays(quiet, 5)
    assert get(quiet.url) == (200, b"hello")  # the request waited in the backlog
    end(quiet)


def under_load(instance: Instance, what: str, times: int = TIMES) -> None:
    """Restart or reload many times under load; clients may notice only a pause."""
    get(instance.url)
    before = instance.pid
    with Load(instance) as load:
        for _ in range(times):
            instance.systemd.ctl("reset-failed", instance.unit)  # otherwise systemd counts too many starts
            instance.systemd.ctl(what, instance.unit, timeout=SLOW)
            load.until_more()
    print(f"{times} times {what}: {dict(load.outcomes)}, longest pause {load.longest:.2f}s")
    assert set(load.outcomes) == {"200 hello"}, f"{load.outcomes}\n{instance.journal()}"
    assert (instance.pid == before) == (what == "reload")


@pytest.mark.parametrize("form", ["plain", "stored", "activated"])
def test_reloads_lose_nothing(each_systemd: Systemd, form: str) -> None:
    """Reloads under load lose and refuse no request, whichever process holds the listener."""
    instance = serving(each_systemd, form, f"reloads-{form}")
    under_load(instance, "reload")
    end(instance)


@pytest.mark.parametrize("form", ["stored", "activated"])
def test_restarts_with_workers_lose_nothing(each_systemd: Systemd, form: str) -> None:
    """With a listener that outlives the service, restarts under load lose no request, with workers, too."""
    instance = serving(each_systemd, form, f"restarts-{form}")
    under_load(instance, "restart")
    end(instance)


def serving(systemd: Systemd, form: str, name: str) -> Instance:
    """A service with two workers, in one of the forms."""
    if form == "activated":
        instance = activated(systemd, name)
        instance.configure("server: {listen: 'fd:http', workers: 2, threads: 2}\n" + PATIENT)
        get(instance.url)
        instance.until_state("active", SLOW)  # the first worker may have answered before the other was ready
        return instance
    return systemd.flaskd(name, (STORED_WORKERS if form == "stored" else WORKERS) + PATIENT).start()


@pytest.mark.parametrize("form", ["stored", "activated"])
def test_a_killed_supervisor_loses_only_what_was_in_hand(each_systemd: Systemd, form: str) -> None:
    """After `kill -9` of the supervisor its workers end, only requests in flight fail, and connecting never fails."""
    systemd = each_systemd
    instance = serving(systemd, form, f"killed-{form}")
    with Load(instance, "/sleep/0.01") as load:
        for _ in range(KILLS):
            before, old = instance.show("MainPID"), pids(instance)
            systemd.ctl("reset-failed", instance.unit)
            instance.signal("KILL")
            until(lambda before=before: instance.show("MainPID") not in {before, "0"}, instance.journal)
            instance.until_state("active", SLOW)
            assert alive(systemd, old) == []
            load.until_more()
    failed = {outcome: count for outcome, count in load.outcomes.items() if outcome != "200 slept"}
    print(f"{KILLS} kills: {dict(load.outcomes)}, longest pause {load.longest:.2f}s")
    assert not any("connecting" in outcome for outcome in failed), load.outcomes
    assert sum(failed.values()) <= 4 * KILLS, load.outcomes  # at most one of each client, each time
    end(instance)


def test_a_stored_listener_drained_by_workers(each_systemd: Systemd) -> None:
    """With a stored listener a drained flaskd answers 503, serves after resume, and `flaskd stop` removes it."""
    systemd = each_systemd
    config = STORED_WORKERS + "cleanup: {policies: {w: {use: command, with: {argv: [sleep, '4']}}}}\n"
    for name, drained in (("asked-w", False), ("drained-w", True)):
        instance = systemd.flaskd(name, config).start()
        assert instance.show("NFileDescriptorStore") == "1"
        instance.client("drain", "--wait")
        assert [get(instance.url)[0] for _ in range(4)] == [503] * 4
        instance.client("resume")
        assert [get(instance.url) for _ in range(4)] == [(200, b"hello")] * 4
        if drained:
            instance.client("drain", "--wait")
        instance.client("stop")
        until(lambda instance=instance: refused(instance.url), "refused long before the end", patience=3)
        assert instance.show("SubState") == "stop-sigterm"
        assert instance.show("NFileDescriptorStore") == "0"
        instance.until_state("inactive")


def test_an_inherited_listener_drained_by_workers(each_systemd: Systemd) -> None:
    """In the hardened form the listener answers 503 while drained; after resume forked workers serve it again."""
    instance = serving(each_systemd, "activated", "drained-activated")
    instance.configure("server: {listen: 'fd:http', workers: 2}\npool: {preload: true}\n")
    each_systemd.ctl("restart", instance.unit, timeout=SLOW)
    instance.client("drain", "--wait")
    assert [get(instance.url)[0] for _ in range(4)] == [503] * 4
    instance.client("resume")
    assert [get(instance.url) for _ in range(4)] == [(200, b"hello")] * 4
    each_systemd.ctl("reload", instance.unit, timeout=SLOW)
    assert get(instance.url) == (200, b"hello")
    end(instance)


def test_who_came_during_a_stop_of_the_manager_is_answered_by_workers(each_systemd: Systemd) -> None:
    """After `systemctl stop`, of which flaskd cannot know whether it is a restart, waiting clients are served."""
    systemd = each_systemd
    instance = systemd.flaskd("late-w", STORED_WORKERS).start()
    held = [Answer(instance.url, "/sleep/2") for _ in range(3)]
    until(lambda: instance.status()["in_flight"] == 3)
    systemd.ctl("stop", "--no-block", instance.unit)
    until(lambda: instance.show("StatusText").startswith("stopping"))
    late = [socket.create_connection(("127.0.0.1", instance.port), timeout=PATIENCE) for _ in range(20)]
    for each in late:
        each.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    for each in late:
        with each, each.makefile("rb") as answer:
            assert answer.read().startswith(b"HTTP/1.1 200 OK")
    assert [each.result() for each in held] == [(200, b"slept")] * 3
    instance.until_state("inactive")
    assert instance.show("Result") == "success"


def test_entries_name_their_worker(each_systemd: Systemd) -> None:
    """What a worker logs has its slot as a field, access lines too; what the supervisor logs has none."""
    systemd = each_systemd
    noted = systemd.flaskd("noted-w", WORKERS).start()
    of = {str(each["pid"]): str(each["slot"]) for each in workers(noted)}
    until(lambda: len({get(noted.url, "/pid")[1] for _ in range(20)}) == 2, "both serve")
    systemd.ctl("stop", noted.unit)
    entries = noted.entries()
    access = [each for each in entries if each.get("FLASKD_LOGGER") == "flaskd.access"]
    assert {each["FLASKD_WORKER"] for each in access} == {"0", "1"}
    assert all(each["FLASKD_WORKER"] == of[each["_PID"]] for each in access)
    (ready,) = (each for each in entries if each["MESSAGE"].startswith("ready: "))
    assert "FLASKD_WORKER" not in ready


def test_a_virtual_environment_may_go_away_under_workers(each_systemd: Systemd) -> None:
    """With the packages deleted a reload fails; the old workers serve on and stop with all cleanup."""
    systemd = each_systemd
    systemd.run("cp", "-a", "/opt/flaskd", "/opt/gone")
    systemd.run("sed", "-i", "s,/opt/flaskd,/opt/gone,", "/opt/gone/bin/flaskd")
    own = "cleanup: {policies: {own: {use: call, with: {target: 'shop:tidy'}}, all: {use: command, with: {argv: ['true']}}}}\n"
    start = "/opt/gone/bin/flaskd serve --name flaskd-%i -c /etc/flaskd/%i.yaml"
    gone = systemd.flaskd("gone-w", WORKERS + own, service=f"[Service]\nExecStart=\nExecStart={start}\n").start()
    get(gone.url)
    systemd.run("rm", "-rf", "/opt/gone")
    assert systemd.run("systemctl", "reload", gone.unit, check=False, timeout=SLOW).returncode
    assert "cannot start worker 0: /opt/gone/bin/python3: No such file" in gone.show("StatusText")
    assert get(gone.url) == (200, b"hello")
    systemd.ctl("stop", gone.unit)
    assert (gone.show("Result"), gone.show("ExecMainStatus")) == ("success", "0")
    assert gone.fates() == {"own (worker 0)": "ok", "own (worker 1)": "ok", "all": "ok"}
    assert "Error" not in gone.journal()
