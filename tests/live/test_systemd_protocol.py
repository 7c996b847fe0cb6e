"""What flaskd and a real service manager tell each other: readiness, reloads, more time, the pulse."""

import http.client
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from http_client import Answer, get
from patience import PATIENCE, until
from systemd_kit import PROJECT, Instance, Systemd

LISTEN = "server: {listen: '127.0.0.1:PORT', threads: 2}\n"


@contextmanager
def streams(instance: Instance, count: int):
    """This many event streams, all running."""
    with ExitStack() as stack:
        for _ in range(count):
            connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=PATIENCE)
            stack.callback(connection.close)
            connection.request("GET", "/stream")
            assert connection.getresponse().read(5) == b"data:"
        yield


def restarted_at(instance: Instance, before: int) -> float:
    """Wait until another process is ready; gives that moment on the monotonic clock, as the manager has it."""
    until(
        lambda: instance.show("MainPID") not in {str(before), "0"} and instance.show("ActiveState") == "active",
        lambda: f"a restart:\n{instance.journal()}",
    )
    return int(instance.show("ActiveEnterTimestampMonotonic")) / 1e6


def test_a_life_as_it_is_shipped(each_systemd: Systemd) -> None:
    """The service is active when it is ready, shows its status, reloads with a correct exit code, and stops cleanly."""
    systemd = each_systemd
    life = systemd.flaskd("life", LISTEN).start()
    assert get(life.url) == (200, b"hello")
    assert life.show("StatusText") == f"ready: shop on 127.0.0.1:{life.port}"
    life.configure(LISTEN + "log: {access: json}\n")
    systemd.ctl("reload", life.unit)
    assert life.show("ActiveState") == "active"
    life.configure(LISTEN + "log: {access: loud}\n")
    failed = systemd.run("systemctl", "reload", life.unit, check=False)
    assert failed.returncode != 0
    assert (life.show("ActiveState"), life.show("SubState")) == ("active", "running")
    assert "ready, but the reload failed: " in life.show("StatusText")
    assert "log.access: expected" in life.show("StatusText")
    assert get(life.url) == (200, b"hello")
    answer = Answer(life.url, "/sleep/2")
    until(lambda: life.status()["in_flight"] == 1, "a request in flight")
    life.client("drain")
    until(lambda: life.show("StatusText").startswith("draining: 1 in flight, oldest GET /sleep/2 (running for"))
    assert answer.result() == (200, b"slept")
    until(lambda: life.show("StatusText").startswith("drained: completed=1 rejected=0 cut=0"))
    systemd.ctl("stop", life.unit)
    assert life.show("Result") == "success"
    assert systemd.run("ls", "/run", check=False).stdout.count("flaskd-life") == 0


def test_children_do_not_inherit_what_is_meant_for_flaskd(each_systemd: Systemd) -> None:
    """The app's children cannot talk to the service manager in flaskd's name."""
    systemd = each_systemd
    child = systemd.flaskd("child", LISTEN).start()
    environ = get(child.url, "/environ")[1].decode()
    assert "RUNTIME_DIRECTORY" in environ
    assert not any(name in environ for name in ("NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_"))
    systemd.ctl("stop", child.unit)


def test_a_reload_by_signal_is_waited_for(each_systemd: Systemd) -> None:
    """With Type=notify-reload, `systemctl reload` returns after the reload, also if that failed."""
    systemd = each_systemd
    if int(systemd.run("systemctl", "--version").stdout.split()[1]) < 253:
        pytest.skip("Type=notify-reload is of systemd 253")
    drop_in = (PROJECT / "systemd/drop-ins/notify-reload.conf").read_text()
    hup = systemd.flaskd("hup", LISTEN, service=drop_in).start()
    hup.configure(LISTEN + "log: {access: off}\n")
    systemd.ctl("reload", hup.unit)
    assert "reloaded /etc/flaskd/hup.yaml" in hup.journal()
    hup.configure("nonsense: 1\n")
    systemd.ctl("reload", hup.unit)
    assert "ready, but the reload failed: " in hup.show("StatusText")
    assert hup.show("ActiveState") == "active"
    systemd.ctl("stop", hup.unit)


