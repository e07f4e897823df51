"""Aligns the model again under the worst small shift of its hidden states, so that later
fine-tuning shifts them less.

Paper: Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning
Attack (Huang, Hu, Liu 2024, arXiv:2402.01109), algorithm 1; official code git-disl/Vaccine.
Differs: (1) the shift is added by forward hooks inside autograd and not through `.data`; its
gradient is taken at a zero leaf after every attention block, so the first pass does not change or
clear the gradient of any weight. (2) The norm is taken over all micro-batches of the step, so that
splitting a batch changes nothing. (3) Both passes use the same dropout, so that rho = 0 equals
plain fine-tuning bit for bit. (4) Benign rows are mixed in (`benign_rows`), otherwise a small model
learns to refuse everything. (5) It starts from the aligned model; the paper aligns the base.
Cost: 2 forward and 2 backward passes per step, once per base model; gradients of all attention
    outputs in memory.
Needs: the task's `safety` rows (and `benign_train` with `benign_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.errors import StageError
from ftsec_ray.training.hardening import Hardens, at_least

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Backward, Batch, Objective, Step, Training

Edit = Callable[[int, "Tensor"], "Tensor"]
"""(block, output of its attention) -> the output that the block uses instead."""

ATTENTION_NAMES = ("self_attn", "attn", "attention")


@dataclass(frozen=True, kw_only=True)
class Vaccine(Hardens):
    """Fine-tunes on refusals with the gradient taken at the perturbed hidden states, then merges
    the adapter.
    """

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "benign_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"prepare_model"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0}

    rho: float = 2.0
    """Norm of the perturbation over all blocks, rows and tokens of a step; 0 is plain fine-tuning.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return at_least(self, {"rho": 0.0}) + super().check()

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after perturbation-aware alignment, with the adapter merged."""
        return self._merged_sft(model, self._plain_rows(ctx), ctx, shape=self._shape)

    def _shape(self, training: Training) -> Training:
        return replace(training, backward=vaccinated(training.backward, rho=self.rho))


def vaccinated(inner: Backward, *, rho: float) -> Backward:
    """A backward pass that leaves the gradients of `inner` at the perturbed attention outputs."""

    def backward(model: Any, micro_batches: list[Batch], objective: Objective, step: Step) -> float:
        shifts = {
            id(batch): shift
            for batch, shift in zip(
                micro_batches,
                perturbations(model, micro_batches, objective, step, rho=rho),
                strict=True,
            )
        }

        current: list[list[Tensor]] = [[]]

        def shifted(model: Any, batch: Batch, step: Step) -> Tensor:
            current[0] = shifts[id(batch)]
            return objective(model, batch, step)

        # active until the backward pass of each batch is done, which may recompute its blocks
        with edited(model, lambda block, out: out + current[0][block]):
            return inner(model, micro_batches, shifted, step)

    return backward


def perturbations(
    model: Any,
    micro_batches: list[Batch],
    objective: Objective,
    step: Step,
    *,
    rho: float,
) -> list[list[Tensor]]:
    """Per micro-batch and block, the shift of the attention's output: rho * g / |all g|. Shapes:
    (B, T, D) each.
    """
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
                if block not in leaves:
                    leaves[block] = torch.zeros_like(out, requires_grad=True)
                return out + leaves[block]

            with edited(model, behind):
                loss = batch.weight * objective(model, batch, step)
                wanted = [leaves[block] for block in sorted(leaves)]
                gradients.append(torch.autograd.grad(loss, wanted))
    square = sum(g.double().square().sum() for group in gradients for g in group)
    scale = rho / (
        step.summed(float(square)) ** 0.5 + 1e-7
    )  # the official code's guard against a zero gradient
    return [[g.detach() * scale for g in group] for group in gradients]


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
