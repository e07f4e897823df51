"""The registry of methods: a method is the only class in its file, and has the name of that file.

Files of `ftsec_ray.attacks` and `ftsec_ray.defenses` are found by searching the package, other
files by the entry-point groups of the same names. Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType

from ftsec_ray.discovery import modules_in
from ftsec_ray.errors import IdentityError, SpecError
from ftsec_ray.identity.tokens import file_token_hash
from ftsec_ray.lifecycle import hooks, hooks_of
from ftsec_ray.method import Method, RowWise
from ftsec_ray.success import ASR, choices

IDLE = "none"
"""The only method that may do nothing."""
NEAR_MISS = 0.8
"""Similarity (difflib's ratio) from which a name counts as a misspelt hook."""


@dataclass
class Registry:
    """All methods of one kind (`attack` or `defense`) by name."""

    kind: str
    package: str
    _classes: dict[str, type[Method]] = field(default_factory=dict)

    def _find(self) -> dict[str, str]:
        return modules_in(self.package)

    def names(self) -> list[str]:
        """All names, sorted, without importing a method."""
        return sorted(self._find())

    def get(self, name: str) -> type[Method]:
        """The class of a method; SpecError with a suggestion if there is none with this name."""
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
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and getattr(value, "KIND", None) == kind
    ]
    if len(classes) != 1:
        raise SpecError(
            f"{module.__name__} must define exactly one {kind} class",
            [c.__name__ for c in classes],
            f"one subclass of {kind.title()}",
            "put each method into a file of its own",
        )
    _check_hooks(classes[0], kind)
    if kind == "attack":
        _check_success(module.__name__, classes[0])
    return classes[0]


def _check_hooks(cls: type[Method], kind: str) -> None:
    """SpecError for a method with a hook that no stage, or not the intended stage, would call."""
    for name, value in inspect.getmembers(cls, callable):
        if name.startswith("_") or name in hooks() or _is_contract(name, cls):
            continue
        near = get_close_matches(name, hooks(), n=1, cutoff=NEAR_MISS)
        takes_context = "ctx" in inspect.signature(value).parameters
        if near or takes_context:
            raise SpecError(
                f"{kind} {_file_of(cls)} has a hook that no stage calls",
                name,
                " | ".join(hooks()),
                f"did you mean {near[0]!r}? As it is, it would be ignored"
                if near
                else "rename it to a hook, or start the name of a helper with an underscore",
            )
    others = [hook for hook in hooks_of(cls) if kind == "attack" and hooks()[hook].by == "defenses"]
    if others:
        raise SpecError(
            f"attack {_file_of(cls)} has a hook at which only defenses act",
            others[0],
            " | ".join(hook for hook, owner in hooks().items() if owner.by == "both"),
            "no stage would call it: remove it, or make the method a defense",
        )
    if not hooks_of(cls) and _file_of(cls) != IDLE:
        raise SpecError(
            f"{kind} {_file_of(cls)} has no hook and would do nothing",
            sorted(name for name in vars(cls) if not name.startswith("_")),
            " | ".join(hooks()),
            "define at least one of these hooks",
        )


def _is_contract(name: str, cls: type[Method]) -> bool:
    """Whether a name belongs to the base classes of methods."""
    return hasattr(Method, name) or (issubclass(cls, RowWise) and hasattr(RowWise, name))


def _file_of(cls: type[Method]) -> str:
    return cls.__module__.rsplit(".", 1)[-1]


def _check_success(module: str, cls: type[Method]) -> None:
    """SpecError if an attack declares no success metric, or one that cannot be measured."""
    declared = getattr(cls, "SUCCESS", "")
    if declared is None and module.endswith(".none"):
        return
    if declared not in choices():
        near = get_close_matches(str(declared), choices(), n=1)
        raise SpecError(
            f"{module}.{cls.__name__} declares no valid success metric",
            declared or None,
            " | ".join(choices()),
            f"did you mean {near[0]!r}?" if near else "set the class variable SUCCESS",
        )
    if declared == ASR and not callable(getattr(cls, "probes", None)):
        raise SpecError(
            f"{module}.{cls.__name__} declares the success metric {ASR!r}, but no probes",
            "no method `probes`",
            "a method `probes` with the triggered prompts",
            "define it, or declare a metric that every cell measures, such as 'harmful_rate'",
        )


ATTACKS = Registry("attack", "ftsec_ray.attacks")
DEFENSES = Registry("defense", "ftsec_ray.defenses")


def name_of(method: Method) -> str:
    """A method's name: the name of its file."""
    return _file_of(type(method))


def outside_hash(module: str) -> str | None:
    """Token hash of a module outside this package, whose code no lock ties to a VERSION; None for a
    module of this package. IdentityError if it has no file.
    """
    return None if module.startswith(f"{__package__}.") else _module_hash(module)


@cache
def _module_hash(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not file.endswith(".py"):
        raise IdentityError("a plug-in has no source file", module, "an importable .py module")
    return file_token_hash(Path(file))
