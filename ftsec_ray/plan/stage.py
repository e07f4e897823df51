"""The nodes of a plan: stages, the cells that they serve, and the units that the scheduler hands
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftsec_ray.config.sweep import AttackSearch, ModelSpec, TaskSpec, TrainingConfig
from ftsec_ray.method import Method
from ftsec_ray.registry import name_of

Resource = str
"""`cpu`, `gpu`, `gpu:<amount>`; of several processes `group:<workers>` with a GPU each or
`group:<workers>cpu`, and `data:<workers>[:<GPUs of each>]`: see plan.resources.
"""
KINDS = (
    "task",
    "source",
    "align",
    "prepare",
    "craft",
    "tune",
    "bank",
    "revise",
    "inspect",
    "evaluate",
)
ROLES = ("reference", "unaligned", "start", "clean_bank")
"""Inputs that a method may ask for in NEEDS; its other entries name splits of the task."""


def is_group(resource: Resource) -> bool:
    """Whether a class is that of stages which several processes train together."""
    return resource.startswith("group:")


def is_data(resource: Resource) -> bool:
    """Whether a class is that of stages which a pipeline of several processes does block by
    block.
    """
    return resource.startswith("data:")


def workers_of(resource: Resource) -> int:
    """Processes that do the work of a stage of a class."""
    return (
        int(resource.split(":")[1].removesuffix("cpu"))
        if is_group(resource) or is_data(resource)
        else 1
    )


def is_on_gpu(resource: Resource) -> bool:
    """Whether a class asks for GPUs."""
    return resource.count(":") > 1 if is_data(resource) else not resource.endswith("cpu")


@dataclass(frozen=True, slots=True)
class Stage:
    """One node of the plan; `digest` covers kind, methods, params, inputs and seed, and nothing
    else.
    """

    digest: str
    kind: str
    method: str | None
    """Name of the method whose hook it is; None where no single method owns the stage."""
    seed: int | None
    inputs: tuple[tuple[str, str], ...]
    """(role, digest) pairs: model, rows, task, and the roles of `ROLES` that its methods need."""
    params: Mapping[str, Any]
    """JSON values that decide the result; methods as {"kind", "name", "params"}."""
    where: Mapping[str, Any]
    """JSON values that do not decide it: paths, names for messages."""
    resource: Resource
    cost_s: float
    """Prior of its duration in seconds, before any record of a like stage is known."""

    def input(self, role: str) -> str | None:
        """Digest of the input in a role; None when the stage has none."""
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
        """The stage that `to_json` wrote."""
        inputs = tuple((role, digest) for role, digest in plain["inputs"])
        return cls(**{**plain, "inputs": inputs})


@dataclass(frozen=True, slots=True)
class Searched:
    """What a cell is in a search: a trial, or the setting that was chosen."""

    key: str
    entry: AttackSearch
    training: TrainingConfig
    """Of its tune."""
    trial: int | None = None
    """Its number from 0; None for the chosen setting."""


SEARCHED = "searched "
"""What stands before the name of an attack whose parameters were searched for; no name of a method
holds a space.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid and the stages that answer it."""

    digest: str
    model: ModelSpec
    task: TaskSpec
    attack: Method
    defenses: tuple[Method, ...]
    seed: int
    evaluate: str
    """Digest of the stage that measures the finished model."""
    inspects: tuple[tuple[str, str], ...]
    """(defense name, stage digest) for every detector of the stack."""
    crafts: tuple[tuple[str, str], ...]
    """(method name, stage digest) for every change of the rows, the attack's first."""
    stages: tuple[str, ...]
    """Digests of all stages of the cell, inputs before their consumers."""
    searched: Searched | None = None
    """What the cell is in a search; None for an ordinary one."""

    @property
    def attack_name(self) -> str:
        """The attack as tables call it."""
        return f"{SEARCHED if self.searched else ''}{name_of(self.attack)}"


@dataclass(frozen=True, slots=True)
class Unit:
    """A stage with the private chain that follows it: what the scheduler hands out."""

    id: str
    """Digest of its last stage."""
    stages: tuple[Stage, ...]
    needs: tuple[str, ...]
    """Digests outside the unit that were not done when it was made."""
    resource: Resource

    @property
    def affinity(self) -> str:
        """Name of the base model that the unit loads; empty for none."""
        return str(self.stages[0].where.get("model", ""))
