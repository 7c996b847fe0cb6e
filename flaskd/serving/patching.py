"""Monkey patching by gevent and eventlet, which replaces the threads, sockets and signals that flaskd stands on.

A thread that is a greenlet runs only when another one waits by the library's own means: flaskd would say that it is
ready, and answer nothing.
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
"""The modules that patch, and how each is asked what it has replaced."""
_NEEDED = ("os", "queue", "select", "signal", "socket", "subprocess", "thread", "threading", "time")
"""What must not have been replaced."""
_TOOLS = {"patch_item", "patch_module"}
"""Functions that replace what their caller names, in a module of its own maybe."""


class PatchingError(ConfigError):
    """The app, or what it imports, would replace Python's own threads and sockets (exit 78)."""


def check_unpatched() -> None:
    """Raise PatchingError where threads, sockets or signals are not Python's own any more."""
    for name, question in _QUESTIONS.items():
        is_patched = contents_of(name).get(question)
        if is_patched is not None and (replaced := [each for each in _NEEDED if is_patched(each)]):
            library = name.partition(".")[0]
            raise _error(f"{library} has replaced Python's own {', '.join(replaced)} (monkey patching)", library)


@contextlib.contextmanager
def patching_refused() -> Iterator[None]:
    """Make what patches raise PatchingError instead, before it has done anything, whenever it is imported."""
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
    """Finds the modules that patch where they are, and changes them once they are imported."""

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

            loader.exec_module = exec_module  # type: ignore[method-assign]  # this loader is this module's alone
        return spec

    def replace_functions(self, module: str) -> None:
        there = contents_of(module)
        for name, function in list(there.items()):
            if (name.startswith("patch_") and name not in _TOOLS) or name == "monkey_patch":
                self._replaced.append((there, name, function))
                there[name] = _refusing(module, name)

    def put_back(self) -> None:
        with contextlib.suppress(ValueError):  # the app may have made itself a list of its own
            sys.meta_path.remove(self)
        for there, name, function in self._replaced:
            there[name] = function


def _refusing(module: str, name: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        caller = sys._getframe(1)  # noqa: SLF001 - the only way to say where the call stands
        place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        raise _error(f"{module}.{name}() was called ({place})", module.partition(".")[0])

    return refuse


def _error(what: str, library: str) -> PatchingError:
    return PatchingError(
        f"cannot serve: {what}, and flaskd serves with threads; leave the patching out, or serve the app with a server "
        f'that is made for it, such as "gunicorn --worker-class {library}"'
    )
