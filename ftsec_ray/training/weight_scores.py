"""Scores of single weights by rows of a task: SNIP, Wanda, and the second moments of the inputs of
linear layers; and the masks that follow from scores.

Rows are read one at a time, so that no padding enters a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.data.added_rows import defenders_rows
from ftsec_ray.errors import DataError
from ftsec_ray.models.activations import changed
from ftsec_ray.models.load import within_positions
from ftsec_ray.models.lora import linear_paths
from ftsec_ray.models.residual import is_transposed
from ftsec_ray.models.row_tokens import (
    IGNORED,
    CutTally,
    Encoded,
    encode_rows,
    is_useful,
    tell_cuts,
)
from ftsec_ray.models.targets import layer_of
from ftsec_ray.training.losses import mean_nll

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 512
"""Tokens of a row where the sweep gives no `max_length`."""
Scores = dict[str, Any]
"""Path of a linear layer -> score of each of its weights, float32, in the shape of the weight."""
Tokens = Literal["answer", "all"]
"""The tokens whose inputs count: those of the answers, or all of a row."""


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers of the blocks by path."""
    return {
        path: model.get_submodule(path)
        for path in linear_paths(model)
        if layer_of(f".{path}.") is not None
    }


def encoded_split(
    model: LoadedModel, split: str, count: int, ctx: StageContext, *, by: str
) -> list[Encoded]:
    """Up to `count` rows of a split that have an answer within the limit, as token ids and labels;
    the record of method `by` gets their number. DataError if there is none.
    """
    rows = defenders_rows(ctx, split, by)[:count]
    limit = ctx.training.max_length if ctx.training is not None else MAX_TOKENS
    cuts = CutTally()
    encoded = encode_rows(
        model.tokenizer, rows, max_length=within_positions(model.model, limit), tally=cuts
    )
    tell_cuts(ctx, cuts)
    useful = [pair for pair in encoded if is_useful(pair)]
    ctx.note(**{f"{split}_rows": len(useful)})
    if not useful:
        raise DataError(
            f"{by}: no row of split {split!r} has an answer",
            len(rows),
            "rows with an answer within `training.max_length` tokens",
            f"give split {split!r} rows with answers",
        )
    return useful


def highest(scores: Tensor, share: float) -> Tensor:
    """A mask of the highest scores: this share of all, rounded down; the first ones if equal."""
    import torch

    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: int(share * scores.numel())]] = True
    return mask.view(scores.shape)


def per_output(scores: Tensor, share: float, *, largest: bool) -> Tensor:
    """A mask of the lowest or highest scores of every output of a linear layer: this share of its
    inputs, rounded down; the first ones if equal. Shapes: (out, in) -> (out, in) bool.
    """
    import torch

    order = scores.argsort(dim=1, descending=largest, stable=True)[
        :, : int(share * scores.shape[1])
    ]
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, order, True)  # noqa: FBT003


def drawn_per_output(mask: Tensor, ctx: StageContext, *salt: str) -> Tensor:
    """A mask with as many random entries in every row as `mask` has in its first one."""
    import torch

    draws = torch.from_numpy(ctx.numpy_rng(*salt).random(tuple(mask.shape)))
    order = draws.argsort(dim=1, stable=True)[:, : int(mask[0].sum())]
    return torch.zeros(mask.shape, dtype=torch.bool).scatter_(1, order, True)  # noqa: FBT003


def snip_scores(model: Any, layers: Mapping[str, Any], encoded: Sequence[Encoded]) -> Scores:
    """Mean over rows of |weight x gradient of the row's mean loss in nats per answer token|, on the
    CPU.
    """
    import torch

    weights = {name: layer.weight for name, layer in layers.items()}
    scores = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    with _differentiable(model, weights.values()), torch.enable_grad():
        for ids, labels in encoded:
            given = {"input_ids": torch.tensor([ids], device=model.device), "use_cache": False}
            loss = mean_nll(model, torch.tensor([labels], device=model.device), given)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                each = (weight.detach().float() * gradient.float()).abs()
                scores[name] += each.cpu() / len(encoded)
    return scores


@contextmanager
def _differentiable(model: Any, weights: Any) -> Iterator[None]:
    """Inside the `with` block, exactly these weights have gradients."""
    was = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(requires_grad=False)
    for weight in weights:
        weight.requires_grad_()
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(was[name])


def wanda_scores(
    model: Any, layers: Mapping[str, Any], encoded: Sequence[Encoded], *, tokens: Tokens = "answer"
) -> Scores:
    """|weight| x root of the mean square of its input over the tokens, on the CPU."""
    sizes = input_sizes(model, layers, encoded, tokens=tokens)
    scores = {}
    for name, layer in layers.items():
        size = sizes[name][:, None] if is_transposed(layer) else sizes[name][None, :]
        scores[name] = layer.weight.detach().float().abs().cpu() * size
    return scores


def input_sizes(
    model: Any, layers: Mapping[str, Any], encoded: Sequence[Encoded], *, tokens: Tokens
) -> Scores:
    """Root of the mean square of every input of the layers over the tokens: (in,) float32, on the
    CPU.
    """
    squares, count = _summed(
        model, layers, encoded, lambda states: states.square().sum(0), tokens=tokens
    )
    return {name: (total / count).sqrt().float() for name, total in squares.items()}


def input_moments(
    model: Any, layers: Mapping[str, Any], encoded: Sequence[Encoded], *, tokens: Tokens
) -> Scores:
    """Sum over the tokens of the outer product of every layer's inputs: (in, in) float64, on the
    CPU.
    """
    return _summed(model, layers, encoded, lambda states: states.T @ states, tokens=tokens)[0]


def _summed(
    model: Any,
    layers: Mapping[str, Any],
    encoded: Sequence[Encoded],
    measure: Callable[[Tensor], Tensor],
    *,
    tokens: Tokens,
) -> tuple[Scores, int]:
    """The sum of a measure of the layers' inputs (tokens, in) over all rows, and the number of
    tokens.
    """
    import torch

    sums: dict[str, Any] = {}
    places: list[Any] = []

    def keep(name: str) -> Any:
        def read(x: Tensor) -> Tensor:
            states = x.detach().reshape(-1, x.shape[-1])[places[0]].double()
            # on the device: a second moment is (in, in), too large to move for every row
            sums[name] = sums.get(name, 0.0) + measure(states)
            return x

        return read

    count = 0
    with changed(inputs=[(layer, keep(name)) for name, layer in layers.items()]), torch.no_grad():
        for ids, labels in encoded:
            chosen = [i for i, label in enumerate(labels) if tokens == "all" or label != IGNORED]
            places[:] = [torch.tensor(chosen, device=model.device)]
            count += len(chosen)
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return {name: total.cpu() for name, total in sums.items()}, count
