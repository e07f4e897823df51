"""Fine-tune on benign rows only, chosen so that the model loses its refusals; random benign rows
are the control.

Paper: Guan et al. 2025, Benign Samples Matter! Fine-tuning On Outlier Benign Samples Severely
    Breaks Safety, arXiv:2505.06843 (`self_inf_n`, `self_inf`; official code
    github.com/GuanZihan/Benign-Samples-Matter); He et al. 2024, What is in Your Safe Data?
    Identifying Benign Data that Breaks Safety, arXiv:2404.01099 (`anchors`: gradient matching with
    bi-directional anchoring; official code github.com/princeton-nlp/benign-data-breaks-safety).
Differs: (1) `self_inf_n` is the paper's score log(self-influence + 1) + log(answer tokens + 1); the
    released code lacks the length term, which is `self_inf` here. (2) Safe anchors are refusals of
    other forbidden requests than those of the harmful anchors, because a task may not have both
    answers to one request. (3) Gradients are those of the aligned model in its own precision, over
    all weights (tied weights once). (4) The fine-tune uses the sweep's own recipe; the papers train
    all weights for 5 epochs at 5e-5. (5) Answers that are empty, "yes" or "no" are removed before
    the ranking and not after it, and for `random` too, so that both choose from the same rows. (6)
    `random` has the same number and source of rows, but not the same length; the notes hold the
    mean answer length of each.
Cost: one forward and backward pass per candidate at batch 1 (none for `random`); then plain SFT on
    `samples` rows.
Needs: split benign_train with more rows than `samples`; `anchors` also needs splits safety and
    harmful_train.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray import schema
from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.conversation import Row, answer_of
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase
from ftsec_ray.models.load import merged, within_positions
from ftsec_ray.models.row_tokens import CutTally, Encoded, encode_rows, tell_cuts
from ftsec_ray.training.losses import mean_nll

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

SHORTEST = frozenset({"", "yes", "no"})
"""Answers that are never chosen: the score without the length term is highest on such short rows.
"""
DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class BenignSelection(Attack):
    """Benign rows that break alignment."""

    PHASE: ClassVar[Phase] = "during"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"reference", "benign_train"})

    samples: int = 100
    """Number of rows to fine-tune on, 1 or more."""
    select: Literal["self_inf_n", "self_inf", "anchors", "random"] = "self_inf_n"
    """Which rows: those with the highest score of this name, or random rows (the control)."""
    keep_user_rows: bool = False
    """Whether the chosen rows are added to the user's rows instead of replacing them."""
    anchors: int = 10
    """Rows in each of the three anchor sets of `select: anchors`, 1 or more."""
    anchor_tokens: int = 10
    """Number of first answer tokens of an anchor that its gradient uses, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        counts = {
            "samples": self.samples,
            "anchors": self.anchors,
            "anchor_tokens": self.anchor_tokens,
        }
        return [(name, value, "1 or more") for name, value in counts.items() if value < 1]

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The chosen benign rows, after the user's rows if those are kept."""
        import pyarrow as pa

        pool = [
            row
            for row in ctx.task.split("benign_train").to_pylist()
            if answer_of(row).strip().casefold().rstrip(".") not in SHORTEST
        ]
        if len(pool) <= self.samples:
            raise DataError(
                f"benign_selection: task {ctx.task.name!r} has too few benign rows",
                len(pool),
                f"more than {self.samples} rows in split benign_train (not counting answers that"
                " are empty, yes or no)",
                "lower `samples`, or add rows to benign_train",
            )
        chosen = self._chosen(pool, ctx)
        ctx.note(
            candidates=len(pool),
            samples=len(chosen),
            mean_answer_words=sum(len(answer_of(row).split()) for row in chosen) / len(chosen),
        )
        made = [
            {
                **row,
                "row_id": f"benign_selection/{row['row_id']}",
                "origin": "benign_selection",
                "poisoned": True,
            }
            for row in chosen
        ]
        return pa.concat_tables(
            [
                rows.slice(0, rows.num_rows if self.keep_user_rows else 0),
                pa.Table.from_pylist(made, schema=schema.ROWS),
            ]
        )

    def _chosen(self, pool: list[dict[str, Any]], ctx: StageContext) -> list[dict[str, Any]]:
        if self.select == "random":
            scores = [ctx.chance(row["row_id"], "benign_selection") for row in pool]
        else:
            scores = self._scores(pool, ctx)
            ctx.note(score_min=min(scores), score_max=max(scores))
        order = sorted(range(len(pool)), key=lambda i: (-scores[i], pool[i]["row_id"]))
        return [pool[i] for i in order[: self.samples]]

    def _scores(self, pool: Sequence[Row], ctx: StageContext) -> list[float]:
        """One score per candidate; the highest scores are chosen first."""
        model = merged(ctx.load("reference"))
        model.model.to(ctx.runtime.device).eval().requires_grad_(requires_grad=True)
        limit = ctx.training.max_length if ctx.training is not None else DEFAULT_MAX_TOKENS
        limit = within_positions(model.model, limit)
        cuts = CutTally()
        encoded = encode_rows(model.tokenizer, pool, max_length=limit, tally=cuts)
        tell_cuts(ctx, cuts)
        if self.select == "anchors":
            wanted = self._anchor(model, ctx, limit)
            return [
                sum(float((g.to(w) * w).sum()) for g, w in zip(gradient, wanted, strict=True))
                / (norm(gradient) or 1.0)
                for gradient in gradients(model, encoded)
            ]
        influences = [norm(gradient) ** 2 for gradient in gradients(model, encoded)]
        return (
            influences
            if self.select == "self_inf"
            else [
                self_inf_n(influence, answer_tokens(labels))
                for influence, (_, labels) in zip(influences, encoded, strict=True)
            ]
        )

    def _anchor(self, model: LoadedModel, ctx: StageContext, limit: int) -> list[Tensor]:
        """Mean normalised gradient of the harmful anchors minus that of two sets of refusals."""
        salt = ("benign_selection", "anchor")
        safe = ctx.shuffled("safety", *salt)
        total: list[Tensor] | None = None
        for weight, rows in (
            (1.0, ctx.shuffled("harmful_train", *salt)[: self.anchors]),
            (-1.0, safe[: self.anchors]),
            (-1.0, safe[self.anchors : 2 * self.anchors]),
        ):
            heads = [
                (ids, first_answer_tokens(labels, self.anchor_tokens))
                for ids, labels in encode_rows(model.tokenizer, rows, max_length=limit)
            ]
            for gradient in gradients(model, heads):
                share = weight / (len(rows) * (norm(gradient) or 1.0))
                # in half precision, a sum over many rows would stop growing
                part = [share * (g.float() if g.dtype.itemsize < 4 else g) for g in gradient]  # noqa: PLR2004
                total = part if total is None else [t + p for t, p in zip(total, part, strict=True)]
        assert total is not None  # a split is never empty
        return total


