"""Finds the modules of a package by name, and those that other packages add to it.

A method, a stage kind or a judge is one file of its package. Other packages add theirs by an entry
point whose group is the name of the package.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from ftsec_ray.errors import SpecError


@cache
def modules_in(package: str) -> dict[str, str]:
    """Name -> path of each module of a package and of its entry points, without importing them.

    Raises SpecError if an entry point has the name of a file or of another entry point.
    """
    folders = importlib.import_module(package).__path__
    names = [info.name for info in pkgutil.iter_modules(folders)]
    modules = {name: f"{package}.{name}" for name in names if not name.startswith("_")}
    for point in entry_points(group=package):
        if point.name in modules:
            raise SpecError(
                f"two modules of {package} have the same name",
                point.name,
                f"a name different from that of {modules[point.name]}",
                f"rename the entry point {point.value!r}",
            )
        modules[point.name] = point.value.split(":")[0]
    return modules
