"""The parts of a plan: stages, the cells that use them, and the units that the scheduler runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ftsec_ray.config.sweep import AttackSearch, ModelSpec, TaskSpec, TrainingConfig
from ftsec_ray.lifecycle import kind_of
from ftsec_ray.method import Method
from ftsec_ray.registry import name_of

Resource = str
"""Resource class of a stage: `cpu`, `gpu` or `gpu:<amount>`; for several processes
`group:<workers>` (one GPU each), `group:<workers>cpu`, or `data:<workers>[:<GPUs of each>]`. See
plan.resources.
"""


def is_group(resource: Resource) -> bool:
    """Whether a resource class is that of a worker group: several processes train one model."""
    return resource.startswith("group:")


def is_data(resource: Resource) -> bool:
    """Whether a resource class is that of a data pipeline: processes that work block by block."""
    return resource.startswith("data:")


def workers_of(resource: Resource) -> int:
    """Number of processes of a stage with this resource class."""
    return (
        int(resource.split(":")[1].removesuffix("cpu"))
        if is_group(resource) or is_data(resource)
        else 1
    )


def is_on_gpu(resource: Resource) -> bool:
    """Whether a resource class requests GPUs."""
    return resource.count(":") > 1 if is_data(resource) else not resource.endswith("cpu")


@dataclass(frozen=True, slots=True)
class Stage:
    """One node of the plan; `digest` covers exactly kind, methods, params, inputs and seed."""

    digest: str
    kind: str
    method: str | None
    """Names of the methods whose hooks it runs, joined by +; None if there are none."""
    seed: int | None
    inputs: tuple[tuple[str, str], ...]
    """(role, digest) pairs: the inputs of its kind, the task, and the other models that its methods
    need.
    """
    params: Mapping[str, Any]
    """JSON values that decide the result; methods as {"kind", "name", "params"}."""
    where: Mapping[str, Any]
    """JSON values that do not decide it: paths, names for messages."""
    resource: Resource
    cost_s: float
    """Prior of its duration in seconds, for use without records of similar stages."""

    def input(self, role: str) -> str | None:
        """Digest of the input in a role; None if the stage has no such input."""
        return next((digest for name, digest in self.inputs if name == role), None)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` turns back into an equal stage."""
        return {
            "digest": self.digest,
            "kind": self.kind,
            "method": self.method,
            "seed": self.seed,
            "inputs": [list(pair) for pair in self.inputs],
            "params": dict(self.params),
            "where": dict(self.where),
            "resource": self.resource,
            "cost_s": self.cost_s,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Stage:
        """The stage from the values of `to_json`."""
        inputs = tuple((role, digest) for role, digest in plain["inputs"])
        return cls(**{**plain, "inputs": inputs})


@dataclass(frozen=True, slots=True)
class Searched:
    """The part of a cell in a search: one of its trials, or the chosen setting."""

    key: str
    entry: AttackSearch
    training: TrainingConfig
    """Training settings of its fine-tune."""
    trial: int | None = None
    """Number of the trial, from 0; None for the chosen setting."""


SEARCHED = "searched "
"""Prefix of the name of an attack whose parameters come from a search; the space cannot occur in
the name of a method.
"""


class Step(NamedTuple):
    """One stage of a cell after its start."""

    kind: str
    methods: str
    """Names of the methods that act in it, joined by +; empty for none."""
    digest: str
    answers: bool
    """Whether the results read its artifact."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid and its stages."""

    digest: str
    model: ModelSpec
    task: TaskSpec
    attack: Method
    defenses: tuple[Method, ...]
    seed: int
    steps: tuple[Step, ...]
    """Its stages from the first method to the last score, in the order of the lifecycle."""
    stages: tuple[str, ...]
    """Digests of all stages of the cell, inputs before their consumers."""
    searched: Searched | None = None
    """The part of the cell in a search; None for a cell of the grid."""

    def of_kind(self, kind: str) -> list[Step]:
        """Its steps of one kind, in order."""
        return [step for step in self.steps if step.kind == kind]

    @property
    def answers(self) -> list[str]:
        """Digests of the stages whose artifacts the results read."""
        return [step.digest for step in self.steps if step.answers]

    @property
    def score(self) -> str:
        """Digest of the stage that computes the metrics of the finished model."""
        return self.of_kind("score")[0].digest

    @property
    def opinions(self) -> list[str]:
        """Digests of the stages in which further judges score the same completions."""
        return [step.digest for step in self.of_kind("score")[1:]]

    @property
    def measurements(self) -> list[str]:
        """Digests of the other stages that produce metrics, such as benchmarks."""
        return [step.digest for step in self.steps if kind_of(step.kind).measures]

    @property
    def filters(self) -> list[str]:
        """Digests of the stages in which defenses filter or change the rows."""
        return [step.digest for step in self.of_kind("craft") if step.answers]

    @property
    def attack_name(self) -> str:
        """The attack's name in tables."""
        return f"{SEARCHED if self.searched else ''}{name_of(self.attack)}"


@dataclass(frozen=True, slots=True)
class Unit:
    """A chain of stages that the scheduler gives to one worker: a stage and those that only it
    feeds.
    """

    id: str
    """Digest of its last stage."""
    stages: tuple[Stage, ...]
    needs: tuple[str, ...]
    """Digests of stages outside the unit that must be done first."""
    resource: Resource

    @property
    def affinity(self) -> str:
        """Name of the base model that the unit loads; empty if it loads none."""
        return str(self.stages[0].where.get("model", ""))


def cell_text(model: str, task: str, attack: str, defenses: Sequence[str], seed: int | None) -> str:
    """A cell as text for messages."""
    return f"{model} x {task} x {attack} x {'+'.join(defenses) or 'none'}, seed {seed}"
