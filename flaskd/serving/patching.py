"""Monkey patching by gevent and eventlet, which replaces the threads, sockets and signals that flaskd uses.

A greenlet in the place of a thread runs only while another one waits with the library's own functions: flaskd would say
that it is ready, and answer no request.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

from flaskd.errors import ConfigError
from flaskd.objects import contents_of
from flaskd.process.forks import forgotten_by_children

_QUESTIONS = {"gevent.monkey": "is_module_patched", "eventlet.patcher": "is_monkey_patched"}
"""The modules that patch, and the function of each that tells whether a module was replaced."""
_NEEDED = ("os", "queue", "select", "signal", "socket", "subprocess", "thread", "threading", "time")
"""The modules that must not have been replaced."""
_TOOLS = {"patch_item", "patch_module"}
"""Functions of these modules that are allowed: they replace what their caller names, perhaps in a module of its own."""


class PatchingError(ConfigError):
    """The app or a module that it imports replaces Python's own threads and sockets (exit code 78)."""


def check_unpatched() -> None:
    """Raise PatchingError if threads, sockets or signals were replaced."""
    for name, question in _QUESTIONS.items():
        is_patched = contents_of(name).get(question)
        if is_patched is not None and (replaced := [each for each in _NEEDED if is_patched(each)]):
            library = name.partition(".")[0]
            raise _error(f"{library} has replaced Python's own {', '.join(replaced)} (monkey patching)", library)


@contextlib.contextmanager
def patching_refused() -> Iterator[None]:
    """While the block runs, make the patching functions raise PatchingError before they change anything."""
    finder = _Finder()
    for name in _QUESTIONS:
        finder.replace_functions(name)
    sys.meta_path.insert(0, finder)
    try:
        with forgotten_by_children(finder.put_back):
            yield
    finally:
        finder.put_back()


class _Finder(MetaPathFinder):
    """Replaces the patching functions, in modules that are imported already, and in others right after their import."""

    def __init__(self) -> None:
        self._replaced: list[tuple[dict[str, Any], str, Callable[..., Any]]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _QUESTIONS or (spec := PathFinder.find_spec(fullname, path, target)) is None:
            return None
        if (loader := spec.loader) is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.replace_functions(fullname)

            loader.exec_module = exec_module  # type: ignore[method-assign]  # only this module has this loader
        return spec

    def replace_functions(self, module: str) -> None:
        there = contents_of(module)
        for name, function in list(there.items()):
            if (name.startswith("patch_") and name not in _TOOLS) or name == "monkey_patch":
                self._replaced.append((there, name, function))
                there[name] = _refusing(module, name)

    def put_back(self) -> None:
        with contextlib.suppress(ValueError):  # the app may have replaced sys.meta_path
            sys.meta_path.remove(self)
        for there, name, function in self._replaced:
            there[name] = function


def _refusing(module: str, name: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        caller = sys._getframe(1)  # noqa: SLF001 - the only way to name the place of the call
        place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        raise _error(f"{module}.{name}() was called ({place})", module.partition(".")[0])

    return refuse


def _error(what: str, library: str) -> PatchingError:
    return PatchingError(
        f"cannot serve: {what}, and flaskd serves with threads; leave the patching out, or serve the app with a server "
        f'that is made for it, such as "gunicorn --worker-class {library}"'
    )
