"""Penalises the part of an adapter's update that lies outside the directions in which alignment
moved each weight.

Paper: AsFT: Anchoring Safety During LLM Fine-Tuning Within Narrow Safety Basin, 2025,
    arXiv:2506.08473; official code PKU-YuanGroup/AsFT.
Differs: (1) The official code's matrix C = V V^T / |V|_F, with V the change of a weight by
    alignment, is no projector: its eigenvalues are far below 1, so that |(I - C) update| is nearly
    |update| and the penalty is plain decay of the update. `projection: code` keeps it; the default
    is a true projector on the top `rank` left singular vectors of V. (2) The update is
    scale * B @ A; the official code leaves the scale of the adapter out. (3) The penalty counts
    once per step, however the step is split. (4) It is computed from products of the factors,
    never from a whole update. (5) Layers that alignment did not change have no such directions and
    no penalty; they are counted.
Cost: about 1.05x plain fine-tuning; two more models are read before the first step, with one SVD
    per layer; `code` keeps V of all layers in memory.
Reads: `projection: none` penalises the whole update with the same weight: the control.
Needs: the aligned model (`reference` or `start`) and the same model before alignment (`unaligned`);
    a fine-tune with `adapter: lora`. Only adds to the loss: works with ZeRO stages that keep
    trained weights whole (0 to 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.errors import StageError
from ftsec_ray.method import Defense, Phase, least_faults
from ftsec_ray.models.lora import scale_of, trained_factors

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import StageContext
    from ftsec_ray.training.setup import Batch, Objective, Step, Training

NAME = "asft"
Outside = Callable[["Tensor"], "Tensor"]
"""Columns without their part along the directions of alignment: (out, R) -> (out, R)."""


@dataclass(frozen=True, kw_only=True)
class AsFT(Defense):
    """Loss + strength * sum over layers of |(I - P) * update|_F^2."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"unaligned", "reference", "start"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"projection": "none"}
    CONFLICTS: ClassVar[Mapping[str, str]] = {
        "safe_lora": "both shrink the update outside the directions of alignment: the second has"
        " little left to remove"
    }

    strength: float = 1.0
    """Weight of the penalty (lambda), 0 or more; 0 is plain fine-tuning."""
    projection: Literal["rank_k", "code", "none"] = "rank_k"
    """P: a true projector of rank `rank`, the official code's matrix, or zero (the control)."""
    rank: int = 8
    """Number of directions per layer that `rank_k` leaves free, 1 or more."""
    aligned: Literal["reference", "start"] = "reference"
    """Which aligned model gives V: the cell's own, or the model from which the fine-tune starts
    (after hardening, and after attacks on the base).
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"strength": 0.0, "rank": 1}
        return least_faults(self, least)

    def needs(self) -> frozenset[str]:
        """The models whose difference is V."""
        return frozenset({"unaligned", self.aligned})

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with the penalty added to its loss."""
        from ftsec_ray.training.terms import TermBatch

        if not self.strength:
            return training
        config = training.config
        if config.adapter != "lora":
            raise StageError(
                "asft penalises the update of an adapter, and this fine-tune trains all weights",
                f"training.adapter: {config.adapter}",
                "training.adapter: lora",
                "set training.adapter: lora, or leave asft out",
            )
        scale = scale_of(config)
        outside, inner = self._outside(ctx), training.objective

        def objective(model: Any, batch: Batch, step: Step) -> Tensor:
            loss = inner(model, batch, step)
            if isinstance(batch, TermBatch) and batch.term is not None:
                return loss
            return loss + self.strength * penalty(step.trainable, outside, scale)

        return replace(training, objective=told(objective, outside, ctx))

    def _outside(self, ctx: StageContext) -> dict[str, Outside]:
        """For every linear layer that alignment changed, by its path, the map (I - P)."""
        import torch

        from ftsec_ray.models.load import merged
        from ftsec_ray.models.targets import layer_of
        from ftsec_ray.models.update import transposed_weights, whole_weights

        pair = [merged(ctx.load(role)) for role in (self.aligned, "unaligned")]
        aligned, unaligned = (whole_weights(loaded) for loaded in pair)
        turned, found = transposed_weights(pair[0]), {}
        for name, weight in aligned.items():
            if weight.ndim != 2 or layer_of(name) is None:  # noqa: PLR2004
                continue
            if name not in unaligned or unaligned[name].shape != weight.shape:
                raise StageError(
                    f"asft: weight {name!r} of the aligned model has no counterpart of the same"
                    " shape before alignment",
                    tuple(unaligned[name].shape) if name in unaligned else None,
                    str(tuple(weight.shape)),
                )
            if torch.equal(weight, unaligned[name]):
                continue
            V = weight.detach().float() - unaligned[name].detach().float()
            V = V.T if name in turned else V
            found[name.removesuffix(".weight")] = self._map(V.to(ctx.runtime.device))
        return found

    def _map(self, V: Tensor) -> Outside:
        from ftsec_ray.defenses.safe_lora import official_projection, top_directions

        if self.projection == "none":
            return lambda columns: columns
        if self.projection == "code":
            return lambda columns: columns - official_projection(V.to(columns.dtype), columns)
        U = top_directions(V, self.rank)
        return lambda columns: columns - U.to(columns.dtype) @ (U.to(columns.dtype).T @ columns)


def told(objective: Objective, outside: Mapping[str, Outside], ctx: StageContext) -> Objective:
    """The objective, which records in its first call how many adapted layers have a penalty."""

    def with_record(model: Any, batch: Batch, step: Step) -> Tensor:
        if "penalised_layers" not in ctx.notes:
            layers = set(trained_factors(step.trainable))
            if not layers & set(outside):
                raise StageError(
                    "asft: alignment changed none of the layers that have an adapter",
                    len(layers),
                    "a layer that both alignment and the adapter change",
                    "give the model as it was before alignment (`unaligned`)",
                )
            ctx.note(
                penalised_layers=len(layers & set(outside)),
                layers_alignment_left=len(layers - set(outside)),
            )
        return objective(model, batch, step)

    return with_record


def penalty(
    trainable: Mapping[str, Tensor], outside: Mapping[str, Outside], scale: float
) -> Tensor:
    """The sum over layers of |(I - P) * scale * B @ A|_F^2, by products of R x R: ()."""
    import torch

    terms = []
    for path, (A, B) in trained_factors(trainable).items():
        if path in outside:
            with torch.autocast(B.device.type, enabled=False):  # squares of small numbers
                left = outside[path](B)
                terms.append(((left.T @ left) * (A @ A.T)).sum())
    total: Tensor = scale**2 * torch.stack(terms).sum()
    return total
