"""Adds to the weights the direction from a harmful twin of the aligned model back to the aligned
model.

Paper: Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through
    Task Arithmetic (Bhardwaj, Do, Poria 2024, arXiv:2402.11746): RESTA, and RESTA_d with DARE (Yu
    et al. 2024, arXiv:2311.03099).
Differs: the official code was not read, and the default of `strength` was not checked against the
    paper. The twin is the model from which the user's fine-tune started, tuned on
    `harmful_rows` of the task's forbidden requests with answers; `twin: unaligned` takes the model
    before alignment instead, which costs nothing. Everything is computed in float32 and rounded
    once.
Published: harmful answers of fine-tuned models fall from 18.6 to 5.1 % (adapters) and from 9.2 to
    1.5 % (full fine-tuning), means over tasks and safety sets.
Cost: one fine-tune on `harmful_rows` rows; none with `twin: unaligned`.
Reads: `vector: random` adds a random direction of equal norm to every weight. The twin's rows come
    from the end of the order in which `harmful_tuning` takes them; another attack may share some.
    With `drop` above 0 the user's update changes too, also at `strength` 0.
Needs: the model from which the fine-tune started; split harmful_train, or the model before
    alignment (`unaligned`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Phase, above_faults, least_faults
from ftsec_ray.training.repair import exchanges_of, repair_config, repair_sft

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class Resta(Defense):
    """Tuned weights + strength * (start - harmful twin)."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "unaligned", "harmful_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"revise_model"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"vector": "random"}

    strength: float = 0.5
    """Factor of the safety vector, 0 or more; 0 adds nothing."""
    drop: float = 0.0
    """Share of the entries of the user's update that are set to zero at random, 0 to below 1; the
    others grow by 1 / (1 - drop). Above 0 it is RESTA_d.
    """
    twin: Literal["harmful", "unaligned"] = "harmful"
    """The model at the other end of the safety vector: the start tuned on harm, or the model before
    alignment.
    """
    vector: Literal["safety", "random"] = "safety"
    """The safety vector, or a random one with the same norm for every weight: the control."""
    harmful_rows: int = 128
    """Maximum number of harmful rows, 1 or more."""
    epochs: float = 5.0
    """Passes over the harmful rows, more than 0."""
    learning_rate: float | None = None
    """Peak learning rate of the twin, more than 0; None: that of the sweep's fine-tune."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return [
            *least_faults(self, {"strength": 0.0, "harmful_rows": 1}),
            *([] if 0.0 <= self.drop < 1.0 else [("drop", self.drop, "0 to below 1")]),
            *above_faults(self, "epochs"),
            *(above_faults(self, "learning_rate") if self.learning_rate is not None else []),
        ]

    def needs(self) -> frozenset[str]:
        """The start, and what the twin is made of."""
        return frozenset({"start", "unaligned" if self.twin == "unaligned" else "harmful_train"})

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with the vector added, in its own dtype and without an adapter."""
        import torch

        from ftsec_ray.models.change import check_counterparts, tell_change
        from ftsec_ray.models.load import copy_model, merged
        from ftsec_ray.models.precision import narrow, tell_rounding, widened

        if not self.strength and not self.drop:
            ctx.note(change_norm=0.0, change_share=0.0)
            return model
        # in float32 before an adapter is merged, so that weights are rounded once
        before, start = (merged(widened(one)) for one in (model, ctx.load("start")))
        check_counterparts("resta", before, start, "the start model")
        made, vector = copy_model(before), {}
        if self.strength:
            twin = self._twin(start, ctx)
            check_counterparts("resta", start, twin, f"the twin ({self.twin})")
            vector = vectors(start, twin)
        theirs = dict(start.model.named_parameters())
        for name, weight in made.model.named_parameters():
            with torch.no_grad():
                if self.drop:
                    base = theirs[name].detach().to(weight)
                    weight.copy_(base + self._dropped(name, weight - base, ctx))
                if name in vector:
                    weight += self.strength * self._chosen(name, vector[name], ctx).to(weight)
        tell_rounding(ctx, narrow(made, model), made)
        norm = sum(float(part.double().square().sum()) for part in vector.values()) ** 0.5
        ctx.note(vector_norm=norm, moved_weights=len(vector))
        tell_change(ctx, before, made, start)
        return made

    def _twin(self, start: LoadedModel, ctx: StageContext) -> LoadedModel:
        from ftsec_ray.models.load import merged
        from ftsec_ray.models.precision import widened

        if self.twin == "unaligned":
            return merged(widened(ctx.load("unaligned")))
        rows = exchanges_of(ctx, "harmful_train", self.harmful_rows, by="resta")
        config = repair_config(
            ctx,
            learning_rate=self.learning_rate or ctx.training.learning_rate,
            epochs=self.epochs,
            batch_size=ctx.training.batch_size,
        )
        return repair_sft(start, rows, config, ctx, part="harmful")

    def _dropped(self, name: str, update: Tensor, ctx: StageContext) -> Tensor:
        """The update with random entries set to zero and the others scaled up."""
        import torch

        draws = ctx.numpy_rng("resta", "drop", name).random(tuple(update.shape))
        kept = torch.from_numpy(draws >= self.drop).to(update.device)
        return update * kept / (1.0 - self.drop)

    def _chosen(self, name: str, safety: Tensor, ctx: StageContext) -> Tensor:
        """The safety vector of a weight, or a random one of its norm."""
        import torch

        if self.vector == "safety":
            return safety
        # numpy's generator gives the same direction on every device
        drawn = ctx.numpy_rng("resta", "random", name).standard_normal(tuple(safety.shape))
        direction = torch.from_numpy(drawn).to(safety)
        scaled: Tensor = direction * (safety.norm() / direction.norm())
        return scaled


def vectors(start: LoadedModel, twin: LoadedModel) -> dict[str, Tensor]:
    """Start minus twin for every weight that differs, float32."""
    theirs, found = dict(twin.model.named_parameters()), {}
    for name, weight in start.model.named_parameters():
        here = weight.detach().float()
        difference = here - theirs[name].detach().float().to(here.device)
        if difference.any():
            found[name] = difference
    return found
