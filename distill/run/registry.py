"""Registries without a list: classes found in the modules of a package and in the entry points of installed packages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Hashable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar, cast

C = TypeVar("C")


def find_entries(package: str, group: str, base: type[C]) -> dict[str, type[C]]:
    """name -> class: the subclasses of `base` with a `name` in the package's modules and in the entry-point group.

    Raises ValueError if two classes have one name, or if an entry point gives no subclass of `base`, or one without a name.
    """
    return dict(_find(package, group, cast(Hashable, base)))


@cache
def _find(package: str, group: str, base: Any) -> dict[str, type[Any]]:
    found: dict[str, type[Any]] = {}

    def add(entry: type[Any], source: str) -> None:
        if found.setdefault(entry.name, entry) is not entry:
            raise ValueError(f"{source}: {entry.name!r} is the name of {found[entry.name].__module__} already")

    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for _, entry in inspect.getmembers(module, inspect.isclass):
            if entry.__module__ == module.__name__ and issubclass(entry, base) and "name" in vars(entry):
                add(entry, module.__name__)
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        entry = point.load()
        if not (inspect.isclass(entry) and issubclass(entry, base)):
            raise ValueError(f"entry point {point.name!r} of {group} is {entry!r}, not a subclass of {base.__name__}")
        if not isinstance(getattr(entry, "name", None), str):
            raise ValueError(f"entry point {point.name!r} of {group}: {entry.__qualname__} sets no `name`")
        add(entry, point.value)
    return dict(sorted(found.items()))
