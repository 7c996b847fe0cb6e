"""Listeners under a real service manager: from socket units and the store, through restarts and crashes."""

from __future__ import annotations

import http.client
import socket

import pytest
from http_client import get, refused
from patience import PATIENCE, until
from systemd_kit import LONG, Instance, Systemd, free_port
from systemd_load import HARDENED, LISTEN, PORT_UNIT, STORED, Load, activated

RESTARTS = 50 if LONG else 20
KILLS = 10 if LONG else 3


def end(instance: Instance) -> None:
    """Stop what the test started."""
    instance.systemd.ctl("stop", instance.socket, instance.unit, check=False)


def restart_under_load(instance: Instance) -> str:
    """Restart many times under load; clients may notice only a pause. Gives the figures."""
    get(instance.url)
    with Load(instance) as load:
        for _ in range(RESTARTS):
            instance.systemd.ctl("reset-failed", instance.unit)  # otherwise systemd counts too many starts
            instance.systemd.ctl("restart", instance.unit)
            load.until_more()
    print(f"{RESTARTS} restarts: {dict(load.outcomes)}, longest pause {load.longest:.2f}s")
    assert set(load.outcomes) == {"200 hello"}, f"{load.outcomes}\n{instance.journal()}"
    return f"{load.longest:.2f}s"


def test_activated_restarts_lose_nothing(each_systemd: Systemd) -> None:
    """The first connection starts the hardened service; restarts under load fail no request."""
    instance = activated(each_systemd, "restarts")
    assert instance.show("ActiveState") == "inactive"
    restart_under_load(instance)
    end(instance)


def test_restarts_with_the_store_lose_nothing(each_systemd: Systemd) -> None:
    """Without a socket unit, restarts under load fail no request if the store keeps the listener."""
    instance = each_systemd.flaskd("stored", STORED).start()
    assert instance.show("NFileDescriptorStore") == "1"
    restart_under_load(instance)
    assert instance.show("NFileDescriptorStore") == "1"
    end(instance)
    assert refused(instance.url)


@pytest.mark.parametrize("form", ["activated", "stored"])
def test_a_killed_process_loses_only_what_it_had(each_systemd: Systemd, form: str) -> None:
    """After `kill -9` only requests in flight fail; connecting never fails."""
    systemd = each_systemd
    instance = activated(systemd, "killed") if form == "activated" else systemd.flaskd("killed-s", STORED).start()
    get(instance.url)
    with Load(instance, "/sleep/0.01") as load:
        for _ in range(KILLS):
            before = instance.show("MainPID")
            systemd.ctl("reset-failed", instance.unit)
            instance.signal("KILL")
            until(lambda before=before: instance.show("MainPID") not in {before, "0"}, instance.journal)
            instance.until_state("active")
            load.until_more()
    failed = {outcome: count for outcome, count in load.outcomes.items() if outcome != "200 slept"}
    print(f"{KILLS} kills: {dict(load.outcomes)}, longest pause {load.longest:.2f}s")
    assert not any("connecting" in outcome for outcome in failed), load.outcomes
    assert sum(failed.values()) <= 4 * KILLS, load.outcomes  # at most one of each client, each time
    assert instance.show("NRestarts") != "0"
    end(instance)


def test_a_listener_that_nobody_wants_any_more_leaves_the_store(each_systemd: Systemd) -> None:
    """A new address is bound, even a wildcard over the old one; the old one is refused, and the store keeps only one."""
    systemd = each_systemd
    instance = systemd.flaskd("moves", STORED).start()
    old = instance.url
    instance.configure(STORED.replace("127.0.0.1:PORT", ":PORT"))
    systemd.ctl("restart", instance.unit)
    assert instance.status()["listen"] == [f"0.0.0.0:{instance.port}"]
    instance.port = free_port()
    instance.configure(STORED)
    systemd.ctl("restart", instance.unit)
    assert get(instance.url) == (200, b"hello")
    assert refused(old)
    assert instance.show("NFileDescriptorStore") == "1"
    instance.configure(LISTEN)
    systemd.ctl("restart", instance.unit)
    assert get(instance.url) == (200, b"hello")
    assert instance.show("NFileDescriptorStore") == "0"
    end(instance)


