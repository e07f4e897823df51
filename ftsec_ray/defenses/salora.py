"""Keeps the outputs of every adapter out of the directions in which the start model answers
forbidden requests, and starts the adapter in the directions of the task.

Paper: Li, Si, Backes, Zhang, Wang, SaLoRA: Safety-Alignment Preserved Low-Rank Adaptation, ICLR
    2025, arXiv:2501.01765; official code homles11/SaLoRA. Every adapted layer computes W + scale *
    C * (B A - B0 A0). C = I - V_s V_s^T is fixed, with V_s the top `rank_s` right singular vectors
    of the layer's outputs, without bias, at the answer tokens of refusals. scale * B0 A0 =
    V_t V_t^T [W]_r: the best approximation of W of the adapter's rank, in the top `rank_t`
    directions of the outputs on the user's rows.
Differs: (1) C is no third factor: the gradient of B and B itself are projected in every step. That
    trains the same weights, and C is part of B at all times. (2) The official code subtracts
    C B0 A0 from the frozen weight. Here the base stays as it is, so that no weight is rounded, the
    start is exact, and the artifact is an adapter of the same base; the finished one holds both
    pairs and has twice the rank. With dropout both pairs see the same dropped inputs (the paper has
    none). (3) B0 A0 is divided by the scale of the adapter, which is 1 in the official code.
    (4) The intact start reads the user's rows; in the official code the blocks below have lost
    C B0 A0 by then. (5) The sweep names the layers and the recipe; the official code adapts q and v
    at rank 16. (6) The directions are exact, and none lies outside the outputs that were read; the
    official code takes a random sketch.
Cost: two passes over `rows` rows per block, and three eigenvalue problems per layer, two of them of
    (out, out), in float64; then 1.1x plain fine-tuning at width 384 and 1.3x at 48 (rank 8, CPU):
    two more products of the adapter's rank per layer and pass.
Reads: (1) `directions: random` takes as many random directions: the control. Fewer outputs slow
    down whatever is learned; only the difference to the control says that the directions matter.
    `benign` takes those of benign answers, `none` leaves the start of the adapter alone. (2) Null
    on ladder:0.1m, five seeds: 8 harmful rows give a harmful rate of 0.77; 0.63, 0.70 and 0.75 at
    `rank_s` 8, 16 and 32, with random directions 0.58, 0.62 and 0.68, with `none` 0.51. What acts
    is the start of the adapter, and refusals stay at 0 all the same. (3) Rows that teach compliance
    may do so in other directions than those of refusals. (4) That safety has weight directions of
    its own is disputed (arXiv:2505.14185). (5) `gradient_removed` in the record is the share of the
    norm of B's gradients that C takes. The tables of the paper were not
    checked; issue 2 of the official repository reports a harmful rate of 0.0 of Llama-2-7B-Chat
    after Alpaca without a defense, at every setting.
Needs: the model from which the fine-tune started and the task's `safety` rows with answers
    (`benign_train` with `directions: benign`); a fine-tune with `adapter: lora`, on any base,
    quantized as well. Changes the adapter at the end: one process trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.errors import DataError, StageError
from ftsec_ray.method import Defense, Fault, Phase, least_faults
from ftsec_ray.models.adapter_start import Pair, subtracted, widen_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.models.row_tokens import Encoded
    from ftsec_ray.training.setup import Batch, Objective, Step, Training

NAME = "salora"
SPLITS = {"safety": "safety", "random": "safety", "benign": "benign_train"}
"""The rows whose outputs give the number of directions, and except for `random` the directions."""


@dataclass(frozen=True)
class Layer:
    """What is fixed for one adapted layer."""

    V: Any
    """The directions that its adapter must not write to: (out, K) with orthonormal columns."""
    start: Pair | None
    """B already projected; None: the ordinary start."""


@dataclass(frozen=True, kw_only=True)
class SaLoRA(Defense):
    """Update = scale * C * (B A - B0 A0), C = I - V V^T."""

    PHASE: ClassVar[Phase] = "during"
    # the last to act: its wrappers are the first to run in a step, before other methods' passes
    ORDER: ClassVar[int] = 10
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "safety", "benign_train"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset()
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"directions": "random"}
    CONFLICTS: ClassVar[Mapping[str, str]] = {
        "asft": "asft penalises B A, which with `init: task` holds the start of the adapter as well"
    }

    rank_s: int = 32
    """Number of directions of the outputs that every adapter is kept out of (r_s), 0 or more; 0 is
    plain fine-tuning. A layer with no more outputs than this does not change at all.
    """
    directions: Literal["safety", "random", "benign", "none"] = "safety"
    """Which ones: those of answers to forbidden requests, as many random ones (the control), those
    of benign answers, or none: the start of `init` alone.
    """
    init: Literal["task", "plain"] = "task"
    """Start of the adapter: the paper's, or the ordinary one (B = 0), which keeps the adapter's
    rank.
    """
    rank_t: int = 32
    """Number of directions of the outputs on the user's rows in which the adapter starts, 1 or
    more.
    """
    rows: int = 128
    """Maximum number of rows of each kind that are read, 1 or more."""

    def check(self) -> list[Fault]:
        """Faults of the parameters beyond their types."""
        return least_faults(self, {"rank_s": 0, "rank_t": 1, "rows": 1})

    def needs(self) -> frozenset[str]:
        """The start model, and the rows of the directions."""
        split = SPLITS.get(self.directions)
        return frozenset({"start"} if split is None else {"start", split})

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune of an adapter that cannot write to these directions."""
        from ftsec_ray.training.terms import frozen_start

        if not self.rank_s:
            return training
        if training.config.adapter != "lora":
            raise StageError(
                "salora projects the outputs of an adapter, and this fine-tune trains all weights",
                f"training.adapter: {training.config.adapter}",
                "training.adapter: lora",
                "set training.adapter: lora, or leave salora out",
            )
        layers = self._layers(frozen_start(ctx), training, ctx)
        tell_directions(layers, self.rank_s, ctx)
        return Projection(layers, ctx, is_widened=self.init == "task").of(training)

    def _layers(
        self, start: LoadedModel, training: Training, ctx: StageContext
    ) -> dict[str, Layer]:
        """The directions and the start of every layer that gets an adapter, by its path."""
        from ftsec_ray.training.weight_scores import encoded_split, input_moments

        safe: list[Encoded] = []
        if self.directions in SPLITS:
            safe = encoded_split(start, SPLITS[self.directions], self.rows, ctx, by=NAME)
        task = self._task_rows(start, training, ctx) if self.init == "task" else []
        found = {}
        for group in in_blocks(start, training.config):
            of_safe, of_task = (
                input_moments(start.model, group, rows, tokens="answer") if rows else {}
                for rows in (safe, task)
            )
            for path, module in group.items():
                W = out_in(module)
                # a layer that no token reached, such as an expert, keeps all of its outputs
                V = output_directions(of_safe.get(path), W, self.rank_s)
                if self.directions == "random":
                    V = self._random(V, path, ctx)
                pair = None
                if path in of_task:
                    V_t = output_directions(of_task[path], W, self.rank_t)
                    pair = task_start(W, V_t, V, training.config)
                V = V.float()
                found[path] = Layer(V, None if pair is None else pair.to(V))
        return found

    def _task_rows(
        self, start: LoadedModel, training: Training, ctx: StageContext
    ) -> list[Encoded]:
        """Random rows of the fine-tune itself, as token ids and labels."""
        from ftsec_ray.conversation import has_answer
        from ftsec_ray.models.load import within_positions
        from ftsec_ray.models.row_tokens import encode_rows, is_useful

        rows = [row for row in training.rows.to_pylist() if has_answer(row)]
        rows = sorted(rows, key=lambda row: ctx.chance(row["row_id"], NAME))[: self.rows]
        limit = within_positions(start.model, training.config.max_length)
        encoded = encode_rows(start.tokenizer, rows, max_length=limit)
        useful = [pair for pair in encoded if is_useful(pair)]
        ctx.note(task_rows=len(useful))
        if not useful:
            raise DataError(
                "salora: no row of the fine-tune has an answer to start the adapter from",
                len(rows),
                "rows with an answer within `training.max_length` tokens",
                "raise training.max_length, or set init: plain",
            )
        return useful

    def _random(self, V: Tensor, path: str, ctx: StageContext) -> Tensor:
        """As many random directions as V has."""
        import torch

        drawn = torch.from_numpy(ctx.numpy_rng(NAME, path).standard_normal(tuple(V.shape)))
        directions: Tensor = torch.linalg.qr(drawn.to(V)).Q
        return directions


