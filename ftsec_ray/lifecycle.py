"""The lifecycle as data: which kinds of stages there are, in which order, and which hooks they own.

A kind is one file of `ftsec_ray.stages`: on top its declaration `KIND`, below it `run(job)`, which
does the work. Files of other packages join by the entry-point group `ftsec_ray.stages`. The planner
walks the kinds in order of their position, and nothing else lists kinds or hooks: a new file is a
new kind, and its hooks are hooks of every method.
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
"""Models that a method can ask for at any stage: the one that every cell starts from, and its twin
before alignment."""


Extra = dict[str, Any]
"""Measurements of a stage for its record: tokens, flops, notes."""


class Job(Protocol):
    """One stage at work, as `run` of its kind gets it."""

    @property
    def stage(self) -> Any:
        """What it is (plan.stage.Stage): kind, params, inputs, seed."""

    @property
    def out(self) -> Path:
        """The empty folder that it fills."""

    @property
    def session(self) -> Any:
        """What the worker holds (execute.session.Session): models, rows, tasks, the store."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Role -> digest."""

    @property
    def runtime(self) -> Runtime:
        """Where and how it runs."""

    def methods(self) -> list[Method]:
        """The methods that act in this stage, in order, with their parameters."""

    def context(self, *, workdir: Path | None = None) -> StageContext:
        """What the stage's hooks may ask."""

    def warn(self, text: str) -> None:
        """Have `run`, `status` and the report say something to whoever reads the results."""

    def change_model(self, hook: str) -> Extra:
        """Let the stage's one method change a copy of its model by a hook, and write the result."""

    def craft_in_blocks(self, method: RowWise, file: Path) -> dict[str, Any]:
        """Let a method change the rows of a file block by block, in many processes where it may."""

    def finish(
        self,
        loaded: LoadedModel,
        *,
        losses: Sequence[float] = (),
        notes: Mapping[str, Any] | None = None,
        **measured: Any,
    ) -> Extra:
        """Write a model, keep it in memory for the next stage, and report on it."""


def _no_settings(method: Any) -> Mapping[str, Any]:  # noqa: ARG001
    """The settings of a kind about which no method decides anything."""
    return {}


