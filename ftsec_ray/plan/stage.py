"""The nodes of a plan: stages, the cells that they serve, and the units that the scheduler hands
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ftsec_ray.config.sweep import AttackSearch, ModelSpec, TaskSpec, TrainingConfig
from ftsec_ray.lifecycle import kind_of
from ftsec_ray.method import Method
from ftsec_ray.registry import name_of

Resource = str
"""`cpu`, `gpu`, `gpu:<amount>`; of several processes `group:<workers>` with a GPU each or
`group:<workers>cpu`, and `data:<workers>[:<GPUs of each>]`: see plan.resources.
"""


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
    """(role, digest) pairs: what its kind takes, the task, and the other models that its methods
    need.
    """
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


class Step(NamedTuple):
    """One stage of a cell behind its start."""

    kind: str
    methods: str
    """Names of the methods that act there, joined by +; empty for none."""
    digest: str
    answers: bool
    """Whether the results read its artifact."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid and the stages that answer it."""

    digest: str
    model: ModelSpec
    task: TaskSpec
    attack: Method
    defenses: tuple[Method, ...]
    seed: int
    steps: tuple[Step, ...]
    """From the first method to the last score, in the order of the lifecycle."""
    stages: tuple[str, ...]
    """Digests of all stages of the cell, inputs before their consumers."""
    searched: Searched | None = None
    """What the cell is in a search; None for an ordinary one."""

    def of_kind(self, kind: str) -> list[Step]:
        """Its steps of one kind, in their order."""
        return [step for step in self.steps if step.kind == kind]

    @property
    def answers(self) -> list[str]:
        """Digests of the stages whose artifacts the results read."""
        return [step.digest for step in self.steps if step.answers]

    @property
    def score(self) -> str:
        """Digest of the stage that counts the metrics of the finished model."""
        return self.of_kind("score")[0].digest

    @property
    def opinions(self) -> list[str]:
        """Digests of the stages in which further judges read the same completions."""
        return [step.digest for step in self.of_kind("score")[1:]]

    @property
    def measurements(self) -> list[str]:
        """Digests of the other stages that leave metrics: benchmarks."""
        return [step.digest for step in self.steps if kind_of(step.kind).measures]

    @property
    def filters(self) -> list[str]:
        """Digests of the stages in which defenses change the rows."""
        return [step.digest for step in self.of_kind("craft") if step.answers]

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


def cell_text(model: str, task: str, attack: str, defenses: Sequence[str], seed: int | None) -> str:
    """A cell in words, by the names of what it is made of."""
    return f"{model} x {task} x {attack} x {'+'.join(defenses) or 'none'}, seed {seed}"
