import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cachelib import FileSystemCache
from cachelib import SimpleCache as CachelibCache
from cleanup_kit import run
from flask import Flask
from flask_caching import Cache
from patience import PATIENCE

from flaskd.cleanup import ACTIONS, Fate, Step, StepFailedError, action_specs, build_plan
from flaskd.cleanup.actions.cache import PersistFields, restore_cache, use_up_cache
from flaskd.config import load_mapping
from flaskd.config.kinds import SecretText
from flaskd.errors import ConfigError

SECRET = "a secret of the app"


def app_of(secret=SECRET, name="shop", kind="SimpleCache", **config):
    """Give an app and its cache."""
    app = Flask(name)
    app.secret_key = secret
    cache = Cache(app, config={"CACHE_TYPE": kind, "CACHE_NO_NULL_WARNING": True} | config)
    return app, app.extensions["cache"][cache]


def there(cache, keys=("short", "long", "ever")):
    """Those of the keys that have a living entry."""
    return [key for key in keys if cache.has(key)]


def persist(app, state, **fields):
    """Run the action and give its result."""
    action = ACTIONS["cache.persist"]
    step = Step("keep", action, action.fields(**fields), action.default_phase, timeout=PATIENCE)
    return run(step, app=app, state=state)["keep"]


def restore(app, state, **fields):
    return restore_cache(app, state, PersistFields(**fields))


@pytest.fixture
def kept(tmp_path):
    """Give the file of a cache with three entries."""
    app, cache = app_of()
    cache.set("short", [1, 2], timeout=100)
    cache.set("long", {"a": "b"}, timeout=1000)
    cache.set("ever", "x", timeout=0)
    assert (persist(app, tmp_path).fate, persist(app, tmp_path).detail) == (Fate.OK, "3 entries")
    return tmp_path / "cache.bin"


def test_entries_come_back_with_their_own_expiry(kept, monkeypatch):
    """Keys, values and expiry are restored, and no other user may read the file."""
    app, cache = app_of()
    assert restore(app, kept.parent) == f"restored 3 entries from {kept}"
    assert (cache.get("short"), cache.get("long"), cache.get("ever")) == ([1, 2], {"a": "b"}, "x")
    every = ["short", "long", "ever"]
    for seconds, left in ((90, every), (101, every[1:]), (990, every[1:]), (1001, every[2:]), (10**9, every[2:])):
        monkeypatch.setattr("cachelib.simple.time", lambda seconds=seconds: time.time() + seconds)
        assert there(cache) == left
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert {each.name for each in kept.parent.iterdir()} == {"cache.bin"}


def test_nothing_is_unpickled(kept, monkeypatch):
    """Neither keeping nor restoring unpickles a value."""

    def never(*_args):
        raise AssertionError("unpickled")

    monkeypatch.setattr(CachelibCache.serializer, "loads", never)
    app, cache = app_of()
    restore(app, kept.parent)
    persist(app, kept.parent)
    assert there(cache) == ["short", "long", "ever"]


def test_what_has_expired_stays_away(tmp_path, monkeypatch):
    """An expired entry is neither kept nor restored."""
    app, cache = app_of()
    cache.set("gone", 1, timeout=10)
    cache.set("soon", 1, timeout=100)
    cache.set("here", 1, timeout=1000)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 50)
    assert persist(app, tmp_path).detail == "2 entries"
    monkeypatch.setattr(time, "time", lambda: real() + 500)
    app, cache = app_of()
    assert restore(app, tmp_path).startswith("restored 1 entry ")
    assert there(cache, ("gone", "soon", "here")) == ["here"]


def test_what_the_app_has_put_there_is_newer(kept):
    """An entry that the app made while it was loaded is not overwritten, and the cache's threshold is kept."""
    app, cache = app_of(CACHE_THRESHOLD=2)
    cache.set("ever", "new")
    assert restore(app, kept.parent).startswith("restored 1 entry ")
    assert cache.get("ever") == "new"


