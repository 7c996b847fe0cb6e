"""Fields of answers as text for people; text replies of the control plane and the client verbs both use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from flaskd.protocol import Fields, how_many
from flaskd.stacks import folded
from flaskd.text import printable, table
from flaskd.units import format_duration


def died(mark: Fields) -> str:
    """How a run ended that left its mark behind, for people.

    A mark that exists but cannot be read says nothing about how the run ended.
    """
    if "unreadable" in mark:
        return f"left a mark that cannot be read, so it is not known how it ended: {mark['unreadable']}"
    if "unrecorded" in mark:
        pid, started, why = (mark.get(key, "unknown") for key in ("pid", "started", "unrecorded"))
        return f"came to its end, but its stop could not be recorded: {why} (pid {pid}, started {started})"
    stopping = f", in the middle of its stop ({mark['stopping']})" if "stopping" in mark else ""
    pid, started = mark.get("pid", "unknown"), mark.get("started", "unknown")
    return f"died without a complete stop{stopping} (pid {pid}, started {started})"


def record_lines(record: Fields) -> list[str]:
    """The record of a stop, for people; first `previous`, a later run that died without a record."""
    lines = []
    if previous := record.get("previous"):
        lines.append(f"previous run: {previous}")
    if "damaged" in record:
        return [*lines, f"the record of the last stop cannot be read: {record['damaged']}"]
    if previous:
        if "reason" not in record:
            return [*lines, "no stop has been recorded"]
        lines.append("the last stop that was recorded:")
    lines += [
        f"reason: {record.get('reason', 'unknown')}",
        f"started: {record.get('started', 'unknown')}, took {format_duration(float(record.get('took') or 0))}",
        (
            f"requests: completed={record.get('completed', 0)} rejected={record.get('rejected', 0)} "
            f"cut={how_many(record, 'cut')}"
        ),
    ]
    lines += _with_stacks(record.get("cut", ()), lambda each: f"cut: {_cut(each)}: {each['reason']}", "requests")
    lines += [background_line(each) for each in record.get("background", ())]
    lines += [unfinished_line(each) for each in record.get("unfinished", ())]
    if record.get("unaccepted"):
        lines.append(f"reset in the backlog: {record['unaccepted']} connections")
    lines += [f"policy {step_line(name, entry)}" for name, entry in record.get("policies", {}).items()]
    lines += [
        f"worker {each['slot']} (pid {each['pid']}): killed: {each['killed']}"
        for each in record.get("workers", ())
        if each.get("killed")
    ]
    return lines


def _cut(each: Fields) -> str:
    """A cut request in a few words."""
    worker = f" in worker {each['worker']}" if "worker" in each else ""
    return f"{each['method']} {each['path']} ({each['phase']} for {each['age']:.1f}s{worker}{_named(each)})"


def _named(entry: Fields) -> str:
    """The id of a request, if it has one."""
    return f", request_id={entry['request_id']}" if entry.get("request_id") else ""


def account_lines(fields: Fields) -> list[str]:
    """What a drain or stop lost, and each cleanup step that is not ok, for people, one on each line."""
    background, unfinished, policies = (fields.get(key) for key in ("background", "unfinished", "policies"))
    lines = [f"cut {_cut(each)}: {each['reason']}" for each in fields.get("cut") or ()]
    lines += map(background_line, background) if isinstance(background, list) else ()
    lines += map(unfinished_line, unfinished) if isinstance(unfinished, list) else ()
    if isinstance(policies, dict):
        lines += [step_line(name, entry) for name, entry in policies.items() if entry["fate"] != "ok"]
    return lines


def step_line(name: str, entry: Fields) -> str:
    """The result of a cleanup step, for people."""
    why = f", {printable(entry['why'], '?')}" if entry.get("why") else ""
    return f"{name}: {entry['fate']} in {format_duration(float(entry.get('took') or 0))}{why}"


def background_line(entry: Fields) -> str:
    """Work that was left running in the background, for people."""
    return f"background: {entry['name']} (for {entry['age']:.1f}s in {entry['thread']})"


def unfinished_line(entry: Fields) -> str:
    """Accepted work, or work left to the end of the process, that was cut, for people."""
    return f"not finished: {printable(entry['name'], '?')}"


def thread_line(entry: Fields) -> str:
    """A thread and the request that it serves, for people, or a line that stands in the place of threads."""
    if entry["id"] is None:
        return str(entry["name"])
    worker = f" of worker {entry['worker']}" if "worker" in entry else ""
    idle = "idle" if entry["name"].startswith("flaskd-thread-") else ""
    return f"{entry['name']} ({entry['id']}){worker} {entry['request'] or idle}".rstrip()


def request_line(entry: Fields) -> str:
    """A request in flight, for people."""
    where = f" in {entry['thread']}" if entry.get("thread") else ""
    where += f" {'of' if where else 'in'} worker {entry['worker']}" if "worker" in entry else ""
    return (
        f"{entry['id']}: {entry['method']} {entry['path']} from {entry['client']}, {entry['phase']} for "
        f"{format_duration(entry['age'])}{where}, {entry['sent']} bytes sent"
        + (", its client has gone" if entry.get("gone") else "")
        + _named(entry)
    )


def request_lines(entries: Iterable[Fields]) -> list[str]:
    """Requests in flight, for people: a line each, with their stacks if asked for; equal stacks are shown once."""
    return _with_stacks(entries, request_line, "requests")


def thread_lines(entries: Iterable[Fields]) -> list[str]:
    """Threads, for people: a line each, with their stacks if asked for; equal stacks are shown once."""
    return _with_stacks(entries, thread_line, "threads")


def _with_stacks(entries: Iterable[Fields], line: Callable[[Fields], str], what: str) -> list[str]:
    """A line for each entry; entries with equal stacks stand together, with their number, above the stack."""
    places: dict[object, tuple[str, list[str]]] = {}
    for number, each in enumerate(entries):
        place = folded(each.get("stack", ""))
        places.setdefault(place or number, (place, []))[1].append(line(each))
    shown = []
    for place, alike in places.values():
        together = len(alike) > 1
        shown += [f"{len(alike)} {what}:", *(f"  {each}" for each in alike)] if together else alike
        shown += _indented(place)
    return shown


def worker_lines(
    entries: Sequence[Fields],
    deaths: Iterable[Fields],
    *,
    wanted: int,
    recycled: Mapping[str, int] | None = None,
    trouble: str | None = None,
) -> list[str]:
    """Workers, for people: a table, how many were recycled, what is wrong with that, and the workers that died.

    `wanted` is the number of workers that there should be.
    """
    if not wanted:
        return ["there are no workers: the app runs in the daemon itself (server.workers is 0)"]
    head = ("slot", "pid", "generation", "state", "age", "in flight", "answered", "connections", "memory", "cpu")
    rows = [
        (
            *("" if each[key] is None else str(each[key]) for key in ("slot", "pid", "generation", "state")),
            format_duration(round(each["age"])),
            *(str(each[key]) for key in ("in_flight", "answered", "connections")),
            f"{each['memory'] >> 20} MiB" if each["memory"] else "?",
            f"{each['cpu']:.1f}s" if each["cpu"] is not None else "?",
        )
        for each in entries
    ]
    told = [line for each in deaths for line in (_death_line(each), *(f"    cut {_cut(cut)}" for cut in each["cut"]))]
    limits = [each for each in (recycled_words(recycled or {}), trouble) if each]
    there = table([head, *rows]) if rows else [f"no worker is there, of {wanted} that there are to be"]
    return [*there, *limits, *told]


def recycled_words(recycled: Mapping[str, int]) -> str:
    """How many workers were replaced because they had reached a limit; empty if none was."""
    kinds = ", ".join(f"{count} for {key}" for key, count in recycled.items() if count)
    return f"{sum(recycled.values())} recycled ({kinds})" if kinds else ""


def _death_line(death: Fields) -> str:
    what = f"died {death['time']}: worker {death['slot']} (pid {death['pid']}, generation {death['generation']})"
    return f"{what}: {death['how']}; it held {death['connections']} connections"


def _indented(stack: str) -> list[str]:
    return [f"    {line}" for line in stack.splitlines()]


def outcome(*words: str, fields: Fields, hint: str = "") -> str:
    """The outcome of a command in one line for people: words, values and a hint."""
    return " ".join(filter(None, [*words, as_text(fields), f"({hint})" if hint else ""]))


def status_lines(fields: Fields) -> list[str]:
    """The status as ``key: value`` lines; values that only programs need are left to JSON."""
    return [
        f"{key}: {_shown(value)}" for key, value in fields.items() if key != "tally" and value not in (None, "", [])
    ]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return format_duration(value)
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return as_text(value) if isinstance(value, Mapping) else str(value)


def as_text(fields: Fields) -> str:
    """``key=value`` pairs for a text reply: seconds as durations, a list of anything but text as its length.

    Empty values are left out, and nested values are left to JSON.
    """
    pairs = []
    for key, value in fields.items():
        if isinstance(value, list | tuple):
            shown = ",".join(value) if value and all(isinstance(each, str) for each in value) else str(len(value))
        elif isinstance(value, float):
            shown = format_duration(value)
        elif value is None or isinstance(value, dict):
            continue
        elif isinstance(value, bool):
            shown = "true" if value else "false"
        else:
            shown = str(value)
        pairs.append(f"{key}={shown}")
    return " ".join(pairs)
