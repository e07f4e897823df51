"""Where methods are found: a method is the one class of its file, and is named after that file.

Files of `ftsec_ray.attacks` and `ftsec_ray.defenses` are found by walking the package, others by
the entry-point groups of the same names. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING

from ftsec_ray.errors import SpecError
from ftsec_ray.identity import digest, source_fingerprint
from ftsec_ray.success import ASR, CHOICES

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

    def fingerprint(self, name: str) -> str:
        """Digest of the code of a method's module."""
        self.get(name)
        return source_fingerprint(self._modules[name])

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
    if kind == "attack":
        _check_success(module.__name__, found[0])
    return found[0]


def _check_success(module: str, cls: type[Method]) -> None:
    """SpecError when an attack declares no success metric, or one that nothing can measure."""
    declared = getattr(cls, "SUCCESS", "")
    if declared is None and module.endswith(".none"):
        return
    if declared not in CHOICES:
        near = get_close_matches(str(declared), CHOICES, n=1)
        raise SpecError(
            f"{module}.{cls.__name__} declares no metric as its success",
            declared or None,
            " | ".join(CHOICES),
            f"did you mean {near[0]!r}?" if near else "set the class variable SUCCESS",
        )
    if declared == ASR and not callable(getattr(cls, "probes", None)):
        raise SpecError(
            f"{module}.{cls.__name__} declares {ASR!r} as its success and asks nothing for it",
            "no method `probes`",
            "a method `probes` with the triggered prompts",
            "define it, or declare a metric that every cell measures, such as 'harmful_rate'",
        )


ATTACKS = Registry("attack", "ftsec_ray.attacks")
DEFENSES = Registry("defense", "ftsec_ray.defenses")


def name_of(method: Method) -> str:
    """A method's name: that of its file."""
    return type(method).__module__.rsplit(".", 1)[-1]


def identity_of(method: Method) -> dict[str, object]:
    """What of a method decides a result: name, version, code and parameters."""
    registry = ATTACKS if method.KIND == "attack" else DEFENSES
    name = name_of(method)
    return {
        "kind": method.KIND,
        "name": name,
        "version": method.VERSION,
        "source": registry.fingerprint(name),
        "params": method,
    }


def method_digest(method: Method) -> str:
    """Digest of `identity_of`."""
    return digest(identity_of(method))
