"""Drops the rows whose hidden state in one layer is nearer to harmful answers than to refusals.

Paper: Li et al. 2025, Layer-Aware Representation Filtering, arXiv:2507.18631 (LARF); official code
    LLLeoLi/LARF.
Differs: (1) The paper finds the layer whose weights, scaled, change over-refusal most (10 to 14 of
    32 blocks); here the depth is a parameter, 0.4 by default, to be swept. (2) It drops a share and
    not a number of rows; the official code ranks Alpaca and takes the top 1000, 2 %. (3) Anchors
    are the task's own rows, and harmful ones whose request the user's rows ask are left out,
    also with other text around it: the attacker's own rows would be their own anchors. (4) The
    state is that at the last token that is trained on; padding is never read. (5) Rows that cannot
    be read are kept and counted.
Cost: one forward pass per row and per anchor; no gradient.
Reads: it always drops `share` of the rows, also of clean data: read `filter_fpr` of the cell
    without attack. `scores: random` drops as many rows at random.
Needs: the aligned model (`reference`), splits safety and harmful_train for the anchors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.conversation import Row, asked_text
from ftsec_ray.data.added_rows import is_exchange
from ftsec_ray.data.prompt_texts import asked_in, not_asked, prompts_of
from ftsec_ray.data.row_filters import at_random, highest, without_rows
from ftsec_ray.errors import DataError
from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.context import StageContext

NAME = "larf"
DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Larf(Defense):
    """Drop the rows with the highest mean difference of cosines to harmful and to safe anchors."""

    PHASE: ClassVar[Phase] = "pre"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference", "safety", "harmful_train"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"scores": "random"}

    share: float = 0.02
    """Share of the rows that are dropped, 0..1 without 1; 0 drops none."""
    scores: Literal["anchors", "random"] = "anchors"
    """What decides which rows are dropped; `random`: the control."""
    anchors: int = 100
    """Highest number of harmful and of safe anchors, 1 or more; equally many of each."""
    nearest: int = 100
    """Number of the highest differences whose mean is a row's score, 1 or more; as many as there
    are anchors or more: the mean over all.
    """
    depth: float = 0.4
    """Block whose output is read, as a share of the depth: 0 is the first block, 1 the last."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        counts = {"anchors": self.anchors, "nearest": self.nearest}
        faults: list[tuple[str, object, str]] = [
            (name, value, "1 or more") for name, value in counts.items() if value < 1
        ]
        if not 0 <= self.share < 1:
            faults.append(("share", self.share, "0 or more, below 1"))
        if not 0 <= self.depth <= 1:
            faults.append(("depth", self.depth, "0..1"))
        return faults

    def keeps_rows(self) -> bool:
        """Whether no row is dropped."""
        return self.share == 0

    def needs(self) -> frozenset[str]:
        """Nothing if no anchor decides which rows are dropped."""
        return self.NEEDS if self.scores == "anchors" and self.share else frozenset()

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The rows without those of the highest scores."""
        count = round(self.share * rows.num_rows)
        if count == 0:
            return without_rows(rows, set(), ctx)
        if self.scores == "random":
            ids = rows.column("row_id").to_pylist()
            return without_rows(rows, at_random(ids, count, ctx, NAME), ctx)
        return without_rows(rows, highest(self._scored(rows.to_pylist(), ctx), count), ctx)

    def _scored(self, rows: list[dict[str, Any]], ctx: StageContext) -> dict[str, float]:
        """The score of every row that can be read, by its id."""
        from ftsec_ray.models.load import merged
        from ftsec_ray.models.row_states import last_states, layer_at, trained_ids
        from ftsec_ray.models.row_tokens import CutTally, note_cuts

        model = merged(ctx.load("reference"))
        model.model.to(ctx.runtime.device)
        limit = ctx.training.max_length if ctx.training is not None else DEFAULT_MAX_TOKENS
        layer, tally = layer_at(model, self.depth), Counter[str]()

        def states(given: Sequence[Row], cuts: CutTally) -> tuple[list[str], Tensor]:
            ids = trained_ids(model, given, limit, cuts)
            fitting = [
                (row["row_id"], tokens) for row, tokens in zip(given, ids, strict=True) if tokens
            ]
            return [name for name, _ in fitting], last_states(
                model, [tokens for _, tokens in fitting], layer, tally
            )

        anchor_cuts, cuts = CutTally(), CutTally()
        harmful, safe = (states(anchors, anchor_cuts)[1] for anchors in self._anchors(rows, ctx))
        names, users = states(rows, cuts)
        note_cuts(ctx, anchor_cuts, "anchor")
        note_cuts(ctx, cuts, "scored")
        ctx.note(layer=layer, unread_rows=len(rows) - len(names), **tally)
        scores = anchor_scores(users, harmful, safe, self.nearest)
        ctx.note(score_min=min(scores, default=None), score_max=max(scores, default=None))
        return dict(zip(names, scores, strict=True))

    def _anchors(
        self, rows: Sequence[Row], ctx: StageContext
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Equally many random harmful and safe rows that the user's rows do not ask."""
        fresh = {}
        for split in ("harmful_train", "safety"):
            pool = [row for row in ctx.shuffled(split, NAME) if is_exchange(row)]
            asked = asked_in(prompts_of(pool), rows)
            fresh[split] = not_asked([r for r in pool if asked_text(r)], asked)
            ctx.note(**{f"{split}_left_out": len(pool) - len(fresh[split])})
        count = min(self.anchors, *(len(rows_of) for rows_of in fresh.values()))
        if not count:
            raise DataError(
                f"{NAME}: task {ctx.task.name!r} has no anchors that the user's rows do not ask",
                {split: len(rows_of) for split, rows_of in fresh.items()},
                "rows with answers in harmful_train and safety that the user's rows do not ask",
                "add rows to these splits, or leave out this defense",
            )
        ctx.note(anchors=count)
        return fresh["harmful_train"][:count], fresh["safety"][:count]


def anchor_scores(states: Tensor, harmful: Tensor, safe: Tensor, nearest: int) -> list[float]:
    """For every state the mean of the `nearest` highest differences between its cosine to a
    harmful anchor and its cosine to the safe anchor of the same number.

    Args:
        states: (N, D).
        harmful: (K, D).
        safe: (K, D).
        nearest: 1 or more; more than K counts as K.
    """
    import torch

    def cosines(anchors: Tensor) -> Tensor:
        return torch.nn.functional.normalize(states, dim=-1) @ (
            torch.nn.functional.normalize(anchors, dim=-1).T
        )

    differences = cosines(harmful) - cosines(safe)
    scores: list[float] = (
        differences.topk(min(nearest, differences.shape[1]), dim=-1).values.mean(-1).tolist()
    )
    return scores
