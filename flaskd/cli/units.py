"""``flaskd units``: prints or installs the unit files, filled in for this installation."""

from __future__ import annotations

from pathlib import Path

import click

from flaskd.cli import show


@click.command(short_help="Print or install the systemd units.")
@click.option("--instance", metavar="NAME", help="For flaskd@NAME, one of several on this machine.")
@click.option(
    "--venv", metavar="PATH", help="The virtual environment that the units use; default: the one that runs this."
)
@click.option(
    "--socket-activated", is_flag=True, help="With a .socket unit, and hardened: no network but the listener."
)
@click.option(
    "--install", "root", metavar="ROOT", help="Write them below ROOT (/ for this system); default: print them."
)
def units(instance: str | None, venv: str | None, socket_activated: bool, root: str | None) -> None:
    """Print the systemd units, filled in for this installation, or install them."""
    import sysconfig  # noqa: PLC0415 - verbs that talk to a daemon need neither import

    from flaskd.systemd.unitfiles import hidden_by, install, left_over, unit_files  # noqa: PLC0415

    place = Path(venv).absolute() if venv else Path(sysconfig.get_path("scripts")).parent
    files = unit_files(venv=place, instance=instance, socket_activated=socket_activated)
    if hidden := hidden_by(place):
        click.echo(f"flaskd: the units cannot run {place}: ProtectHome= hides {hidden}; install in /opt, say", err=True)
    if not (place / "bin/flaskd").exists():
        click.echo(f"flaskd: there is no {place}/bin/flaskd, which the units run; install flaskd there", err=True)
    if root is not None:
        for path in install(files, Path(root)):
            show.say(str(path))
        if left := left_over(files, Path(root)):
            click.echo(
                f"flaskd: left from --socket-activated, and still in force: {', '.join(map(str, left))}; "
                "stop the socket and remove them, or install with --socket-activated",
                err=True,
            )
        return
    show.say("\n".join(f"# {path}\n{text}" for path, text in files.items()).removesuffix("\n"))
