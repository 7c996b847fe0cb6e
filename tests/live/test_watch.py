"""watch: true and --reload: flaskd notices edits of the configuration file, or of the app, by itself."""

import signal

import pytest
from daemon_kit import Flaskd
from http_client import get
from workers_kit import code, workers

ONE = "watch: true\nserver: {threads: 2}\n"
TWO = "watch: true\nserver: {threads: 3}\ncleanup: {policies: {bye: {use: command, with: {argv: [touch, two]}}}}\n"


def reloads(flaskd: Flaskd) -> int:
    """How many reloads are over, good or bad."""
    return flaskd.log.count(" reloaded ") + flaskd.log.count("reload failed: ")


def in_place(flaskd: Flaskd, text: str) -> None:
    flaskd.write("flaskd.yaml", text)


def renamed(flaskd: Flaskd, text: str) -> None:
    flaskd.write("flaskd.yaml.swp", text).replace(flaskd.directory / "flaskd.yaml")


def swapped(flaskd: Flaskd, text: str) -> None:
    """Update a mounted ConfigMap as the kubelet does: make a new directory, and exchange the ..data link."""
    number = str(len(list(flaskd.directory.glob("..20*"))))
    flaskd.write(f"..20{number}/flaskd.yaml", text)
    (flaskd.directory / "..data_tmp").symlink_to(f"..20{number}")
    (flaskd.directory / "..data_tmp").rename(flaskd.directory / "..data")
    if not (flaskd.directory / "flaskd.yaml").exists():
        (flaskd.directory / "flaskd.yaml").symlink_to("..data/flaskd.yaml")


@pytest.mark.parametrize("edit", [in_place, renamed, swapped])
def test_an_edit_is_picked_up(flaskd: Flaskd, edit) -> None:
    """Each edit gives one reload: good ones are applied, a bad one is reported once with its place."""
    edit(flaskd, ONE)
    flaskd.start()
    edit(flaskd, TWO)
    flaskd.until(lambda: reloads(flaskd) == 1)
    assert flaskd.status()["threads"] == 3
    assert "bye" in flaskd.command("plan")
    edit(flaskd, "watch: true\nserver: {threads: many}\n")
    flaskd.until(lambda: reloads(flaskd) == 2)
    assert "flaskd.yaml:2:19 server.threads: expected an integer" in flaskd.log
    assert flaskd.status()["last_reload"]["ok"] is False
    edit(flaskd, ONE)
    flaskd.until(lambda: reloads(flaskd) == 3)
    assert flaskd.status()["last_reload"]["ok"] is True
    assert flaskd.status()["threads"] == 2
    assert get(flaskd.url) == (200, b"hello")
    assert flaskd.stop() == 0
    assert flaskd.log.count("reload failed: ") == 1
    assert reloads(flaskd) == 3


@pytest.mark.parametrize("lose", ["truncate", "comment", "delete"])
def test_a_source_that_is_lost_changes_nothing(flaskd: Flaskd, lose: str) -> None:
    """An empty or deleted file is one failed reload; the watch goes on, and notices when the file is back."""
    in_place(flaskd, ONE)
    flaskd.start()
    if lose == "delete":
        (flaskd.directory / "flaskd.yaml").unlink()
    else:
        in_place(flaskd, "" if lose == "truncate" else "# watch: true\n")
    flaskd.until(lambda: reloads(flaskd) == 1)
    assert flaskd.log.count("reload failed: cannot re") == 1
    assert flaskd.status()["threads"] == 2
    in_place(flaskd, TWO)
    flaskd.until(lambda: reloads(flaskd) == 2)
    assert flaskd.status()["threads"] == 3
    assert flaskd.stop() == 0


def test_during_a_stop_nothing_changes(flaskd: Flaskd) -> None:
    """An edit during a stop is not read; the plan stays."""
    in_place(flaskd, TWO)
    flaskd.start()
    held = flaskd.hold()
    flaskd.kill(signal.SIGTERM)
    flaskd.wait_message("STOPPING=1")
    in_place(flaskd, "[")
    # Longer than the watch needs for an edit: it reports progress every second.
    for _ in range(3):
        flaskd.wait_message("stopping: 1 in flight")
    assert reloads(flaskd) == 0
    flaskd.gate.open()
    assert held.result() == (200, b"held")
    assert flaskd.wait() == 0
    assert (flaskd.directory / "two").exists()
    assert "has changed" not in flaskd.log


def test_an_edit_while_drained_waits_for_resume(flaskd: Flaskd) -> None:
    """A drained flaskd does not reload; after a resume the edit is applied."""
    in_place(flaskd, ONE)
    flaskd.start()
    flaskd.command("drain wait")
    in_place(flaskd, TWO)
    assert flaskd.command("reload") == "ERR not-now cannot reload: flaskd is drained\n"
    assert flaskd.command("resume").startswith("OK ready")
    flaskd.until(lambda: reloads(flaskd) == 1)
    assert flaskd.status()["threads"] == 3
    assert flaskd.stop() == 0


def test_a_watch_begins_and_ends_with_a_reload(flaskd: Flaskd) -> None:
    """Without watch: true only `reload` applies an edit; with it, `reload` and the watch apply it once."""
    path = flaskd.write("flaskd.yaml", "server: {threads: 2}\n")
    flaskd.start()
    in_place(flaskd, TWO)
    assert flaskd.client("reload")[:2] == (0, f"reloaded config={path}\n")
    assert flaskd.status()["threads"] == 3
    in_place(flaskd, ONE)
    flaskd.until(lambda: reloads(flaskd) == 2)
    in_place(flaskd, "server: {threads: 5}\n")
    flaskd.until(lambda: reloads(flaskd) == 3)
    in_place(flaskd, TWO)
    assert flaskd.command("reload").startswith("OK reloaded")
    in_place(flaskd, ONE)
    flaskd.until(lambda: flaskd.status()["threads"] == 2)
    assert flaskd.stop() == 0
    assert reloads(flaskd) == 5  # the fourth was asked for; the watch did not repeat it


def test_a_saved_file_of_the_app_brings_new_code(flaskd: Flaskd) -> None:
    """With --reload a saved file brings a new worker; failing code leaves the old one, with a traceback in the terminal."""
    flaskd.write("prices.py", "")
    code(flaskd, "one", "import prices\n")
    flaskd.start("--reload", app="shop:app")
    (before,) = workers(flaskd)
    url = flaskd.url
    assert get(url) == (200, b"one")
    code(flaskd, "two", "import prices\n")
    flaskd.until(lambda: get(url) == (200, b"two"))
    flaskd.write("prices.py", "import taxes\n")
    flaskd.write("taxes.py", "raise LookupError('no taxes')\n")
    flaskd.until(lambda: "LookupError: no taxes" in flaskd.log)
    flaskd.until(lambda: reloads(flaskd) >= 2)
    assert 'taxes.py", line 1, in <module>' in flaskd.log
    assert get(url) == (200, b"two")
    code(flaskd, "three", "import prices\n")
    flaskd.write("taxes.py", "")
    flaskd.until(lambda: get(url) == (200, b"three"))
    assert before not in workers(flaskd)
    assert flaskd.stop() == 0
