"""Turns the hidden states of harmful answers into noise, and raises their loss at every depth,
while the model is aligned again.

Paper: Rosati et al. 2024, Representation Noising: A Defence Mechanism Against Harmful Finetuning,
    arXiv:2405.14577; official code domenicrosati/representation-noising: loss of the refusals +
    beta * mean over layers of MMD^2(states behind the MLP, Gaussian noise) - alpha * log(1 + mean
    over depths of the harmful loss), where the prompt's harmful answer and its refusal differ.
Differs: (1) Hooks are removed after every pass; the official code adds new ones in every step.
    (2) A token of the harmful answer counts where the refusal has another one at the same place of
    the answer, so that prompt, padding and token 0 play no part. (3) The loss at a depth is that of
    the states behind every block through the last norm and the head, without the embeddings; the
    last one is the model's output (without a soft cap of the logits). (4) A row without a refusal
    of its own gets that of another request. (5) Benign rows are mixed in, and an adapter is trained
    and merged. (6) The distance is taken over the rows of one forward pass, and the bandwidth
    counts as a constant.
Cost: about 3 forward and 3 backward passes per step, and the head at every depth, once per base
    model; the states of all layers in memory.
Reads: its authors call it very sensitive: sweep alpha, beta and the learning rate, and look at
    `benign_rate`. Its harmful rows come from the split that also serves attacks.
Needs: splits safety and harmful_train (and benign_train with `benign_rows`); a model whose blocks
    have one attention and one MLP. Only adds micro-batches with their own loss: ZeRO stages 0 to 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.conversation import Row, last_trained, with_answer
from ftsec_ray.data.added_rows import is_exchange
from ftsec_ray.data.pairs import refusals_for
from ftsec_ray.errors import DataError
from ftsec_ray.method import least_faults
from ftsec_ray.models.families import RESIDUAL_WRITERS
from ftsec_ray.models.row_tokens import (
    IGNORED,
    CutTally,
    Encoded,
    answer_tokens,
    encode_rows,
    is_useful,
    note_cuts,
)
from ftsec_ray.training.hardening import HARMFUL, Hardens, capped

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Batch, Step, Training
    from ftsec_ray.training.terms import TermBatch

NAME = "repnoise"
KERNELS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Bandwidths of the Gaussian kernels, as multiples of the mean squared distance."""


