"""``sentry.flush`` and ``otel.shutdown``: what is queued for Sentry and OpenTelemetry is sent."""

from __future__ import annotations

import time
from typing import Any

from flaskd.cleanup.context import StepContext, StepTimedOutError
from flaskd.cleanup.ending import live_action
from flaskd.cleanup.kinds import Kind
from flaskd.cleanup.targets import TargetFields
from flaskd.config import Phase


def flush_sentry(client: Any, context: StepContext, _fields: TargetFields) -> None:
    """Send what is queued (sentry_sdk.Client.flush); a call that used its timeout may have lost events."""
    timeout = context.remaining()
    began = time.monotonic()
    client.flush(timeout=timeout)
    if time.monotonic() - began >= timeout:
        raise StepTimedOutError("events may be lost")


def shut_down_telemetry(provider: Any, _context: StepContext, _fields: TargetFields) -> None:
    """Export what is buffered, and end (OpenTelemetry: TracerProvider, MeterProvider, LoggerProvider .shutdown).

    None of them keeps a timeout reliably, so only the step's own timeout limits this.
    """
    provider.shutdown()


ACTIONS = (
    live_action(
        "sentry.flush",
        Phase.FLUSH,
        flush_sentry,
        needs={"sentry_sdk": "sentry-sdk"},
        summary="Sends what Sentry's client still holds.",
    ),
    live_action(
        "otel.shutdown",
        Phase.FLUSH,
        shut_down_telemetry,
        needs={"opentelemetry.sdk": "opentelemetry-sdk"},
        kinds=(
            Kind(
                (
                    "opentelemetry.sdk.trace:TracerProvider",
                    "opentelemetry.sdk.metrics:MeterProvider",
                    "opentelemetry.sdk._logs:LoggerProvider",
                )
            ),
        ),
        summary=("Sends what OpenTelemetry's providers of traces, metrics and logs still hold, and shuts them down."),
    ),
)
