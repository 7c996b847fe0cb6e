"""``cache.persist``: the app's memory caches keep their entries over a restart.

It keeps the caches of cachelib's ``SimpleCache``, on which Flask-Caching's is based. Their entries are pickled values,
and are written as they are; restoring does not unpickle them, and each keeps its own expiry. The app unpickles an entry
when it reads it, so a file that another user could write would run that user's code in the app. Therefore the file is
signed, and nothing is restored if the HMAC is wrong.

A file is restored by only one successful start. If it were restored again, for example after a crash, entries that the
app has changed or deleted since would come back. A file that was restored has the epoch as its modification time: its
content stays whole, and setting the time works on a full disk, too.

With workers, each worker writes a file of its own when the service stops; a worker that is replaced writes none.

The format: a line that names the format, the HMAC-SHA256 of the rest, the length of the index (8 bytes, big-endian),
the index as JSON, and the values one after the other.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flaskd.cleanup.context import StepContext, StepFailedError
from flaskd.cleanup.model import Action
from flaskd.config import KEY_FILE, WORKER, Duration, Phase, Settings, Size
from flaskd.config.fields import SomeText
from flaskd.config.kind import checked
from flaskd.config.kinds import SecretText
from flaskd.config.settings import field
from flaskd.files import read_whole, write_once, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable

_FORMAT = b"flaskd cache 1\n"
_PURPOSE = b"flaskd cache.persist 1"
_MAC = hashlib.sha256().digest_size
_KEY_BYTES = 32
_SHORTEST_KEY = 16
_CLOCKS_DIFFER = 60.0
"""How many seconds in the future a file's time may be, because clocks are corrected."""
_Entry = tuple[str, float, bytes]
"""Key, moment of expiry (seconds since the epoch; 0: never), pickled value."""


def _long_enough(key: SecretText) -> SecretText:
    if len(key.get_secret_value()) < _SHORTEST_KEY:
        raise ValueError(f"expected at least {_SHORTEST_KEY} characters")
    return key


class PersistFields(Settings):
    """Fields of ``cache.persist``."""

    path: SomeText = field(
        "cache.bin",
        description="The file; relative to the state directory. {worker} in it is the worker's number, from 0.",
    )
    restore: bool = field(True, description="Whether a start fills the caches from the file, before READY.")
    key: Annotated[SecretText, checked(_long_enough)] | None = field(
        default=None,
        description="What the file is signed with; default: derived from the app's secret_key, else a file of our own.",
    )
    max_size: Size = field(
        default=64 * 1024**2, ge=4096, description="Largest file; the entries that expire first are left out."
    )
    max_age: Duration = field(86400.0, gt=0, description="A file that is older than this is not restored.")


def persist_cache(context: StepContext, fields: PersistFields) -> str:
    """Write those entries of the app's caches that have not expired; raises StepFailedError."""
    caches = _caches(context.app)
    if not caches:
        return "nothing to keep: no cache is in memory"
    path = _path(context.state, fields)
    kept, left_out = _fitting({name: _entries(name, cache) for name, cache in caches.items()}, fields.max_size)
    signature = _key(context.app, context.state, fields, make=True)
    try:
        if context.state is not None:
            context.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, _written(kept, _name(context.app), signature))
    except OSError as error:
        raise StepFailedError(f"cannot write {path}: {error.strerror}") from error
    count = sum(map(len, kept.values()))
    said = f"{count} {'entry' if count == 1 else 'entries'}"
    return f"{said}; {left_out} left out by max_size" if left_out else said


