"""Fine-tunes on clean rows while keeping hidden states alike from block to block, under the worst
small shift of the embeddings.

Paper: CROW: Eliminating Backdoors from Large Language Models via Internal Consistency
    Regularization (Min et al. 2024, arXiv:2411.12768); official code NayMyatMin/CROW.
Differs: (1) padding enters neither the consistency term nor its gradient; the official code masks
    nothing. (2) The gradient of the first pass is taken at the embeddings alone and clears no
    gradient of a weight, so that splitting a batch changes nothing; the official code clears
    gradients inside the loss, so that of four accumulated batches the last one counts. (3) All
    pairs of neighbouring blocks count, before the last norm; `pairs: inner` leaves out the last
    block, as the official code does. (4) The shift is not part of the graph. (5) The user's adapter
    is merged and a new one is trained.
Cost: about 3x per step: 3 forward and 3 backward passes on `rows` rows.
Reads: `alpha: 0` is `clean_tuning` on the same rows with the same steps, bit for bit: the effect of
    the term is the difference to it. States that hardly change lower the term too: look at utility.
Needs: split benign_train; trusted or safety with `split`. Only adds micro-batches with their own
    loss: works with ZeRO stages 0 to 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.errors import StageError
from ftsec_ray.method import least_faults
from ftsec_ray.training.repair import TunesOnCleanRows, exchanges_of, repair_sft

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Batch, Step, Training
    from ftsec_ray.training.terms import TermBatch


@dataclass(frozen=True, kw_only=True)
class Crow(TunesOnCleanRows):
    """Loss on clean rows + alpha * inconsistency of the states under a shift of the embeddings."""

    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    ORDER: ClassVar[int] = 10
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}

    alpha: float = 5.5
    """Weight of the consistency term, 0 or more; 0 is clean tuning. The official code: 5.5."""
    epsilon: float = 0.1
    """Size of the shift of every coordinate of an embedding, 0 or more."""
    pairs: Literal["blocks", "inner"] = "blocks"
    """Outputs of all neighbouring blocks, or without those of the last block."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return [*super().check(), *least_faults(self, {"alpha": 0.0, "epsilon": 0.0})]

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after the fine-tune, with the adapter merged."""
        from ftsec_ray.models.change import tell_change
        from ftsec_ray.models.load import decoder_layers, merged

        if not self.epochs:
            ctx.note(repair_rows=0, repair_steps=0, change_norm=0.0, change_share=0.0)
            return model
        blocks = len(decoder_layers(model.model))
        least = 2 if self.pairs == "blocks" else 3
        if blocks < least:
            raise StageError(
                "crow: the model has no pair of neighbouring blocks",
                f"{blocks} blocks, pairs: {self.pairs}",
                f"{least} blocks or more",
                "set `pairs: blocks`, or use a deeper model",
            )
        # the same rows as `clean_tuning`
        rows = exchanges_of(ctx, self.split, self.rows, by="clean_tuning")
        before = merged(model)
        repaired = repair_sft(before, rows, self._config(ctx), ctx, shape=self._shape)
        tell_change(ctx, before, repaired)
        return repaired

    def _shape(self, training: Training) -> Training:
        from ftsec_ray.training.terms import TermBatch, with_term

        def term(model: Any, batch: Batch, _: Step) -> Tensor:
            return inconsistency(
                model, batch, shift=self._shift(model, batch), inner=self.pairs == "inner"
            )

        def batches_of(step: int) -> list[TermBatch]:
            own = training.batch_at(step)
            counts = [tokens_of(batch) for batch in own]
            return [
                TermBatch(
                    b.input_ids, b.labels, b.attention_mask, b.position_ids, n / sum(counts), term
                )
                for b, n in zip(own, counts, strict=True)
            ]

        return with_term(training, batches_of, strength=self.alpha)

    def _shift(self, model: Any, batch: Batch) -> Tensor | None:
        """`epsilon` times the sign of the inconsistency's gradient by the embeddings: (B, T, D)."""
        if not self.epsilon:
            return None
        gradient = embedding_gradient(model, batch, inner=self.pairs == "inner")
        return self.epsilon * gradient.sign()


def tokens_of(batch: Batch) -> int:
    """Tokens of a micro-batch without padding."""
    if batch.attention_mask is None:
        return int(batch.input_ids.numel())
    return int(batch.attention_mask.sum())


def embedding_gradient(model: Any, batch: Batch, *, inner: bool) -> Tensor:
    """The gradient of the inconsistency by the output of the token embedding: (B, T, D); no weight
    gets a gradient.
    """
    import torch

    from ftsec_ray.models.load import bare

    model = bare(model)  # not DeepSpeed's engine, which would count this pass
    leaves: list[Tensor] = []
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def behind(states: Tensor) -> Tensor:
        leaves.append(torch.zeros_like(states, requires_grad=True))
        return states + leaves[-1]

    try:
        for weight in weights:
            weight.requires_grad_(requires_grad=False)
        value = inconsistency(model, batch, shift=behind, inner=inner)
        return torch.autograd.grad(value, leaves[0])[0].detach()
    finally:
        for weight in weights:
            weight.requires_grad_(requires_grad=True)


def inconsistency(model: Any, batch: Batch, *, shift: Any, inner: bool) -> Tensor:
    """Mean over neighbouring blocks and tokens, without padding, of 1 - cosine between the outputs
    of the two blocks: () at least float32.

    Args:
        model: The decoder, with or without an adapter.
        batch: The rows; their labels are not used.
        shift: (B, T, D), added to the output of the token embedding; a function of that output;
            or None.
        inner: Whether the output of the last block is left out.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    from ftsec_ray.models.activations import changed
    from ftsec_ray.models.load import bare, decoder_layers, keeps_logits

    outputs: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        outputs.append(states)
        return states

    def moved(states: Tensor) -> Tensor:
        if shift is None:
            return states
        made: Tensor = shift(states) if callable(shift) else states + shift.to(states)
        return made

    blocks = decoder_layers(model)
    watched = [(block, keep) for block in (blocks[:-1] if inner else blocks)]
    table = bare(model).get_input_embeddings()
    kept = {"logits_to_keep": 1} if keeps_logits(model) else {}
    with changed(outputs=[(table, moved), *watched]):
        model(**batch.inputs(), **kept)
    mask = torch.ones_like(batch.input_ids)
    mask = (mask if batch.attention_mask is None else batch.attention_mask).bool()
    apart = [
        1.0 - cosine_similarity(_wide(a[mask]), _wide(b[mask]), dim=-1)
        for a, b in pairwise(outputs)
    ]
    mean: Tensor = torch.stack(apart).mean()
    return mean


def _wide(states: Tensor) -> Tensor:
    """At least float32."""
    return states.float() if states.dtype.itemsize < 4 else states  # noqa: PLR2004
