"""Where methods are found: a method is the one class of its file, and is named after that file.

Files of `ftsec_ray.attacks` and `ftsec_ray.defenses` are found by walking the package, others by
the entry-point groups of the same names. Nothing is imported before it is asked for.
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
from ftsec_ray.success import ASR, CHOICES

IDLE = "none"
"""The one method that may do nothing."""
NEAR_MISS = 0.8
"""Likeness (difflib's ratio) from which on a name is taken for a misspelt hook."""


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
    _check_hooks(found[0], kind)
    if kind == "attack":
        _check_success(module.__name__, found[0])
    return found[0]


def _check_hooks(cls: type[Method], kind: str) -> None:
    """SpecError for a method that no stage, or not the meant stage, would ever call."""
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
                f"did you mean {near[0]!r}? It would be ignored"
                if near
                else "name it after a hook, or begin the name of a helper with an underscore",
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
            f"{kind} {_file_of(cls)} has no hook, so that it would do nothing",
            sorted(name for name in vars(cls) if not name.startswith("_")),
            " | ".join(hooks()),
            "define at least one of these",
        )


def _is_contract(name: str, cls: type[Method]) -> bool:
    """Whether a name belongs to the bases of methods."""
    return hasattr(Method, name) or (issubclass(cls, RowWise) and hasattr(RowWise, name))


def _file_of(cls: type[Method]) -> str:
    return cls.__module__.rsplit(".", 1)[-1]


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
    return _file_of(type(method))


def outside_hash(module: str) -> str | None:
    """Token hash of a module from outside of this package, whose code no lock holds to a VERSION;
    None for one of the package. IdentityError when it has no file.
    """
    return None if module.startswith(f"{__package__}.") else _module_hash(module)


@cache
def _module_hash(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not file.endswith(".py"):
        raise IdentityError("the code of a plug-in has no file", module, "an importable .py module")
    return file_token_hash(Path(file))
