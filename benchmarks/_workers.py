"""What `loss.py` does to the workers of a server under load: new code, replacements, scaling, and kills."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from _load import Load
from _processes import memory_of
from _reload import BAD, EXIT_OF_BAD_CODE, GOOD, MODULE, RELOADS, config, put, serving, taken_over, versions
from _servers import NotReadyError, Running, Served, Server, running
from app import THREADS

LOADED = 0.4
"""Average seconds of load between two stops or other steps."""
_PATIENCE = 60.0
"""Seconds for flaskd's commands, and for peers to serve the new code."""
_START_TIMEOUT = 6.0
"""Seconds that flaskd gives a new worker in the scenario of bad code."""
_REFILLED = 45.0
"""Seconds until there is more than one worker again: flaskd waits up to 30 s for a slot that fails repeatedly."""
_SOON = 2.0
"""Seconds after a kill within which all clients of that worker have noticed it."""

LEAKS = 20
"""Requests a second and worker, each of which leaks 1 MB."""
LEAK_LIMIT = 150
"""MiB that a worker may have (pool.max_memory)."""
MOST_GROWN = 1.3
"""No worker may exceed this many times the limit."""
_LEAK_CYCLE = 6.0
"""Seconds of leaking that count as a cycle."""
_SAMPLE = 0.1
"""Seconds between two looks at the memory of all workers."""


def busy() -> None:
    """Let the clients get answers for a while."""
    time.sleep(LOADED * random.uniform(0.7, 1.3))


class Story:
    """A server under load, and the findings: the seconds of each step, and broken promises."""

    def __init__(self, server: Running, clients: Load, workers: int) -> None:
        self.server = server
        self.clients = clients
        self.workers = workers
        self.took: list[float] = []
        self.faults: list[str] = []
        self.account: dict[str, Any] | None = None

    def expect(self, kept: bool, fault: str) -> None:
        """Note a fault if a promise was not kept."""
        if not kept:
            self.faults.append(fault)

    def command(self, *arguments: str, wanted: int = 0) -> str:
        """Run a flaskd command, measure its time, and check its exit code; returns its output."""
        self.alive()
        began = time.monotonic()
        done = self.server.flaskd(*arguments, patience=_PATIENCE)
        self.took.append(time.monotonic() - began)
        said = done.stdout + done.stderr
        self.expect(
            done.returncode == wanted, f"{' '.join(arguments)}: exit code {done.returncode}, not {wanted}: {said!r}"
        )
        return said

    def alive(self) -> None:
        """Raise NotReadyError if the server has exited."""
        if (code := self.server.process.poll()) is not None:
            raise NotReadyError(f"{self.server.name} has exited with {code} under load")

    def finish(self) -> dict[str, Any]:
        """Let the clients finish, once; returns their account."""
        if self.account is None:
            busy()
            self.account = self.clients.finish()
            self.alive()
        return self.account

    @contextlib.contextmanager
    def replacing(self, what: str, at_least: int = 1) -> Iterator[None]:
        """Check that at least this many processes import the app meanwhile."""
        before = self.server.imports
        yield
        new = self.server.imports - before
        self.expect(new >= at_least, f"{what}: {new} new workers, not {at_least}")


def _reloads(story: Story, cycles: int) -> None:
    """Good code, repeatedly: after each reload new code answers all connections."""
    for cycle in range(cycles):
        busy()
        version = f"version {cycle}"
        put(story.server, GOOD, version)
        if story.server.name == "flaskd":
            with story.replacing("reload", story.workers):
                story.command("reload")
        else:
            _reload_peer(story, version)
        found = versions(story.server, 4)
        story.expect(found == {(200, version)}, f"reload {cycle}: answered by {sorted(found)}")


def _reload_peer(story: Story, version: str) -> None:
    began, old = time.monotonic(), story.server.workers
    RELOADS[story.server.name](story.server, _PATIENCE)
    while not taken_over(story.server, old, version) and time.monotonic() < began + _PATIENCE:
        story.alive()
        time.sleep(0.05)
    story.took.append(time.monotonic() - began)


