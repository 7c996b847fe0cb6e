"""One thing that discovery found, and what is to become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Found:
    """A live object that the app holds.

    `name` is MODULE:ATTRIBUTE where a module holds it, the extension's key where an extension of the app does, else its
    type and a number; `kind` its type; `use` the action that closes it, empty when there is none; `left` why it is
    closed by nothing but a policy that asks for it, empty for what a stop closes by itself.
    """

    name: str
    kind: str
    use: str
    left: str = ""
    _refer: Callable[[], Any] = field(default=lambda: None, repr=False, compare=False)

    @property
    def object(self) -> Any:
        """The object itself; None once the app has let go of it, for finding it keeps nothing alive."""
        return self._refer()

    def describe(self) -> dict[str, str]:
        """Stable keys for programs."""
        return {"name": self.name, "kind": self.kind, "use": self.use, "left": self.left}
