"""Finding the app: Flask's own grammar through Flask's own loader, and any other WSGI callable too."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from flaskd.errors import AppError, ConfigError
from flaskd.forks import AppCode

if TYPE_CHECKING:
    from flask import Flask

WSGIApp = Callable[..., Any]

_MAX_WRAPPERS = 32
"""How deep a Flask app is looked for inside middleware."""


@dataclass(frozen=True)
class LoadedApp:
    """What is served, the Flask app inside it if there is one, and what it was asked for as."""

    wsgi: WSGIApp
    flask: Flask | None
    target: str


def choose_target(configured: str | None, environ: Mapping[str, str], directory: Path) -> str:
    """The app to load: what was asked for, else ``FLASK_APP``, else ``wsgi.py`` or ``app.py``; ConfigError if none."""
    if target := configured or environ.get("FLASK_APP"):
        return target
    for name in ("wsgi.py", "app.py"):
        if (directory / name).is_file():
            return name
    raise ConfigError(
        f"cannot find an app: none was named, FLASK_APP is not set, and there is no wsgi.py or app.py in {directory}; "
        'try "flaskd serve MODULE:APP"'
    )


def load_app(target: str) -> LoadedApp:
    """Import the app named by `target` (``module``, ``module:name``, ``module:create_app("x")`` or a file).

    The working directory is on ``sys.path``. Raises ConfigError for a module or attribute that is not there, AppError
    for app code that raises; SystemExit raised by a module counts as that, KeyboardInterrupt is passed on.
    """
    # flask.cli has click in it, and both take their time: imported by those who serve, not by client verbs.
    from flask.cli import NoAppException, find_best_app, prepare_import  # noqa: PLC0415

    os.environ["FLASK_RUN_FROM_CLI"] = "true"  # a stray app.run() does nothing: flask.Flask.run
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    path, name = _split(target)
    module = _import(prepare_import(path), target)
    recording = _Recording(module)
    try:
        with AppCode():
            found = recording.find(name) if name else _wrapped_app(module) or find_best_app(module)
    except NoAppException as error:
        found = recording.returned if name else _wsgi_by_name(module)
        if found is None:
            raise ConfigError(f"cannot load {target}: {_sentence(error)}") from None
    except Exception as error:
        raise _app_error(target, error) from error
    except SystemExit as error:
        raise _app_error(target, error) from error
    return LoadedApp(found, find_flask(found), target)


def make_app(make: Callable[[], WSGIApp]) -> WSGIApp:
    """The app that Flask's own command line makes (``FlaskGroup(create_app=…)``); raises as `load_app` does."""
    from flask.cli import NoAppException  # noqa: PLC0415 - see load_app

    target = getattr(make, "__qualname__", "the app")
    try:
        with AppCode():
            return make()
    except NoAppException as error:
        raise ConfigError(f"cannot load {target}: {_sentence(error)}") from None
    except Exception as error:
        raise _app_error(target, error) from error
    except SystemExit as error:
        raise _app_error(target, error) from error


def find_flask(wsgi: Any) -> Flask | None:
    """The Flask app in a WSGI callable: itself, or what its middleware holds as ``.app`` or ``.wsgi_app``."""
    from flask import Flask  # noqa: PLC0415 - see load_app

    for _ in range(_MAX_WRAPPERS):
        if isinstance(wsgi, Flask):
            return wsgi
        owner = getattr(wsgi, "__self__", None)  # ``app.wsgi_app`` is a bound method of the app
        following = owner if isinstance(owner, Flask) else getattr(wsgi, "app", None) or getattr(wsgi, "wsgi_app", None)
        if following is None:
            return None
        wsgi = following
    return None


def _split(target: str) -> tuple[str, str]:
    parts = re.split(r":(?![\\/])", target, maxsplit=1)  # as flask.cli.ScriptInfo.load_app
    return parts[0], parts[1] if len(parts) > 1 else ""


def _import(name: str, target: str) -> ModuleType:
    try:
        with AppCode():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise ConfigError(
                f'cannot load {target}: there is no module "{missing}" in {Path.cwd()} or on the Python path; '
                "check the name, or set app.chdir"
            ) from None
        raise _app_error(target, error) from error
    except Exception as error:
        raise _app_error(target, error) from error
    except SystemExit as error:
        raise _app_error(target, error) from error


class _Recording:
    """A module whose factories are watched: what Flask's loader refuses because it is not a Flask app is still had."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.returned: Any = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not inspect.isfunction(found):
            if callable(found) and not inspect.isclass(found):
                self.returned = found
            return found

        @functools.wraps(found)
        def factory(*args: Any, **kwargs: Any) -> Any:
            from flask.cli import NoAppException  # noqa: PLC0415 - see load_app

            try:
                inspect.signature(found).bind(*args, **kwargs)
            except TypeError as error:
                raise NoAppException(f'the factory "{name}" cannot be called like that: {error}') from None
            made = found(*args, **kwargs)
            if callable(made):
                self.returned = made
            return made

        return factory

    def find(self, name: str) -> Any:
        """What Flask's loader finds by `name`; a function that takes an environ and a start_response is an app."""
        from flask.cli import find_app_by_string  # noqa: PLC0415 - see load_app

        found = getattr(self._module, name, None) if name.isidentifier() else None
        if inspect.isfunction(found) and _takes(found, 2) and not _takes(found, 0):
            return found
        return find_app_by_string(self, name)  # type: ignore[arg-type]  # all it asks of a module is its attributes


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


def _wrapped_app(module: ModuleType) -> Any:
    """A Flask app in middleware, under a usual name: Flask's own search would find the app and lose the middleware."""
    found = _wsgi_by_name(module)
    return found if find_flask(found) is not None else None


def _wsgi_by_name(module: ModuleType) -> Any:
    for name in ("app", "application"):
        found = getattr(module, name, None)
        if callable(found) and not inspect.isclass(found):
            return found
    return None


def _sentence(error: Exception) -> str:
    text = str(getattr(error, "message", error)).strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _app_error(target: str, error: BaseException) -> AppError:
    """An error of the app's own, with its traceback from the app's first frame on."""
    kept = error.__traceback__
    while kept is not None and _is_machinery(kept):
        kept = kept.tb_next
    text = "".join(traceback.format_exception(type(error), error, kept)).rstrip()
    said = str(error).partition("\n")[0]
    what = type(error).__name__ + (f": {said}" if said else "")
    return AppError(f"cannot load {target}: the app raised {what}", text)


def _is_machinery(frame: TracebackType) -> bool:
    name = frame.tb_frame.f_code.co_filename
    module = str(frame.tb_frame.f_globals.get("__name__", ""))
    return name.startswith("<frozen ") or module in {__name__, "importlib", "flask.cli"}
