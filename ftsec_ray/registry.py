"""Where methods are found: a method is the one class of its file, and is named after that file.

Files of `ftsec_ray.attacks` and `ftsec_ray.defenses` are found by walking the package, others by
the entry-point groups of the same names. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ftsec_ray.errors import IdentityError, SpecError
from ftsec_ray.identity.tokens import file_token_hash

if TYPE_CHECKING:
    from ftsec_ray.method import Method


@dataclass
class Registry:
    """All methods of one kind (`attack` or `defense`) by name."""

    kind: str
    package: str
    _modules: dict[str, str] = field(default_factory=dict)
    _classes: dict[str, type[Method]] = field(default_factory=dict)

    def _find(self) -> dict[str, str]:
        if not self._modules:
            package = importlib.import_module(self.package)
            names = [
                m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")
            ]
            self._modules = {name: f"{self.package}.{name}" for name in names}
            for point in entry_points(group=self.package):
                if point.name in self._modules:
                    raise SpecError(
                        f"two {self.kind}s of one name",
                        point.name,
                        f"a name other than {self._modules[point.name]}",
                        f"rename the entry point {point.value!r}",
                    )
                self._modules[point.name] = point.value.split(":")[0]
        return self._modules

    def names(self) -> list[str]:
        """All names, sorted, without importing a method."""
        return sorted(self._find())

    def get(self, name: str) -> type[Method]:
        """The class of a method; SpecError with a suggestion when there is none of that name."""
        modules = self._find()
        if name not in modules:
            near = get_close_matches(str(name), modules, n=1)
            raise SpecError(
                f"unknown {self.kind}",
                name,
                " | ".join(sorted(modules)),
                (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"add {self.package.replace('.', '/')}/{name}.py"
                ),
            )
        if name not in self._classes:
            self._classes[name] = _method_class(importlib.import_module(modules[name]), self.kind)
        return self._classes[name]

    def doc(self, name: str) -> str:
        """The docstring of a method's module."""
        return (importlib.import_module(self.get(name).__module__).__doc__ or "").strip()


def _method_class(module: ModuleType, kind: str) -> type[Method]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and getattr(value, "KIND", None) == kind
    ]
    if len(found) != 1:
        raise SpecError(
            f"{module.__name__} must hold exactly one {kind} class",
            [c.__name__ for c in found],
            f"one subclass of {kind.title()}",
            "one method, one file",
        )
    return found[0]


ATTACKS = Registry("attack", "ftsec_ray.attacks")
DEFENSES = Registry("defense", "ftsec_ray.defenses")


def name_of(method: Method) -> str:
    """A method's name: that of its file."""
    return type(method).__module__.rsplit(".", 1)[-1]


def outside_hash(cls: type[Method]) -> str | None:
    """Token hash of the file of a method from outside of this package, whose code no lock holds to
    a VERSION; None for one of the package. IdentityError when it has no file.
    """
    is_inside = cls.__module__.startswith(f"{__package__}.")
    return None if is_inside else _module_hash(cls.__module__)


@cache
def _module_hash(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not file.endswith(".py"):
        raise IdentityError(
            "the code of a method has no file", module, "a method in an importable .py module"
        )
    return file_token_hash(Path(file))
