"""Collects the stages of a plan, each digest once, with its resources and expected cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ftsec_ray.config.sweep import ModelSpec, SweepSpec, TrainingConfig
from ftsec_ray.errors import SpecError
from ftsec_ray.evals.model_judges import BATCH as JUDGE_BATCH
from ftsec_ray.identity import digests
from ftsec_ray.method import Method
from ftsec_ray.plan.durations import parameters_of, prior_s
from ftsec_ray.plan.memory import inference_gib
from ftsec_ray.plan.resources import (
    Sizing,
    data_resource,
    gpu_memory_of,
    gpus_for,
    group_name,
    resource_name,
)
from ftsec_ray.plan.stage import Resource, Stage
from ftsec_ray.plan.stage_templates import StageTemplate

JUDGE_TOKENS = 1024
"""Assumed tokens of a judge's prompt, which contains request and answer; sizes its memory."""
Inputs = tuple[tuple[str, str], ...]
"""(role, digest) pairs."""


@dataclass(frozen=True, slots=True)
class CellStart:
    """The stages of one model on one task before any method acts."""

    model: ModelSpec
    task: str
    """Digest of the stage that reads the task."""
    reference: str
    """Digest of the model that every cell starts from."""
    unaligned: str | None
    """Digest of the model before alignment; None if the sweep gives none."""
    where: Mapping[str, Any]
    parameters: int
    resource: Resource
    """Resource class of the stages that load the model."""
    is_large: bool
    """Whether the training data may be large enough for a data pipeline."""
    stages: tuple[str, ...]


class StageSet:
    """All stages of a plan by digest, and the faults found while they were added."""

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.stages: dict[str, Stage] = {}
        self.faults: dict[tuple[str, ...], tuple[str, SpecError]] = {}
        self.sizing = Sizing(spec)
        self._known: dict[tuple[object, ...], str] = {}
        self._groups: dict[tuple[object, ...], tuple[Resource, dict[str, Any]]] = {}

    def tuned_otherwise(self, training: TrainingConfig) -> StageSet:
        """The same stages and faults, sized for other training settings."""
        other = StageSet(replace(self.spec, training=training))
        other.stages, other.faults, other._known = self.stages, self.faults, self._known
        return other

    def add(
        self,
        template: StageTemplate,
        inputs: Inputs,
        seed: int | None,
        start: CellStart | None,
        *,
        where: Mapping[str, Any] | None = None,
        resource: Resource = "cpu",
        trains_all: bool = False,
    ) -> str:
        """Digest of the stage with these inputs; adds the stage if it is new.

        Args:
            template: Kind, methods and params of the stage.
            inputs: (role, digest) pairs.
            seed: Seed of the stage; None if it has none.
            start: The start of the cell; None for a stage that reads a task or loads a model.
            where: Values that do not decide the result; default: those of `start`.
            resource: Resource class without a `start`.
            trains_all: Whether the stage trains all weights (pre-training, alignment).
        """
        memo = (template.key, inputs, seed)
        digest = self._known.get(memo)
        if digest is not None:
            return digest
        digest = self._known[memo] = digests.of_stage(template.key, inputs, seed)
        place = where if where is not None else start.where if start else {}
        parameters = start.parameters if start else int(place.get("parameters", 0))
        takes = "cpu" if not template.on_model else start.resource if start else resource
        if template.judge is not None:
            place = {**place, "judges": dict(template.judge.where)}
            if template.judge.model is not None:
                takes = self._judge_resource(template.judge.model)
        if template.row_wise and start and start.is_large:
            takes = data_resource(self.spec.data.workers, takes)
        is_split = (
            start is not None
            and template.trains is not None
            and self.sizing.is_split(start.model, trains_all=trains_all)
        )
        if start is not None and template.trains is not None and is_split:
            takes, group = self.worker_group(start.model, template.trains, trains_all=trains_all)
            place = {**place, "worker_group": group}
        elif (
            start is not None
            and template.trains is not None
            and self.sizing.recomputes(start.model, trains_all=trains_all)
        ):
            place = {**place, "gradient_checkpointing": True}
        kind = template.kind
        if template.where:
            place = {**place, **template.where}
        variant = "model" if template.needs and not kind.needs_model else None
        if template.judge is not None and template.judge.model is not None:
            parameters, variant = parameters_of(template.judge.model), "judge"
        self.stages[digest] = Stage(
            digest,
            kind.name,
            template.method,
            seed,
            inputs,
            template.params,
            place,
            takes,
            prior_s(kind.prior_of(template.params, variant), parameters, takes),
        )
        return digest

    def resource(self, model: ModelSpec, *, trains_all: bool = False) -> Resource:
        """Resource class of the stages of a model; records a fault if they fit on no GPU."""
        try:
            return self.sizing.resource(model, trains_all=trains_all)
        except SpecError as fault:
            self.faults["model", model.name, "memory", str(trains_all)] = (model.name, fault)
            return "gpu"

    def _judge_resource(self, judge: ModelSpec) -> Resource:
        """Resource class of the stages in which a judge model scores answers."""
        wanted = self.spec.resources.gpus_per_stage
        if wanted != "auto":
            return resource_name(wanted)
        card = gpu_memory_of(self.spec)
        gib = inference_gib(
            parameters_of(judge),
            models=1,
            batch=JUDGE_BATCH,
            prompt_tokens=JUDGE_TOKENS,
            new_tokens=self.spec.evaluation.new_tokens,
        )
        gpus = gpus_for(gib, card)
        if gpus > 1:
            self.faults["judge", judge.source] = (
                judge.name,
                SpecError(
                    f"the judge needs about {gib:.0f} GiB in one process, but one GPU has"
                    f" {card:g} GiB",
                    parameters_of(judge),
                    f"at most {card:g} GiB",
                    "use a smaller judge or a larger resources.gpu_memory_gib; if the size is"
                    " wrong, set `parameters` of the judge; or set resources.gpus_per_stage: 1 to"
                    " skip this check",
                ),
            )
            return "gpu"
        return resource_name(gpus)

    def worker_group(
        self, model: ModelSpec, methods: Sequence[Method], *, trains_all: bool
    ) -> tuple[Resource, dict[str, Any]]:
        """Resource class and settings of the worker group that trains a model; records a fault if
        no worker group fits.
        """
        memo = (model.name, trains_all, *(id(method) for method in methods))
        if memo not in self._groups:
            try:
                group = self.sizing.worker_group(model, tuple(methods), trains_all=trains_all)
                name = group_name(group.workers, on_gpu=self.spec.resources.wants_gpus)
                self._groups[memo] = name, asdict(group)
            except SpecError as fault:
                self.faults["worker_group", model.name, fault.what] = (model.name, fault)
                self._groups[memo] = "gpu", {}
        return self._groups[memo]
