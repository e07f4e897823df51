"""The lifecycle as data: the stage kinds, their order, and the hooks that they own.

A kind is one file of `ftsec_ray.stages`: the declaration `KIND`, and `run(job)`, which does the
work. Other packages add files by the entry-point group `ftsec_ray.stages`. The planner goes through
the kinds by their position. There is no other list of kinds or hooks: a new file adds a kind, and
every method can define its hooks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ftsec_ray.discovery import modules_in
from ftsec_ray.errors import SpecError

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, Runtime, StageContext
    from ftsec_ray.method import Method, RowWise

PACKAGE = "ftsec_ray.stages"
ROLES_BEFORE = ("reference", "unaligned")
"""Models that a method can load at any stage: the model that every cell starts from, and its
unaligned twin."""


Extra = dict[str, Any]
"""Measurements of a stage for its record: tokens, flops, notes."""


class Job(Protocol):
    """The job of one stage, as the `run` of its kind gets it."""

    @property
    def stage(self) -> Any:
        """The stage (plan.stage.Stage): kind, params, inputs, seed."""

    @property
    def out(self) -> Path:
        """The empty output folder."""

    @property
    def session(self) -> Any:
        """The worker's session (execute.session.Session): models, rows, tasks, the store."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Role -> digest of the input."""

    @property
    def runtime(self) -> Runtime:
        """The runtime settings of the stage."""

    def methods(self) -> list[Method]:
        """The methods that act in this stage, in order."""

    def context(self, *, workdir: Path | None = None) -> StageContext:
        """The context of the stage's hooks."""

    def warn(self, text: str) -> None:
        """Add a warning that `run`, `status` and the report show."""

    def change_model(self, hook: str) -> Extra:
        """Run a hook of the stage's only method on a copy of its model, and write the result."""

    def craft_in_blocks(self, method: RowWise, file: Path) -> dict[str, Any]:
        """Run a method on the rows of a file block by block, in several processes if possible."""

    def finish(
        self,
        loaded: LoadedModel,
        *,
        losses: Sequence[float] = (),
        notes: Mapping[str, Any] | None = None,
        **measured: Any,
    ) -> Extra:
        """Write a model, cache it for the next stage, and return the values for the record."""


def _no_settings(method: Any) -> Mapping[str, Any]:  # noqa: ARG001
    """Default of `settings_of`: methods decide no settings."""
    return {}


def _once(params: Mapping[str, Any]) -> float:  # noqa: ARG001
    """Default of `amount_of`: the amount of work does not depend on the params."""
    return 1.0


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """The declaration of a stage kind: position, hooks, inputs, output and expected cost."""

    name: str
    """Name of its file."""
    position: int
    """Position in the lifecycle: kinds act in ascending order."""
    version: int = 1
    """Increase it if the same inputs would give another result."""
    hooks: Mapping[str, str] = field(default_factory=dict)
    """Hooks that it owns -> signature of each."""
    shares_hooks: tuple[str, ...] = ()
    """Hooks of other kinds at which methods act here too."""
    acts: Literal["engine", "each", "all"] = "engine"
    """`each`: one stage per method with one of its hooks, in the order of the stack; `all`: one
    stage in which all these methods act, even if there are none; `engine`: planned without methods.
    """
    by: Literal["both", "defenses"] = "both"
    """Methods that may act: attack and defenses, or only defenses."""
    takes: tuple[str, ...] = ()
    """Inputs, besides the task: `model`, `rows`, `completions`, or another kind's `gives`."""
    takes_clean: tuple[str, ...] = ()
    """Additional inputs `clean_<name>`, from the cell without attack and defense on the same model,
    task and seed, with the same training settings. If all of them equal the cell's own inputs, the
    cell has no such stage.
    """
    gives: str | None = None
    """The input of later stages that it replaces; None if only the results read its artifact."""
    answers: Literal["none", "defenses", "all"] = "none"
    """Stages whose artifacts the results read: all, those in which a defense acts, or none."""
    roles: tuple[str, ...] = ROLES_BEFORE
    """Other models of the cell that a method can load here, if its NEEDS lists them."""
    names_input: str | None = None
    """Role under which later stages can load its input model."""
    provides: str | None = None
    """Role of its artifact; the stage is made only for methods that need this role."""
    measures: bool = False
    """Whether the results add the rows of its `metrics.parquet` (schema.metrics without `cell`) to
    those of `score`. Trials of a search have no such stage.
    """
    shaped_as: str | None = None
    """For a kind that provides a role: the kind whose hooks the defenses of the cell run here too,
    so that it trains as that kind does, without the attack.
    """
    settings: tuple[str, ...] = ()
    """Parts of the sweep that decide its result: `training` (of the cell), `sweep_training` (of the
    sweep, even if a search changes that of the cell), `generation`, `scoring`, `benchmarks`,
    `pairs` (`win_rate`). Training settings count only if a method acts or if it always trains.
    `benchmarks` gives one stage per benchmark, `pairs` one if the sweep sets `win_rate`.
    """
    settings_of: Callable[[Any], Mapping[str, Any]] = _no_settings
    """Method that needs the provided role -> settings that the method decides."""
    loads: tuple[str, ...] = ()
    """Packages whose files it loads by name; their code counts as its own."""
    computes: bool = True
    """Whether CPU kernels affect its result, so that `resources.numerics` is in its identity."""
    needs_model: bool = True
    """Whether it always loads a model; otherwise only if its methods need a role."""
    tunes: bool = False
    """Whether it is part of the user's fine-tune; a model measured before it has no such stage."""
    trains: Literal["never", "declared", "always"] = "never"
    """Whether it trains: always, never, or if a method declares one of its hooks in TRAINS."""
    prior_s: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"": (1.0, 1.0)})
    """Variant ("" for the default) -> (fixed seconds, seconds per million parameters) on one CPU
    core. Variants: the first part of a source (`ladder`), `judge` with a judge model, and `model`
    for a stage of rows that loads a model.
    """
    amount_of: Callable[[Mapping[str, Any]], float] = _once
    """Params -> factor of the seconds per million parameters."""

    def uses(self) -> tuple[str, ...]:
        """Modules that it runs in addition to the imports of its file."""
        return tuple(module for package in self.loads for module in modules_in(package).values())

    @property
    def asks_model(self) -> bool:
        """Whether it runs the finished model, so that `serve_template` affects its result."""
        return not {"generation", "benchmarks"}.isdisjoint(self.settings)

    def prior_of(
        self, params: Mapping[str, Any], variant: str | None = None
    ) -> tuple[float, float]:
        """The prior of a stage with these params; the default variant is the first part of its
        `source`, such as `ladder` of `ladder:1m`.
        """
        name = str(params.get("source", "")).split(":")[0] if variant is None else variant
        fixed, per_million = self.prior_s.get(name) or self.prior_s[""]
        return fixed, per_million * self.amount_of(params)