def _replaces(story: Story, cycles: int) -> None:
    """Each slot in turn gets a new worker."""
    for cycle in range(cycles):
        busy()
        with story.replacing("restart"):
            story.command("restart", str(cycle % story.workers))


def _scales(story: Story, cycles: int) -> None:
    """Two workers more, and back again."""
    for _ in range(cycles):
        busy()
        with story.replacing("scale", 2):
            story.command("scale", str(story.workers + 2))
        busy()
        story.command("scale", str(story.workers))


def _bad(story: Story, cycles: int) -> None:
    """Bad code of each kind in turn: it is refused with its reason, and the old code serves on."""
    for cycle in range(cycles):
        busy()
        code = BAD[cycle % len(BAD)]
        put(story.server, code, f"bad {cycle}")
        said = story.command("reload", wanted=EXIT_OF_BAD_CODE)
        story.expect(code.says in said, f"reload of code that {code.text}: did not say {code.says!r} but {said!r}")
        found = versions(story.server, 4)
        story.expect(found == {(200, "")}, f"reload of code that {code.text}: answered by {sorted(found)}")


def _kills(story: Story, cycles: int) -> None:
    """`kill -9` of a random worker, repeatedly, each time when there is another one."""
    killed: dict[int, float] = {}
    named: dict[int, Counter[str]] = defaultdict(Counter)
    for _ in range(cycles):
        busy()
        began = time.monotonic()
        while len(living := [pid for pid in story.server.workers if pid not in killed]) < min(2, story.workers):
            story.alive()
            if time.monotonic() > began + _REFILLED:
                raise NotReadyError(f"{story.server.name} has not filled its workers' places in {_REFILLED:.0f} s")
            time.sleep(0.02)
        story.took.append(time.monotonic() - began)
        victim = random.choice(living)
        os.kill(victim, signal.SIGKILL)
        killed[victim] = time.time()
        if story.server.name == "flaskd":
            _read_named(story, named)
    account = story.finish()
    notes = story.server.notes.read_text(encoding="utf-8").splitlines()
    story.faults += strays(account["losses"], notes, killed)
    if story.server.name == "flaskd":
        _read_named(story, named)
        story.faults += unnamed(notes, killed, named)
        account["named"] = sum(count for pid in killed for count in named[pid].values())


def _leaks(story: Story, cycles: int) -> None:
    """Workers that leak memory, each of which is replaced in time."""
    peaks: dict[int, float] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    until = time.monotonic() + cycles * _LEAK_CYCLE
    while (now := time.monotonic()) < until:
        story.alive()
        for pid in story.server.workers:
            with contextlib.suppress(OSError, IndexError):  # the worker has ended
                peaks[pid] = max(peaks.get(pid, 0.0), memory_of(pid))
                first.setdefault(pid, now)
                last[pid] = now
        time.sleep(_SAMPLE)
    gone = [pid for pid in last if last[pid] < until - 1]
    story.took += [last[pid] - first[pid] for pid in gone]
    story.finish()["peaks"] = [round(peak, 1) for peak in peaks.values()]
    most = MOST_GROWN * LEAK_LIMIT
    story.faults += [f"worker {pid} had {peak:.0f} MiB, of {most:g}" for pid, peak in peaks.items() if peak > most]
    story.expect(len(gone) >= story.workers, f"{len(gone)} workers were replaced")


def _read_named(story: Story, into: dict[int, Counter[str]]) -> None:
    """Read which requests flaskd names for dead workers. It may forget the oldest ones, so each is kept here."""
    done = story.server.flaskd("workers", "--json", patience=_PATIENCE)
    if done.returncode:
        raise NotReadyError(f"flaskd workers --json exited with {done.returncode}: {done.stderr or done.stdout}")
    for pid, requests in named_requests(json.loads(done.stdout)).items():
        into[pid] |= requests


