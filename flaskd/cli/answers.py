"""The answers of a daemon as text for people: a page for some verbs, one line for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flaskd import text
from flaskd.cli import show
from flaskd.present import (
    account_lines,
    outcome,
    record_lines,
    recycled_words,
    request_lines,
    thread_lines,
    worker_lines,
)
from flaskd.units import format_duration


def answer(verb: str, fields: dict[str, Any]) -> str:
    """An answer to a verb, as text for people."""
    page, fields = _PAGES.get(verb), show.made_printable(fields)
    return page(fields) if page else _outcome(fields)


def _outcome(fields: dict[str, Any]) -> str:
    result, hint = fields.pop("result"), fields.pop("hint", "")
    return "\n".join([*account_lines(fields), outcome(result, fields=fields, hint=hint)])


def status(fields: dict[str, Any]) -> str:
    """The status as a page that can be read in five seconds; empty values are left out."""
    none_ready = fields["state"] in {"ready", "reloading"} and fields.get("workers") and not fields["workers"]["ready"]
    heads = [
        f"{show.state(fields['state'])} for {show.short(fields['for'])}",
        f"at most {show.short(fields['left'])} left" if fields.get("left") is not None else "",
        show.coloured("but no worker is ready", show.RED) if none_ready else "",
        f"up for {show.short(fields['uptime'])}",
        fields.get("app"),
        f"pid {fields['pid']}",
    ]
    rows = {
        "reason": fields.get("reason"),
        "drain": f"asked for {drain['time']} by {drain['by']}" if (drain := fields.get("drain")) else "",
        "cleanup": ", ".join(fields.get("cleanup") or []),
        "listen": ", ".join(fields["listen"]),
        "admin": ", ".join(fields.get("admin") or []),
        "agent": ", ".join(fields.get("agent") or []),
        "requests": _requests_now(fields),
        "answered": _answered(fields),
        "recently": _recently(fields),
        "limits": limits(fields),
        "threads": _threads_now(fields),
        "workers": workers_now(fields.get("workers")),
        "trouble": fields.get("trouble") and show.coloured(fields["trouble"], show.RED),
        "connections": str(fields["connections"]),
        "background": ", ".join(map(_background, fields.get("background") or [])),
        "last reload": _last_reload(fields.get("last_reload")),
        "last stop": _last_stop(fields.get("last_stop")),
        "previous run": fields.get("previous"),
        "idle stop at": fields.get("idle_stop_at"),
        "config": fields.get("config"),
        "flaskd": _itself(fields),
    }  # fmt: skip
    shown = [(key, str(value)) for key, value in rows.items() if value]
    head = ", ".join(filter(None, heads))
    in_flight = [f"  {each}" for each in request_lines(fields.get("requests", ()))]
    return "\n".join([head, *text.table(shown, indent=2, gap=1, least=12), *in_flight, *_next_steps(fields)])


def named(fields: dict[str, Any]) -> str:
    """The option with which a command finds the daemon of that status; empty for the usual name."""
    name = fields.get("name") or "flaskd"
    return "" if name == "flaskd" else f" --name {name}"


def _next_steps(fields: dict[str, Any]) -> list[str]:
    """What to do next: commands, each with its purpose; empty if all is well."""
    which, config = named(fields), fields.get("config")
    state, workers, reload = fields["state"], fields.get("workers"), fields.get("last_reload")
    stop = (f"flaskd stop{which} --wait", "clean up, and end")
    steps: list[tuple[str, str]] = []
    if state in {"draining", "drained"}:
        steps = [(f"flaskd resume{which}", "undo the drain: serve again"), stop]
    elif state == "stopping":
        steps = [(f"flaskd stop{which} --now", "cut requests and cleanup short")]
    elif workers and not workers["ready"]:
        steps = [(f"flaskd workers{which}", "what became of them")]
    elif state in {"ready", "reloading"}:
        if _all_busy(fields) or fields.get("queued"):
            steps = [(f"flaskd requests{which} --stacks", "where they are in the code of the app")]
        elif fields.get("trouble"):
            steps = [(f"flaskd {'workers' if workers else 'threads --stacks'}{which}", "where to look")]
        if reload and not reload["ok"]:
            check = f"flaskd check {config}" if config else "flaskd check"
            steps += [(check, "is the configuration valid now?"), (f"flaskd reload{which}", "try again")]
    return ["next:", *text.table(steps, indent=2, gap=3)] if steps else []


def _all_busy(fields: dict[str, Any]) -> bool:
    return bool(0 < fields["threads"] <= fields["busy"])


def _threads_now(fields: dict[str, Any]) -> str:
    said = f"{fields['busy']} of {fields['threads']} busy"
    return show.coloured(f"{said}: all of them", show.YELLOW) if _all_busy(fields) else said


def _recently(fields: dict[str, Any]) -> str:
    """How many answers a second there were in the last minute, and how long they took; empty if there were none."""
    recent = fields.get("recent") or {"counts": []}
    if not (answers := sum(recent["counts"])):
        return ""
    half, most = (at_most(quantile(recent["counts"], fields["tally"]["bounds"], part)) for part in (0.5, 0.95))
    rate = (
        f"{answers / max(0.001, recent['seconds']):,.1f} answers a second in the last {show.short(recent['seconds'])}"
    )
    return f"{rate}; 50 % took {half}, 95 % {most}"


def quantile(counts: Sequence[int], bounds: Sequence[float], part: float) -> float | None:
    """The upper bound of the bucket with that part of all; None if there are none, infinity above the last bound."""
    wanted, seen = part * sum(counts), 0
    if not wanted:
        return None
    for count, bound in zip(counts, [*bounds, float("inf")], strict=True):
        seen += count
        if seen >= wanted:
            return bound
    return float("inf")


def at_most(seconds: float | None) -> str:
    """An upper bound from `quantile` as text."""
    if seconds is None:
        return "-"
    return f"> {format_duration(60.0)}" if seconds == float("inf") else f"<= {format_duration(seconds)}"


def _itself(fields: dict[str, Any]) -> str:
    """The version of flaskd, and the memory of this one process."""
    if "version" not in fields:  # an older daemon does not tell
        return ""
    whose = " without its workers" if fields.get("workers") else ""
    memory = f", {fields['memory'] >> 20} MiB of memory{whose}" if fields.get("memory") else ""
    return f"{fields['version']}{memory}"


def _background(entry: dict[str, Any]) -> str:
    if not entry["thread"]:  # work in a worker, of which nothing more is known
        return str(entry["name"])
    return f"{entry['name']} (for {show.short(entry['age'])} in {entry['thread']})"


def _requests_now(fields: dict[str, Any]) -> str:
    text = f"{fields['in_flight']} in flight"
    if fields.get("queued"):
        text += show.coloured(f", {fields['queued']} of them queued", show.YELLOW)
    return text + (f"; oldest {fields['oldest']}" if fields.get("oldest") else "")


def workers_now(workers: dict[str, Any] | None) -> str:
    """The workers in a few words; empty if there are none."""
    if not workers:
        return ""
    generations = ", ".join(map(str, workers["generations"])) or "none"
    died = f"; {workers['died']} died" if workers["died"] else ""
    recycled = recycled_words(workers.get("recycled") or {})
    ready = f"{workers['ready']} of {workers['wanted']} ready, generation {generations}{died}"
    return "; ".join(filter(None, [ready, recycled]))


def limits(fields: dict[str, Any]) -> str:
    """How often limits were reached, in a few words; empty if none was."""
    return ", ".join(f"{count:,} for {limit}" for limit, count in (fields.get("limited") or {}).items())


def _answered(fields: dict[str, Any]) -> str:
    tally = fields["tally"]
    text = f"{fields['completed']:,}"
    notable = {
        "4xx": tally["statuses"]["4xx"], "5xx": tally["statuses"]["5xx"],
        **{key: tally["outcomes"][key] for key in ("rejected", "cut", "gone")},
    }  # fmt: skip
    return ", ".join([text, *(f"{count:,} {key}" for key, count in notable.items() if count)])


def _last_reload(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    return (
        f"ok, {entry['time']}"
        if entry["ok"]
        else f"{show.coloured('failed', show.RED)}, {entry['time']}: {entry.get('fault')}"
    )


def _last_stop(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    if why := entry.get("damaged"):
        return f"cannot be read: {why}"
    counts = {"cut": entry["cut"], "not finished": entry.get("unfinished")}
    lost = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing lost"
    failed = f", {entry['failed']} cleanup steps failed" if entry["failed"] else ""
    return f"{entry['started']}, {entry['reason']}, took {format_duration(float(entry['took'] or 0))}, {lost}{failed}"


def requests(fields: dict[str, Any]) -> str:
    """Requests in flight, one on each line, with the stacks that were asked for."""
    return "\n".join(request_lines(fields["requests"])) or "nothing is in flight"


def threads(fields: dict[str, Any]) -> str:
    """Threads, one on each line, with the stacks that were asked for."""
    return "\n".join(thread_lines(fields["list"]))


_PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "status": status,
    "requests": requests,
    "threads": threads,
    "workers": lambda fields: "\n".join(
        worker_lines(
            [*fields["list"], *fields["templates"]],
            fields["deaths"],
            wanted=fields["wanted"],
            recycled=fields.get("recycled"),
            trouble=fields.get("trouble"),
        )
    ),
    "config": lambda fields: str(fields["yaml"]).rstrip(),
    "log-level": lambda fields: " ".join(
        filter(None, [fields["level"], f"({fields['hint']})" if "hint" in fields else ""])
    ),
    "version": lambda fields: str(fields["version"]),
    "last-stop": lambda fields: "\n".join(record_lines(fields)),
}
