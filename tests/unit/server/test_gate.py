"""The gate (SO_BINDTOIFINDEX) resets no client whose handshake is done: as root and without privileges, IPv4 and IPv6.

Each case runs in a process of its own, because dropped privileges cannot be regained.

Refused clients pause before they connect again. Without a pause they would soon use every port of the machine, including
ports of old connections that are in TIME_WAIT here. Behind a gate, a client from such a port is not refused: its kernel
tries again 8 ms later, from a timer that does the handshakes of several clients together. If the request of such a client
comes from another CPU at that moment, some kernels (such as 6.18) reset it: they look the connection up while they move it
from the half-open to the open ones, and find the listener. This happens with any server, even if it answers the request.
"""

import json
import os
import subprocess
import sys

import pytest
from server_kit import HAS_IPV6

NOBODY = 65534

PROGRAM = """
import encodings.idna, errno, json, logging, os, socket, sys, threading, traceback
from collections import Counter
from flaskd.server import WaitressThread
from flaskd.sockets import Listener, Address

host, user, cycles = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)

with socket.socket() as one:
    assert one.connect_ex(("127.0.0.1", 1)) != 0  # what connecting imports late is there before anything is measured

logging.getLogger("waitress.queue").setLevel("ERROR")  # two workers for twelve clients: requests wait in line

def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]

fates, ended, gates, again = Counter(), threading.Event(), [], threading.Event()
before = Listener.gate
family = socket.AF_INET6 if ":" in host else socket.AF_INET

def gate(self):
    closed = before(self)
    with socket.socket(family) as late:  # the listener is there, and nobody accepts in this moment
        gates.append(closed and late.connect_ex((host, port)) == errno.ECONNREFUSED)
    return closed

Listener.gate = gate

def ask():
    while not ended.is_set():
        with socket.socket(family) as client:
            client.settimeout(20)
            try:
                client.connect((host, port))
            except OSError as error:
                fates[type(error).__name__ + " while connecting"] += 1
                again.wait(0.01)
                continue
            try:
                client.sendall(b"GET / HTTP/1.1\\r\\nHost: test\\r\\nConnection: close\\r\\n\\r\\n")
                answer = b"".join(iter(lambda: client.recv(4096), b""))
                fates["answered" if answer.endswith(b"hello") else f"broken off after {len(answer)} bytes"] += 1
            except OSError as error:
                fates[type(error).__name__] += 1

# The grace is long: on a busy machine a client may be slow to ask, and its request must not meet the end of the grace.
server = WaitressThread(app, host, 0, 2, keepalive_grace=20).start()
port = server.addresses[0].port
askers = [threading.Thread(target=ask) for _ in range(12)]
for each in askers:
    each.start()
accounts = []
for _ in range(cycles):
    before_drain = server.completed
    while server.completed < before_drain + 50:
        assert server.turns(20)
    again.clear()
    report = server.drain(20)
    accounts.append([len(report.cut), report.rejected])
    server.resume()
    again.set()
ended.set()
for each in askers:
    each.join(20)
server.stop()
print(json.dumps({"fates": fates, "gates": gates, "accounts": accounts, "completed": server.completed}))
"""


@pytest.mark.parametrize("user", [0, NOBODY], ids=["root", "nobody"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_clients_that_connect_in_a_drain_are_answered_or_refused(host, user):
    """Twelve clients reconnect all the time during ten drains: each is answered or refused, none is reset."""
    if user != os.geteuid() and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if host == "::1" and not HAS_IPV6:
        pytest.skip("this machine has no ::1")
    cycles = 10
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, host, str(0 if os.geteuid() else user), str(cycles)],
        capture_output=True, text=True, timeout=80, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)
    assert set(seen["fates"]) <= {"answered", "ConnectionRefusedError while connecting"}, seen
    assert seen["fates"]["answered"] == seen["completed"]
    assert seen["gates"] == [True] * (cycles + 1)  # the stop's too
    assert seen["accounts"] == [[0, 0]] * cycles
