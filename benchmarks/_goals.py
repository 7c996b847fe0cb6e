"""The results of `speed.py`, and the goals that flaskd must meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from _measure import COMPUTE, JOB, LOADS, ONE, Balance, Beside, Sample, Supervisor
from _servers import median

BASE = "waitress-serve"
MOST_ACCEPTING = 2.0 / 5000
"""Seconds per idle connection, until all are accepted."""
ACCEPTED_SOON = 2.0
"""Seconds that are allowed for any number of idle connections."""
LEAST_BESIDE = 0.95
"""The part of its throughput that one busy connection keeps beside the idle ones."""
MOST_MEMORY = 35.0
"""MiB after 256 busy connections."""
MOST_SPREAD = 1.2
"""Jobs of the busiest of four workers ÷ those of the idlest."""
MOST_JOB = 1.3
"""The time within which 99 of 100 jobs are answered ÷ the length of a job."""
MOST_SUPERVISOR = 25.0
"""MiB of the supervisor."""
MOST_SHARE = 0.01
"""The part of a core that an idle supervisor uses."""


@dataclass(frozen=True)
class Measure:
    """A figure of a sample; it is shown multiplied by `scale`, with `digits` decimal places."""

    text: str
    title: str
    of: Callable[[Sample], float]
    scale: float
    digits: int


RATE = Measure("requests a second", "Requests a second", lambda each: each.rate, 1, 0)
CPU = Measure("CPU", "CPU for a request in µs", lambda each: each.cpu_each, 1e6, 1)
P99 = Measure("p99", "99 of 100 requests are answered within, in ms", lambda each: each.p99, 1e3, 1)


@dataclass(frozen=True)
class Goal:
    """A limit for a ratio: the figure of `server` under a load ÷ that of `peer`."""

    load: str
    measure: Measure
    peer: str
    least: float | None = None
    most: float | None = None
    server: str = "flaskd"

    @property
    def text(self) -> str:
        """The goal as it is printed."""
        load = next(each for each in (*LOADS, COMPUTE) if each.name == self.load)
        whose = "" if self.server == "flaskd" else f" of {self.server}"
        return f"{load.text}: {self.measure.text}{whose} ÷ {self.peer}"


GOALS = [
    *[Goal(load, RATE, BASE, least=1.8) for load in ("1", "16", "64", "256")],
    *[Goal(load, CPU, BASE, most=1.0) for load in ("1", "16", "64", "256")],
    Goal("head", CPU, "granian", most=1.15),
    Goal("head", CPU, BASE, most=0.45),
    Goal("head", CPU, "flaskd", most=1.15, server="flaskd+log"),
    Goal("bare", CPU, "granian", most=1.3),
    *[Goal(load, RATE, BASE, least=1.0) for load in ("down", "up")],
    *[Goal(load, RATE, "before", least=1.0) for load in ("down", "up", "post")],
    Goal("sleeps", RATE, "before", least=0.98),
    Goal("sleeps", P99, "before", most=1.1),
    Goal("sleepers", RATE, "granian", least=1.0),
    Goal("sleepers", P99, "granian", most=1.2),
]


WORKER_GOALS = [
    Goal("compute", RATE, ONE, least=1.8),
    Goal("compute", RATE, "gunicorn", least=1.0),
    Goal("16", RATE, "gunicorn", least=1.2),
]
"""With two worker processes on two cores; they replace the other goals."""


@dataclass
class Results:
    """The figures by load or number of idle connections, server and run; and the measurements that failed."""

    samples: dict[tuple[str, str], dict[int, Sample]] = field(default_factory=dict)
    beside: dict[tuple[int, str], dict[int, Beside]] = field(default_factory=dict)
    memory: dict[str, dict[int, float]] = field(default_factory=dict)
    balance: dict[str, dict[int, Balance]] = field(default_factory=dict)
    supervisor: dict[str, dict[int, Supervisor]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def figure(self, load: str, server: str, what: Callable[[Sample], float]) -> float:
        """The median of the runs."""
        return median([what(each) for each in self.samples.get((load, server), {}).values()])

    def ratio(self, load: str, server: str, what: Callable[[Sample], float], peer: str = BASE) -> float:
        """The median of the ratios to a peer in the same run."""
        ours, theirs = (self.samples.get((load, name), {}) for name in (server, peer))
        both = [(what(ours[run]), what(theirs[run])) for run in ours if run in theirs]
        return round(median([one / other for one, other in both if other]), 2)

    def crowded(self, count: int, server: str, what: Callable[[Beside], float]) -> float:
        """The median of the runs with this many idle connections."""
        return median([what(each) for each in self.beside.get((count, server), {}).values()])

    def of_balance(self, server: str, what: Callable[[Balance], float]) -> float:
        """The median of the runs."""
        return median([what(each) for each in self.balance.get(server, {}).values()])

    def of_supervisor(self, server: str, what: Callable[[Supervisor], float]) -> float:
        """The median of the runs."""
        return median([what(each) for each in self.supervisor.get(server, {}).values()])


def judge(results: Results, wanted: list[str], crowds: list[int], workers: int = 0) -> list[dict[str, Any]]:
    """The goals, each with its figure; a goal whose peer was not measured is left out."""
    goals: list[dict[str, Any]] = []

    def at(goal: str, figure: float, *, least: float | None = None, most: float | None = None) -> None:
        met = figure >= least if least is not None else most is not None and figure <= most
        goals.append({"goal": goal, "least": least, "most": most, "figure": figure, "met": met})

    for goal in WORKER_GOALS if workers else GOALS:
        if goal.load in wanted and (goal.load, goal.peer) in results.samples:
            figure = results.ratio(goal.load, goal.server, goal.measure.of, goal.peer)
            at(goal.text, figure, least=goal.least, most=goal.most)
    for count in crowds if "idle" in wanted else ():
        accepted, ratio = (results.crowded(count, "flaskd", what) for what in (lambda e: e.accepted, lambda e: e.ratio))
        at(f"{count} idle: accepted, s", round(accepted, 2), most=max(ACCEPTED_SOON, MOST_ACCEPTING * count))
        at(f"{count} idle: one busy beside ÷ alone", round(ratio, 2), least=LEAST_BESIDE)
    if workers and "balance" in wanted:
        spread, p99 = (results.of_balance("flaskd", what) for what in (lambda e: e.spread, lambda e: e.p99))
        at("jobs of the busiest of 4 workers ÷ the idlest", round(spread, 2), most=MOST_SPREAD)
        at("jobs of 10 ms: p99 ÷ 10 ms", round(p99 / JOB, 2), most=MOST_JOB)
    if workers and "supervisor" in wanted:
        memory, share = (results.of_supervisor("flaskd", what) for what in (lambda e: e.memory, lambda e: e.share))
        at("supervisor: MiB", round(memory, 1), most=MOST_SUPERVISOR)
        at("supervisor, idle: share of a core", round(share, 4), most=MOST_SHARE)
    if "memory" in wanted and not workers:
        at("256 connections: MiB afterwards", median(list(results.memory.get("flaskd", {}).values())), most=MOST_MEMORY)
    return goals
