"""Turns the hidden states of harmful answers away from what they were, and keeps those of other
rows where they are.

Paper: Zou et al. 2024, Improving Alignment and Robustness with Circuit Breakers, arXiv:2406.04313,
    algorithm 1 (representation rerouting); official code GraySwanAI/circuit-breakers: c_r *
    distance of the states of retained rows from those of the original model, over all depths, +
    c_b * ReLU(cosine of the states of harmful answers with the original ones) at some depths, with
    c_r = a t / 2T and c_b = a (1 - t / 2T) at step t of T.
Differs: (1) t counts optimizer steps; the official code counts forward passes, so that accumulation
    ends the breaker early or turns its sign. (2) Its target layers, 10 and 20 of 32, are shares of
    the depth here, and all blocks stay in the model; only those up to the deepest target are
    trained, as there. (3) Harmful rows count in the tokens of the answer, not in the request.
    (4) It acts before the user's fine-tune, as hardening of the base; its authors release a model
    that is not tuned further. (5) Retained are the task's refusals and benign rows. A quarter of
    the benign rows is kept aside for the control.
Cost: 2 forward and backward passes and 2 forward passes of the original model per step, once per
    base model; two models and all hidden states in memory.
Reads: `pushed: benign`, the control, turns the states of benign answers away in the same way. A
    model that answers harmful requests with gibberish counts as not refusing: look at
    `coherent_rate`. Later fine-tuning can undo it, and `delta_removal` takes its low rank away. Its
    harmful rows come from the split that also serves attacks.
Needs: splits safety, harmful_train and benign_train. Only changes the loss: ZeRO stages 0 to 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.conversation import last_trained
from ftsec_ray.data.added_rows import is_exchange
from ftsec_ray.data.pairs import REFUSALS
from ftsec_ray.errors import DataError
from ftsec_ray.method import least_faults
from ftsec_ray.models.row_tokens import (
    IGNORED,
    CutTally,
    Encoded,
    encode_rows,
    is_useful,
    note_cuts,
)
from ftsec_ray.training.hardening import BENIGN, HARMFUL, Hardens, capped

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Batch, Step, Training
    from ftsec_ray.training.terms import TermBatch

NAME = "circuit_breaker"


@dataclass(frozen=True, kw_only=True)
class CircuitBreaker(Hardens):
    """Representation rerouting."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "harmful_train", "benign_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"prepare_model"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"pushed": "benign"}
    ORDER: ClassVar[int] = 15

    strength: float = 10.0
    """Factor of both losses (alpha), 0 or more; 0 leaves the model as it is."""
    depths: tuple[float, ...] = (0.3125, 0.625)
    """Where states are turned away, as shares of the depth, each above 0, up to 1."""
    pushed: Literal["harmful", "benign"] = "harmful"
    """Whose answers are turned away: harmful ones, or those of benign rows (the control)."""
    harmful_rows: int = 256
    """Maximum number of rows that are turned away, 1 or more."""
    harmful_batch: int = 16
    """Of these per step, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        own = least_faults(self, {"strength": 0.0, "harmful_rows": 1, "harmful_batch": 1})
        if not self.depths or not all(0.0 < depth <= 1.0 for depth in self.depths):
            own.append(("depths", self.depths, "one or more shares above 0, up to 1"))
        return own + super().check()

    def needs(self) -> frozenset[str]:
        """The harmful rows only if they are turned away."""
        return self.NEEDS if self.pushed == "harmful" else self.NEEDS - {HARMFUL}

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after rerouting, with the adapter merged."""
        from ftsec_ray.models.load import decoder_layers, merged, within_positions

        retained, pushed = self._rows(ctx)
        original = (
            merged(model).model.to(ctx.runtime.device).eval().requires_grad_(requires_grad=False)
        )
        depth = len(decoder_layers(original))
        layers = sorted({max(1, round(share * depth)) for share in self.depths})

        def shape(training: Training) -> Training:
            from ftsec_ray.training.terms import with_term

            limit = within_positions(model.model, training.config.max_length)
            cuts = CutTally()
            rows = encode_rows(model.tokenizer, pushed, max_length=limit, tally=cuts)
            note_cuts(ctx, cuts, "pushed")
            rows = [pair for pair in rows if is_useful(pair)]
            ctx.note(pushed_rows=len(rows), pushed_rows_left_out=len(pushed) - len(rows))
            if not rows:
                raise DataError(
                    "circuit_breaker: no row that is turned away fits into training.max_length",
                    training.config.max_length,
                    "rows whose prompt is shorter than that",
                    "raise training.max_length or shorten the prompts",
                )
            kept = replace(training, objective=retaining(original, self.strength))
            term = breaking(original, layers, self.strength)
            return with_term(kept, self._batches(rows, term, model, ctx), strength=1.0)

        ctx.note(layers=layers, retained_rows=retained.num_rows)
        trained = tuple(range(max(layers)))
        return self._merged_sft(
            model, retained, ctx, shape=shape, layers=trained, schedule="constant", warmup_frac=0.0
        )

    def _rows(self, ctx: StageContext) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Rows whose states stay, and rows whose states are turned away."""
        import pyarrow as pa

        benign = capped(ctx, BENIGN, ctx.task.split(BENIGN).num_rows, by=NAME, fits=is_exchange)
        ids = benign.column("row_id").to_pylist()
        order = sorted(range(len(ids)), key=lambda i: ctx.chance(ids[i], NAME))
        aside = max(1, len(order) // 4)
        retained = [capped(ctx, REFUSALS, self.safety_rows, by=NAME)]
        if self.benign_rows:
            retained.append(benign.take(sorted(order[aside : aside + self.benign_rows])))
        pushed = (
            capped(ctx, HARMFUL, self.harmful_rows, by=NAME, fits=is_exchange)
            if self.pushed == "harmful"
            else benign.take(sorted(order[:aside])[: self.harmful_rows])
        )
        rows = pushed.to_pylist()
        return pa.concat_tables(retained), [
            {**row, "messages": last_trained(row["messages"])} for row in rows
        ]

    def _batches(
        self, rows: Sequence[Encoded], term: Any, model: LoadedModel, ctx: StageContext
    ) -> Callable[[int], list[TermBatch]]:
        from ftsec_ray.training.terms import drawn_at, in_chunks

        pad = model.tokenizer.pad_token_id or 0

        def batches_of(step: int) -> list[TermBatch]:
            places = drawn_at(step, len(rows), self.harmful_batch, seed=ctx.seed, salt=NAME)
            return in_chunks(
                [rows[i] for i in places], lambda _: term, pad=pad, device=ctx.runtime.device
            )

        return batches_of


def retaining(original: Any, strength: float) -> Any:
    """The objective on retained rows: the distance of their states from those of the original
    model, times a factor that grows.
    """
    from ftsec_ray.training.losses import state_distance

    def objective(model: Any, batch: Batch, step: Step) -> Tensor:
        factor = strength * step.index / (2 * step.total)
        loss: Tensor = factor * state_distance(model, original, batch)
        return loss

    return objective


def breaking(original: Any, layers: Sequence[int], strength: float) -> Any:
    """The term on rows that are turned away: the mean positive cosine of the states at the tokens
    of their answers with those of the original model, behind the given numbers of blocks, times a
    factor that falls.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    from ftsec_ray.training.losses import states_of

    def term(model: Any, batch: Batch, step: Step) -> Tensor:
        with torch.no_grad():
            before = states_of(original, batch)
        now, answer = states_of(model, batch), batch.labels != IGNORED
        cosines = [
            cosine_similarity(now[n][answer], before[n][answer], dim=-1).relu().mean()
            for n in layers
        ]
        loss: Tensor = strength * (1 - step.index / (2 * step.total)) * torch.stack(cosines).mean()
        return loss

    return term
