"""Public names of a package, imported when they are first used (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def attach(package: str, public: Mapping[str, str], subpackages: tuple[str, ...] = ()) -> tuple[Callable, Callable]:
    """The `__getattr__` and `__dir__` of a package.

    Arguments: `public` maps a name to the submodule that holds it; `subpackages` are modules that are names themselves.
    """

    def __getattr__(name: str):
        if name in subpackages:
            return import_module(f"{package}.{name}")
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{public[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__():
        return sorted({*vars(sys.modules[package]), *public, *subpackages})

    return __getattr__, __dir__
