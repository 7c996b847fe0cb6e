"""Looks at objects of the app without running their code.

An object may do anything when an attribute is asked for: raise, load itself, make the attribute, or pretend to be
another object. Therefore attributes are read from its dictionary, past its class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any

bases: Callable[[type], tuple[type, ...]] = vars(type)["__mro__"].__get__
"""The bases of a class, itself first, without asking its metaclass."""


def contents_of(module: str) -> dict[str, Any]:
    """The attributes of an imported module; empty if it is not imported, or is no module.

    A lazy module stays unloaded (importlib.util.LazyLoader).
    """
    loaded = sys.modules.get(module)  # it has None for a module that may not be imported
    return attributes_of(loaded) if issubclass(type(loaded), ModuleType) else {}


def attributes_of(thing: Any) -> dict[str, Any]:
    """An object's own attributes, a module's contents; empty if it has no dictionary."""
    for base in bases(type(thing)):
        own: Any = vars(base).get("__dict__")
        if type(own) in {GetSetDescriptorType, MemberDescriptorType}:
            found = own.__get__(thing)
            return found if type(found) is dict else {}  # a class has a mapping proxy
    return {}
