"""Loading the app: a target in Flask's own syntax, read by Flask's own loader; any WSGI callable can be served."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from flaskd.errors import AppError, ConfigError
from flaskd.objects import attributes_of
from flaskd.process.forks import AppCode
from flaskd.serving.choice import Named, NoAppError, Unnamed, why_not
from flaskd.serving.patching import PatchingError, check_unpatched
from flaskd.serving.wsgi import WSGIApp, find_flask, is_app, is_flask
from flaskd.text import escaped, text_of, traceback_of
from flaskd.values import value

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger("flaskd.loading")


@value
class LoadedApp:
    """The WSGI callable that is served, the Flask app that was found inside of it, and the target that named it.

    For the log, `chosen` says which object it is, and why; `doubt` says what else may have been meant.
    """

    wsgi: WSGIApp
    inside: Flask | None
    target: str
    chosen: str = ""
    doubt: str = ""

    @property
    def flask(self) -> Flask | None:
        """The Flask app inside; searched again if there was none, as a wrapper may make it at the first request."""
        return self.inside or find_flask(self.wsgi)

    def tell(self) -> None:
        """Log what is served, and why."""
        if self.chosen:
            log.info(self.chosen)
        if self.doubt:
            log.warning(self.doubt)


def choose_target(configured: str | None, environ: Mapping[str, str], directory: Path) -> str:
    """The target: `configured`, else ``FLASK_APP``, else ``wsgi.py`` or ``app.py``; raises ConfigError if none."""
    if target := configured or environ.get("FLASK_APP"):
        return target
    for name in ("wsgi.py", "app.py"):
        if (directory / name).is_file():
            return name
    unread = (
        " (.flaskenv is there, but only Flask's own commands read it)" if (directory / ".flaskenv").is_file() else ""
    )
    raise ConfigError(
        f"cannot find an app: none was named, FLASK_APP is not set{unread}, and there is no wsgi.py or app.py in "
        f'{directory}; try "flaskd serve MODULE:APP"'
    )


def load_app(target: str) -> LoadedApp:
    """Import the app named by `target` (``module``, ``module:name``, ``module:create_app("x")`` or a file).

    The working directory is put on ``sys.path``. Raises ConfigError for a missing module or attribute, and for an
    object that cannot be served; AppError if the app's code raises an error or SystemExit. KeyboardInterrupt is passed
    on.
    """
    # Imported here, because flask.cli and click take long to import, and client verbs do not need them.
    from flask.cli import NoAppException, prepare_import  # noqa: PLC0415

    os.environ["FLASK_RUN_FROM_CLI"] = "true"  # makes app.run() in the module do nothing (flask.Flask.run)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    path, name = _split(target)
    place = prepare_import(path)
    module = _import(place, target)
    try:
        with AppCode():
            found = Named(module, place, name).find() if name else Unnamed(module, place).find()
    except (NoAppException, NoAppError) as error:
        raise ConfigError(f"cannot load {target}: {_sentence(error)}") from None
    except PatchingError:
        raise
    except (Exception, SystemExit) as error:
        raise _app_error(target, error) from error
    inside = find_flask(found.wsgi) or _only_flask_app(module)
    what = described(found.wsgi, inside)
    return LoadedApp(found.wsgi, inside, target, f"serving {found.name}, {what}: {found.why}", found.doubt)


def given_app(app: WSGIApp) -> LoadedApp:
    """Describe an app object; raises ConfigError if it cannot be served."""
    check_servable(app)
    name = type(app).__name__
    with contextlib.suppress(Exception):  # any object may raise when its attributes are read
        name = str(getattr(app, "__name__", "") or getattr(app, "import_name", "") or name)
    return LoadedApp(app, find_flask(app), name)


def make_app(make: Callable[[], WSGIApp]) -> WSGIApp:
    """Call the factory of Flask's own command line (``FlaskGroup(create_app=…)``); raises as `load_app` does."""
    from flask.cli import NoAppException  # noqa: PLC0415 - see load_app

    target = getattr(make, "__qualname__", "the app")
    try:
        with AppCode():
            return make()
    except NoAppException as error:
        raise ConfigError(f"cannot load {target}: {_sentence(error)}") from None
    except PatchingError:
        raise
    except (Exception, SystemExit) as error:
        raise _app_error(target, error) from error


# --- what can be served ---------------------------------------------------------------------------------------------


def check_servable(app: Any) -> None:
    """Raise ConfigError for an object that is not a WSGI app, and after monkey patching of threads and sockets."""
    if not is_app(app):
        raise ConfigError(f"cannot serve {type(app).__name__}: {why_not(app)}")
    check_unpatched()


def described(wsgi: Any, inside: Flask | None) -> str:
    """A short description of what is served, for the log."""
    kind = type(wsgi).__name__
    if is_flask(wsgi):
        return f'the Flask app "{wsgi.import_name}"'
    return f"a WSGI app ({kind})" + (f' around the Flask app "{inside.import_name}"' if inside is not None else "")


def _only_flask_app(module: ModuleType) -> Flask | None:
    """The module's only Flask app, for a wrapper in which no Flask app was found; None if there are several or none."""
    apps = {id(value): value for value in attributes_of(module).values() if is_flask(value)}
    return next(iter(apps.values())) if len(apps) == 1 else None


def _split(target: str) -> tuple[str, str]:
    parts = re.split(r":(?![\\/])", target, maxsplit=1)  # as flask.cli.ScriptInfo.load_app
    return parts[0], parts[1] if len(parts) > 1 else ""


def _import(name: str, target: str) -> ModuleType:
    from flask.cli import NoAppException  # noqa: PLC0415 - see load_app

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
    except NoAppException as error:  # the module itself says that there is none, and why
        raise ConfigError(f"cannot load {target}: {_sentence(error)}") from None
    except PatchingError:
        raise
    except (Exception, SystemExit) as error:
        raise _app_error(target, error) from error


def _sentence(error: Exception) -> str:
    text = escaped(str(getattr(error, "message", error)).strip().rstrip("."))
    return text[:1].lower() + text[1:]


def _app_error(target: str, error: BaseException) -> AppError:
    """The error for an exception of the app, with its traceback from the app's first frame on."""
    kept = error.__traceback__
    while kept is not None and _is_machinery(kept):
        kept = kept.tb_next
    text = traceback_of(error, kept)
    said = text_of(error)
    what = type(error).__name__ + (f": {said}" if said else "")
    return AppError(f"cannot load {target}: the app raised {what}", text)


def _is_machinery(frame: TracebackType) -> bool:
    name = frame.tb_frame.f_code.co_filename
    module = str(frame.tb_frame.f_globals.get("__name__", ""))
    return name.startswith("<frozen ") or module in {__name__, "flaskd.serving.choice", "importlib", "flask.cli"}