def _once(params: Mapping[str, Any]) -> float:  # noqa: ARG001
    """The amount of work of a kind whose params do not tell it."""
    return 1.0


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """One kind of stage: where it stands in the lifecycle, what it takes and gives, what it
    costs.
    """

    name: str
    """That of its file."""
    position: int
    """Place in the lifecycle: kinds act in ascending order."""
    version: int = 1
    """Raise when the same inputs would give another result."""
    hooks: Mapping[str, str] = field(default_factory=dict)
    """Hooks at which methods act here -> what each takes and gives."""
    shares_hooks: tuple[str, ...] = ()
    """Hooks of other kinds at which methods act here too."""
    acts: Literal["engine", "each", "all"] = "engine"
    """`each`: one stage for every method that has a hook, in the order of the stack; `all`: one
    stage in which all of them act, made even where none does; `engine`: planned without regard to
    methods.
    """
    by: Literal["both", "defenses"] = "both"
    """Who may act: attack and defenses, or defenses only."""
    takes: tuple[str, ...] = ()
    """What flows in: `model`, `rows`, `completions`, or what another kind gives. The task always
    does.
    """
    takes_clean: tuple[str, ...] = ()
    """What flows in besides, as `clean_<name>`, from the cell without attack and defense on the
    same model, task and seed, tuned alike. A cell in which nothing of it differs has no such stage.
    """
    gives: str | None = None
    """What it replaces for the stages after it; None where only results read it."""
    answers: Literal["none", "defenses", "all"] = "none"
    """Whose artifacts the results read: all, those of stages in which a defense acts, or none."""
    roles: tuple[str, ...] = ROLES_BEFORE
    """Other models of the cell that a method can ask for here by its NEEDS."""
    names_input: str | None = None
    """Role that the model which comes in has for later stages."""
    provides: str | None = None
    """Role that the stage itself has, made for the methods that need it."""
    measures: bool = False
    """Whether the results take the rows of its `metrics.parquet` (schema.metrics without `cell`) as
    they are, beside those of `score`; trials of a search are not measured so.
    """
    shaped_as: str | None = None
    """Kind of stage whose hooks the defenses of a cell have here as well, where the stage provides
    a role: it then trains as that kind does, without the attack.
    """
    settings: tuple[str, ...] = ()
    """Parts of the sweep that decide its result: `training` (of the cell), `sweep_training` (also
    where a search tunes otherwise), `generation`, `scoring`, `benchmarks`, `pairs` (`win_rate`).
    Training counts where a method acts or it trains; by `benchmarks` there is one stage for each of
    them, by `pairs` one where the sweep asks for it.
    """
    settings_of: Callable[[Any], Mapping[str, Any]] = _no_settings
    """What a method that asks for the role that this kind provides decides about it."""
    loads: tuple[str, ...] = ()
    """Packages whose files it finds by name, so that an edit of them is an edit of it."""
    computes: bool = True
    """Whether CPU kernels decide its bytes, so that `resources.numerics` is in its identity."""
    needs_model: bool = True
    """Whether it has a model in memory; a stage of rows has one where its method asks for a
    role.
    """
    tunes: bool = False
    """Whether it is of the user's fine-tune: a model that is measured before it has no such stage.
    """
    trains: Literal["never", "declared", "always"] = "never"
    """Whether it trains: where a method declares that hook in TRAINS, or always."""
    prior_s: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"": (1.0, 1.0)})
    """Variant ("" for any other) -> (seconds, seconds more per million weights) on one CPU core.
    Variants: the first part of a source (`ladder`), `judge` where a judge that is a model reads,
    and `model` where a stage of rows asks a model.
    """
    amount_of: Callable[[Mapping[str, Any]], float] = _once
    """Params -> how often a stage does what takes the seconds per million weights."""

    def uses(self) -> tuple[str, ...]:
        """Modules that it runs besides what its own file imports."""
        return tuple(module for package in self.loads for module in modules_in(package).values())

    @property
    def asks_model(self) -> bool:
        """Whether it asks a finished model, so that `serve_template` decides its result."""
        return not {"generation", "benchmarks"}.isdisjoint(self.settings)

    def prior_of(
        self, params: Mapping[str, Any], variant: str | None = None
    ) -> tuple[float, float]:
        """The prior for a stage with these params; its variant is that of its `source`, such as
        `ladder:1m`, where none is given.
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
                f"{module} does not declare a kind of stage of its name",
                getattr(kind, "name", kind),
                f"KIND = StageKind(name={name!r}, ...)",
            )
        if kind.hooks and kind.acts == "engine":
            raise SpecError(
                f"kind of stage {name!r} owns hooks at which nobody would act",
                sorted(kind.hooks),
                "acts='each' or acts='all'",
            )
        declared.append(kind)
    return {
        kind.name: kind for kind in sorted(declared, key=lambda kind: (kind.position, kind.name))
    }


def kind_of(name: str) -> StageKind:
    """The kind of a name; SpecError when there is none."""
    if name not in kinds():
        raise SpecError("unknown kind of stage", name, " | ".join(kinds()))
    return kinds()[name]


def runner_of(name: str) -> Callable[[Job], Extra]:
    """The function that does a stage of a kind."""
    kind_of(name)
    run: Callable[[Job], Extra] = importlib.import_module(modules_in(PACKAGE)[name]).run
    return run


def module_of(name: str) -> str:
    """Name of the module that declares a kind."""
    kind_of(name)
    return modules_in(PACKAGE)[name]


@cache
def hooks() -> dict[str, StageKind]:
    """Every hook, in the order of the lifecycle, and the kind that owns it."""
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
    """Every role of a model that NEEDS may name; its other entries name splits of the task."""
    named = [
        role for kind in kinds().values() for role in (kind.names_input, kind.provides) if role
    ]
    return (*ROLES_BEFORE, *dict.fromkeys(named))


def part_in_tune(method: Method) -> str | None:
    """What a method does in the user's fine-tune or needs of it, so that it cannot act on a model
    that was not fine-tuned; None for one that can.
    """
    tuning = [kind for kind in kinds().values() if kind.tunes]
    owned = [hook for hook in hooks_of(type(method)) if any(hook in kind.hooks for kind in tuning)]
    if owned:
        return f"acts in the fine-tune ({', '.join(owned)})"
    made = {role for kind in tuning for role in (kind.names_input, kind.provides) if role}
    needed = sorted(method.NEEDS & made)
    return f"needs what only a fine-tune has ({', '.join(needed)})" if needed else None


def hooks_of(cls: type[Any]) -> tuple[str, ...]:
    """The hooks that a method class defines, in the order of the lifecycle."""
    return _hooks_of(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable


@cache
def _hooks_of(cls: type[Any]) -> tuple[str, ...]:
    return tuple(hook for hook in hooks() if callable(getattr(cls, hook, None)))