@pytest.mark.parametrize(
    ("fault", "code", "restarts"),
    [("nonsense: 1\n", "78", False), (LISTEN + "health: {probe: /boom}\n", "70", True)],
    ids=["configuration", "app"],
)
def test_a_failed_start_tells_why(each_systemd: Systemd, fault: str, code: str, restarts: bool) -> None:
    """STATUS, ERRNO and the exit code tell the fault; a start with a faulty configuration is not repeated."""
    systemd = each_systemd
    name = f"fault{code}"
    service = "[Unit]\nStartLimitIntervalSec=60\nStartLimitBurst=2\n"
    broken = systemd.flaskd(name, fault, service=service)
    systemd.write("/srv/app/boom.py", "from shop import app\n@app.get('/boom')\ndef boom(): 1/0\n")
    if restarts:
        config = "app: {target: 'boom:app', chdir: /srv/app}\n" + fault.replace("PORT", str(broken.port))
        systemd.write(f"/etc/flaskd/{name}.yaml", config)
    systemd.run("systemctl", "start", broken.unit, check=False)
    broken.until_state("failed")
    assert broken.show("ExecMainStatus") == code
    assert (int(broken.show("NRestarts")) > 0) == restarts
    assert broken.show("StatusErrno") == "22"
    why = "expected a known key" if code == "78" else "the probe of /boom was answered with 500"
    assert why in broken.show("StatusText")


def test_a_slow_start_gets_time_while_it_is_at_work(each_systemd: Systemd) -> None:
    """An import longer than TimeoutStartSec succeeds while it works, and is ended when it hangs."""
    systemd = each_systemd
    text = (
        "import time\nfrom shop import app\nend = time.monotonic() + {}\nwhile time.monotonic() < end: time.sleep({})\n"
    )
    service = "[Service]\nTimeoutStartSec=2\nRestart=no\n"
    slow = systemd.flaskd("slow", service=service)
    listen = "server: {listen: '127.0.0.1:0'}\n"
    systemd.write("/srv/app/slow.py", text.format(4, 0.1))
    systemd.write("/srv/app/hung.py", text.format(600, 600))
    systemd.write("/etc/flaskd/slow.yaml", "app: {target: 'slow:app', chdir: /srv/app}\n" + listen)
    hung = systemd.flaskd("hung", service=service)
    systemd.write("/etc/flaskd/hung.yaml", "app: {target: 'hung:app', chdir: /srv/app}\n" + listen)
    systemd.ctl("start", "--no-block", hung.unit)
    slow.start()
    assert slow.show("StatusText").startswith("ready: slow:app")
    systemd.ctl("stop", slow.unit)
    hung.until_state("failed")
    assert hung.show("Result") == "timeout"


def test_a_stop_gets_time_up_to_its_deadline(each_systemd: Systemd) -> None:
    """With TimeoutStopSec=2, a cleanup within the deadline ends well, whoever asked for the stop; a hanging one, too."""
    systemd = each_systemd

    def serving(name: str, seconds: str, more: str = "") -> Instance:
        step = f"{{use: command, with: {{argv: [sleep, '{seconds}']}}, timeout: 20s, always: true}}"
        config = LISTEN + f"cleanup: {{policies: {{long: {step}}}}}\n" + more
        return systemd.flaskd(name, config, service="[Service]\nTimeoutStopSec=2\n").start()

    longer, asked = serving("longer", "6"), serving("asked", "4")
    hung = serving("hung-up", "60", "shutdown: {deadline: 5s}\n")
    began = time.monotonic()
    asked.client("stop")
    systemd.ctl("stop", "--no-block", hung.unit)
    systemd.ctl("stop", longer.unit)
    assert 6 <= time.monotonic() - began < 9
    for each in (longer, asked, hung):
        each.until_state("inactive")
        assert each.show("Result") == "success"
        assert each.fates() == {"long": "timed_out" if each is hung else "ok"}


