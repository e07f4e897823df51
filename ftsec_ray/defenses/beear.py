"""Looks for a shift of hidden states that makes the model comply, and trains it to refuse under
that shift.

Paper: BEEAR: Embedding-based Adversarial Removal of Safety Backdoors in Instruction-tuned Language
    Models (Zeng et al. 2024, arXiv:2406.17092): an inner search of one shift for all rows at the
    last positions of the prompt, an outer step that keeps the wanted answers under it.
Differs: the official code was not read; depth, positions and numbers of steps are ours. (1) The
    shift starts at zero in every step and takes `inner_steps` steps of equal length against its
    gradient, and its norm at every position is limited to `radius` times the mean norm of the
    states there: without a limit it can grow beyond any state. (2) Wanted and unwanted answers
    belong to different forbidden requests (splits safety and harmful_train). (3) The user's adapter
    is merged and a new one is trained.
Published: backdoors set during RLHF fall from above 95 to below 1 % attack success, a sleeper agent
    that writes unsafe code from 47 to 0 %.
Cost: about 2 + 2 x `inner_steps` forward and backward passes on `batch_size` rows per step, for
    `epochs` passes over `rows` benign rows.
Reads: `inner_steps: 0` is the same tuning on benign rows and refusals without a shift: the control.
    It assumes that the defender can name the unwanted behaviour: here compliance with forbidden
    requests. The harmful rows come from the end of the order in which `harmful_tuning` takes them;
    another attack may share some.
Needs: splits safety and harmful_train, and benign_train (or trusted). Only adds micro-batches with
    their own loss: works with ZeRO stages 0 to 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.method import above_faults, least_faults
from ftsec_ray.training.repair import TunesOnCleanRows, exchanges_of, repair_sft

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Batch, Objective, Step, Training
    from ftsec_ray.training.terms import TermBatch

PAIR = frozenset({"safety", "harmful_train"})


@dataclass(frozen=True, kw_only=True)
class Beear(TunesOnCleanRows):
    """Loss on benign rows + loss on refusals under the worst shift."""

    NEEDS: ClassVar[frozenset[str]] = TunesOnCleanRows.NEEDS | PAIR
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    ORDER: ClassVar[int] = 10
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"inner_steps": 0}

    inner_steps: int = 5
    """Steps of the search in every optimizer step, 0 or more; 0 trains without a shift."""
    inner_rate: float = 0.2
    """Length of a step at every position, as a share of the mean norm of the states, more
    than 0."""
    radius: float = 0.5
    """Maximum norm of the shift at a position, as a share of the mean norm of the states, more
    than 0.
    """
    depth: float = 0.28
    """The block whose output is shifted, as a share of the blocks, 0 to 1; 0.28 is the 9th of 32.
    """
    positions: int = 5
    """Number of shifted tokens at the end of the prompt, 1 or more."""
    safety_weight: float = 1.0
    """Weight of the loss on refusals, 0 or more; 0 is clean tuning."""
    pair_rows: int = 100
    """Maximum number of refusals, and of harmful rows, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"inner_steps": 0, "positions": 1, "safety_weight": 0.0, "pair_rows": 1}
        return [
            *super().check(),
            *least_faults(self, least),
            *above_faults(self, "inner_rate", "radius"),
            *([] if 0.0 <= self.depth <= 1.0 else [("depth", self.depth, "0 to 1")]),
        ]

    def needs(self) -> frozenset[str]:
        """The split of the benign rows, refusals, and harmful rows if there is a search."""
        used = PAIR if self.inner_steps else {"safety"}
        return frozenset({self.split, *(used if self.safety_weight else ())})

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after the fine-tune, with the adapter merged."""
        from ftsec_ray.models.change import tell_change
        from ftsec_ray.models.load import merged

        if not self.epochs:
            ctx.note(repair_rows=0, repair_steps=0, change_norm=0.0, change_share=0.0)
            return model
        # the same rows as `clean_tuning`
        rows = exchanges_of(ctx, self.split, self.rows, by="clean_tuning")
        before = merged(model)
        # the end of the prompt is found in rows that are not packed
        config = self._config(ctx)
        if self.safety_weight and config.batching == "packed":
            config = replace(config, batching="shuffled")
        repaired = repair_sft(
            before,
            rows,
            config,
            ctx,
            shape=(lambda training: self._shape(training, ctx)) if self.safety_weight else None,
        )
        tell_change(ctx, before, repaired)
        return repaired

    def _shape(self, training: Training, ctx: StageContext) -> Training:
        from ftsec_ray.data.rows import from_rows
        from ftsec_ray.training.terms import TermBatch, with_term

        wanted = exchanges_of(ctx, "safety", self.pair_rows, by="beear")
        wanted_at = training.encode(from_rows(wanted), "beear/wanted")
        unwanted_at = None
        if self.inner_steps:
            unwanted = exchanges_of(ctx, "harmful_train", self.pair_rows, by="beear")
            unwanted_at = training.encode(from_rows(unwanted), "beear/unwanted")
            ctx.note(harmful_rows=len(unwanted))
        ctx.note(safety_rows=len(wanted))
        loss, inner, found = training.objective, training.backward, [None]

        def term(model: Any, batch: Batch, step: Step) -> Tensor:
            return self.shifted_loss(model, batch, found[0], loss, step)

        def batches_of(step: int) -> list[TermBatch]:
            return [
                TermBatch(b.input_ids, b.labels, b.attention_mask, b.position_ids, b.weight, term)
                for b in wanted_at(step)
            ]

        def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
            if unwanted_at is not None:
                pair = wanted_at(step.index), unwanted_at(step.index)
                found[0] = self.search(model, *pair, loss, step)
            return inner(model, batches, objective, step)

        return replace(
            with_term(training, batches_of, strength=self.safety_weight), backward=backward
        )

    def search(
        self,
        model: Any,
        wanted: Sequence[Batch],
        unwanted: Sequence[Batch],
        loss: Objective,
        step: Step,
    ) -> Any:
        """The shift after `inner_steps` steps that lower the loss of the unwanted answers minus
        that of the wanted ones: (positions, D); no weight gets a gradient.
        """
        import torch

        from ftsec_ray.models.load import bare

        model = bare(model)  # not DeepSpeed's engine, which would count these passes
        size, width = self.mean_norm(model, wanted)
        shift = torch.zeros(self.positions, width, device=size.device)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        try:
            for weight in weights:
                weight.requires_grad_(requires_grad=False)
            for _ in range(self.inner_steps):
                leaf = shift.detach().requires_grad_()
                gradient = torch.zeros_like(shift)
                for sign, part in ((1.0, unwanted), (-1.0, wanted)):
                    for batch in part:  # one at a time, so that one graph is kept
                        value = self.shifted_loss(model, batch, leaf, loss, step)
                        gradient += torch.autograd.grad(sign * batch.weight * value, leaf)[0]
                norms = gradient.norm(dim=1, keepdim=True)
                shift = shift - self.inner_rate * size * gradient / norms.where(norms > 0, 1.0)
                lengths = shift.norm(dim=1, keepdim=True)
                most = self.radius * size
                shift = shift * (most / lengths.where(lengths > most, most))
        finally:
            for weight in weights:
                weight.requires_grad_(requires_grad=True)
        return shift.detach()

    def mean_norm(self, model: Any, batches: Sequence[Batch]) -> tuple[Tensor, int]:
        """Mean norm of the block's output at the shifted positions, and its width."""
        import torch

        from ftsec_ray.models.activations import changed

        seen: list[Tensor] = []

        def keep(states: Tensor) -> Tensor:
            seen.append(states)
            return states

        with torch.no_grad(), changed(outputs=[(self.block_of(model), keep)]):
            for batch in batches:
                model(**batch.inputs())
        inside = [places(batch.labels, self.positions)[1] for batch in batches]
        there = torch.cat([states[at] for states, at in zip(seen, inside, strict=True)])
        return there.float().norm(dim=-1).mean(), int(there.shape[-1])

    def block_of(self, model: Any) -> Any:
        """The block whose output is shifted."""
        from ftsec_ray.models.load import decoder_layers

        blocks = decoder_layers(model)
        return blocks[min(len(blocks) - 1, int(self.depth * len(blocks)))]

    def shifted_loss(
        self, model: Any, batch: Batch, shift: Any, loss: Objective, step: Step
    ) -> Tensor:
        """The loss of the answers with the shift added to the block's output at the end of the
        prompts; None: without a shift.
        """
        from ftsec_ray.models.activations import changed

        if shift is None:
            return loss(model, batch, step)
        index, inside = places(batch.labels, self.positions)

        def moved(states: Tensor) -> Tensor:
            made: Tensor = states + (shift[index] * inside[..., None]).to(states)
            return made

        with changed(outputs=[(self.block_of(model), moved)]):
            return loss(model, batch, step)


def places(labels: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Of every token, which of the last `positions` tokens before the first answer it is, and
    whether it is one. Shapes: (B, T) -> (B, T) int64, (B, T) bool.
    """
    import torch

    first = (labels != -100).int().argmax(dim=1)
    offset = torch.arange(labels.shape[1], device=labels.device)[None] - first[:, None] + positions
    return offset.clamp(0, positions - 1), (offset >= 0) & (offset < positions)
