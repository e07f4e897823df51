"""Keeps the entries of the fine-tune's update that cost least safety, up to a budget, and moves the
other weights so that the outputs on safe rows stay.

Paper: Safe Delta: Consistently Preserving Safety when Fine-Tuning LLMs on Diverse Datasets (Lu et
    al. 2025, arXiv:2505.12038); official code ColinLu50/SafeDelta.
Differs: (1) the official budget of a matrix is an absolute number, made of `s`, the width of a
    block and rows / 4096, so that it means something else at every size of model; `budget: code`
    keeps it, the default is the share `s` of the cost of the whole update, so that 0 gives the
    aligned weight and 1, with `keep_back: 0`, the tuned one. (2) The official code compensates
    after every fourth column, here after every column. (3) The safe rows are the task's refusals,
    read by the start model, one at a time; the paper has 128 answers of the aligned model itself.
    (4) As in the official code, weights outside the linear layers of the blocks are those of the
    start.
Cost: no gradient; one pass over `rows` rows per block of the model, one inverse of (in, in) and
    `in` steps over columns per matrix.
Reads: `select: random` keeps as many entries of every block at random, with the same compensation:
    the control. `shrink` is the trivial one.
Needs: split safety; the model from which the fine-tune started; a dense model. An adapter is
    merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Phase
from ftsec_ray.models.families import RESIDUAL_WRITERS

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext

DAMPING = 0.01
"""Share of the mean second moment that is added to every second moment, as in the official code."""
CODE_ROWS = 4096
"""Outputs of a matrix for which the official budget counts in full."""


@dataclass(frozen=True, kw_only=True)
class SafeDelta(Defense):
    """The start, with the cheapest tuned entries and a compensation of what they change."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "safety"})
    STRUCTURE: ClassVar[frozenset[str]] = frozenset({RESIDUAL_WRITERS})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"select": "random"}

    s: float = 0.1
    """Budget of safety, 0 or more; 0 gives the start. The official code: 0.1 or 0.11."""
    budget: Literal["share", "code"] = "share"
    """Whether `s` is a share of the cost of all entries of a block, or the official formula."""
    keep_back: float = 0.15
    """Share of the entries, those of the highest cost, that are never taken, 0 to 1; official."""
    block: int = 2048
    """Inputs that share a budget, 1 or more; official."""
    select: Literal["cost", "random"] = "cost"
    """The entries of lowest cost, or as many of every block at random: the control."""
    compensate: bool = True
    """Whether later inputs of an output make up for what a taken entry changes on the safe rows."""
    rows: int = 128
    """Maximum number of safe rows, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        faults += [("s", self.s, "0 or more")] if self.s < 0.0 else []
        is_share = 0.0 <= self.keep_back <= 1.0
        faults += [] if is_share else [("keep_back", self.keep_back, "0 to 1")]
        return faults + [
            (name, getattr(self, name), "1 or more")
            for name in ("block", "rows")
            if getattr(self, name) < 1
        ]

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The start with the chosen entries, without an adapter."""
        import torch

        from ftsec_ray.models.change import check_counterparts, tell_change
        from ftsec_ray.models.load import copy_model, merged
        from ftsec_ray.models.precision import widen
        from ftsec_ray.models.targets import layer_of
        from ftsec_ray.training.weight_scores import encoded_split, input_moments, linear_layers

        before, start = merged(model), merged(ctx.load("start"))
        check_counterparts("safe_delta", before, start, "the start model")
        made = copy_model(before)
        with torch.no_grad():
            theirs = dict(start.model.named_parameters())
            for name, weight in made.model.named_parameters():
                weight.copy_(theirs[name])
        widen(start.model)
        start.model.eval()
        encoded = encoded_split(start, "safety", self.rows, ctx, by="safe_delta")
        layers, tuned = linear_layers(made.model), dict(before.model.named_parameters())
        sources = linear_layers(start.model)
        taken = entries = 0
        # the moments of one block at a time, because those of all may not fit into memory
        for _, group in groupby(layers, key=lambda name: layer_of(f".{name}.")):
            names = list(group)
            moments = input_moments(
                start.model, {name: sources[name] for name in names}, encoded, tokens="all"
            )
            for name in names:
                H = moments.pop(name) * (2.0 / len(encoded))
                count = self._write(layers[name], tuned[f"{name}.weight"], H, name, ctx)
                taken, entries = taken + count, entries + layers[name].weight.numel()
        ctx.note(matrices=len(layers), entries=entries, taken=taken)
        tell_change(ctx, before, made, start)
        return made

    def _write(self, layer: Any, tuned: Tensor, H: Tensor, name: str, ctx: StageContext) -> int:
        """Write the new weight of a layer that holds the start's; returns the number of entries
        that are the tuned ones.
        """
        import torch

        from ftsec_ray.models.residual import is_transposed

        turned = is_transposed(layer)
        aligned, other = (
            (weight.T if turned else weight).detach().float() for weight in (layer.weight, tuned)
        )
        # of inputs that hardly vary alone, float32 finds no root
        root = inverse_root(H.to(aligned.device)).to(aligned.dtype)
        exact, count = self._chosen(name, aligned, other, root, ctx)
        with torch.no_grad():
            layer.weight.copy_(exact.T if turned else exact)
        return count

    def _chosen(
        self, name: str, aligned: Tensor, tuned: Tensor, root: Tensor, ctx: StageContext
    ) -> tuple[Tensor, int]:
        """The new weight of a layer, and the number of its entries that are the tuned ones. Shapes:
        (out, in), (out, in), (in, in) -> (out, in).
        """
        import torch

        W, taken = aligned.clone(), 0
        for first in range(0, W.shape[1], self.block):
            columns = slice(first, min(first + self.block, W.shape[1]))
            price = root.diagonal()[columns] ** -2
            mask = self.mask(W[:, columns], tuned[:, columns], price)
            if self.select == "random":
                draws = ctx.numpy_rng("safe_delta", name, str(first)).random(mask.numel())
                order = torch.from_numpy(draws).argsort(stable=True)[: int(mask.sum())]
                mask = torch.zeros_like(mask).flatten()
                mask[order.to(mask.device)] = True
                mask = mask.view(W[:, columns].shape)
            taken += int(mask.sum())
            for j in range(columns.start, columns.stop):
                kept = torch.where(mask[:, j - first], tuned[:, j], W[:, j])
                error = (W[:, j] - kept) / root[j, j]
                W[:, j] = kept
                if self.compensate:
                    W[:, j + 1 :] -= error[:, None] * root[j, j + 1 :]
        return W, taken

    def mask(self, aligned: Tensor, tuned: Tensor, price: Tensor) -> Tensor:
        """The entries that are taken: in the order of their price, while their costs, price x
        (tuned - aligned)^2, stay within the budget. Shapes: (out, in), (out, in), (in,) ->
        (out, in) bool.
        """
        import torch

        prices = price.expand_as(aligned)
        cost = (prices * (tuned - aligned) ** 2).flatten()
        if self.budget == "share":
            budget = self.s * cost.sum()
        else:
            budget = prices.mean() * (self.s / 2) * (aligned.shape[0] / CODE_ROWS)
        order = prices.flatten().argsort(stable=True)
        order = order[: len(order) - int(self.keep_back * len(order))]
        # a share of 1 takes all, whatever the order of summation
        within = cost[order].cumsum(0) <= budget * (1.0 + 1e-5 * (self.budget == "share"))
        mask = torch.zeros_like(cost, dtype=torch.bool)
        mask[order] = within
        if not self.s:
            mask[:] = False
        return mask.view(aligned.shape)


def inverse_root(H: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, after damping; an input that is always zero counts
    as one. Its rows give the compensation of each column, its diagonal the price. Shapes: (in, in)
    -> (in, in).
    """
    import torch

    H = H.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root
