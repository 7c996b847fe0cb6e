"""The unit files that come with flaskd: fills them in for an installation, and compares a unit with a configuration.

Their source is the directory ``systemd/`` of the repository, which the wheel has as ``flaskd/systemd/files/``.
"""

from __future__ import annotations

import re
from pathlib import Path

from flaskd.errors import CannotCreateError, ConfigError, UsageError
from flaskd.units import format_duration
from flaskd.values import value

_INSTANCE = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")
"""The allowed names of an instance: systemd would escape other characters (systemd.unit(5)), and ":" in
RuntimeDirectory= asks for a symlink (systemd.exec(5))."""
_EXIT = 1.0
"""Seconds past the deadline within which a stop ends, whatever happens."""
_HIDDEN = ("/home", "/root", "/run/user")
"""The directories that ProtectHome= hides (systemd.exec(5))."""
_DEFAULT_TIMEOUT = 90.0
"""The default of DefaultTimeoutStopSec= (systemd-system.conf(5)), in seconds."""
_UNITS = {
    "us": 1e-6, "usec": 1e-6, "µs": 1e-6, "ms": 1e-3, "msec": 1e-3,
    "": 1, "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hr": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
    "w": 604800, "week": 604800, "weeks": 604800,
    "M": 2629800, "month": 2629800, "months": 2629800, "y": 31557600, "year": 31557600, "years": 31557600,
}  # fmt: skip


def _source() -> Path:
    here = Path(__file__).parent
    return next(each for each in (here / "files", here.parents[1] / "systemd") if each.is_dir())


def unit_files(*, venv: Path, instance: str | None = None, socket_activated: bool = False) -> dict[Path, str]:
    """The files to install for flaskd in `venv`, by their path: hardened, and with a socket unit if that is wanted.

    `instance` fills in the template for one name. Raises UsageError for a name that no unit can have.
    """
    if re.search(r"[\s%$;\"'\\]", str(venv)):
        raise UsageError(f'cannot write units for "{venv}": expected a path without spaces, quotes, ";", "%" and "$"')
    unit = "flaskd"
    if instance is not None:
        if not _INSTANCE.fullmatch(instance):
            raise UsageError(f'cannot name a unit "flaskd@{instance}": expected letters, digits, "_", "." and "-"')
        unit = f"flaskd@{instance}"
    template = "flaskd" if instance is None else "flaskd@"
    units = Path("/etc/systemd/system")
    places = {units / f"{unit}.service": f"{template}.service"}
    if socket_activated:
        places[units / f"{unit}.socket"] = f"{template}.socket"
        places[units / f"{unit}.service.d/hardened.conf"] = "drop-ins/hardened.conf"
    places[Path("/etc/sysusers.d/flaskd.conf")] = "flaskd.sysusers.conf"
    places[Path("/etc/tmpfiles.d/flaskd.conf")] = "flaskd.tmpfiles.conf"
    source = _source()
    return {
        place: (source / name)
        .read_text(encoding="utf-8")
        .replace("/opt/flaskd/bin/", f"{venv}/bin/")
        .replace("%i", instance or "%i")
        for place, name in places.items()
    }


def hidden_by(venv: Path) -> str | None:
    """The directory that ProtectHome= hides and the virtual environment is in; None if services can read it."""
    return next((each for each in _HIDDEN if venv.is_relative_to(each)), None)


def install(files: dict[Path, str], root: Path) -> list[Path]:
    """Write the files below `root`, and return their paths; raises CannotCreateError.

    A symbolic link is not written through, because that of a masked unit leads to /dev/null (systemctl(1)).
    """
    written = []
    places = {root / place.relative_to("/"): text for place, text in files.items()}
    for path in places:
        if path.is_symlink():
            raise CannotCreateError(
                f"cannot write {path}: it is a link to {path.readlink()}; remove it first, "
                "or if the unit is masked: systemctl unmask"
            )
    for path, text in places.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            path.chmod(0o644)
        except OSError as error:
            raise CannotCreateError(f"cannot write {path}: {error.strerror}") from error
        written.append(path)
    return written


def left_over(files: dict[Path, str], root: Path) -> list[Path]:
    """Files of the socket-activated form below `root` that would still apply although `files` are the plain form."""
    service = next(place for place in files if place.suffix == ".service")
    others = (service.with_suffix(".socket"), service.with_name(f"{service.name}.d") / "hardened.conf")
    return [
        root / each.relative_to("/") for each in others if each not in files and (root / each.relative_to("/")).exists()
    ]


_PLACES = ("etc/systemd/system", "run/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system")
"""Where systemd looks for units and their drop-ins; earlier ones override later ones (systemd.unit(5))."""


