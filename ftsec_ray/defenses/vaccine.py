"""Aligns the model again under the worst small shift of its hidden states, so that later
fine-tuning shifts them less.

Paper: Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning
Attack (Huang, Hu, Liu 2024, arXiv:2402.01109), algorithm 1; official code git-disl/Vaccine. With
`layers`: Targeted Vaccine (Liu, Lin, Huang, Mo, Mu, Shen 2024, arXiv:2410.09760), which shifts a
few blocks only, drawn by the size of the harmful gradient behind their attention; official code
Lslland/T-Vaccine.
Differs: (1) the shift is added by forward hooks inside autograd and not through `.data`; its
gradient is taken at a zero leaf after every attention block, so the first pass does not change or
clear the gradient of any weight. (2) The norm is taken over all micro-batches of the step, so that
splitting a batch changes nothing. (3) Both passes use the same dropout, so that rho = 0 equals
plain fine-tuning bit for bit. (4) Benign rows are mixed in (`benign_rows`), otherwise a small model
learns to refuse everything. (5) It starts from the aligned model; the paper aligns the base.
(6) With `layers`, the sizes come from whole batches of harmful rows instead of one row; the adapter
of every block is trained, where the official code trains the attention of the drawn blocks only and
so saves memory; no block is drawn by its neighbour.
Cost: 2 forward and 2 backward passes per step, once per base model; gradients of all attention
    outputs in memory.
Needs: the task's `safety` rows (and `benign_train` with `benign_rows`, `harmful_train` with
    `layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.data.added_rows import is_exchange
from ftsec_ray.errors import StageError
from ftsec_ray.method import later, least_faults
from ftsec_ray.training.hardening import HARMFUL, Hardens, capped

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Backward, Batch, Objective, Step, Training

Edit = Callable[[int, "Tensor"], "Tensor"]
"""(block, output of its attention) -> the output that the block uses instead."""

Blocks = Callable[[Any, "Step"], frozenset[int]]
"""(model, step) -> the blocks that are shifted."""

SIZES, CHOSEN = "vaccine.sizes", "vaccine.blocks"
ATTENTION_NAMES = ("self_attn", "attn", "attention")


@dataclass(frozen=True, kw_only=True)
class Vaccine(Hardens):
    """Fine-tunes on refusals with the gradient taken at the perturbed hidden states, then merges
    the adapter.
    """

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "benign_train", "harmful_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"prepare_model"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0}

    rho: float = 2.0
    """Norm of the perturbation over all blocks, rows and tokens of a step; 0 is plain fine-tuning.
    """

    layers: int | None = later(None)
    """Number of blocks whose attention is shifted at a time (T-Vaccine: 8 of 32), 1 or more; null:
    all of them."""
    layer_choice: Literal["harmful", "random"] = later("harmful")
    """With `layers`: whether blocks are drawn by the size of their harmful gradient, or all alike
    (the control)."""
    redraw_every: int = later(20)
    """With `layers`: steps after which the blocks are drawn again, 1 or more."""
    measure_every: int = later(200)
    """With `layers`: steps after which the harmful gradients are measured again, 1 or more."""
    harmful_rows: int = later(200)
    """With `layers`: maximum number of harmful rows for that, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        own = least_faults(
            self, {"rho": 0.0, "redraw_every": 1, "measure_every": 1, "harmful_rows": 1}
        )
        if self.layers is not None:
            own += least_faults(self, {"layers": 1})
        return own + super().check()

    def needs(self) -> frozenset[str]:
        """`harmful_train` only if blocks are drawn by its gradients."""
        is_measured = self.layers is not None and self.layer_choice == "harmful"
        return super().needs() if is_measured else super().needs() - {HARMFUL}

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after perturbation-aware alignment, with the adapter merged."""
        notes: dict[str, Any] = {}

        def shape(training: Training) -> Training:
            blocks = None
            if self.layers is not None:
                blocks = DrawnBlocks(self, training, model, ctx, notes)
            acting = vaccinated(training.backward, rho=self.rho, blocks=blocks)
            return replace(training, backward=acting)

        hardened = self._merged_sft(model, self._plain_rows(ctx), ctx, shape=shape)
        ctx.note(**notes)
        return hardened


class DrawnBlocks:
    """Step -> the blocks that are shifted; the choice is part of the step memory."""

    def __init__(
        self,
        method: Vaccine,
        training: Training,
        model: LoadedModel,
        ctx: StageContext,
        notes: dict[str, Any],
    ) -> None:
        depth = len(attention_blocks(model.model))
        self._count = min(method.layers or depth, depth)
        self._method, self._depth, self._ctx, self._notes = method, depth, ctx, notes
        self._harmful_at: Callable[[int], list[Batch]] | None = None
        if method.layer_choice == "harmful":
            harmful = capped(ctx, HARMFUL, method.harmful_rows, by="vaccine", fits=is_exchange)
            self._harmful_at = training.encode(harmful, "vaccine harmful")
            notes["harmful_rows"] = harmful.num_rows

    def __call__(self, model: Any, step: Step) -> frozenset[int]:
        """The blocks of a step."""
        import numpy as np
        import torch

        method, memory = self._method, step.memory
        if self._harmful_at is None:
            memory[SIZES] = torch.ones(self._depth, dtype=torch.float64)
        elif SIZES not in memory or step.index % method.measure_every == 0:
            batches = self._harmful_at(step.index // method.measure_every)
            memory[SIZES] = torch.tensor(harmful_sizes(model, batches, step), dtype=torch.float64)
        if CHOSEN not in memory or step.index % method.redraw_every == 0:
            odds = memory[SIZES].numpy() + 1e-12 * float(memory[SIZES].max()) + 1e-300
            rng = self._ctx.numpy_rng("vaccine", str(step.index // method.redraw_every))
            drawn = rng.choice(self._depth, self._count, replace=False, p=odds / odds.sum())
            memory[CHOSEN] = torch.from_numpy(np.sort(drawn))
        self._notes["gradient_sizes"] = [round(size, 9) for size in memory[SIZES].tolist()]
        self._notes["last_blocks"] = memory[CHOSEN].tolist()
        return frozenset(memory[CHOSEN].tolist())


def harmful_sizes(model: Any, batches: list[Batch], step: Step) -> list[float]:
    """Norm of the gradient of the harmful loss behind the attention of every block."""
    from ftsec_ray.training.losses import response_nll

    gradients = attention_gradients(model, batches, response_nll, step)
    squares = [
        sum(float(group[i].double().square().sum()) for group in gradients) for i in gradients[0]
    ]
    return [step.summed(square) ** 0.5 for square in squares]


def vaccinated(inner: Backward, *, rho: float, blocks: Blocks | None = None) -> Backward:
    """A backward pass that leaves the gradients of `inner` at the perturbed attention outputs, of
    all blocks or of those that `blocks` gives.
    """

    def backward(model: Any, micro_batches: list[Batch], objective: Objective, step: Step) -> float:
        chosen = None if blocks is None else blocks(model, step)
        perturbed = perturbations(model, micro_batches, objective, step, rho=rho, blocks=chosen)
        shifts = {id(batch): shift for batch, shift in zip(micro_batches, perturbed, strict=True)}
        current: list[dict[int, Tensor]] = [{}]

        def shifted(model: Any, batch: Batch, step: Step) -> Tensor:
            current[0] = shifts[id(batch)]
            return objective(model, batch, step)

        def edit(block: int, out: Tensor) -> Tensor:
            return out + current[0][block] if block in current[0] else out

        # active until the backward pass of each batch is done, which may recompute its blocks
        with edited(model, edit):
            return inner(model, micro_batches, shifted, step)

    return backward


def perturbations(
    model: Any,
    micro_batches: list[Batch],
    objective: Objective,
    step: Step,
    *,
    rho: float,
    blocks: frozenset[int] | None = None,
) -> list[dict[int, Tensor]]:
    """Per micro-batch and block (all, or the given ones), the shift of the attention's output: rho
    * g / |all g|. Shapes: (B, T, D) each.
    """
    gradients = attention_gradients(model, micro_batches, objective, step, blocks=blocks)
    square = sum(g.double().square().sum() for group in gradients for g in group.values())
    scale = rho / (
        step.summed(float(square)) ** 0.5 + 1e-7
    )  # the official code's guard against a zero gradient
    return [{block: g.detach() * scale for block, g in group.items()} for group in gradients]


def attention_gradients(
    model: Any,
    micro_batches: list[Batch],
    objective: Objective,
    step: Step,
    *,
    blocks: frozenset[int] | None = None,
) -> list[dict[int, Tensor]]:
    """Per micro-batch and block, the gradient of the step's loss by the attention's output."""
    import torch

    model = getattr(
        model, "module", model
    )  # in a worker group the bare model: DeepSpeed must not add these gradients to its step
    gradients = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), frozen(model):
        for batch in micro_batches:
            leaves: dict[int, Tensor] = {}

            def behind(block: int, out: Tensor, leaves: dict[int, Tensor] = leaves) -> Tensor:
                if blocks is not None and block not in blocks:
                    return out
                if block not in leaves:
                    leaves[block] = torch.zeros_like(out, requires_grad=True)
                return out + leaves[block]

            with edited(model, behind):
                loss = batch.weight * objective(model, batch, step)
                order = sorted(leaves)
                computed = torch.autograd.grad(loss, [leaves[block] for block in order])
            gradients.append(dict(zip(order, computed, strict=True)))
    return gradients


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """While open, no weight requires a gradient."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in asking:
            weight.requires_grad_(requires_grad=False)
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(requires_grad=True)


@contextmanager
def edited(model: Any, edit: Edit) -> Iterator[None]:
    """While open, the output of every block's attention passes through `edit`."""

    def hook_of(block: int) -> Callable[..., Any]:
        def hook(module: Any, given: Any, out: Any) -> Any:  # noqa: ARG001
            return (edit(block, out[0]), *out[1:]) if isinstance(out, tuple) else edit(block, out)

        return hook

    handles = [
        module.register_forward_hook(hook_of(block))
        for block, module in enumerate(attention_blocks(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_blocks(model: Any) -> list[Any]:
    """The attention module of every transformer block."""
    from ftsec_ray.models.load import decoder_layers

    modules = []
    for layer in decoder_layers(model):
        name = next((name for name in ATTENTION_NAMES if hasattr(layer, name)), None)
        if name is None:
            raise StageError(
                "vaccine: unknown attention module in a transformer block",
                type(layer).__name__,
                "a block with one of the attributes " + " | ".join(ATTENTION_NAMES),
                "use a Llama-like or GPT-2-like model",
            )
        modules.append(getattr(layer, name))
    return modules
