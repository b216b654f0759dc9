"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec


def names_of(package: str, **modules: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        modules: module of the package -> the public names that it has, in one text; any module can be asked for too.
    """
    names = {name: module for module, text in modules.items() for name in text.split()}

    def get(name: str) -> object:
        if name in names:
            found = getattr(importlib.import_module(f"{package}.{names[name]}"), name)
        elif name.isidentifier() and not name.startswith("_") and find_spec(f"{package}.{name}"):
            found = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)  # asked for once
        return found

    def list_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return get, list_