def test_a_stop_asked_of_flaskd_refuses_and_empties_the_store(each_systemd: Systemd) -> None:
    """After `flaskd stop` new clients are refused at once, and the store is empty."""
    systemd = each_systemd
    config = STORED + "cleanup: {policies: {w: {use: command, with: {argv: [sleep, '4']}}}}\n"
    instance = systemd.flaskd("asked-stored", config).start()
    instance.client("stop")
    until(lambda: refused(instance.url), "refused long before the end", patience=2)
    assert instance.show("SubState") == "stop-sigterm"
    assert instance.show("NFileDescriptorStore") == "0"
    instance.until_state("inactive")


def test_a_drained_listener_of_the_store_is_refused_once_a_stop_is_asked_for(each_systemd: Systemd) -> None:
    """A drained listener answers 503; after `flaskd stop` clients are refused."""
    systemd = each_systemd
    config = STORED + "cleanup: {policies: {w: {use: command, with: {argv: [sleep, '4']}}}}\n"
    instance = systemd.flaskd("drained-stored", config).start()
    instance.client("drain", "--wait")
    assert get(instance.url)[0] == 503
    instance.client("resume")
    assert get(instance.url) == (200, b"hello")
    instance.client("drain", "--wait")
    instance.client("stop")
    until(lambda: refused(instance.url), "refused long before the end", patience=2)
    assert instance.show("SubState") == "stop-sigterm"
    instance.until_state("inactive")


def test_who_came_during_a_stop_of_the_manager_is_answered(each_systemd: Systemd) -> None:
    """After `systemctl stop`, of which flaskd cannot know whether it is a restart, waiting clients are served."""
    systemd = each_systemd
    instance = systemd.flaskd("late", STORED).start()
    first = socket.create_connection(("127.0.0.1", instance.port), timeout=PATIENCE)
    first.sendall(b"GET /sleep/1 HTTP/1.1\r\nHost: x\r\n\r\n")
    until(lambda: instance.status()["in_flight"] == 1)
    systemd.ctl("stop", "--no-block", instance.unit)
    until(lambda: instance.show("StatusText").startswith("stopping"))
    late = [socket.create_connection(("127.0.0.1", instance.port), timeout=PATIENCE) for _ in range(20)]
    for each in late:
        each.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    for each in [first, *late]:
        with each, each.makefile("rb") as answer:
            assert answer.read().startswith(b"HTTP/1.1 200 OK")
    instance.until_state("inactive")


def test_a_unix_listener_in_the_store_keeps_its_node(each_systemd: Systemd) -> None:
    """The node of a stored Unix listener stays over a restart and serves again; `flaskd stop` removes it."""
    systemd = each_systemd
    config = "server: {listen: 'unix:/run/unix-stored/http'}\nsystemd: {fdstore: true}\n"
    service = "[Service]\nRuntimeDirectory=unix-stored\nRuntimeDirectoryPreserve=yes\n"
    instance = systemd.flaskd("unix", config, service=service).start()

    def ask() -> str:
        return systemd.run("/usr/bin/python3", "-c", ASK_UNIX, "/run/unix-stored/http").stdout

    assert ask() == "200"
    systemd.ctl("restart", instance.unit)
    assert ask() == "200"
    assert instance.show("NFileDescriptorStore") == "1"
    instance.client("stop", "--wait")
    instance.until_state("inactive")
    assert systemd.run("ls", "/run/unix-stored").stdout == ""