def named_requests(told: Any, pid: int | None = None) -> dict[int, Counter[str]]:
    """The requests in the output of `flaskd workers --json`: method and path, by the `pid` of the enclosing worker."""
    found: dict[int, Counter[str]] = defaultdict(Counter)
    if isinstance(told, dict):
        pid = told.get("pid", pid)
        if pid is not None and {"method", "path"} <= told.keys():
            found[pid][f"{told['method']} {told['path'].partition('?')[0]}"] += 1
    for each in told.values() if isinstance(told, dict) else told if isinstance(told, list) else ():
        for owner, requests in named_requests(each, pid).items():
            found[owner] += requests
    return found


def strays(losses: list[dict[str, Any]], notes: list[str], killed: dict[int, float]) -> list[str]:
    """Losses that no kill explains: begun by another worker, or by none and not at the time of a kill."""
    begun = {request.partition(" ")[2]: pid for sign, pid, request in map(_note, notes) if sign == "+"}
    found = []
    for each in losses:
        if each["fate"] not in {"reset", "cut"}:
            continue
        pid = begun.get(each["target"])
        near = any(-0.1 <= each["at"] - moment <= _SOON for moment in killed.values())
        if (pid is not None and pid not in killed) or (pid is None and not near):
            by = f"begun by {pid}, which was not killed" if pid else "begun by no worker, and not when one was killed"
            found.append(f"{each['fate']}: {each['kind']} {each['target']}, {each['how']}: {by}")
    return found


def _note(line: str) -> tuple[str, int, str]:
    sign, pid, request = line.split(" ", 2)
    return sign, int(pid), request


def unnamed(notes: list[str], killed: dict[int, float], named: dict[int, Counter[str]]) -> list[str]:
    """Requests that the killed workers had begun and not ended, and that flaskd does not name."""
    held: dict[int, Counter[str]] = defaultdict(Counter)
    for sign, pid, request in map(_note, notes):
        if pid in killed:
            held[pid][request.partition("?")[0]] += 1 if sign == "+" else -1
    found = []
    for pid, requests in held.items():
        found += [
            f"worker {pid} had {count} x {request}, and {named[pid][request]} are named"
            for request, count in requests.items()
            if count > named[pid][request]
        ]
    return found


STEPS: dict[str, Callable[[Story, int], None]] = {
    "reload": _reloads,
    "replace": _replaces,
    "scale": _scales,
    "bad": _bad,
    "kill": _kills,
    "leak": _leaks,
}
PEERS_TOO = {"reload", "kill"}
"""Scenarios for peers with workers, too; all others are for flaskd alone."""


def _load(port: int, scenario: str, options: argparse.Namespace) -> Load:
    return Load(port, "leak", LEAKS * options.workers) if scenario == "leak" else Load(port, "mixed", options.clients)


def tell(server: Server, port: int, scenario: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    """Run one scenario with one server; returns the clients' account, with the faults, and seconds of each step."""
    if scenario == "kill":
        how: dict[str, Any] = {"served": Served(app="noted", workers=options.workers)}
    elif scenario == "leak":
        how = {"served": Served(workers=options.workers), "config": f"pool: {{max_memory: {LEAK_LIMIT}MiB}}\n"}
    else:
        how = {"served": serving(options.workers, THREADS), "modules": {f"{MODULE}.py": GOOD.version("")}}
        how["config"] = config(_START_TIMEOUT if scenario == "bad" else _PATIENCE)
    with (
        running(server, port, unprivileged=options.unprivileged, **how) as each,
        contextlib.closing(_load(port, scenario, options)) as clients,
    ):
        clients.wait_begun()
        story = Story(each, clients, options.workers)
        STEPS[scenario](story, options.cycles)
        account = story.finish()
    story.expect(not account["fates"]["refused"], f"{account['fates']['refused']} refused")
    return account | {"faults": story.faults}, story.took