def test_a_stopped_process_is_restarted(each_systemd: Systemd) -> None:
    """A daemon that got SIGSTOP sends no pulse; within two watchdog periods a new one is ready."""
    systemd = each_systemd
    frozen = systemd.flaskd("frozen", LISTEN, service="[Service]\nWatchdogSec=2\n").start()
    pid = frozen.pid
    frozen.signal("STOP")
    stopped = time.monotonic()
    assert restarted_at(frozen, pid) - stopped < 4
    assert get(frozen.url) == (200, b"hello")
    systemd.ctl("stop", frozen.unit)


def test_a_wedged_loop_is_restarted_with_its_stacks_in_the_journal(each_systemd: Systemd) -> None:
    """A serving thread that hangs sends no pulse, and the stacks of all threads are in the journal."""
    systemd = each_systemd
    wedged = systemd.flaskd("wedged", LISTEN, service="[Service]\nWatchdogSec=2\n").start()
    pid = wedged.pid
    get(wedged.url)
    Answer(wedged.url, "/wedge")
    restarted = restarted_at(wedged, pid)
    journal = wedged.journal()
    (at,) = re.findall(r"^wedged at ([0-9.]+)$", journal, re.MULTILINE)
    assert restarted - float(at) < 4, journal
    assert "the serving thread does not answer" in journal
    assert "Fatal Python error: Aborted" in journal
    # Of the thread that hangs: the call in which it waits, and that it runs the loop.
    assert re.search(r'threading\.py", line \d+ in wait\n(  File .*\n)*?  File ".*/server/loop\.py", line', journal), (
        journal
    )
    assert get(wedged.url) == (200, b"hello")
    systemd.ctl("stop", wedged.unit)


def test_hanging_threads_are_a_wedge_only_when_asked_for(each_systemd: Systemd) -> None:
    """If all threads hang, nothing happens by default; with `stuck_after` the service is restarted soon after that time."""
    systemd = each_systemd
    config, service = LISTEN + "shutdown: {deadline: 3s}\n", "[Service]\nWatchdogSec=2\n"
    stuck = systemd.flaskd("stuck", config, service=service).start()
    pid = stuck.pid
    hanging = [Answer(stuck.url, "/hang") for _ in range(2)]
    until(lambda: stuck.status()["in_flight"] == 2)
    stays = time.monotonic() + 5
    until(lambda: time.monotonic() > stays)  # only time shows that nothing happens
    assert stuck.pid == pid
    stuck.configure(config + "systemd: {stuck_after: 1s}\n")
    systemd.ctl("reload", stuck.unit)
    reloaded = time.monotonic()
    assert restarted_at(stuck, pid) - reloaded < 5  # one second until it is noticed, and two watchdog periods
    journal = stuck.journal()
    assert "all threads have hung for" in journal
    stacks = journal.partition("Fatal Python error: Aborted")[2]
    assert len(re.findall(r'File ".*/shop\.py", line \d+ in hang\n', stacks)) == 2, journal  # both threads that hang
    del hanging
    systemd.ctl("stop", stuck.unit)


def test_busy_or_drained_is_not_wedged(each_systemd: Systemd) -> None:
    """Threads that all serve streams, clients that upload for long, and a drain cause no restart."""
    systemd = each_systemd
    config = LISTEN + "systemd: {stuck_after: 500ms}\nshutdown: {drain: {stream_grace: 100ms}}\n"
    busy = systemd.flaskd("busy", config, service="[Service]\nWatchdogSec=1\n").start()
    pid = busy.pid
    with streams(busy, 2), ExitStack() as stack:
        uploads = [stack.enter_context(socket.create_connection(("127.0.0.1", busy.port))) for _ in range(4)]
        for each in uploads:
            each.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        ended = time.monotonic() + 4
        while time.monotonic() < ended:
            for each in uploads:
                each.sendall(b"x" * 10)
            threading.Event().wait(0.2)
        assert busy.pid == pid
    busy.client("drain", "--wait")
    ended = time.monotonic() + 3
    until(lambda: time.monotonic() > ended)
    assert (busy.pid, busy.show("NRestarts")) == (pid, "0")
    systemd.ctl("stop", busy.unit)
