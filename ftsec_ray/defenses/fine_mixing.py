"""Resets a random part of the fine-tuned weights to the start, then fine-tunes on clean rows.

Paper: Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models (Zhang et al. 2022,
    arXiv:2210.09545): mixing, then tuning on clean rows; E-PUR resets the words whose embeddings
    moved most for how rare they are.
Differs: no official code was read, and the numbers of E-PUR (200 words, counts of at least 20) were
    not checked against the paper. The start is the model from which the user's fine-tune started,
    and not the pre-trained model; kept entries are not scaled up. The paper chooses the share of
    kept weights by accuracy on held-out rows, here it is `keep`. In E-PUR the counts of words are
    those of the clean rows; with tied embeddings the head is reset too. An adapter on linear layers
    moves no embedding: then E-PUR does nothing.
Cost: one pass over the weights, and a fine-tune of `epochs` passes over `rows` rows.
Reads: `keep: 1` with `purify: 0` is `clean_tuning` on the same rows with the same steps: the effect
    of mixing is the difference to it. Mixing alone (`epochs: 0`) is the control `random_mask`.
Needs: split benign_train; trusted or safety with `split`; the model from which the fine-tune
    started.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.method import least_faults
from ftsec_ray.training.repair import TunesOnCleanRows, exchanges_of, repair_sft

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext

LEAST_COUNT = 20
"""Words seen less often count as seen so often."""


@dataclass(frozen=True, kw_only=True)
class FineMixing(TunesOnCleanRows):
    """Each tuned weight stays with probability `keep`; then a fine-tune on clean rows."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "benign_train", "trusted", "safety"})
    ORDER: ClassVar[int] = 10
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0, "purify": 0}

    keep: float = 0.5
    """Share of the tuned weights that stay, 0 to 1; 1 resets nothing."""
    purify: int = 200
    """Number of tokens whose embeddings are reset, 0 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        is_share = 0.0 <= self.keep <= 1.0
        return [
            *super().check(),
            *([] if is_share else [("keep", self.keep, "0 to 1")]),
            *least_faults(self, {"purify": 0}),
        ]

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The mixed model after the fine-tune, without an adapter."""
        from ftsec_ray.models.change import check_counterparts, tell_change
        from ftsec_ray.models.load import copy_model, merged

        if self.keep == 1.0 and not self.purify and not self.epochs:
            ctx.note(change_norm=0.0, change_share=0.0)
            return model
        before, start = merged(model), merged(ctx.load("start"))
        check_counterparts("fine_mixing", before, start, "the start model")
        # the same rows as `clean_tuning`
        rows = exchanges_of(ctx, self.split, self.rows, by="clean_tuning")
        made = copy_model(before)
        self._purify(made, start, rows, ctx)
        self._mix(made, start, ctx)
        if self.epochs:
            made = repair_sft(made, rows, self._config(ctx), ctx)
        tell_change(ctx, before, made, start)
        return made

    def _mix(self, made: LoadedModel, start: LoadedModel, ctx: StageContext) -> None:
        """Reset each entry that the fine-tune changed with probability 1 - keep, in place."""
        import torch

        reset = changed = 0
        theirs = dict(start.model.named_parameters())
        for name, weight in made.model.named_parameters():
            base = theirs[name].detach().to(weight)
            moved = weight.detach() != base
            if self.keep == 1.0 or not moved.any():
                changed += int(moved.sum())
                continue
            draws = ctx.numpy_rng("fine_mixing", name).random(tuple(weight.shape))
            back = torch.from_numpy(draws >= self.keep).to(weight.device)
            with torch.no_grad():
                weight.copy_(torch.where(back, base, weight))
            reset, changed = reset + int((back & moved).sum()), changed + int(moved.sum())
        ctx.note(changed_entries=changed, reset_entries=reset)

    def _purify(
        self,
        made: LoadedModel,
        start: LoadedModel,
        rows: list[dict[str, Any]],
        ctx: StageContext,
    ) -> None:
        """Reset the embeddings of the tokens with the highest scores, in place."""
        import torch

        from ftsec_ray.models.row_tokens import encode_rows

        words = made.model.get_input_embeddings().weight
        base = start.model.get_input_embeddings().weight.detach().to(words)
        encoded = encode_rows(made.tokenizer, rows, max_length=ctx.training.max_length)
        counts = Counter(token for ids, _ in encoded for token in ids)
        scores = movement(words.detach(), base, counts)
        order = scores.argsort(descending=True, stable=True)[: self.purify]
        chosen = order[scores[order] > 0]
        with torch.no_grad():
            words[chosen] = base[chosen]
        names = made.tokenizer.convert_ids_to_tokens(chosen[:8].tolist())
        ctx.note(purified_tokens=len(chosen), most_moved_tokens=[str(name) for name in names])


def movement(words: Tensor, base: Tensor, counts: Mapping[int, int]) -> Tensor:
    """Norm of the change of every token's embedding over the logarithm of its count, at least
    LEAST_COUNT. Shapes: (V, D), (V, D) -> (V,).
    """
    import torch

    often = [math.log(max(counts.get(token, 0), LEAST_COUNT)) for token in range(len(words))]
    moved = (words.float() - base.float()).norm(dim=1)
    scores: Tensor = moved / torch.tensor(often, dtype=moved.dtype, device=moved.device)
    return scores
