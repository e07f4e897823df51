"""What is found by looking: the modules of a package by name, and those that other packages add to
it.

A method, a kind of stage or a judge is one file of its package. Other packages add theirs by an
entry point whose group is the package's name.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from ftsec_ray.errors import SpecError


@cache
def modules_in(package: str) -> dict[str, str]:
    """Name -> module path of everything in a package and its entry points, without importing any.

    SpecError when an entry point takes the name of a file or of another entry point.
    """
    folders = importlib.import_module(package).__path__
    names = [info.name for info in pkgutil.iter_modules(folders)]
    modules = {name: f"{package}.{name}" for name in names if not name.startswith("_")}
    for point in entry_points(group=package):
        if point.name in modules:
            raise SpecError(
                f"two parts of {package} of one name",
                point.name,
                f"a name other than {modules[point.name]}",
                f"rename the entry point {point.value!r}",
            )
        modules[point.name] = point.value.split(":")[0]
    return modules