def in_blocks(start: LoadedModel, config: Any) -> Iterator[dict[str, Any]]:
    """The layers that get an adapter, by their paths, one block at a time: the moments of the
    inputs of all of them together may not fit into memory.
    """
    from ftsec_ray.models.lora import linear_paths
    from ftsec_ray.models.targets import layer_of, targeted

    paths = targeted(linear_paths(start.model), config.targets, config.blocks())
    for _, group in groupby(paths, key=lambda path: layer_of(f".{path}.")):
        yield {path: start.model.get_submodule(path) for path in group}


def out_in(module: Any) -> Tensor:
    """The weight of a linear layer as a map of columns: (out, in) float64."""
    from ftsec_ray.models.residual import is_transposed

    weight: Tensor = module.weight.detach().double()
    return weight.T if is_transposed(module) else weight


def output_directions(moments: Tensor | None, W: Tensor, rank: int) -> Tensor:
    """The top right singular vectors of the outputs X W^T, without those that they do not span.

    Shapes: moments X^T X (in, in) or None, W (out, in) -> (out, K <= rank) float64.
    """
    import torch

    if moments is None:
        return W.new_zeros(len(W), 0)
    values, vectors = torch.linalg.eigh(W @ moments.to(W) @ W.T)
    noise = float(values[-1]) * len(values) * torch.finfo(values.dtype).eps
    count = min(rank, int((values > noise).sum()))
    directions: Tensor = vectors.flip(1)[:, :count]
    return directions


