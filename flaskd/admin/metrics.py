"""The metrics for Prometheus: the daemon's counts, written out only when Prometheus asks.

`exporter` imports `prometheus_client`, which is optional. No request of the app runs code of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from flaskd.lifecycle import State
from flaskd.server import BOUNDS, Histogram
from flaskd.snapshot import Snapshot
from flaskd.version import __version__

Exporter = Callable[[str], tuple[bytes, str]]
"""Called with the Accept header; gives the text and its content type."""


def exporter(measures: Callable[[], Snapshot]) -> Exporter:
    """Make the function that writes the metrics; raises ImportError if prometheus_client is not installed."""
    import prometheus_client.core  # noqa: F401, PLC0415 - now: later there may be no free descriptor
    from prometheus_client import CollectorRegistry  # noqa: PLC0415 - optional, and takes 20 to 90 ms
    from prometheus_client.exposition import choose_encoder  # noqa: PLC0415
    from prometheus_client.registry import Collector  # noqa: PLC0415

    class Reader(Collector):
        def collect(self) -> Iterator[Any]:
            return families(measures())

        def describe(self) -> list[Any]:  # without it the registry would collect now to learn the names
            return []

    # A registry of flaskd's own, without the metrics that the app has in the global one.
    registry = CollectorRegistry()
    registry.register(Reader())

    def write(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return write


def families(now: Snapshot) -> Iterator[Any]:
    """All metrics of one moment."""
    yield from _life(now)
    yield from _requests(now)
    if now.serving.wanted:
        yield from _workers(now)
    yield from _stops(now)


def _life(now: Snapshot) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily  # noqa: PLC0415

    yield InfoMetricFamily("flaskd", "The running flaskd.", {"version": __version__, "instance": now.instance})
    states = GaugeMetricFamily("flaskd_state", "1 for the state the daemon is in.", labels=["state"])
    for state in State:
        states.add_metric([state], state == now.state)
    yield states
    for name, text, value in (
        ("flaskd_state_since_timestamp_seconds", "When it came into this state (Unix time).", now.since),
        ("flaskd_start_time_seconds", "When flaskd was started (Unix time).", now.started),
    ):
        yield GaugeMetricFamily(name, text, value)
    yield CounterMetricFamily("flaskd_drains", "Drains begun.", now.counts.drains)
    reloads = CounterMetricFamily("flaskd_reloads", "Reloads by result.", labels=["result"])
    reloads.add_metric(["ok"], now.counts.reloads)
    reloads.add_metric(["failed"], now.counts.failed_reloads)
    yield reloads


def _requests(now: Snapshot) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily  # noqa: PLC0415

    serving, oldest = now.serving, now.serving.oldest
    for name, text, value in (
        ("flaskd_requests_in_flight", "Requests accepted and not yet completely answered.", len(serving.in_flight)),
        ("flaskd_requests_queued", "Requests that wait for a thread.", serving.queued),
        ("flaskd_oldest_request_seconds", "Age of the oldest request in flight.", oldest.age if oldest else 0.0),
        ("flaskd_connections", "Open connections.", serving.connections),
        ("flaskd_threads", "Threads that run the app.", now.all_threads),
    ):
        yield GaugeMetricFamily(name, text, value)

    outcomes = CounterMetricFamily("flaskd_requests", "Requests by what became of them.", labels=["outcome"])
    for outcome, count in serving.tally.outcomes.items():
        outcomes.add_metric([outcome], count)
    yield outcomes
    limited = CounterMetricFamily(
        "flaskd_limited", "Requests refused or given up for a limit, by its setting.", labels=["limit"]
    )
    for limit, count in serving.tally.limited.items():
        limited.add_metric([limit], count)
    yield limited
    answers = CounterMetricFamily("flaskd_responses", "Answers by class of their status.", labels=["status"])
    for digit in range(1, 6):
        answers.add_metric([f"{digit}xx"], serving.tally.statuses[digit])
    yield answers
    for name, text, histogram in (
        ("flaskd_request_seconds", "From a request's first byte to its answer's last.", serving.tally.took),
        ("flaskd_queue_wait_seconds", "How long complete requests waited for a thread.", serving.tally.waited),
    ):
        yield HistogramMetricFamily(name, text, buckets=_cumulative(histogram), sum_value=histogram.total)


def _workers(now: Snapshot) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

    from flaskd.pool.handle import Phase  # noqa: PLC0415 - loaded only if there are workers

    serving = now.serving
    yield GaugeMetricFamily("flaskd_workers_wanted", "Workers that there are to be.", serving.wanted)
    states = GaugeMetricFamily("flaskd_workers", "Workers by state.", labels=["state"])
    for state in Phase:
        states.add_metric([state], sum(each["state"] == state for each in serving.workers))
    yield states
    yield CounterMetricFamily("flaskd_worker_deaths", "Workers that died and were not told to.", serving.deaths)
    yield CounterMetricFamily(
        "flaskd_worker_death_requests", "Requests, read whole, that died with a worker.", serving.cut_by_deaths
    )
    recycled = CounterMetricFamily(
        "flaskd_workers_recycled", "Workers replaced because they had reached a limit.", labels=["limit"]
    )
    for limit, count in serving.recycled.items():
        recycled.add_metric([limit], count)
    yield recycled
    for key, name, text in (
        ("in_flight", "flaskd_worker_requests_in_flight", "Requests in flight in each worker."),
        ("queued", "flaskd_worker_requests_queued", "Requests that wait for a thread in each worker."),
        ("connections", "flaskd_worker_connections", "Open connections of each worker."),
        ("generation", "flaskd_worker_generation", "The generation of each worker."),
    ):
        family = GaugeMetricFamily(name, text, labels=["worker", "pid"])
        for each in serving.workers:
            family.add_metric([str(each["slot"]), str(each["pid"])], each[key])
        yield family


def _stops(now: Snapshot) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    steps = GaugeMetricFamily(
        "flaskd_cleanup_seconds", "How long each cleanup step took.", labels=["stop", "policy", "fate"]
    )
    ledger = GaugeMetricFamily("flaskd_last_stop_requests", "The ledger of the last stop.", labels=["outcome"])
    recorded = now.held.last_stop
    last = recorded if recorded and "damaged" not in recorded else None
    for stop, policies in (("current", now.serving.steps), ("last", last.get("policies", {}) if last else {})):
        for policy, entry in policies.items():
            steps.add_metric([stop, policy, str(entry.get("fate"))], float(entry.get("took") or 0))
    yield steps
    if last:
        for outcome in ("completed", "rejected"):
            ledger.add_metric([outcome], int(last.get(outcome, 0)))
        ledger.add_metric(["cut"], len(last.get("cut", ())))
        yield ledger
        yield GaugeMetricFamily(
            "flaskd_last_stop_duration_seconds", "How long the last stop took.", float(last.get("took") or 0)
        )


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    counts = accumulate(histogram.counts)
    return [(str(bound), float(count)) for bound, count in zip((*BOUNDS, "+Inf"), counts, strict=True)]