@cache
def kinds() -> dict[str, StageKind]:
    """All kinds by name, in the order of the lifecycle."""
    declared = []
    for name, module in modules_in(PACKAGE).items():
        kind = getattr(importlib.import_module(module), "KIND", None)
        if not isinstance(kind, StageKind) or kind.name != name:
            raise SpecError(
                f"{module} does not declare a stage kind with the name of the file",
                getattr(kind, "name", kind),
                f"KIND = StageKind(name={name!r}, ...)",
            )
        if kind.hooks and kind.acts == "engine":
            raise SpecError(
                f"stage kind {name!r} owns hooks, but methods cannot act in it",
                sorted(kind.hooks),
                "acts='each' or acts='all'",
            )
        declared.append(kind)
    return {
        kind.name: kind for kind in sorted(declared, key=lambda kind: (kind.position, kind.name))
    }


def kind_of(name: str) -> StageKind:
    """The kind of a name; SpecError if there is none."""
    if name not in kinds():
        raise SpecError("unknown stage kind", name, " | ".join(kinds()))
    return kinds()[name]


def runner_of(name: str) -> Callable[[Job], Extra]:
    """The function that runs a stage of a kind."""
    kind_of(name)
    run: Callable[[Job], Extra] = importlib.import_module(modules_in(PACKAGE)[name]).run
    return run


def module_of(name: str) -> str:
    """Name of the module that declares a kind."""
    kind_of(name)
    return modules_in(PACKAGE)[name]


@cache
def hooks() -> dict[str, StageKind]:
    """Every hook -> the kind that owns it, in the order of the lifecycle."""
    owners: dict[str, StageKind] = {}
    for kind in kinds().values():
        for hook in kind.hooks:
            if hook in owners:
                raise SpecError(
                    "two kinds of stages own one hook", hook, f"{owners[hook].name} or {kind.name}"
                )
            owners[hook] = kind
    return owners


def roles() -> tuple[str, ...]:
    """Every model role that NEEDS may contain; its other entries are splits of the task."""
    named = [
        role for kind in kinds().values() for role in (kind.names_input, kind.provides) if role
    ]
    return (*ROLES_BEFORE, *dict.fromkeys(named))


def part_in_tune(method: Method) -> str | None:
    """Why a method cannot act on a model that is not fine-tuned: it acts in the fine-tune, or needs
    something that only a fine-tune provides. None if it can.
    """
    tuning = [kind for kind in kinds().values() if kind.tunes]
    owned = [hook for hook in hooks_of(type(method)) if any(hook in kind.hooks for kind in tuning)]
    if owned:
        return f"acts in the fine-tune ({', '.join(owned)})"
    made = {role for kind in tuning for role in (kind.names_input, kind.provides) if role}
    needed = sorted(method.needs() & made)
    return f"needs models that only a fine-tune provides ({', '.join(needed)})" if needed else None


def hooks_of(cls: type[Any]) -> tuple[str, ...]:
    """The hooks that a method class defines, in the order of the lifecycle."""
    return _hooks_of(cls)  # type: ignore[arg-type]  # mypy thinks that classes are not hashable


@cache
def _hooks_of(cls: type[Any]) -> tuple[str, ...]:
    return tuple(hook for hook in hooks() if callable(getattr(cls, hook, None)))