def task_start(W: Tensor, V_t: Tensor, V: Tensor, config: Any) -> Pair:
    """C B0 and A0 with scale * B0 A0 = V_t V_t^T [W]_r; beyond the rank of W they are zero."""
    import torch

    from ftsec_ray.models.lora import scale_of

    scale = scale_of(config)
    is_wide = W.shape[0] <= W.shape[1]
    # the smaller of the two products: the decomposition of W itself takes far longer
    values, vectors = torch.linalg.eigh(W @ W.T if is_wide else W.T @ W)
    noise = float(values[-1]) * len(values) * torch.finfo(values.dtype).eps
    count = min(config.rank, int((values > noise).sum()))
    S, found = values.flip(0)[:count].sqrt(), vectors.flip(1)[:, :count]
    U, rows = (found, (found.T @ W) / S[:, None]) if is_wide else (W @ found / S, found.T)
    root = (S / scale).sqrt()
    A, B = W.new_zeros(config.rank, W.shape[1]), W.new_zeros(len(W), config.rank)
    A[:count] = root[:, None] * rows
    B[:, :count] = outside(V, V_t @ (V_t.T @ U) * root)
    return Pair(A, B, count)


def outside(V: Tensor, columns: Tensor) -> Tensor:
    """Columns without their part along the directions V: (out, K), (out, N) -> (out, N)."""
    import torch

    if V.shape[0] == V.shape[1]:
        return torch.zeros_like(columns)  # exactly: AdamW would enlarge what rounding leaves
    return columns - V @ (V.T @ columns)


