"""Estimates how long a stage will take: from records of similar stages, else scaled from records of
other model sizes, else from a prior by kind and size.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from heapq import nsmallest
from math import inf, log
from statistics import linear_regression, median
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import ModelSpec
from ftsec_ray.plan.stage import Stage, is_on_gpu, workers_of

if TYPE_CHECKING:
    from ftsec_ray.plan.graph import Plan

_GPU_SPEEDUP = 200.0
UNKNOWN_PARAMETERS = 1_000_000_000
"""Assumed number of parameters of a model of unknown size."""
_SIZE = re.compile(r"(?<![\w.])(?:(\d+)x)?(\d+(?:\.\d+)?)([mb])(?![a-z])", re.IGNORECASE)
"""A size in a name: `-135M-`, `1.5b`, `8x7B`. Not `k`: in names of models it is a context length.
"""


def named_parameters(model: ModelSpec) -> int | None:
    """Number of parameters as declared, else from the source's name; None if both are missing."""
    if model.parameters:
        return model.parameters
    match = _SIZE.search(model.source.rsplit("/", 1)[-1])
    if match is None:
        return None
    experts, count, unit = match.groups()
    return round(int(experts or 1) * float(count) * {"m": 1e6, "b": 1e9}[unit.lower()])


def parameters_of(model: ModelSpec) -> int:
    """Number of parameters as declared or named, else a guess of 1e9, which `ftsec plan` shows."""
    return named_parameters(model) or UNKNOWN_PARAMETERS


def prior_s(prior: tuple[float, float], parameters: int, resource: str) -> float:
    """Expected seconds of a stage on a model of this size.

    Args:
        prior: (fixed seconds, seconds per million parameters) on one CPU core; for the order of
            work only their ratios matter.
        parameters: Number of parameters of the model.
        resource: Resource class of the stage.
    """
    fixed, per_million = prior
    work = per_million * parameters / 1e6
    return fixed + (work / _GPU_SPEEDUP if is_on_gpu(resource) else work) / workers_of(resource)


def learned_from(
    plan: Plan, done: Collection[str], *, each: int = 8, others: int = 256
) -> set[str]:
    """Digests of a sample of artifacts whose records are enough to estimate durations; a sample, so
    that a large store stays fast.

    Args:
        plan: The plan.
        done: Digests of the artifacts in the store.
        each: Records per combination of kind, method and model size of the plan, at most.
        others: Records of other sweeps, at most; used if a combination has no record of its own.
    """
    similar: dict[tuple[str, str | None, object], list[str]] = defaultdict(list)
    for stage in plan.stages.values():
        group = similar[stage.kind, stage.method, stage.where.get("parameters")]
        if len(group) < each and stage.digest in done:
            group.append(stage.digest)
    own = {digest for group in similar.values() for digest in group}
    if all(similar.values()):
        return own
    # Digests are hashes, so the smallest ones are a random sample.
    return own | set(nsmallest(others, (digest for digest in done if digest not in plan.stages)))


class Basis(Enum):
    """Basis of an estimate."""

    RECORDS = "records"
    """Records of the same kind, method and size."""
    SCALED = "scaled"
    """Records of the same kind and method at other sizes, scaled by FLOPs."""
    PRIOR = "prior"
    """The prior, corrected by records of other methods of the same kind, if there are any."""


@dataclass(frozen=True, slots=True)
class _Point:
    """The durations and size of one record."""

    parameters: int
    flops: float
    wall_s: float
    prior_s: float


class Costs:
    """Expected seconds of a stage: from records, else scaled from records of other sizes, else from
    the prior.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._points: dict[tuple[str, str | None, bool], dict[int, list[_Point]]] = defaultdict(
            lambda: defaultdict(list)
        )
        ratios: dict[tuple[str, bool], list[float]] = defaultdict(list)
        for record in records:
            kind, method, on_gpu, point = _read(record)
            if point is not None:
                self._points[kind, method, on_gpu][point.parameters].append(point)
                ratios[kind, on_gpu].append(point.wall_s / point.prior_s)
        self._ratio = {key: median(values) for key, values in ratios.items()}
        self._known: dict[tuple[str, str | None, bool, int, float], tuple[float, Basis]] = {}

    @property
    def is_learned(self) -> bool:
        """Whether there is any record to learn from."""
        return bool(self._ratio)

    def __call__(self, stage: Stage) -> float:
        """Expected seconds of a stage."""
        return self.estimate(stage)[0]

    def estimate(self, stage: Stage) -> tuple[float, Basis]:
        """Expected seconds of a stage, and the basis of this estimate."""
        key = (
            stage.kind,
            stage.method,
            is_on_gpu(stage.resource),
            int(stage.where.get("parameters") or 0),
            stage.cost_s,
        )
        estimate = self._known.get(key)
        if estimate is None:
            estimate = self._known[key] = self._estimate(*key)
        return estimate

    def _estimate(
        self,
        kind: str,
        method: str | None,
        on_gpu: bool,  # noqa: FBT001
        size: int,
        prior: float,
    ) -> tuple[float, Basis]:
        sizes = self._points.get((kind, method, on_gpu))
        if not sizes:
            return prior * self._ratio.get((kind, on_gpu), 1.0), Basis.PRIOR
        if size in sizes:
            return (
                prior * median(point.wall_s / point.prior_s for point in sizes[size]),
                Basis.RECORDS,
            )
        return _scaled(sizes, size, prior), Basis.SCALED


def _read(record: Mapping[str, Any]) -> tuple[str, str | None, bool, _Point | None]:
    """Kind, method, whether it ran on a GPU, and the point of a record; no point if the record is
    incomplete: it is only used for estimates, so that is no error.
    """
    try:
        wall_s, prior = float(record["wall_s"]), float(record["cost_s"])
        size = int((record.get("where") or {}).get("parameters") or 0)
        flops = float(record.get("flops") or 0.0)
        kind, method = str(record["kind"]), record.get("method")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return "", None, False, None
    on_gpu = is_on_gpu(str(record.get("resource") or ("gpu" if record.get("gpu_s") else "cpu")))
    is_right = 0 < wall_s < inf and 0 < prior < inf and 0 <= flops < inf and size >= 0
    point = _Point(size, flops, wall_s, prior) if is_right else None
    return kind, None if method is None else str(method), on_gpu, point


def _scaled(sizes: Mapping[int, list[_Point]], size: int, prior: float) -> float:
    """Expected seconds at a model size without records: a linear fit of seconds against FLOPs
    through the sizes with records.

    With a single size, or without FLOPs, it scales the prior by the ratio at the nearest size.
    """
    near = sizes[min(sizes, key=lambda other: abs(log(max(other, 1) / max(size, 1))))]
    flops = {other: median(point.flops for point in points) for other, points in sizes.items()}
    if len(sizes) == 1 or not all(flops.values()):
        return prior * median(point.wall_s / point.prior_s for point in near)
    known = {
        flops[other]: median(point.wall_s for point in points) for other, points in sizes.items()
    }
    expected = size * median(point.flops / max(1, point.parameters) for point in near)
    line = linear_regression(list(known), list(known.values())) if len(known) > 1 else None
    if line is None or line.intercept < 0 or line.slope < 0:
        return expected * median(seconds / flop for flop, seconds in known.items())
    return line.intercept + line.slope * expected
