"""Hostile and careless control clients: HTTP serving and the other control clients are not affected."""

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from daemon_kit import Flaskd
from http_client import get
from patience import PATIENCE


def memory(flaskd: Flaskd) -> int:
    """Resident memory in kilobytes."""
    status = Path(f"/proc/{flaskd.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def descriptors(flaskd: Flaskd) -> int:
    return len(os.listdir(f"/proc/{flaskd.pid}/fd"))


def test_300_half_open_clients(flaskd: Flaskd) -> None:
    """With more silent clients than there may be, a client with a command is answered, and kept while it waits."""
    flaskd.start()
    with contextlib.ExitStack() as stack:
        held = flaskd.hold()
        waiting = stack.enter_context(flaskd.control())
        waiting.sendall(b"drain wait\n")
        assert waiting.recv(100).startswith(b".. in_flight=1 left=")
        for begin in (b"", b"stat", b'{"cmd":', b"POST /stop HTTP/1.1\r\n") * 75:
            each = stack.enter_context(flaskd.control())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                each.sendall(begin)
        assert flaskd.command("health") == "OK healthy\n"
        assert descriptors(flaskd) < 150
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        answer = b"".join(iter(lambda: waiting.recv(1000), b""))
        assert answer.splitlines()[-1].startswith(b"OK drained completed=1")
    assert flaskd.stop() == 0


@pytest.mark.parametrize(
    "unit", [b"x", b"X", b"{", b"\x00\xff\xfe", b"\n", b'{"cmd":"status"}\n', b"GET / HTTP/1.1\r\n"]
)
def test_megabytes_of_junk(flaskd: Flaskd, unit: bytes) -> None:
    """Five megabytes of random bytes in one piece cost no memory and change nothing."""
    flaskd.start()
    flaskd.command("status")
    before = memory(flaskd)
    data = unit * (5_000_000 // len(unit))
    with flaskd.control() as client:
        client.settimeout(0.5)
        with contextlib.suppress(OSError):
            while data:
                data = data[client.send(data) :]
        assert flaskd.command("ready") == "OK ready\n"
    assert get(flaskd.url) == (200, b"hello")
    assert memory(flaskd) - before < 6_000
    assert flaskd.stop() == 0


@pytest.mark.parametrize("unit", [b"\n", b'{"cmd":"version"}\n'])
def test_a_flood_after_a_command_waits_outside(flaskd: Flaskd, unit: bytes) -> None:
    """A client that sends commands faster than they are carried out must wait, and flaskd does not store its bytes."""
    flaskd.start()
    flaskd.command("status")
    before = memory(flaskd)
    most = before
    flood = unit * (1_000_000 // len(unit))
    with flaskd.control() as client:
        client.sendall(b'{"cmd":"version"}\n')
        client.setblocking(False)
        end = time.monotonic() + 3  # some 300 MB if there were no limit
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):  # all answers are read, so that only the inbox limits it
                while client.recv(1 << 20):
                    pass
            if select.select([], [client], [], 0.02)[1]:
                client.send(flood)
            most = max(most, memory(flaskd))
            assert most - before < 6_000
        assert flaskd.command("ready") == "OK ready\n"
    assert flaskd.stop() == 0


def test_junk_in_the_fifo(flaskd: Flaskd) -> None:
    """Megabytes without a newline, and of newlines alone, are dropped; the next command is carried out."""
    flaskd.start()
    before = memory(flaskd)
    for unit in (b"x", b"\n", b"\xff\n"):
        with flaskd.fifo_path.open("wb", buffering=0) as fifo:
            for _ in range(20):
                fifo.write(unit * (50_000 // len(unit)))
            fifo.write(b"\n")
    with flaskd.fifo_path.open("wb") as fifo:
        fifo.write(b"\ndrain\n")
    flaskd.wait_message("drained")
    assert memory(flaskd) - before < 20_000  # what the log takes
    assert flaskd.stop() == 0


def test_who_asks_without_end_and_never_reads(flaskd: Flaskd) -> None:
    """A client that sends commands and never reads is not read from once its answers are unread; others are."""
    flaskd.start()
    flaskd.command("status")
    before = memory(flaskd)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(flaskd.control())
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(b'{"cmd":"config"}\n' * 100)
        began = time.monotonic()
        assert flaskd.command("ready") == "OK ready\n"
        assert time.monotonic() - began < 2
        assert get(flaskd.url) == (200, b"hello")
        assert memory(flaskd) - before < 16_000
    assert flaskd.stop() == 0


def test_waiting_clients_that_never_read_their_progress(flaskd: Flaskd) -> None:
    """Clients that never read their progress do not delay the drain."""
    flaskd.start()
    held = flaskd.hold()
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(flaskd.control())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.sendall(b'{"cmd":"drain","wait":true}\n' * 30)
        flaskd.until(lambda: flaskd.status()["state"] == "draining")
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        flaskd.until(lambda: flaskd.command("status").endswith("OK drained\n"))
    assert flaskd.stop() == 0


def test_random_bytes_on_a_live_socket(flaskd: Flaskd) -> None:
    """After a thousand random pieces of commands, JSON and HTTP flaskd is ready, and answers."""
    flaskd.start()
    generator = random.Random(7)  # the same pieces every time
    words = [b"status", b"help", b"{", b"}", b'{"id":', b'"cmd":"ready"}', b"\n", b"\r\n\r\n", b"GET /", b" HTTP/1.1\r\n",
             b"Content-Length: 99\r\n", b"\x00", b"\xff", b"POST /check", b"Host: x\r\n", b"log-level"]  # fmt: skip
    for _ in range(1000):
        with flaskd.control() as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(b"".join(generator.choices(words, k=generator.randrange(8))))
            if generator.random() < 0.5:
                client.shutdown(socket.SHUT_WR)
                select.select([client], [], [], 1)
    assert flaskd.command("ready") == "OK ready\n"
    assert flaskd.status()["state"] == "ready"
    assert "Traceback" not in flaskd.log
    assert flaskd.stop() == 0


def test_ten_thousand_questions_leave_nothing_behind(flaskd: Flaskd) -> None:
    """10,000 calls of status, each on its own connection or all on one, leave no memory, descriptor or thread."""
    flaskd.start()
    threads = Path(f"/proc/{flaskd.pid}/task")

    def ask(count: int) -> None:
        with flaskd.control() as client, client.makefile("rwb") as stream:
            for _ in range(count):
                stream.write(b'{"cmd":"status"}\n')
                stream.flush()
                assert json.loads(stream.readline())["ok"]
        for _ in range(count // 10):
            assert flaskd.command("status").endswith("OK ready\n")

    ask(1000)
    before = (memory(flaskd), descriptors(flaskd), len(list(threads.iterdir())))
    ask(9100)
    flaskd.until(lambda: descriptors(flaskd) <= before[1])
    assert memory(flaskd) - before[0] < 2_000
    assert len(list(threads.iterdir())) == before[2]
    assert flaskd.stop() == 0


# --- nodes that were removed ------------------------------------------------------------------------------------------


def test_a_socket_that_was_deleted_is_put_back(flaskd: Flaskd) -> None:
    """A deleted socket is made again at the same path, with the same mode; connected clients stay."""
    flaskd.start()
    with flaskd.control() as client, client.makefile("rwb") as stream:
        flaskd.socket_path.unlink()
        flaskd.until(flaskd.socket_path.exists)
        assert flaskd.command("ready") == "OK ready\n"
        stream.write(b'{"cmd":"ready"}\n')
        stream.flush()
        assert json.loads(stream.readline())["ok"]
    assert flaskd.socket_path.stat().st_mode & 0o777 == 0o660
    assert "the control socket had been removed; it was made again" in flaskd.log
    assert flaskd.stop() == 0


def test_a_fifo_that_was_replaced_is_put_back(flaskd: Flaskd) -> None:
    """If another FIFO replaces flaskd's, that is replaced, and commands written to the new one are carried out."""
    flaskd.start()
    ours = flaskd.fifo_path.stat().st_ino
    other = flaskd.directory / "other"
    os.mkfifo(other)
    other.rename(flaskd.fifo_path)
    theirs = flaskd.fifo_path.stat().st_ino
    flaskd.until(lambda: flaskd.fifo_path.exists() and flaskd.fifo_path.stat().st_ino not in {ours, theirs})
    subprocess.run(["sh", "-c", f"echo drain > {flaskd.fifo_path}"], check=True, timeout=PATIENCE)
    flaskd.wait_message("drained")
    assert flaskd.stop() == 0


def test_a_file_in_the_place_of_a_node_stays_until_it_is_gone(flaskd: Flaskd) -> None:
    """A file that a shell made in place of the FIFO is left alone, with one warning; when it is gone, the FIFO is made."""
    flaskd.start()
    mistake = flaskd.directory / "mistake"
    mistake.write_text("drain\n")
    mistake.rename(flaskd.fifo_path)
    flaskd.until(lambda: "a file that is not a FIFO stands there" in flaskd.log)
    assert flaskd.fifo_path.read_text() == "drain\n"
    flaskd.fifo_path.unlink()
    flaskd.until(flaskd.fifo_path.is_fifo)
    assert flaskd.log.count("a file that is not a FIFO stands there") == 1
    assert flaskd.stop() == 0


def test_a_file_that_lies_there_at_the_start_stays_until_it_is_gone(flaskd: Flaskd) -> None:
    """If a file is in place of a node at the start, the node is made when the file is gone; the other node works."""
    flaskd.runtime.mkdir()
    flaskd.fifo_path.write_text("precious")
    flaskd.start()
    assert flaskd.command("ready") == "OK ready\n"
    assert flaskd.fifo_path.read_text() == "precious"
    flaskd.fifo_path.unlink()
    flaskd.until(flaskd.fifo_path.is_fifo)
    with flaskd.fifo_path.open("wb") as fifo:
        fifo.write(b"drain\n")
    flaskd.wait_message("drained")
    assert flaskd.log.count("a file that is not a FIFO stands there") == 1
    assert "the FIFO was made now" in flaskd.log
    assert flaskd.stop() == 0


def test_a_socket_whose_place_was_taken_at_the_start_answers_later(flaskd: Flaskd) -> None:
    """If the socket's place is taken at the start, the FIFO serves and stops alone; the socket comes later."""
    flaskd.runtime.mkdir()
    flaskd.socket_path.mkdir()
    flaskd.start()
    assert "a file that is not a socket stands there; serving all the same" in flaskd.log
    flaskd.socket_path.rmdir()
    flaskd.until(flaskd.socket_path.is_socket)
    assert flaskd.command("ready") == "OK ready\n"
    assert flaskd.socket_path.stat().st_mode & 0o777 == 0o660
    assert flaskd.stop() == 0


def test_a_directory_that_was_deleted_is_made_again(flaskd: Flaskd) -> None:
    """A deleted runtime directory is made again with both nodes, and no second flaskd can start there."""
    flaskd.start()
    flaskd.fifo_path.unlink()
    flaskd.socket_path.unlink()
    flaskd.runtime.rmdir()
    flaskd.until(lambda: flaskd.socket_path.exists() and flaskd.fifo_path.exists())
    assert flaskd.command("ready") == "OK ready\n"
    first, flaskd.process = flaskd.process, None
    try:
        code, log = flaskd.fails()
        assert (code, f"pid {first.pid if first else 0}" in log) == (75, True)
    finally:
        flaskd.process = first
    assert flaskd.stop() == 0


def test_a_link_in_the_place_of_the_socket(flaskd: Flaskd) -> None:
    """A symbolic link in place of the socket is not followed, replaced or removed."""
    flaskd.start()
    link = flaskd.directory / "link"
    link.symlink_to(flaskd.directory / "gate")
    link.rename(flaskd.socket_path)
    flaskd.until(lambda: "the control socket was removed, and cannot be made again" in flaskd.log)
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 0
    assert flaskd.socket_path.is_symlink()
    flaskd.socket_path.unlink()
    flaskd.runtime.rmdir()


def test_a_crowd_that_comes_at_once(flaskd: Flaskd) -> None:
    """A hundred clients that connect and ask at the same moment are all answered."""
    flaskd.start()
    flaskd.kill(signal.SIGSTOP)  # no client is accepted until all have connected
    with contextlib.ExitStack() as stack:
        crowd = []
        for _ in range(120):  # the backlog has room for them
            client = stack.enter_context(flaskd.control())
            client.sendall(b"ready\n")
            crowd.append(client)
        flaskd.kill(signal.SIGCONT)
        answers = [b"".join(iter(lambda each=each: each.recv(100), b"")) for each in crowd]
    assert answers == [b"OK ready\n"] * 120
    assert flaskd.stop() == 0


def test_those_who_wait_leave_room_for_those_who_ask(flaskd: Flaskd) -> None:
    """With the most waiting clients another one is refused by name; short questions, and a stop, are answered."""
    flaskd.start()
    held = flaskd.hold()

    def wait(stack: contextlib.ExitStack, line: bytes, first: bytes) -> socket.socket:
        client = stack.enter_context(flaskd.control())
        client.sendall(line)
        assert client.recv(1000).startswith(first)
        return client

    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as leaving:
            for _ in range(10):
                wait(leaving, b"drain wait\n", b".. in_flight=1 left=")
            waiting = [wait(stack, b"drain wait\n", b".. in_flight=1 left=") for _ in range(38)]
            refused = "clients wait for an outcome already; come back later"
            assert flaskd.command("drain wait") == f"ERR not-now cannot drain: 48 {refused}, or leave out wait\n"
            assert flaskd.command("check") == f"ERR not-now cannot check: 48 {refused}\n"
            for _ in range(40):  # and many silent clients
                stack.enter_context(flaskd.control())
            assert flaskd.command("status").endswith("OK draining\n")
            assert flaskd.command("drain").startswith("OK draining in_flight=1 ")
        # Ten have hung up, so ten more may wait.
        waiting += [wait(stack, b"drain wait\n", b".. in_flight=1 left=") for _ in range(10)]
        assert flaskd.command("drain wait").startswith("ERR not-now ")
        stopping = wait(stack, b"stop wait\n", b".. in_flight=1")
        assert flaskd.command("ready") == "ERR not-ready flaskd is stopping\n"
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        for client in [*waiting, stopping]:
            answer = b"".join(iter(lambda client=client: client.recv(1000), b"")).splitlines()[-1]
            assert answer.startswith(b"OK stopped " if client is stopping else b"OK drained ")
    assert flaskd.wait() == 0


def test_who_waits_and_hangs_up_is_let_go(flaskd: Flaskd) -> None:
    """A waiting client that hangs up is dropped at once; one that only ends its sending side gets its outcome."""
    flaskd.start()
    held = flaskd.hold()
    flaskd.command("status")
    before = descriptors(flaskd)
    with flaskd.control() as patient:
        patient.sendall(b"drain wait\n")
        patient.shutdown(socket.SHUT_WR)
        assert patient.recv(1000).startswith(b".. in_flight=1 left=")
        for _ in range(20):
            with flaskd.control() as client:
                client.sendall(b"drain wait\n")
                assert client.recv(1000).startswith(b".. in_flight=1 left=")
        flaskd.until(lambda: descriptors(flaskd) <= before + 1)
        flaskd.gate.open()
        assert held.result() == (200, b"held")
        assert b"".join(iter(lambda: patient.recv(1000), b"")).splitlines()[-1].startswith(b"OK drained completed=1")
    assert flaskd.stop() == 0


# --- the log ----------------------------------------------------------------------------------------------------------


def test_refused_commands_are_bounded_in_the_log_and_counted(flaskd: Flaskd) -> None:
    """Thousands of refused commands, from the socket and the FIFO, give some fifty lines each, and their number."""
    flaskd.write("flaskd.yaml", "control: {roles: {viewer: [nobody]}, fifo: [status]}\n")
    flaskd.start()
    with flaskd.control() as client, client.makefile("rwb") as stream:
        for _ in range(100):
            stream.write(b'{"cmd":"log-level","level":"loud"}\n' * 30)
            stream.flush()
            for _ in range(30):
                assert json.loads(stream.readline())["error"]["code"] == "usage"
    with flaskd.fifo_path.open("wb") as fifo:
        fifo.write(b"drian\nstop\n\xff\n" * 1000 + b"x" * 5000 + b"\n")
    flaskd.until(lambda: "the FIFO got a line of 5000 bytes" in flaskd.log)
    assert flaskd.command("ready") == "OK ready\n"
    assert flaskd.stop() == 0
    assert len(flaskd.log.splitlines()) < 200
    counted = {
        kind: int(count)
        for count, kind in re.findall(r" (\d+) more (.*) in \d+s: counted, and not listed one by one", flaskd.log)
    }
    user = f"control commands of uid={os.geteuid()}"
    assert counted == {user: 2950, f"refused {user}": 2950, "refused control commands of the FIFO": 3950}


def test_what_a_command_prints_and_an_app_raises_is_text_in_the_log(flaskd: Flaskd) -> None:
    """Output of a command and texts of exceptions cannot begin a log line, or control a terminal."""
    forged = "x\\n2026-01-01T00:00:00.000Z error   forged\\x1b[31m\\u202e"
    flaskd.write(
        "rude.py",
        "import flaskd, logging\nfrom gateapp import app\n"
        f"@app.get('/rude')\ndef rude():\n    raise RuntimeError('{forged}')\n"
        "app.testing = app.config['PROPAGATE_EXCEPTIONS'] = True\n"
        f"@flaskd.on_stop\ndef late():\n    raise RuntimeError('{forged}')\n",
    )
    script = "printf 'x\\n2026-01-01T00:00:00.000Z error   forged\\033[31m\\n'; exit 1"
    flaskd.write(
        "flaskd.yaml",
        f"cleanup: {{policies: {{rude: {{use: command, with: {{argv: [sh, -c, {json.dumps(script)}]}}}}}}}}\n",
    )
    flaskd.start(app="rude")
    assert get(flaskd.url, "/rude")[0] == 500
    assert flaskd.stop() == 0
    assert flaskd.log.count("forged") >= 3
    assert "\x1b" not in flaskd.log
    assert "\u202e" not in flaskd.log
    assert not [line for line in flaskd.log.splitlines() if line.startswith("2026-01-01")]


# --- runtime directories that cannot be used at the start -------------------------------------------------------------


def test_a_runtime_directory_that_is_repaired_is_used(flaskd: Flaskd) -> None:
    """If a file is in place of the runtime directory, that is logged once; when it is gone, both nodes are made."""
    flaskd.runtime.write_text("in the way")
    flaskd.launch()
    flaskd.wait_message("READY=1")
    assert "control is not complete: cannot use" in flaskd.log
    flaskd.runtime.unlink()
    flaskd.until(lambda: flaskd.socket_path.exists() and flaskd.fifo_path.exists())
    assert flaskd.command("ready") == "OK ready\n"
    with flaskd.fifo_path.open("wb") as fifo:
        fifo.write(b"drain\n")
    flaskd.wait_message("drained")
    assert flaskd.log.count("Not a directory") == 1
    assert flaskd.stop() == 0


NO_TEMPORARY = """
import tempfile
def none():
    raise FileNotFoundError(2, "No usable temporary directory found")
tempfile.gettempdir = tempfile._get_default_tempdir = none
"""


def test_control_needs_no_temporary_directory(flaskd: Flaskd) -> None:
    """Without a writable temporary directory, as on a read-only root, the runtime directory is enough."""
    flaskd.write("no-tmp/sitecustomize.py", NO_TEMPORARY)
    flaskd.env["PYTHONPATH"] = f"{flaskd.directory / 'no-tmp'}:{os.environ.get('PYTHONPATH', '')}"
    flaskd.start()
    assert flaskd.client("health") == (0, "healthy\n", "")
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0
    assert "Traceback" not in flaskd.log


def test_serving_needs_no_place_for_control(flaskd: Flaskd) -> None:
    """Without any usable runtime directory flaskd logs that and serves; a client says that there is no daemon."""
    flaskd.write("no-tmp/sitecustomize.py", NO_TEMPORARY)
    flaskd.env |= {
        "PYTHONPATH": f"{flaskd.directory / 'no-tmp'}:{os.environ.get('PYTHONPATH', '')}",
        "RUNTIME_DIRECTORY": "/proc/nowhere",
        "XDG_RUNTIME_DIR": "/proc/nowhere",
        "TMPDIR": "/proc",
    }
    flaskd.start("--name", "nobody-runs-this", listen=f"unix:{flaskd.directory}/app.sock")
    code, out, err = flaskd.client("health", "--name", "nobody-runs-that")
    assert (code, out, "Traceback" in err) == (69, "", False)
    assert get(f"unix:{flaskd.directory}/app.sock") == (200, b"hello")
    flaskd.kill(signal.SIGTERM)
    assert flaskd.wait() == 0
    assert "control is not complete: cannot use /proc/nowhere: No such file or directory" in flaskd.log
    assert "Traceback" not in flaskd.log
