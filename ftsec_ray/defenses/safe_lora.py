"""Projects the fine-tuned update onto the directions in which alignment moved each weight, in the
layers where the two disagree most.

Paper: Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning LLMs (Hsu et al. 2024,
arXiv:2405.16833), section 3; official code IBM/SafeLoRA.
Differs: (1) the code's matrix V V^T / |V|_F is no projector: it shrinks an update to a small part
of its norm, under 1 % for the weights of real models, so a chosen layer is practically dropped.
`projection: code` keeps it, `rank_k` is a true projector on the top `rank` left singular vectors of
V, `drop` is the control that drops the layer. (2) Layers are matched by name and shape, not by
substring and order, so that biases and unequal shapes cause no error. (3) Everything is computed in
float32, and nothing changes before all cosines are known. (4) For a model without an adapter, the
update is the difference to the start of its fine-tune.
Cost: two more models in memory; one d x d product and, for `rank_k`, one SVD per layer; no data.
Needs: the aligned model (`reference` or `start`), the same model before alignment (`unaligned`),
    and the model from which the fine-tune started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from ftsec_ray.errors import StageError
from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.models.update import Update


Projection = Callable[["Tensor"], "Tensor"]
"""A linear map of columns. Shapes: (out, N) -> (out, N)."""


class LayerCandidate(NamedTuple):
    """A layer's update, the projection of its columns, and the cosine between the update and its
    projection.
    """

    update: Update
    project: Projection
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SafeLora(Defense):
    """Update <- C @ update for the layers with a low cosine between the two."""

    VERSION: ClassVar[int] = 2
    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"unaligned", "reference", "start"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"projection": "drop"}

    projection: Literal["code", "rank_k", "drop"] = "code"
    """The official code's matrix, a true projector of rank `rank`, or dropping the update (with the
    cosines of `code`).
    """
    rank: int = 8
    """Number of dimensions that `rank_k` keeps, 1 or more."""
    select: Literal["number", "cosine"] = "number"
    """Project the `number` layers with the lowest cosine (the default of the official code), or all
    layers whose cosine is at most `tau`. A layer is one weight matrix.
    """
    number: int = 10
    """Number of layers, 1 or more; the official default."""
    tau: float = 0.5
    """Maximum cosine, -1 to 1, for `select: cosine`; the official default. A cosine is 1 if the
    projection changes no direction.
    """
    aligned: Literal["reference", "start"] = "reference"
    """Which aligned model gives V: the cell's own, or the model from which the fine-tune started
    (after hardening, and after attacks on the base).
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        faults += [] if self.rank >= 1 else [("rank", self.rank, "1 or more")]
        faults += [] if -1.0 <= self.tau <= 1.0 else [("tau", self.tau, "-1 to 1")]
        faults += [] if self.number >= 1 else [("number", self.number, "1 or more")]
        return faults

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with the chosen updates projected."""
        from ftsec_ray.models.update import updates, whole_weights

        aligned, unaligned = (
            whole_weights(ctx.load(self.aligned)),
            whole_weights(ctx.load("unaligned")),
        )
        revised, changes = updates(model, ctx.load("start"), low_rank=True)
        candidates = [
            c
            for update in changes
            if (c := self._candidate(update, aligned, unaligned)) is not None
        ]
        if not candidates:
            raise StageError(
                "safe_lora: alignment changed none of the fine-tuned layers",
                len(changes),
                "a layer that both alignment and the fine-tune changed",
                "give the model as it was before alignment (`unaligned`)",
            )
        chosen = self._chosen(candidates)
        before = sum(c.update.norm() ** 2 for c in chosen)
        for c in chosen:
            c.update.shrink(0.0) if self.projection == "drop" else c.update.project(c.project)
        after = sum(c.update.norm() ** 2 for c in chosen)
        ctx.note(
            layers=len(candidates),
            projected=[c.update.module for c in chosen],
            cosines={c.update.module: round(c.cosine, 6) for c in candidates},
            norm_kept=(after / before) ** 0.5 if chosen else None,
            adapter=revised.has_adapter,
        )
        return revised

    def _candidate(
        self, update: Update, aligned: Mapping[str, Any], unaligned: Mapping[str, Any]
    ) -> LayerCandidate | None:
        """None for weights that are not a linear layer of a block, and for those that alignment
        did not change.
        """
        import torch

        key = f"{update.module}.weight"
        if update.weight.ndim != 2 or update.layer is None:  # noqa: PLR2004
            return None
        for name, weights in (("aligned", aligned), ("unaligned", unaligned)):
            if key not in weights or weights[key].shape != update.weight.shape:
                raise StageError(
                    f"safe_lora: weight {key!r} of the fine-tuned model has no counterpart of the"
                    f" same shape in the {name} model",
                    tuple(weights[key].shape) if key in weights else None,
                    str(tuple(update.weight.shape)),
                )
        if torch.equal(aligned[key], unaligned[key]):
            return None
        before_and_after = (
            update.oriented(weights[key].detach()) for weights in (aligned, unaligned)
        )
        project = self._projection(*before_and_after)
        return LayerCandidate(update, project, cosine(project(update.delta()), update.delta()))

    def _projection(self, aligned: Tensor, unaligned: Tensor) -> Projection:
        """The linear map of columns. V is computed at each use, because the V of all layers
        together may not fit into memory.
        """
        if self.projection != "rank_k":
            return lambda columns: official_projection(aligned.float() - unaligned.float(), columns)
        U = top_directions(aligned.float() - unaligned.float(), self.rank)

        def onto(columns: Tensor) -> Tensor:
            basis = U.to(columns.device)
            return basis @ (basis.T @ columns)

        return onto

    def _chosen(self, candidates: list[LayerCandidate]) -> list[LayerCandidate]:
        if self.select == "number":
            return sorted(candidates, key=lambda c: c.cosine)[: self.number]
        return [c for c in candidates if c.cosine <= self.tau]


def official_projection(V: Tensor, columns: Tensor) -> Tensor:
    """V V^T / |V|_F @ columns: the official code's map, which is not a true projection. Shapes: V
    (out, in), columns (out, N).
    """
    projected: Tensor = V @ (V.T @ columns) / V.norm()
    return projected


def top_directions(V: Tensor, rank: int) -> Tensor:
    """The top `rank` left singular vectors of V; U U^T is their projector. Shapes: V (out, in) ->
    (out, K <= rank).
    """
    import torch

    U, S, _ = torch.linalg.svd(V, full_matrices=False)
    # directions that V does not span hold no alignment: keep none of them, even if `rank` allows it
    noise = float(S[0]) * max(V.shape) * torch.finfo(S.dtype).eps
    directions: Tensor = U[:, : min(rank, int(S.gt(noise).sum()))]
    return directions


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine between two matrices, flattened; 0 where one of them is zero."""
    one, other = one.double(), other.double()
    norms = float(one.norm() * other.norm())
    return float((one * other).sum()) / norms if norms > 0.0 else 0.0