def test_a_unix_listener_in_the_store_whose_node_is_gone_is_bound_anew(each_systemd: Systemd) -> None:
    """If the node of a stored listener is removed with RuntimeDirectory=, it is made again, with a warning."""
    systemd = each_systemd
    systemd.run("mkdir", "-p", "/run/real")
    systemd.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run/real")  # systemd only deletes here
    config = "server: {listen: 'unix:/run/real/gone/http'}\nsystemd: {fdstore: true}\n"
    service = "[Service]\nRuntimeDirectory=\nRuntimeDirectory=real/gone\n"
    instance = systemd.flaskd("gone", config, service=service).start()
    systemd.ctl("restart", instance.unit)
    assert systemd.run("/usr/bin/python3", "-c", ASK_UNIX, "/run/real/gone/http").stdout == "200"
    assert instance.show("NFileDescriptorStore") == "1"
    assert "unix:/run/real/gone/http cannot be reached there any more: bound anew" in instance.journal()
    systemd.ctl("stop", instance.unit)
    systemd.run("umount", "/run/real")


ASK_UNIX = """
import http.client, socket, sys
connection = http.client.HTTPConnection("x")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.settimeout(10)
connection.sock.connect(sys.argv[1])
connection.request("GET", "/")
print(connection.getresponse().status, end="")
"""


def test_sockets_by_name_and_kind_beside_listeners_of_ones_own(each_systemd: Systemd) -> None:
    """TCP, IPv6 and Unix sockets of units, found by name, and a port that flaskd binds, work together."""
    systemd = each_systemd
    own, six = free_port(), free_port()
    config = f"server: {{listen: ['fd:http', 'fd:inner', '127.0.0.1:{own}']}}\nsystemd: {{fdstore: true}}\n"
    sockets = f"[Socket]\nListenStream=\nListenStream=127.0.0.1:PORT\nListenStream=[::1]:{six}\n"
    inner = "[Socket]\nListenStream=/run/mixed-inner\nFileDescriptorName=inner\nService=flaskd@mixed.service\n"
    systemd.write("/etc/systemd/system/mixed-inner.socket", inner)
    instance = systemd.flaskd("mixed", config, service="[Service]\nSockets=mixed-inner.socket\n", socket_unit=sockets)
    systemd.ctl("start", instance.socket, "mixed-inner.socket")
    for _ in range(2):
        urls = [instance.url, f"http://[::1]:{six}/", f"http://127.0.0.1:{own}/"]
        systemd.ctl("start", instance.unit)
        assert [get(url) for url in urls] == [(200, b"hello")] * 3
        assert systemd.run("/usr/bin/python3", "-c", ASK_UNIX, "/run/mixed-inner").stdout == "200"
        assert instance.show("NFileDescriptorStore") == "1"
        systemd.ctl("restart", instance.unit)
    systemd.ctl("stop", "mixed-inner.socket")
    end(instance)


def test_a_credential_is_read(each_systemd: Systemd) -> None:
    """`${cred:name}` is the content of LoadCredential= or SetCredential=, in the hardened form, too."""
    systemd = each_systemd
    instance = systemd.flaskd(
        "cred", service=HARDENED + "SetCredential=ident:from-a-credential\n", socket_unit=PORT_UNIT
    )
    instance.configure("server: {ident: '${cred:ident}'}\n")
    systemd.ctl("start", instance.socket)
    connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=PATIENCE)
    connection.request("GET", "/")
    assert connection.getresponse().headers["Server"] == "from-a-credential"
    connection.close()
    end(instance)


def test_a_stop_of_an_activated_service_says_that_it_is_undone(each_systemd: Systemd) -> None:
    """`flaskd stop` says that the socket unit starts flaskd again, which is true; stopping both is final."""
    systemd = each_systemd
    instance = activated(systemd, "again")
    get(instance.url)
    assert "the next connection starts it again, unless the .socket unit is stopped too" in instance.client(
        "stop", "--wait"
    )
    instance.until_state("inactive")
    assert get(instance.url) == (200, b"hello")
    end(instance)
    assert refused(instance.url)