def restore_cache(app: Any, state: Path | None, fields: PersistFields) -> str:
    """Fill the app's caches from the file; raises StepFailedError if the file cannot be read or trusted.

    An entry that the app has already put there is newer, and stays. Returns what was done, empty if there is no file.
    """
    if not fields.restore:
        return ""
    path = _path(state, fields)
    try:
        content = read_whole(path, fields.max_size)
        kept = _read(content, _name(app), fields.max_age, _key(app, state, fields, make=False))
        _check_unused(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StepFailedError(f"cannot use {path}: {error.strerror}; starting empty") from error
    except ValueError as error:
        raise StepFailedError(f"refused {path}: {error}; starting empty") from error
    caches = _caches(app)
    count = sum(_fill(name, caches[name], entries) for name, entries in kept.items() if name in caches)
    return f"restored {count} {'entry' if count == 1 else 'entries'} from {path}"


def use_up_cache(state: Path | None, fields: PersistFields) -> None:
    """Mark the file as restored. Called once the start has succeeded: a start that fails leaves it to the next one.

    Raises StepFailedError if the file cannot be marked.
    """
    path = _path(state, fields)
    try:
        os.utime(path, ns=(0, 0))
    except OSError as error:
        raise StepFailedError(f"cannot note that {path} is restored: {error.strerror}; remove it") from error


def _path(state: Path | None, fields: PersistFields) -> Path:
    path = Path(fields.path.replace(WORKER, _slot()))
    if not path.is_absolute() and state is None:
        raise StepFailedError(f"cannot use {path}: no state directory is ours; give an absolute path")
    return path if state is None else state / path


def _slot() -> str:
    """The number of the worker that this process is; 0 without workers."""
    slot = os.environ.get("FLASKD_WORKER", "")
    return slot if re.fullmatch("[0-9]{1,9}", slot) else "0"


def _name(app: Any) -> str:
    return str(getattr(app, "import_name", ""))


# --- the app's caches -----------------------------------------------------------------------------------------------


def _caches(app: Any) -> dict[str, Any]:
    """The app's SimpleCache objects by names that are the same at the next start.

    Flask-Caching has them in ``app.extensions["cache"]``, a mapping of extension to backend in the order of
    ``init_app``; Flask-Session has one as ``client`` or ``cache`` of its session interface. Others are extensions
    themselves.
    """
    extensions: dict[str, Any] = getattr(app, "extensions", {})
    found: dict[str, Any] = {}
    for name, extension in extensions.items():
        if name == "cache" and isinstance(extension, dict):
            found |= {f"cache {number}": backend for number, backend in enumerate(extension.values())}
        else:
            found[f"extension {name}"] = extension
    interface = getattr(app, "session_interface", None)
    found |= {f"session {name}": getattr(interface, name, None) for name in ("client", "cache")}
    # flaskd never imports cachelib: an app that uses it has imported it.
    module = sys.modules.get("cachelib.simple")
    names = {id(cache): name for name, cache in found.items() if module and isinstance(cache, module.SimpleCache)}
    return {name: found[name] for name in names.values()}  # each once, even if several objects hold it


def _entries(name: str, cache: Any) -> list[_Entry]:
    """Copy the entries of a cache that have not expired; first check its private attributes (cachelib 0.17)."""
    lock, held = getattr(cache, "_lock", None), getattr(cache, "_cache", None)
    if not (hasattr(lock, "__enter__") and isinstance(held, dict)):
        raise StepFailedError(f"cannot keep {name}: this version of cachelib keeps its entries in another way")
    assert lock is not None
    with lock:
        copy = dict(held)
    entries = []
    for key, value in copy.items():
        match value:
            case (int() | float() as expires, bytes() as pickled) if isinstance(key, str):
                entries.append((key, expires, pickled))
            case _:
                raise StepFailedError(f"cannot keep {name}: an entry is not what cachelib's entries were")
    return [each for each in entries if _lives(each, time.time())]


def _lives(entry: _Entry, now: float) -> bool:
    return entry[1] == 0 or entry[1] > now


def _fill(name: str, cache: Any, entries: Iterable[_Entry]) -> int:
    """Put entries into a cache as cachelib would, but leave existing keys alone; returns how many were put in."""
    _entries(name, cache)  # raises if the cache has other attributes
    now, count = time.time(), 0
    with cache._lock:  # noqa: SLF001 - see _entries
        held = cache._cache  # noqa: SLF001
        for key, expires, pickled in entries:
            if len(held) >= getattr(cache, "_threshold", 500):
                break
            if key not in held and _lives((key, expires, pickled), now):
                held[key] = (expires, pickled)
                count += 1
    return count


# --- the file -------------------------------------------------------------------------------------------------------


def _fitting(caches: dict[str, list[_Entry]], size: int) -> tuple[dict[str, list[_Entry]], int]:
    """Choose entries that fit into `size` bytes, those with the latest expiry first, and count the others."""
    left = size - 2048 - sum(len(json.dumps(name)) + 8 for name in caches)
    kept: dict[str, list[_Entry]] = {name: [] for name in caches}
    left_out = 0
    every = [(name, entry) for name, entries in caches.items() for entry in entries]
    for name, entry in sorted(every, key=lambda each: each[1][1] or float("inf"), reverse=True):
        needed = len(entry[2]) + len(json.dumps([entry[0], entry[1], len(entry[2])])) + 2
        if needed <= left:
            left -= needed
            kept[name].append(entry)
        else:
            left_out += 1
    return kept, left_out


def _check_unused(path: Path) -> None:
    """Raise ValueError if the file was restored before, OSError if it could not be marked as restored."""
    found = path.stat()
    if found.st_mtime_ns == 0:
        raise ValueError("it was restored before, and what has changed since is not in it")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _written(caches: dict[str, list[_Entry]], app: str, signature: bytes) -> bytes:
    """The content of the file."""
    listed = {name: [[key, expires, len(value)] for key, expires, value in entries] for name, entries in caches.items()}
    index = json.dumps({"saved": time.time(), "app": app[:256], "caches": listed}).encode()
    values = b"".join(value for entries in caches.values() for _, _, value in entries)
    body = len(index).to_bytes(8, "big") + index + values
    return _FORMAT + _mac(body, signature) + body


def _read(content: bytes, app: str, max_age: float, signature: bytes) -> dict[str, list[_Entry]]:
    """The entries in what `_written` wrote; raises ValueError, which says why they are not used."""
    if not content.startswith(_FORMAT):
        raise ValueError("it is no cache file of this version")
    mac, body = content[len(_FORMAT) :][:_MAC], content[len(_FORMAT) + _MAC :]
    if not hmac.compare_digest(mac, _mac(body, signature)):
        raise ValueError("it was changed, is not whole, or was signed with another key")
    # The signature is right, so flaskd has written the rest itself.
    begin = 8 + int.from_bytes(body[:8], "big")
    index = json.loads(body[8:begin])
    if index["app"] != app[:256]:
        raise ValueError(f'it is of the app "{index["app"]}", and this is "{app[:256]}"')
    age = time.time() - index["saved"]
    if age > max_age:
        raise ValueError(f"it is {age:.0f}s old, and max_age is {max_age:.0f}s")
    if age < -_CLOCKS_DIFFER:
        raise ValueError(f"it is {-age:.0f}s from the future")
    caches: dict[str, list[_Entry]] = {}
    for name, listed in index["caches"].items():
        caches[name] = []
        for key, expires, length in listed:
            caches[name].append((key, expires, body[begin : begin + length]))
            begin += length
    return caches


def _mac(body: bytes, signature: bytes) -> bytes:
    return hmac.digest(signature, _FORMAT + body, "sha256")


# --- the key --------------------------------------------------------------------------------------------------------


def _key(app: Any, state: Path | None, fields: PersistFields, *, make: bool) -> bytes:
    """What the file is signed with; derived, so that the app's own secret signs nothing twice."""
    secret: str | bytes | None = fields.key.get_secret_value() if fields.key else getattr(app, "secret_key", None)
    if not secret:
        secret = _key_of_our_own(state, make=make)
    return hmac.digest(secret.encode() if isinstance(secret, str) else secret, _PURPOSE, "sha256")


def _key_of_our_own(state: Path | None, *, make: bool) -> bytes:
    """The random key in the state directory that only its owner may read; `make` makes it if there is none."""
    if state is None:
        raise StepFailedError("cannot sign the cache: no state directory is ours to keep a key in; give with.key")
    path = state / KEY_FILE
    try:
        if make and not path.exists():
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_once(path, secrets.token_bytes(_KEY_BYTES))  # several workers may make it at the same time
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise StepFailedError(f"cannot use the key {path}: expected a file of our own with mode 0600; remove it")
        key = read_whole(path, _KEY_BYTES)
    except FileNotFoundError:
        raise StepFailedError(f"cannot check the cache: there is no key {path}") from None
    except OSError as error:
        raise StepFailedError(f"cannot use the key {path}: {error.strerror}") from error
    if len(key) != _KEY_BYTES:
        raise StepFailedError(f"cannot use the key {path}: expected {_KEY_BYTES} bytes, got {len(key)}; remove it")
    return key


ACTIONS = (
    Action(
        "cache.persist",
        PersistFields,
        Phase.PERSIST,
        persist_cache,
        restore=restore_cache,
        use_up=use_up_cache,
        keeps="path",
        at_replacement=False,
        summary=(
            "Writes what the app's caches in memory (Flask-Caching, cachelib) hold to a file, and "
            "reads it at the next start."
        ),
    ),
)
