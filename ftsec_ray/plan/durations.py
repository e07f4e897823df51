"""How long a stage will take: as records of like stages say, else scaled from other sizes, else a
prior by kind and size.
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
"""Weights of a model whose size nothing tells."""
_SIZE = re.compile(r"(?<![\w.])(?:(\d+)x)?(\d+(?:\.\d+)?)([mb])(?![a-z])", re.IGNORECASE)
"""A size in a name: `-135M-`, `1.5b`, `8x7B`. No `k`: in names of models that is a length of
context.
"""


def named_parameters(model: ModelSpec) -> int | None:
    """Count of weights as declared, else as the source's name says; None when neither tells."""
    if model.parameters:
        return model.parameters
    found = _SIZE.search(model.source.rsplit("/", 1)[-1])
    if found is None:
        return None
    experts, count, unit = found.groups()
    return round(int(experts or 1) * float(count) * {"m": 1e6, "b": 1e9}[unit.lower()])


def parameters_of(model: ModelSpec) -> int:
    """Count of weights as declared or named, else a guess of 1e9, which `ftsec plan` tells."""
    return named_parameters(model) or UNKNOWN_PARAMETERS


def prior_s(prior: tuple[float, float], parameters: int, resource: str) -> float:
    """Seconds that a stage should take on a model of this size.

    Args:
        prior: Seconds, and seconds more per million weights, on one CPU core; only ratios matter
            for the order of work.
        parameters: Count of weights.
        resource: Its class.
    """
    fixed, per_million = prior
    work = per_million * parameters / 1e6
    return fixed + (work / _GPU_SPEEDUP if is_on_gpu(resource) else work) / workers_of(resource)


def learned_from(
    plan: Plan, done: Collection[str], *, each: int = 8, others: int = 256
) -> set[str]:
    """Digests of artifacts whose records are enough to learn from.

    Those are so many of every kind, method and size of the plan. Where the plan has stages to run
    that are like none of them, records of other sweeps join them, a sample so that a large store
    stays quick to ask.
    """
    found: dict[tuple[str, str | None, object], list[str]] = defaultdict(list)
    for stage in plan.stages.values():
        like = found[stage.kind, stage.method, stage.where.get("parameters")]
        if len(like) < each and stage.digest in done:
            like.append(stage.digest)
    own = {digest for like in found.values() for digest in like}
    if all(found.values()):
        return own
    # Digests are hashes: the first ones are as good as drawn.
    return own | set(nsmallest(others, (digest for digest in done if digest not in plan.stages)))


class Basis(Enum):
    """Where an estimate comes from."""

    RECORDS = "records"
    """Records of the same kind, method and size."""
    SCALED = "scaled"
    """Records of the same kind and method at other sizes, scaled with flops."""
    PRIOR = "prior"
    """The prior, corrected by what other methods of the kind took, where any ran."""


@dataclass(frozen=True, slots=True)
class _Point:
    """One record, as far as it tells about time."""

    parameters: int
    flops: float
    wall_s: float
    prior_s: float


class Costs:
    """Seconds per stage: as records say, else scaled from records of other sizes, else the
    prior.
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
        """Whether any record corrected a prior."""
        return bool(self._ratio)

    def __call__(self, stage: Stage) -> float:
        """Expected seconds of a stage."""
        return self.estimate(stage)[0]

    def estimate(self, stage: Stage) -> tuple[float, Basis]:
        """Expected seconds of a stage, and where they come from."""
        key = (
            stage.kind,
            stage.method,
            is_on_gpu(stage.resource),
            int(stage.where.get("parameters") or 0),
            stage.cost_s,
        )
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._estimate(*key)
        return found

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
    """Kind, method, whether it ran on a GPU, and the point of a record; no point where the record
    does not tell: it helps to guess, and is never a fault.
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
    """Seconds at a size without records: on the line of seconds over flops through the sizes that
    have some.

    From one size alone no line can be drawn: then the prior's own share of fixed time holds.
    """
    near = sizes[min(sizes, key=lambda one: abs(log(max(one, 1) / max(size, 1))))]
    flops = {one: median(point.flops for point in points) for one, points in sizes.items()}
    if len(sizes) == 1 or not all(flops.values()):
        return prior * median(point.wall_s / point.prior_s for point in near)
    known = {flops[one]: median(point.wall_s for point in points) for one, points in sizes.items()}
    wanted = size * median(point.flops / max(1, point.parameters) for point in near)
    line = linear_regression(list(known), list(known.values())) if len(known) > 1 else None
    if line is None or line.intercept < 0 or line.slope < 0:
        return wanted * median(seconds / flop for flop, seconds in known.items())
    return line.intercept + line.slope * wanted