@dataclass(frozen=True, kw_only=True)
class RepNoise(Hardens):
    """Loss of the refusals, noise in the states of harmful answers, and ascent on their loss."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "harmful_train", "benign_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"prepare_model"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    STRUCTURE: ClassVar[frozenset[str]] = frozenset({RESIDUAL_WRITERS})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "beta": 0.0}

    alpha: float = 1.0
    """Weight of the ascent on the harmful loss, 0 or more."""
    beta: float = 0.001
    """Weight of the distance to noise, 0 or more; with alpha 0 too it is plain fine-tuning."""
    harmful_rows: int = 256
    """Maximum number of forbidden requests with harmful answers, 1 or more."""
    harmful_batch: int = 8
    """Harmful rows per step, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        own = {"alpha": 0.0, "beta": 0.0, "harmful_rows": 1, "harmful_batch": 1}
        return least_faults(self, own) + super().check()

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after alignment with both terms, with the adapter merged."""
        if self.alpha == self.beta == 0.0:
            return self._merged_sft(model, self._plain_rows(ctx), ctx)
        chosen = capped(ctx, HARMFUL, self.harmful_rows, by=NAME, fits=is_exchange).to_pylist()
        refusals = refusals_for(chosen, ctx, by=NAME)

        def shape(training: Training) -> Training:
            from ftsec_ray.models.load import within_positions
            from ftsec_ray.training.terms import with_term

            limit = within_positions(model.model, training.config.max_length)
            cuts = CutTally()
            rows = differing(model.tokenizer, chosen, refusals, max_length=limit, tally=cuts)
            note_cuts(ctx, cuts, "harmful")
            ctx.note(harmful_rows=len(rows), harmful_rows_left_out=len(chosen) - len(rows))
            return with_term(training, self._batches(rows, model, ctx), strength=1.0)

        return self._merged_sft(model, self._plain_rows(ctx), ctx, shape=shape)

    def _batches(
        self, rows: Sequence[Encoded], model: LoadedModel, ctx: StageContext
    ) -> Callable[[int], list[TermBatch]]:
        from ftsec_ray.training.terms import drawn_at, in_chunks

        pad = model.tokenizer.pad_token_id or 0

        def term(trained: Any, batch: Batch, _: Step) -> Tensor:
            return noising(trained, batch, alpha=self.alpha, beta=self.beta)

        def batches_of(step: int) -> list[TermBatch]:
            places = drawn_at(step, len(rows), self.harmful_batch, seed=ctx.seed, salt=NAME)
            return in_chunks(
                [rows[i] for i in places],
                lambda _: term,
                pad=pad,
                device=ctx.runtime.device,
                by_tokens=False,
            )

        return batches_of


def differing(
    tokenizer: Any,
    rows: Sequence[Row],
    refusals: Sequence[str],
    *,
    max_length: int,
    tally: CutTally | None = None,
) -> list[Encoded]:
    """Harmful rows as token ids, and as labels the tokens of their answers that are not those of
    the refusals; without the rows that have none. `tally` counts rows that are cut. DataError if no
    row has one.
    """
    only = [{**row, "messages": last_trained(row["messages"])} for row in rows]
    found = []
    for (ids, labels), row, refusal in zip(
        encode_rows(tokenizer, only, max_length=max_length, tally=tally),
        rows,
        refusals,
        strict=True,
    ):
        other = iter(answer_tokens(tokenizer, with_answer(row, refusal)))
        kept = [
            label if label != IGNORED and label != next(other, IGNORED) else IGNORED
            for label in labels
        ]
        if is_useful((ids, kept)):
            found.append((ids, kept))
    if not found:
        raise DataError(
            "repnoise: no harmful answer differs from its refusal within training.max_length",
            max_length,
            "harmful answers that are not refusals, and prompts that are shorter than that",
            "raise training.max_length, or give the task other harmful rows",
        )
    return found


def noising(model: Any, batch: Batch, *, alpha: float, beta: float) -> Tensor:
    """Beta * mean over layers of the distance to noise - alpha * log(1 + mean over depths of the
    loss), for the labelled tokens of a micro-batch; () float32.
    """
    import torch

    from ftsec_ray.models.lens import lens_nll

    behind_mlp, behind_block = read_states(model, batch)
    labelled = batch.labels != IGNORED
    labelled[:, 0] = False  # nothing predicts the first token
    total = torch.zeros((), device=batch.labels.device)
    if beta:
        far = [distance_to_noise(states, labelled) for states in behind_mlp]
        total = total + beta * torch.stack(far).mean()
    if alpha:
        rows, columns = labelled[:, 1:].nonzero(as_tuple=True)
        wanted = batch.labels[rows, columns + 1]
        depths = [lens_nll(model, states[rows, columns], wanted) for states in behind_block]
        total = total - alpha * torch.log1p(torch.stack(depths).mean())
    return total


def read_states(model: Any, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The states behind every MLP and behind every block, (B, T, D) each; no hook stays."""
    from ftsec_ray.models.activations import changed
    from ftsec_ray.models.load import decoder_layers, keeps_logits
    from ftsec_ray.models.residual import block_parts

    blocks = decoder_layers(model)
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(place: str, number: int) -> Callable[[Tensor], Tensor]:
        def read(states: Tensor) -> Tensor:
            seen[place, number] = states.reshape(*batch.input_ids.shape, -1)
            return states

        return read

    hooks = [(block_parts(block).mlp, keep("mlp", i)) for i, block in enumerate(blocks)]
    hooks += [(block, keep("block", i)) for i, block in enumerate(blocks)]
    kept = {"logits_to_keep": 1} if keeps_logits(model) else {}
    with changed(outputs=hooks):
        model(**batch.inputs(), **kept)
    mlp, block = ([seen[place, i] for i in range(len(blocks))] for place in ("mlp", "block"))
    return mlp, block


def distance_to_noise(states: Tensor, labelled: Tensor) -> Tensor:
    """MMD^2 between the rows' states and noise, each flattened, with zeros where no token is
    labelled. Shapes: (B, T, D), (B, T) bool -> () float32.
    """
    import torch

    given = states[labelled]
    given = given if given.dtype is torch.float64 else given.float()
    noise = torch.randn_like(given)  # drawn for labelled tokens alone, whatever the padding
    shape = (*labelled.shape, states.shape[-1])
    here, there = (
        torch.zeros(shape, dtype=given.dtype, device=given.device).masked_scatter(
            labelled.unsqueeze(-1), part
        )
        for part in (given, noise)
    )
    return mmd(here.flatten(1), there.flatten(1))


def mmd(ours: Tensor, theirs: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of two samples under a sum of Gaussian kernels. Shapes:
    (N, D), (N, D) -> ().
    """
    import torch

    both = torch.cat([ours, theirs])
    # without the (N, N, D) differences, and without the cancellation of products
    squares = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    count = len(both)
    scale = squares.detach().sum() / (count * count - count)
    kernel = torch.stack([torch.exp(-squares / (scale * width)) for width in KERNELS]).sum(0)
    n = len(ours)
    found: Tensor = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2.0 * kernel[:n, n:].mean()
    return found