def _directories(path: Path) -> list[Path]:
    """Where a unit and its drop-ins may be: beside the file, and in all of systemd's places if that is one of them."""
    here = path.absolute().parent
    for place in _PLACES:
        if here.as_posix().endswith(f"/{place}"):
            root = here.as_posix().removesuffix(place)
            return [Path(root, each) for each in _PLACES]
    return [here]


def _drop_ins(path: Path) -> list[Path]:
    """The drop-ins of a unit in the order in which they apply: sorted by file name, whatever directory they are in.

    Of two with the same name, that of the instance overrides that of the template, which overrides that of all
    services; after that, the one in /etc overrides the others (systemd.unit(5)).
    """
    stem, at, _ = path.stem.partition("@")
    names = dict.fromkeys([path.name, f"{stem}@{path.suffix}" if at else path.name])
    if not at:  # for a name with dashes also those of its prefixes
        parts = stem.split("-")
        names |= dict.fromkeys(f"{'-'.join(parts[:count])}-{path.suffix}" for count in range(len(parts) - 1, 0, -1))
    found: dict[str, Path] = {}
    for name in (*names, path.suffix.removeprefix(".")):
        for directory in _directories(path):
            for each in (directory / f"{name}.d").glob("*.conf"):
                found.setdefault(each.name, each)
    return [found[name] for name in sorted(found)]


def _fragment(path: Path) -> Path:
    """The file of a unit; an instance may have its template's file."""
    stem, at, _ = path.stem.partition("@")
    if at and not path.exists():
        template = f"{stem}@{path.suffix}"
        return next((each / template for each in _directories(path) if (each / template).exists()), path)
    return path


@value
class _Setting:
    value: str
    place: str


def _settings(path: Path) -> dict[str, _Setting]:
    """The last value of each key of [Service] in a unit and its drop-ins."""
    found: dict[str, _Setting] = {}
    try:
        for file in [_fragment(path), *_drop_ins(path)]:
            section, before = "", ""
            for number, raw in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                line = before + raw.strip()
                before = ""
                if line.startswith(("#", ";")):
                    continue
                if line.endswith("\\"):
                    before = line[:-1] + " "
                elif line.startswith("["):
                    section = line
                elif section == "[Service]" and "=" in line:
                    key, _, value = line.partition("=")
                    found.pop(key.strip(), None)  # so that the order is that of the last assignments
                    found[key.strip()] = _Setting(value.strip(), f"{file}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the unit {path}: {getattr(error, 'strerror', None) or error}") from error
    return found


def _seconds(setting: _Setting, key: str) -> float:
    """The seconds of a time span (systemd.time(7))."""
    text = setting.value
    if text in {"infinity", "0"}:  # 0 means infinity for timeouts of a service: systemd.service(5)
        return float("inf")
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([A-Za-zµ]*)\s*", text)
    known = re.fullmatch(r"(\d+(\.\d+)?\s*[A-Za-zµ]*\s*)+", text) and all(unit in _UNITS for _, unit in parts)
    if not known:
        raise ConfigError(f'{setting.place}: {key}: expected a time span such as 35 or 1min 30s, got "{text}"')
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def compare(path: Path, *, deadline: float, fdstore: bool, workers: bool = False) -> list[str]:
    """Messages about settings of a unit and a configuration (`deadline` in seconds) that do not fit together."""
    settings = _settings(path)
    faults = []
    timeout, place = _DEFAULT_TIMEOUT, str(path)
    for key, setting in settings.items():  # TimeoutSec= sets TimeoutStopSec=, too; the later one applies
        if key in {"TimeoutSec", "TimeoutStopSec"} and setting.value:
            timeout, place = _seconds(setting, key), setting.place
    needed = deadline + _EXIT
    if timeout < needed:
        faults.append(
            f"{place}: TimeoutStopSec={format_duration(timeout)} ends a stop before shutdown.deadline "
            f"({format_duration(deadline)}) does: set TimeoutStopSec={int(needed + 9.999)}, or a shutdown.deadline "
            f"of at most {format_duration(max(0.0, timeout - _EXIT))}"
        )
    store = settings.get("FileDescriptorStoreMax", _Setting("0", str(path)))
    if fdstore and store.value in {"", "0"}:
        faults.append(
            f"{store.place}: FileDescriptorStoreMax={store.value or 0} keeps nothing for systemd.fdstore: set "
            f"FileDescriptorStoreMax=16"
        )
    policy = settings.get("OOMPolicy", _Setting("", str(path)))
    if workers and policy.value in {"", "stop"}:
        faults.append(
            f"{policy.place}: OOMPolicy=stop, systemd's own default, stops all workers when the kernel kills one "
            "for want of memory: set OOMPolicy=continue"
        )
    return faults
