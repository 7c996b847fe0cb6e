"""Failures while a stop is planned or under way: it ends all the same, in time and with its record."""

from __future__ import annotations

from daemon_kit import GATE_APP, Flaskd

ODD_NAME = """
import flaskd

class Odd:
    @property
    def __name__(self):
        if registered:
            raise RuntimeError("no name")
        return "odd"
    def __call__(self):
        pass

registered = False
flaskd.on_stop(Odd())
registered = True
"""
UNTOLD = """
import flaskd.systemd.service

def stopping(*_):
    raise RuntimeError("no manager")

flaskd.systemd.service.Service.stopping = stopping
"""
POOLS = """
import collections

class Pools(collections.UserDict):
    def values(self):
        raise RuntimeError("not now")

pools = Pools()
"""
BROKEN = """
import flaskd.cleanup.runner

def run(*_):
    raise RuntimeError("broken")

flaskd.cleanup.runner.Runner.run = run
"""
MARK = "cleanup: {policies: {mark: {use: command, with: {argv: [touch, mark]}}}}\n"


def test_what_cannot_be_planned_or_told_does_not_keep_the_stop(flaskd: Flaskd) -> None:
    """If planning raises and systemd cannot be told, the stop drains and runs its policies."""
    flaskd.write("badapp.py", GATE_APP + ODD_NAME + UNTOLD)
    flaskd.start("-c", str(flaskd.write("flaskd.yaml", MARK)), app="badapp")
    answer = flaskd.hold()
    flaskd.command("stop")
    flaskd.gate.open()
    assert answer.result()[0] == 200
    assert flaskd.wait() == 0
    assert (flaskd.directory / "mark").exists()
    assert flaskd.record()["policies"]["mark"]["fate"] == "ok"
    assert "cannot plan all of the cleanup" in flaskd.log
    assert "cannot tell of StopBegan" in flaskd.log


def test_the_app_s_objects_do_not_keep_the_drain(flaskd: Flaskd) -> None:
    """An object that raises when it is looked at fails its step alone, and requests in flight are answered."""
    flaskd.write("badapp.py", GATE_APP + POOLS)
    policy = "cleanup: {policies: {pools: {use: redis.close, with: {target: 'badapp:pools'}}}}\n"
    flaskd.start("-c", str(flaskd.write("flaskd.yaml", policy)), app="badapp")
    answer = flaskd.hold()
    flaskd.command("stop")
    flaskd.gate.open()
    assert answer.result()[0] == 200
    assert flaskd.wait() == 0
    record = flaskd.record()
    assert (record["cut"], record["policies"]["pools"]["fate"]) == ([], "failed")


def test_a_cleanup_that_breaks_off_leaves_the_drain(flaskd: Flaskd) -> None:
    """If the cleanup fails before the drain, requests in flight are answered and recorded."""
    flaskd.write("badapp.py", GATE_APP + BROKEN)
    flaskd.start(app="badapp")
    answer = flaskd.hold()
    with flaskd.control() as stopping, stopping.makefile("r") as told:
        stopping.sendall(b"stop wait\n")
        assert [told.readline()[:14] for _ in "12"] == [
            ".. in_flight=1"
        ] * 2  # the second one comes a second after the failure
        flaskd.gate.open()
        assert told.read().splitlines()[-1].startswith("OK stopped completed=1 rejected=0 cut=0")
    assert answer.result()[0] == 200
    assert flaskd.wait() == 0
    assert "cleanup broke off: broken" in flaskd.log
    assert "AssertionError" not in flaskd.log
    assert (flaskd.record()["completed"], flaskd.record()["cut"]) == (1, [])
