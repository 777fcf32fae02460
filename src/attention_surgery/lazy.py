"""Packages whose names are imported when they are first asked for (PEP 562).

PyTorch and diffusers take seconds to import. A package that is imported for its settings, its errors or its help does
not wait for them.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, *modules: str, **names: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, whose type checkers read the imports under TYPE_CHECKING.

    Args:
        package: its `__name__`.
        modules: submodules that are public themselves.
        names: submodule → the names that it gives the package. No name may be a submodule's: importing that submodule
            would put the module in the name's place.
    """
    homes = {name: module for module, exported in names.items() for name in exported}
    public = sorted({*homes, *modules})

    def getattribute(name: str) -> Any:
        if name in homes:
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if name in names or name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattribute, lambda: public, public