def test_a_file_is_restored_once(kept):
    """A file is restored by only one successful start, and its content is not changed."""
    content = kept.read_bytes()
    restore(app_of()[0], kept.parent)
    assert restore(app_of()[0], kept.parent).startswith("restored 3 entries")  # that start has not succeeded
    use_up_cache(kept.parent, PersistFields())
    app, cache = app_of()
    with pytest.raises(StepFailedError, match="it was restored before"):
        restore(app, kept.parent)
    assert there(cache) == []
    assert kept.read_bytes() == content
    persist(app, kept.parent)
    assert restore(app_of()[0], kept.parent).startswith("restored 0 entries")


def test_a_file_that_goes_away_is_told(kept):
    """If the file cannot be marked as restored, the error says so and what to do."""
    restore(app_of()[0], kept.parent)
    kept.unlink()
    with pytest.raises(StepFailedError, match=f"^cannot note that {kept} is restored: No such file .*; remove it$"):
        use_up_cache(kept.parent, PersistFields())


def damaged(content):
    """Give each way in which a file can be damaged."""
    yield "nothing", b""
    yield "half", content[: len(content) // 2]
    yield "one byte less", content[:-1]
    yield "one byte more", content + b"x"
    for place in (0, 20, 60, len(content) - 1):
        yield f"byte {place}", content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    yield "foreign", b"\x80\x04]\x94."
    yield "large", content + b"x" * 70_000


def test_a_file_that_is_not_ours_is_refused(kept):
    """A file that was changed, truncated or is of another kind is refused by name, and the cache stays empty."""
    app, cache = app_of()
    for what, content in damaged(kept.read_bytes()):
        kept.write_bytes(content)
        with pytest.raises(StepFailedError, match=f"^refused {kept}: it .*; starting empty$"):
            restore(app, kept.parent, max_size=64_000)
        assert there(cache) == [], what


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        ({"secret": "another secret"}, {}, "signed with another key"),
        ({}, {"key": SecretText("sixteen letters!")}, "signed with another key"),
        ({"name": "store"}, {}, 'it is of the app "shop", and this is "store"'),
    ],
)
def test_a_foreign_file_is_refused(kept, change, fields, words):
    """A file that was signed with another key, or by another app with the same key, is refused."""
    with pytest.raises(StepFailedError, match=words):
        restore(app_of(**change)[0], kept.parent, **fields)