def tell_directions(layers: Mapping[str, Layer], rank_s: int, ctx: StageContext) -> None:
    """Record how many directions the layers lose; StageError if no layer keeps an output."""
    sizes = [tuple(layer.V.shape) for layer in layers.values()]
    closed = sum(out == count for out, count in sizes)
    ctx.note(
        projected_layers=sum(count > 0 for _, count in sizes),
        directions_least=min(count for _, count in sizes),
        directions_most=max(count for _, count in sizes),
        closed_layers=closed,
    )
    if closed == len(sizes):
        raise StageError(
            "salora: no adapter keeps an output that it can write to",
            f"rank_s: {rank_s}, and the layers have {min(sizes)[0]} to {max(sizes)[0]} outputs",
            "rank_s below the number of outputs of a layer",
            "lower rank_s",
        )
    if closed:
        ctx.warn(
            f"salora: {closed} of {len(sizes)} layers have no more than rank_s = {rank_s} outputs"
            " and do not change"
        )


class Projection:
    """The adapter of one fine-tune: its start, the projection in every step, and its end.

    Between steps every B is free of V, so that step checkpoints and other methods see the adapter
    that the model computes with.
    """

    def __init__(self, layers: Mapping[str, Layer], ctx: StageContext, *, is_widened: bool) -> None:
        self._layers, self._ctx, self._is_widened = layers, ctx, is_widened
        self._projected: list[tuple[Any, Any]] = []
        """B and V of every layer that trains."""
        self._pairs: dict[str, Pair] = {}
        self._handles: list[Any] = []
        self._is_begun = False

    def of(self, training: Training) -> Training:
        """The fine-tune with the projection."""
        inner, inner_backward = training.objective, training.backward

        def objective(model: Any, batch: Batch, step: Step) -> Tensor:
            self._begin(model, step)
            return inner(model, batch, step)

        def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
            self._begin(model, step)
            return inner_backward(model, batches, objective, step)

        after = (self._project, *training.after_step, self._end)
        return replace(training, objective=objective, backward=backward, after_step=after)

    def _begin(self, model: Any, step: Step) -> None:
        """Put hooks on the adapter before the first pass of this process, and in the first step of
        the fine-tune give the adapter its start.
        """
        from ftsec_ray.models.load import bare
        from ftsec_ray.models.lora import trained_factors

        if self._is_begun:
            return
        self._is_begun = True
        found = trained_factors(step.trainable)
        for path, (A, B) in found.items():
            layer = self._layers[path]
            V = layer.V.to(B)
            self._projected.append((B, V))
            self._handles.append(B.register_hook(counted(V, step)))
            if layer.start is None:
                continue
            pair = self._pairs[path] = layer.start.to(B)
            if step.index == 0:
                pair.write(A, B)
            self._handles += subtracted(bare(model).get_submodule(path), pair)
        self._ctx.note(trained_layers=len(found), started_layers=len(self._pairs))

    def _project(self, model: Any, step: Step) -> None:  # noqa: ARG002
        """Take out what the optimizer wrote along V: it moves every entry at a rate of its own."""
        import torch

        with torch.no_grad():
            for B, V in self._projected:
                B.copy_(outside(V, B))

    def _end(self, model: Any, step: Step) -> None:
        """After the last step: no hooks, and an ordinary adapter that holds both pairs."""
        if step.index < step.total - 1:
            return
        for handle in self._handles:
            handle.remove()
        removed, whole = step.memory[NAME].tolist()
        self._ctx.note(gradient_removed=round((removed / whole) ** 0.5 if whole else 0.0, 6))
        if self._is_widened:
            widen_adapter(model, self._pairs)


def counted(V: Tensor, step: Step) -> Callable[[Tensor], Tensor]:
    """A hook that projects a gradient, and adds the squared norm of what it took and of the whole
    to the step memory.
    """
    import torch

    def project(gradient: Tensor) -> Tensor:
        """The gradient without its part along V, (out, R) -> (out, R)."""
        left = outside(V, gradient)
        seen = [x.double().square().sum() for x in (gradient - left, gradient)]
        sums = step.memory.get(NAME, torch.zeros(2, dtype=torch.float64))
        step.memory[NAME] = sums.to(gradient.device) + torch.stack(seen)
        return left

    return project
