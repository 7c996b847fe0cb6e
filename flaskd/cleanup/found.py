"""One object that discovery found, and what a stop does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from flaskd.values import value


@value
class Found:
    """A live object that the app holds.

    `name` is MODULE:ATTRIBUTE if a module holds the object, the extension's key if one of the app's extensions does,
    else its type and a number. `kind` is its type. `use` is the action that closes it, empty if there is none. `left`
    says why only a policy that asks for it closes it; `left` is empty if a stop closes it by itself.
    """

    name: str
    kind: str
    use: str
    left: str = ""
    _refer: Callable[[], Any] = field(default=lambda: None, repr=False, compare=False)

    @property
    def object(self) -> Any:
        """The object itself, or None if the app has dropped it: only a weak reference is kept."""
        return self._refer()

    def describe(self) -> dict[str, str]:
        """The fields as JSON-ready values under stable keys."""
        return {"name": self.name, "kind": self.kind, "use": self.use, "left": self.left}
