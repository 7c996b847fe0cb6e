"""Installs packages with entry points into a directory, as from a wheel, without a network or a build."""

import shutil
import tomllib
from pathlib import Path

EXAMPLE = Path(__file__).parent / "example_action"


def install_example(target: Path) -> Path:
    """Install the example package into a directory to be put on sys.path."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    target.mkdir(exist_ok=True)
    shutil.copy(EXAMPLE / "flaskd_receipts.py", target)
    return install(target, project["name"], project["entry-points"]["flaskd.cleanup"], project["version"])


def install(target: Path, name: str, entry_points: dict[str, str], version: str = "1.0") -> Path:
    """Write the metadata of a package that brings these actions (packaging.python.org, "Recording installed projects")."""
    metadata = target / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in entry_points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[flaskd.cleanup]", *lines, ""]))
    return target