@pytest.mark.parametrize(("seconds", "words"), [(3601, "old, and max_age is 3600s"), (-3600, "from the future")])
def test_an_old_file_is_refused(kept, monkeypatch, seconds, words):
    """A file older than max_age, or from the future, is refused."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)
    with pytest.raises(StepFailedError, match=words):
        restore(app_of()[0], kept.parent, max_age=3600.0)


def test_what_is_no_file_is_refused(tmp_path):
    """A FIFO or a directory in place of the file does not block the start; a missing file is not reported."""
    app, _ = app_of()
    assert restore(app, tmp_path) == ""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StepFailedError, match="not a regular file"):
        restore(app, tmp_path, path="fifo")
    with pytest.raises(StepFailedError, match="Is a directory"):
        restore(app, tmp_path, path=str(tmp_path))


def test_restore_can_be_declined(kept):
    """With restore: false the file is not touched."""
    app, cache = app_of()
    assert restore(app, kept.parent, restore=False) == ""
    assert there(cache) == []


def test_the_size_is_bounded(tmp_path):
    """The file is never larger than max_size; entries that expire last are kept, and the others are counted."""
    app, cache = app_of()
    for number in range(200):
        cache.set(f"key {number}", "x" * 100, timeout=1000 + number)
    result = persist(app, tmp_path, max_size=16 * 1024)
    assert (tmp_path / "cache.bin").stat().st_size <= 16 * 1024
    app, cache = app_of()
    restore(app, tmp_path, max_size=16 * 1024)
    keys = [f"key {number}" for number in range(200)]
    count = len(there(cache, keys))
    assert 50 < count < 200
    assert result.detail == f"{count} entries; {200 - count} left out by max_size"
    assert there(cache, keys) == keys[200 - count :]


def test_without_a_secret_a_key_is_made(tmp_path):
    """Without secret_key and `key` a random key is made in the state directory, which no other user can read."""
    app, cache = app_of(secret=None)
    cache.set("a", 1)
    assert persist(app, tmp_path).fate is Fate.OK
    key = tmp_path / "cache.key"
    assert (stat.S_IMODE(key.stat().st_mode), key.stat().st_size) == (0o600, 32)
    app, cache = app_of(secret=None)
    assert restore(app, tmp_path).startswith("restored 1 ")
    before = key.read_bytes()
    persist(app, tmp_path)
    assert key.read_bytes() == before


@pytest.mark.parametrize("how", ["open to all", "short", "a link", "gone"])
def test_a_key_that_others_may_know_is_refused(tmp_path, how):
    """Nothing is restored with a key file that others can read, that has another length, is a link, or is missing."""
    app, cache = app_of(secret=None)
    cache.set("a", 1)
    persist(app, tmp_path)
    key = tmp_path / "cache.key"
    if how == "open to all":
        key.chmod(0o644)
    elif how == "short":
        key.write_bytes(b"x")
    else:
        key.rename(tmp_path / "other")
        if how == "a link":
            key.symlink_to("other")
    with pytest.raises(StepFailedError, match=f"{key}"):
        restore(app_of(secret=None)[0], tmp_path)
    assert (persist(app, tmp_path).fate is Fate.OK) == (how == "gone")


def test_a_configured_key_is_never_shown():
    """`flaskd config` never shows `key`; a short one is a fault."""
    specs = action_specs()
    policy = {"use": "cache.persist", "with": {"key": "sixteen letters!"}}
    shown = load_mapping({"cleanup": {"policies": {"a": policy}}}, actions=specs)
    assert "sixteen" not in shown.describe()
    assert build_plan(shown.values.cleanup).steps[0].fields.key.get_secret_value() == "sixteen letters!"
    with pytest.raises(ConfigError, match=r"cleanup.policies.a.with.key: expected at least 16 characters"):
        load_mapping({"cleanup": {"policies": {"a": {**policy, "with": {"key": 123}}}}}, actions=specs)


def test_each_worker_keeps_a_file_of_its_own(tmp_path, monkeypatch):
    """{worker} in the path is the worker's number from the environment; without workers it is 0."""
    monkeypatch.delenv("FLASKD_WORKER", raising=False)
    for slot, name in ((None, "cache-0"), ("3", "cache-3"), ("11", "cache-11"), ("../x", "cache-0")):
        if slot is not None:
            monkeypatch.setenv("FLASKD_WORKER", slot)
        app, cache = app_of()
        cache.set("ever", name, timeout=0)
        assert persist(app, tmp_path, path="cache-{worker}").fate is Fate.OK
        app, cache = app_of()
        restore(app, tmp_path, path="cache-{worker}")
        assert cache.get("ever") == name
        use_up_cache(tmp_path, PersistFields(path="cache-{worker}"))
        assert (tmp_path / name).stat().st_mtime == 0
    assert {each.name for each in tmp_path.iterdir()} == {"cache-0", "cache-3", "cache-11"}


def test_workers_that_need_a_key_at_the_same_time_have_the_same(tmp_path, monkeypatch):
    """Workers that need a key at the same time all use the first one that is written."""
    app, cache = app_of(secret=None)
    cache.set("ever", 1, timeout=0)

    def exists(_path):
        monkeypatch.undo()
        assert persist(app, tmp_path, path="first").fate is Fate.OK  # another worker makes the key at this moment
        return False

    monkeypatch.setattr(Path, "exists", exists)
    assert persist(app, tmp_path, path="second").fate is Fate.OK
    for path in ("first", "second"):
        assert restore(app_of(secret=None)[0], tmp_path, path=path).startswith("restored 1 entry")
    assert {each.name for each in tmp_path.iterdir()} == {"first", "second", "cache.key"}
    assert stat.S_IMODE((tmp_path / "cache.key").stat().st_mode) == 0o600


