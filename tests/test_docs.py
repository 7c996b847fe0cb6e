"""The documents as a whole: each is in the index, every link leads to a file and a heading, the sdist has them all."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def without_code(text: str) -> str:
    """A page without its blocks of code, in which a # is no heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """What a page links to in the project: a path, an anchor, or both."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", without_code(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    """The file is there, and so is the heading."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_has_every_document() -> None:
    """docs/README.md links to each page of docs/ once, and README.md links to docs/README.md."""
    index = links(ROOT / "docs" / "README.md")
    docs = ROOT / "docs"
    here = sorted(page.relative_to(docs).as_posix() for page in docs.rglob("*.md") if page != docs / "README.md")
    assert sorted(link for link in index if not link.startswith("../")) == here
    assert "docs/README.md" in links(ROOT / "README.md")


def test_pictures_are_small_and_told_in_words() -> None:
    """Each picture of a page has a text for readers who do not see it, and is no larger than 150 kB; none is unused."""
    shown = set()
    for page in PAGES:
        for text, path in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text()):
            assert len(text) > 40, path
            shown.add((page.parent / path).resolve())
    assert shown == set((ROOT / "docs" / "images").glob("*.png"))
    assert [path.name for path in shown if path.stat().st_size > 150_000] == []


def test_the_sdist_has_what_its_tests_read() -> None:
    """Each file or directory at the top of the project that a test names is in it, and all that is listed is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = {name.removeprefix("/") for name in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert [name for name in include if not (ROOT / name).exists()] == []
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    read = set(re.findall(r'(?:ROOT|PROJECT|parent\.parent|parents\[\d\]) / "([^"/]+)', tests))
    assert {"benchmarks", ".ci"} < read
    top = {path.name for path in ROOT.iterdir()} - {"pyproject.toml"}  # hatchling puts that in by itself
    assert read & top <= include


def test_sentences_about_programs_have_a_program_as_their_subject() -> None:
    """No page says somebody, nobody, whoever or anybody where a client, a user or a process is meant."""
    for page in PAGES:
        assert re.findall(r"\b(?:some|no|any)body\b|\bwhoever\b", page.read_text(), re.IGNORECASE) == [], page
