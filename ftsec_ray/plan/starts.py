"""The common start of all cells of one model and task: the task's rows, the model, and its
unaligned twin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ftsec_ray.config.sweep import ModelSpec, TaskSpec
from ftsec_ray.errors import SpecError
from ftsec_ray.identity import canonical
from ftsec_ray.lifecycle import kind_of
from ftsec_ray.plan.durations import parameters_of
from ftsec_ray.plan.origin import Origin, model_origin, task_origin
from ftsec_ray.plan.resources import is_large
from ftsec_ray.plan.stage_set import CellStart, StageSet
from ftsec_ray.plan.stage_templates import Templates


class Starts:
    """Adds the stages before any method acts."""

    def __init__(self, stages: StageSet, templates: Templates) -> None:
        self._stages = stages
        self._templates = templates
        self._sweep = {"sweep": stages.spec.name}
        self._origins: dict[tuple[str, ...], Origin] = {}
        self._large: dict[str, bool] = {}

    def of(self, model: ModelSpec, task: TaskSpec) -> CellStart:
        """The start of the cells of a model and task; adds its stages."""
        task_digest = self._task(task)
        is_ladder = model.source.startswith("ladder:") and not model.source.endswith("-base")
        is_published_aligned = model.aligned and not is_ladder and model.align is None
        raw, where = self._source(model, model.source, aligned=is_published_aligned)
        where = {**where, "aligned": True}
        shell = CellStart(
            model,
            task_digest,
            raw,
            None,
            where,
            parameters_of(model),
            self._align_resource(model, is_ladder=is_ladder),
            is_large=False,
            stages=(),
        )
        chain = [task_digest, raw]
        reference, unaligned = raw, None
        if is_ladder:
            template = self._templates.template(kind_of("align"), {"source": model.source})
            inputs = (("model", raw),)
            reference, unaligned = self._stages.add(template, inputs, None, shell), raw
            chain.append(reference)
        if model.align is not None:
            align = {"align": json.loads(canonical(model.align))}
            template = replace(self._templates.template(kind_of("align"), align), trains=())
            given = (("model", reference), ("task", task_digest))
            unaligned = reference
            reference = self._stages.add(template, given, None, shell, trains_all=True)
            chain.append(reference)
        elif unaligned is None and model.unaligned is not None:
            unaligned, _ = self._source(model, model.unaligned, aligned=False)
        return CellStart(
            model,
            task_digest,
            reference,
            unaligned,
            {
                "model": model.name,
                "family": model.family,
                "aligned": model.aligned or model.align is not None,
                "parameters": parameters_of(model),
                **self._sweep,
            },
            parameters_of(model),
            self._stages.resource(model),
            self._is_large(task),
            tuple(chain),
        )

    def _align_resource(self, model: ModelSpec, *, is_ladder: bool) -> str:
        """Resource class of the stage that aligns a model in one process; `cpu` if none does."""
        is_split = self._stages.sizing.is_split(model, trains_all=True)
        is_single = is_ladder or (model.align is not None and not is_split)
        return self._stages.resource(model, trains_all=True) if is_single else "cpu"

    def _is_large(self, task: TaskSpec) -> bool:
        if task.name not in self._large:
            self._large[task.name] = is_large(task, self._stages.spec.data.ray_above)
        return self._large[task.name]

    def _task(self, task: TaskSpec) -> str:
        """Digest of the stage that reads a task."""
        origin = self._origin(task.name, ("task", task.name), lambda: task_origin(task))
        template = self._templates.template(kind_of("task"), origin.params)
        where = {**origin.where, **self._sweep}
        return self._stages.add(template, (), None, None, where=where)

    def _source(
        self, model: ModelSpec, source: str, *, aligned: bool
    ) -> tuple[str, Mapping[str, Any]]:
        """Digest and `where` of the stage that loads or pre-trains a model."""
        key = ("model", model.name, source)
        origin = self._origin(model.name, key, lambda: model_origin(model, source))
        where = {
            "model": model.name,
            "family": model.family,
            "aligned": aligned,
            "parameters": parameters_of(model),
            **self._sweep,
            **origin.where,
        }
        template = self._templates.template(kind_of("source"), origin.params, trains=origin.trains)
        takes = self._stages.resource(model, trains_all=True) if origin.trains else "cpu"
        return self._stages.add(template, (), None, None, where=where, resource=takes), where

    def _origin(self, place: str, key: tuple[str, ...], find: Callable[[], Origin]) -> Origin:
        if key not in self._origins:  # files are read once for all cells
            try:
                self._origins[key] = find()
            except SpecError as fault:
                self._stages.faults[key] = (place, fault)
                self._origins[key] = Origin({"missing": list(key)}, {})
        return self._origins[key]