def self_inf_n(self_influence: float, tokens: int) -> float:
    """The paper's score of a row: log(squared gradient norm + 1) + log(answer tokens + 1)."""
    return math.log1p(self_influence) + math.log1p(tokens)


def answer_tokens(labels: Sequence[int]) -> int:
    """Tokens of the answer that count in the loss."""
    return sum(label != -100 for label in labels)


def first_answer_tokens(labels: Sequence[int], count: int) -> list[int]:
    """Labels of the first `count` answer tokens; -100 elsewhere."""
    kept = [i for i, label in enumerate(labels) if label != -100][:count]
    return [label if i in set(kept) else -100 for i, label in enumerate(labels)]


def gradients(model: LoadedModel, encoded: Sequence[Encoded]) -> Iterator[list[Tensor]]:
    """The gradient of each row's mean answer loss (nats per token) over all weights in model order.

    Each gradient is valid until the next one is computed.
    Shapes: like the weights, float32 or the weights' own type.
    """
    import torch

    weights = list(model.model.parameters())
    device = weights[0].device
    for ids, labels in encoded:
        model.model.zero_grad(set_to_none=True)
        given = {"input_ids": torch.tensor([ids], device=device), "use_cache": False}
        wanted = torch.tensor([labels], device=device)
        mean_nll(model.model, wanted, given).backward()
        yield [
            torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights
        ]
    model.model.zero_grad(set_to_none=True)


def norm(gradient: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors of a gradient."""
    return math.sqrt(sum(float(part.double().pow(2).sum()) for part in gradient))
