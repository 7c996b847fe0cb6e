"""Looking at objects of others without asking them.

An object may do anything when it is asked for an attribute: raise, load itself, make what it is asked for, or stand in
for another one. So what it holds is read past its class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any

bases: Callable[[type], tuple[type, ...]] = vars(type)["__mro__"].__get__
"""The bases of a class, itself first; its metaclass is not asked."""


def contents_of(module: str) -> dict[str, Any]:
    """What an imported module holds; nothing where there is none, or something else in its place.

    A lazy one stays unloaded (importlib.util.LazyLoader).
    """
    loaded = sys.modules.get(module)  # None stands there for a module that may not be imported
    return attributes_of(loaded) if issubclass(type(loaded), ModuleType) else {}


def attributes_of(thing: Any) -> dict[str, Any]:
    """An object's own attributes, a module's contents; nothing where it has no dictionary of them."""
    for base in bases(type(thing)):
        own: Any = vars(base).get("__dict__")
        if type(own) in {GetSetDescriptorType, MemberDescriptorType}:
            found = own.__get__(thing)
            return found if type(found) is dict else {}  # that of a class is a mapping proxy
    return {}