def test_a_key_is_made_where_files_have_no_links(tmp_path, monkeypatch):
    """The key is also made on a file system without hard links."""

    def refuse(*_args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    app, cache = app_of(secret=None)
    cache.set("ever", 1, timeout=0)
    assert persist(app, tmp_path).fate is Fate.OK
    assert restore(app_of(secret=None)[0], tmp_path).startswith("restored 1 entry")
    assert {each.name for each in tmp_path.iterdir()} == {"cache.bin", "cache.key"}


def test_other_caches_keep_themselves(tmp_path):
    """With caches that are not in memory, and without a cache, there is nothing to do."""
    for app in (None, Flask("bare"), app_of(kind="NullCache")[0]):
        result = persist(app, tmp_path)
        assert (result.fate, result.detail) == (Fate.OK, "nothing to keep: no cache is in memory")
    assert list(tmp_path.iterdir()) == []


def test_caches_without_flask_caching_are_found(tmp_path):
    """A cachelib cache is found as an extension, and in a session interface; caches in files are left alone."""
    app = SimpleNamespace(import_name="x", secret_key="s" * 16, extensions={"mine": CachelibCache()})
    app.session_interface = SimpleNamespace(client=CachelibCache())
    app.extensions["files"] = FileSystemCache(str(tmp_path / "files"))
    app.extensions["mine"].set("a", 1)
    app.session_interface.client.set("a", 2)
    assert persist(app, tmp_path).detail == "2 entries"
    app.extensions["mine"], app.session_interface.client = CachelibCache(), CachelibCache()
    restore(app, tmp_path)
    assert (app.extensions["mine"].get("a"), app.session_interface.client.get("a")) == (1, 2)


class ChangedCache(CachelibCache):
    """A cache of a cachelib that keeps its entries in another form or place."""

    def __init__(self, entries):
        super().__init__()
        self._cache = entries
        if entries is None:
            del self._cache


def test_the_private_shape_is_tested_first(kept):
    """If cachelib has changed inside, the step fails with the cache's name, and the previous file stays."""
    content = kept.read_bytes()
    app, _ = app_of()
    [name] = app.extensions["cache"]
    app.extensions["cache"][name] = ChangedCache({"odd": "neither"})
    result = persist(app, kept.parent)
    assert (result.fate, result.why) == (
        Fate.FAILED, "cannot keep cache 0: an entry is not what cachelib's entries were",
    )  # fmt: skip
    app.extensions["cache"][name] = ChangedCache(None)
    for use in (lambda: persist(app, kept.parent).why, lambda: restore(app, kept.parent)):
        try:
            why = use()
        except StepFailedError as error:
            why = str(error)
        assert "this version of cachelib keeps its entries in another way" in why
    assert kept.read_bytes() == content


def test_without_a_state_directory_of_our_own(kept, tmp_path):
    """While another flaskd uses the state directory, only a file with an absolute path can be kept."""
    app, _ = app_of()
    assert persist(app, None).why == "cannot use cache.bin: no state directory is ours; give an absolute path"
    with pytest.raises(StepFailedError, match="no state directory is ours"):
        restore(app, None)
    assert persist(app, None, path=str(tmp_path / "mine")).fate is Fate.OK
    assert "no state directory is ours to keep a key in" in persist(app_of(secret=None)[0], None, path="/x").why


def test_a_directory_that_cannot_be_written_to(tmp_path):
    """If the directory cannot be written, the failure says what and why."""
    app, _ = app_of()
    (tmp_path / "file").touch()
    result = persist(app, tmp_path / "file")
    assert result.why == f"cannot write {tmp_path / 'file' / 'cache.bin'}: File exists"
    result = persist(app, tmp_path, path="none/cache.bin")
    assert result.why == f"cannot write {tmp_path / 'none' / 'cache.bin'}: No such file or directory"
