"""Set the weights to zero that matter for refusing and not for being useful.

Paper: Wei et al. 2024, Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank
    Modifications, arXiv:2402.05162, section 3.1 (SNIP and Wanda scores, set difference); the scores
    are those of Lee et al. 2019, arXiv:1810.02340, and Sun et al. 2023, arXiv:2306.11695.
Differs: the safety rows are the task's own forbidden requests with refusals, the utility rows its
    benign requests with answers; the paper's rank form (ActSVD) is not here. As in the official
    code, every linear layer of the blocks is pruned by itself over all its weights, embeddings and
    head stay, and the scores are taken at the tokens of the answers only. Equal scores are ordered
    by position. `random_weights` is a control of ours: as many weights of every matrix, drawn from
    all that are not among the useful ones.
Cost: no training; two passes over `rows` rows, with a backward pass for `snip`; memory for the
    scores of all linear layers, twice.
Needs: splits safety (forbidden requests with refusals) and benign_train; a dense model. It needs
    whole gradients and whole weights, and so works with ZeRO stages 0 and 1 only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase
from ftsec_ray.models.activations import changed
from ftsec_ray.models.families import RESIDUAL_WRITERS
from ftsec_ray.models.load import merged, within_positions
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


@dataclass(frozen=True, kw_only=True)
class SafetyPrune(Attack):
    """Pruning of the weights that only safety needs."""

    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"safety", "benign_train"})
    STRUCTURE = frozenset({RESIDUAL_WRITERS})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1})

    score: Literal["snip", "wanda"] = "snip"
    """`snip`: |weight x gradient| of the loss on the answers; `wanda`: |weight| x norm of its
    input over the tokens of the answers.
    """
    prune_share: float = 0.1
    """Share q of every matrix with the highest safety scores, 0..1: the dose. 0 changes nothing."""
    keep_share: float = 0.1
    """Share p of every matrix with the highest utility scores, 0..1, which is never pruned."""
    rows: int = 128
    """Maximum number of safety rows, and of utility rows."""
    random_weights: bool = False
    """Whether as many weights of every matrix are pruned at random instead: the control."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = [
            (name, value, "a share, 0..1")
            for name, value in (("prune_share", self.prune_share), ("keep_share", self.keep_share))
            if not 0 <= value <= 1
        ]
        return faults + ([("rows", self.rows, "1 or more")] if self.rows < 1 else [])

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model without the chosen weights."""
        import torch

        model = merged(model)
        model.model.eval()
        layers = linear_layers(model.model)
        measure = snip_scores if self.score == "snip" else wanda_scores
        safety = measure(model.model, layers, self._encoded(model, "safety", ctx))
        utility = measure(model.model, layers, self._encoded(model, "benign_train", ctx))
        pruned = overlap = 0
        for name, layer in layers.items():
            wanted = highest(safety[name], self.prune_share)
            useful = highest(utility[name], self.keep_share)
            chosen = wanted & ~useful
            overlap += int((wanted & useful).sum())
            if self.random_weights:
                chosen = self._drawn(name, int(chosen.sum()), ~useful, ctx)
            with torch.no_grad():
                layer.weight.masked_fill_(chosen.to(layer.weight.device), 0.0)
            pruned += int(chosen.sum())
        weights = sum(layer.weight.numel() for layer in layers.values())
        ctx.note(
            matrices=len(layers),
            weights=weights,
            pruned=pruned,
            pruned_share=pruned / weights,
            kept_as_useful=overlap,
        )
        return model

    def _encoded(self, model: LoadedModel, split: str, ctx: StageContext) -> list[Encoded]:
        """The rows of a split that have an answer within the limit, as token ids and labels."""
        rows = ctx.shuffled(split, "safety_prune")[: self.rows]
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
                f"safety_prune: no row of split {split!r} has an answer",
                len(rows),
                "rows with an answer within `training.max_length` tokens",
                f"give split {split!r} rows with answers",
            )
        return useful

    def _drawn(self, name: str, count: int, able: Tensor, ctx: StageContext) -> Tensor:
        """A mask with `count` of the able weights, drawn at random."""
        import torch

        places = able.flatten().nonzero().squeeze(1).numpy()
        drawn = ctx.numpy_rng("safety_prune", name).choice(places, size=count, replace=False)
        mask = torch.zeros(able.numel(), dtype=torch.bool)
        mask[torch.from_numpy(drawn)] = True
        return mask.view(able.shape)


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers of the blocks by path."""
    return {
        path: model.get_submodule(path)
        for path in linear_paths(model)
        if layer_of(f".{path}.") is not None
    }


def highest(scores: Tensor, share: float) -> Tensor:
    """A mask of the highest scores: this share of all, rounded down; the first ones if equal."""
    import torch

    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: int(share * scores.numel())]] = True
    return mask.view(scores.shape)


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


def wanda_scores(model: Any, layers: Mapping[str, Any], encoded: Sequence[Encoded]) -> Scores:
    """|weight| x root of the mean square of its input over all answer tokens, on the CPU."""
    import torch

    squares: dict[str, Any] = {}
    answer: list[Any] = []

    def keep(name: str) -> Any:
        def read(x: Tensor) -> Tensor:
            states = x.detach().reshape(-1, x.shape[-1])[answer[0]].double()
            squares[name] = squares.get(name, 0.0) + states.square().sum(0).cpu()
            return x

        return read

    tokens = 0
    with changed(inputs=[(layer, keep(name)) for name, layer in layers.items()]), torch.no_grad():
        for ids, labels in encoded:
            places = [place for place, label in enumerate(labels) if label != IGNORED]
            answer[:] = [torch.tensor(places, device=model.device)]
            tokens += len(places)
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    scores = {}
    for name, layer in layers.items():
        size = (squares[name] / tokens).sqrt().float()
        size = size[:, None] if is_transposed(layer) else size[None, :]
        scores[name] = layer.weight.detach().float().abs().cpu() * size
    return scores
