"""The screens in the documents: blocks of code marked `console`, whose commands are typed, and answer what is shown.

A screen shows a real run. What differs from run to run (times, pids, sizes in memory, the width of a column) may differ
here, too; `...` is any text within a line, and as a line of its own any lines.
"""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"

_DIFFERS = [
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "MOMENT"),
    (r"\[\d\d/\w{3}/\d{4}:[\d:]+ [+-]\d{4}\]", "MOMENT"),
    (r"(?<![\w.])(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+(?!\w)", "TIME"),
    (r"(?<=\bpid)([ =])(?:\d+|\.{3})", r"\1PID"),
    (r"\b[\d.]+(?= answers a second)", "RATE"),
    (r"\b[\d.]+(?=/s\b)", "RATE"),
    (r"\b\d+ MiB", "SIZE"),
    (r"\bflaskd-thread-(?:\d+|\.{3})", "THREAD"),
    (r"(?<=, line )\d+", "LINE"),
    (r"\b(\d+) frames of .*", "FRAMES"),
    (r"^(\s*)(?:\d+|\.{3})(?=: [A-Z]+ /)", r"\1ID"),
    (r"(?<=plan )[0-9a-f]{12}\b", "PLAN"),
    (r" {2,}", "  "),
    (r"(?<=  )\d{3,}(?=  )", "PID"),
]  # fmt: skip


def masked(text: str) -> str:
    """Text in which a word stands for what differs from run to run."""
    for pattern, word in _DIFFERS:
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return text


def screens(page: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """The screens of a page: what stands behind `console`, and each command with what it answers."""
    blocks = re.findall(r"^```console ?([^\n]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)) for kind, block in blocks]


def pattern(expected: str) -> str:
    """What an answer has to match in which the same is masked."""
    lines = [".*".join(re.escape(part) for part in line.split("...")) for line in masked(expected).splitlines()]
    return "".join("(?:.*\n)*" if line == ".*" else f"{line}\n" for line in lines)


def check(command: str, answer: str, expected: str) -> None:
    """Compare what a command answered with what the page shows."""
    assert re.fullmatch(pattern(expected), masked(answer)), f"$ {command}\n{answer}\ninstead of\n{expected}"


def frames(sent: str) -> list[str]:
    """The lines that a terminal has shown, one after the other, without colours: those that were drawn over, too."""
    plain = re.sub(r"\x1b\[[\d;?]*[mhlH]", "", sent)
    return [line.rstrip() for line in re.split(r"[\r\n]+(?:\x1b\[K)?|\x1b\[K", plain) if line.strip()]


def check_frames(command: str, sent: str, expected: str) -> None:
    """Compare what a command drew on a terminal: each line that the page shows was there, in this order."""
    shown = iter(frames(sent))
    for line in filter(str.strip, expected.splitlines()):
        wanted = re.compile(pattern(line).removesuffix("\n"))
        found = line == "..." or any(wanted.fullmatch(masked(each)) for each in shown)
        assert found, f"$ {command}\nno {line}\nin its place in\n" + "\n".join(frames(sent))
