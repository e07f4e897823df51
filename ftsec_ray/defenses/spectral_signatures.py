"""Drops the rows whose hidden state lies farthest along the main direction of their label, after a
short fine-tune on the rows.

Paper: Tran, Li and Madry 2018, Spectral Signatures in Backdoor Attacks, arXiv:1811.00636,
    algorithm 1; official code MadryLab/backdoor_data_poisoning.
Differs: (1) The paper's classifiers are trained from scratch on images; here the aligned model is
    fine-tuned by the sweep's recipe (`warmup_epochs`), and the representation is the output of its
    last block at the token before the answer. (2) Rows without a label form one group, since an
    answer in free text has no class. (3) `epsilon` is a share of each label's rows, not a count.
    (4) Rows without a prompt, or beyond the model's positions, are kept and counted.
Cost: one more fine-tune and one forward pass per row; no training with `warmup_epochs: 0`.
Reads: it always drops 1.5 epsilon of the rows, also of clean data: read `filter_fpr` of the cell
    without attack. `scores: random` drops as many rows of each label at random.
Needs: the aligned model (`reference`). The warm-up runs in one process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.data.row_filters import at_random, highest, without_rows
from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.context import StageContext

FACTOR = 1.5
"""Dropped rows per row that may be poisoned, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(Defense):
    """Drop the rows with the highest ((r_i - mean) . v)^2 of each label."""

    PHASE: ClassVar[Phase] = "pre"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"scores": "random"}

    epsilon: float = 0.1
    """Highest share of a label's rows that may be poisoned, 0 to 0.66: 1.5 times as many rows of
    every label are dropped. 0 drops none.
    """
    scores: Literal["spectral", "random"] = "spectral"
    """What decides which rows of a label are dropped; `random`: the control."""
    warmup_epochs: float | None = None
    """Passes over the rows of the fine-tune before the scores, 0 or more; None: those of the
    sweep's recipe, 0: the aligned model's own states.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        if not 0 <= self.epsilon < 1 / FACTOR:
            faults.append(("epsilon", self.epsilon, "0 to 0.66"))
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < float("inf"):
            faults.append(("warmup_epochs", self.warmup_epochs, "0 or more, and finite"))
        return faults

    def keeps_rows(self) -> bool:
        """Whether no row is dropped."""
        return self.epsilon == 0

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The rows without those that score highest in their label."""
        if self.epsilon == 0:
            return without_rows(rows, set(), ctx)
        states = self._states(rows, ctx)
        groups: dict[str | None, list[str]] = defaultdict(list)
        for row_id, label in zip(
            *(rows.column(name).to_pylist() for name in ("row_id", "label")), strict=True
        ):
            if row_id in states:
                groups[label].append(row_id)
        dropped: set[str] = set()
        shares: dict[str, float] = {}
        for label, ids in sorted(groups.items(), key=lambda pair: str(pair[0])):
            count = int(FACTOR * self.epsilon * len(ids) + 1e-9)
            if self.scores == "random":
                dropped |= at_random(ids, count, ctx, "spectral_signatures")
                continue
            scores, share = spectral([states[row_id] for row_id in ids])
            shares["none" if label is None else label] = share
            dropped |= highest(dict(zip(ids, scores, strict=True)), count)
        ctx.note(unread_rows=rows.num_rows - len(states), top_direction_share=shares)
        return without_rows(rows, dropped, ctx)

    def _states(self, rows: pa.Table, ctx: StageContext) -> dict[str, Tensor]:
        """The state of every row that can be read, by id; none is computed for the control."""
        import torch

        from ftsec_ray.models.row_states import last_states, layer_at, prompt_ids
        from ftsec_ray.training.warm_up import warmed_up

        plain = rows.to_pylist()
        is_control = self.scores == "random"
        model = ctx.load("reference") if is_control else warmed_up(ctx, rows, self.warmup_epochs)
        found = {
            row["row_id"]: ids
            for row, ids in zip(plain, prompt_ids(model, plain), strict=True)
            if ids is not None
        }
        if is_control:
            return dict.fromkeys(found, torch.empty(0))
        states = last_states(model, list(found.values()), layer_at(model, 1.0))
        return dict(zip(found, states, strict=True))


def spectral(states: list[Tensor]) -> tuple[list[float], float]:
    """The squared component of every state, less their mean, along the direction in which they
    differ most; and the share of all squared differences that lies along it.

    Args:
        states: (D,) float64 each.
    """
    import torch

    matrix = torch.stack(states)
    matrix = matrix - matrix.mean(0)
    _, values, directions = torch.linalg.svd(matrix, full_matrices=False)
    total = float(values.square().sum())
    scores: list[float] = (matrix @ directions[0]).square().tolist()
    return scores, float(values[0] ** 2) / total if total else 0.0
