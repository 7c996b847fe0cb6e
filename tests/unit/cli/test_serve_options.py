"""The options of ``flaskd serve`` become values that win over the file, also at a reload."""

from types import SimpleNamespace

import pytest

from flaskd import boot, cli
from flaskd.errors import UsageError
from flaskd.process import exit as exit_
from flaskd.process import pid1


@pytest.fixture
def readers(monkeypatch, tmp_path):
    """Runs no daemon; gives the functions that read the configuration of each daemon that would run."""
    made = []

    class Boot:
        def __init__(self, load, **_more):
            made.append(load)
            self.daemon = SimpleNamespace(reload=SimpleNamespace())

        def run(self, *, last):
            assert last
            return 0

    def leave(code, _ending):
        raise SystemExit(code)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(boot, "Boot", Boot)
    monkeypatch.setattr(pid1, "stand_in_front", lambda: None)
    monkeypatch.setattr(exit_, "leave", leave)
    return made


@pytest.mark.parametrize(("option", "workers"), [("-w", 3), ("--workers", "auto"), ("-w", 0)])
def test_workers_of_the_command_line_win(readers, tmp_path, option, workers):
    """--workers wins over the file at the start and at a reload."""
    file = tmp_path / "flaskd.yaml"
    file.write_text("server: {workers: 2, threads: 7}\n")
    with pytest.raises(SystemExit):
        cli.cli(["serve", "shop:app", option, str(workers)], standalone_mode=False)
    (load,) = readers
    assert load().values.server.workers == workers
    file.write_text("server: {workers: 5}\n")
    assert load().values.server.workers == workers


def test_without_the_option_the_file_says_how_many_workers(readers, tmp_path):
    """Without --workers the file's number is used."""
    (tmp_path / "flaskd.yaml").write_text("server: {workers: 2}\n")
    with pytest.raises(SystemExit):
        cli.cli(["serve", "shop:app"], standalone_mode=False)
    assert readers[0]().values.server.workers == 2


@pytest.mark.parametrize(("words", "workers"), [((), 1), (("-w", "0"), 1), (("-w", "3"), 3)])
def test_reload_has_a_worker_at_least(readers, words, workers):
    """With --reload there is at least one worker, or as many as asked for."""
    with pytest.raises(SystemExit):
        cli.cli(["serve", "shop:app", "--reload", *words], standalone_mode=False)
    assert readers[0]().values.server.workers == workers


def test_reload_is_for_development(readers, tmp_path):
    """--reload under profile: production is a usage fault, which names the alternative."""
    (tmp_path / "flaskd.yaml").write_text("profile: production\n")
    with pytest.raises(SystemExit):
        cli.cli(["serve", "shop:app", "--reload"], standalone_mode=False)
    with pytest.raises(UsageError, match="profile: production; there, flaskd reload brings new code"):
        readers[0]()
