"""Takes back the part of the fine-tune's update that matters most on harmful rows.

Paper: Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful
    Fine-tuning (Huang et al. 2024, arXiv:2408.09600), algorithm 1; official code git-disl/Antidote.
Differs: (1) the official code prunes the factors A and B of the adapter separately; with a rank of
    8 it then removes at least one of eight entries of every row of B. Here the update itself is
    scored and pruned, entry by entry, for adapters and full fine-tuning alike. `prune: weight`
    scores and zeroes the tuned weights instead. (2) All linear layers of the blocks count; the
    official setting is q, k and v. (3) Scores are those of the tuned model for all blocks at once.
Cost: no training; one pass over `rows` rows.
Reads: the paper's mask needs two controls. `mask: random` takes back as many entries of every
    output at random, `mask: benign` those that matter most on benign rows. The harmful rows come
    from the end of the order in which `harmful_tuning` takes them; another attack may share some.
Needs: split harmful_train (benign_train with `mask: benign`); the model from which the fine-tune
    started; a dense model. An adapter is merged, because a masked product has full rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Phase
from ftsec_ray.models.families import RESIDUAL_WRITERS

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.models.update import Update

SPLITS = {"harmful": "harmful_train", "benign": "benign_train"}


@dataclass(frozen=True, kw_only=True)
class Antidote(Defense):
    """Entries with the highest |entry| x size of the input on harmful rows are removed."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "harmful_train", "benign_train"})
    STRUCTURE: ClassVar[frozenset[str]] = frozenset({RESIDUAL_WRITERS})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"mask": "random"}

    share: float = 0.1
    """Share of the inputs of every output of a linear layer whose entries are removed, 0 to 1,
    rounded down; 0 changes nothing. The official code: 0.1, or 0.05 on two of its tasks.
    """
    prune: Literal["update", "weight"] = "update"
    """What is scored and removed: the fine-tune's update, or the tuned weight."""
    mask: Literal["harmful", "benign", "random"] = "harmful"
    """The rows by which entries are chosen, or as many entries at random."""
    rows: int = 128
    """Maximum number of rows, 1 or more; the paper: 2000."""
    tokens: Literal["all", "answer"] = "all"
    """The tokens whose inputs count."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        faults += [] if 0.0 <= self.share <= 1.0 else [("share", self.share, "0 to 1")]
        return faults + ([("rows", self.rows, "1 or more")] if self.rows < 1 else [])

    def needs(self) -> frozenset[str]:
        """The start, and the split of the rows."""
        return frozenset({"start", *([] if self.mask == "random" else [SPLITS[self.mask]])})

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model without the chosen entries."""
        import torch

        from ftsec_ray.models.change import tell_change
        from ftsec_ray.models.load import merged
        from ftsec_ray.models.update import updates
        from ftsec_ray.training.weight_scores import encoded_split, input_sizes, linear_layers

        if not self.share:
            ctx.note(removed=0, change_norm=0.0, change_share=0.0)
            return model
        start = ctx.load("start")
        before = merged(model)
        made, changes = updates(merged(model), start, low_rank=False)
        made.model.eval()
        layers = linear_layers(made.model)
        sizes: Mapping[str, Any] = {}
        if self.mask != "random":
            encoded = encoded_split(made, SPLITS[self.mask], self.rows, ctx, by="antidote")
            sizes = input_sizes(made.model, layers, encoded, tokens=self.tokens)
        chosen_from = [update for update in changes if update.module in layers]
        removed = 0
        for update in chosen_from:
            chosen = self._chosen(update, sizes.get(update.module), ctx)
            weight = update.weight.detach()
            mask = update.oriented(chosen).to(weight.device)
            left = (
                torch.zeros_like(weight)
                if self.prune == "weight"
                else update.start.detach().to(weight)
            )
            update.write(torch.where(mask, left, weight))
            removed += int(chosen.sum())
        entries = sum(update.weight.numel() for update in chosen_from)
        ctx.note(matrices=len(chosen_from), entries=entries, removed=removed)
        tell_change(ctx, before, made, merged(start))
        return made

    def _chosen(self, update: Update, size: Tensor | None, ctx: StageContext) -> Tensor:
        """The mask of the entries of one layer that are removed: (out, in) bool, on the CPU."""
        from ftsec_ray.training.weight_scores import drawn_per_output, per_output

        scored = (
            update.delta() if self.prune == "update" else update.oriented(update.weight.detach())
        )
        scores = scored.float().abs().cpu() * (1.0 if size is None else size)
        chosen = per_output(scores, self.share, largest=True)
        return drawn_per_output(chosen, ctx, "antidote", update.name) if size is None else chosen
