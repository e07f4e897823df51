"""Set the weights to zero that matter for refusing and not for being useful.

Paper: Wei et al. 2024, Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank
    Modifications, arXiv:2402.05162, section 3.1 (SNIP and Wanda scores, set difference); the scores
    are those of Lee et al. 2019, arXiv:1810.02340, and Sun et al. 2023, arXiv:2306.11695.
Differs: the safety rows are the task's own forbidden requests with refusals, the utility rows its
    benign requests with answers; the paper's rank form (ActSVD) is not here. As in the official
    code, every linear layer of the blocks is pruned by itself over all its weights, embeddings and
    head stay, and the scores are taken at the tokens of the answers only. Equal scores are ordered
    by position. `random_weights` is a control of ours: as many weights of every matrix, drawn from
    all that are not among the useful ones.
Cost: no training; two passes over `rows` rows, with a backward pass for `snip`; memory for the
    scores of all linear layers, twice.
Needs: splits safety (forbidden requests with refusals) and benign_train; a dense model. It needs
    whole gradients and whole weights, and so works with ZeRO stages 0 and 1 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.method import Attack, Phase
from ftsec_ray.models.families import RESIDUAL_WRITERS
from ftsec_ray.models.load import merged
from ftsec_ray.training.weight_scores import (
    encoded_split,
    highest,
    linear_layers,
    snip_scores,
    wanda_scores,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.models.row_tokens import Encoded


@dataclass(frozen=True, kw_only=True)
class SafetyPrune(Attack):
    """Pruning of the weights that only safety needs."""

    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"safety", "benign_train"})
    STRUCTURE = frozenset({RESIDUAL_WRITERS})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1})

    score: Literal["snip", "wanda"] = "snip"
    """`snip`: |weight x gradient| of the loss on the answers; `wanda`: |weight| x norm of its
    input over the tokens of the answers.
    """
    prune_share: float = 0.1
    """Share q of every matrix with the highest safety scores, 0..1: the dose. 0 changes nothing."""
    keep_share: float = 0.1
    """Share p of every matrix with the highest utility scores, 0..1, which is never pruned."""
    rows: int = 128
    """Maximum number of safety rows, and of utility rows."""
    random_weights: bool = False
    """Whether as many weights of every matrix are pruned at random instead: the control."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = [
            (name, value, "a share, 0..1")
            for name, value in (("prune_share", self.prune_share), ("keep_share", self.keep_share))
            if not 0 <= value <= 1
        ]
        return faults + ([("rows", self.rows, "1 or more")] if self.rows < 1 else [])

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model without the chosen weights."""
        import torch

        model = merged(model)
        model.model.eval()
        layers = linear_layers(model.model)
        measure = snip_scores if self.score == "snip" else wanda_scores
        safety = measure(model.model, layers, self._rows_of(model, "safety", ctx))
        utility = measure(model.model, layers, self._rows_of(model, "benign_train", ctx))
        pruned = overlap = 0
        for name, layer in layers.items():
            wanted = highest(safety[name], self.prune_share)
            useful = highest(utility[name], self.keep_share)
            chosen = wanted & ~useful
            overlap += int((wanted & useful).sum())
            if self.random_weights:
                chosen = self._drawn(name, int(chosen.sum()), ~useful, ctx)
            with torch.no_grad():
                layer.weight.masked_fill_(chosen.to(layer.weight.device), 0.0)
            pruned += int(chosen.sum())
        weights = sum(layer.weight.numel() for layer in layers.values())
        ctx.note(
            matrices=len(layers),
            weights=weights,
            pruned=pruned,
            pruned_share=pruned / weights,
            kept_as_useful=overlap,
        )
        return model

    def _rows_of(self, model: LoadedModel, split: str, ctx: StageContext) -> list[Encoded]:
        return encoded_split(model, split, self.rows, ctx, by="safety_prune")

    def _drawn(self, name: str, count: int, able: Tensor, ctx: StageContext) -> Tensor:
        """A mask with `count` of the able weights, drawn at random."""
        import torch

        places = able.flatten().nonzero().squeeze(1).numpy()
        drawn = ctx.numpy_rng("safety_prune", name).choice(places, size=count, replace=False)
        mask = torch.zeros(able.numel(), dtype=torch.bool)
        mask[torch.from_numpy(drawn)] = True
        return mask.view(able.shape)
