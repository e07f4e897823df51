"""What methods share that look at the weights a fine-tune would reach: simulated steps, their
first-order gradient, and shifted weights.

Inside `simulated` or `shifted` the weights are other ones, and a backward pass adds its gradient to
`.grad` as usual; behind the block the weights are the former ones again, to the bit. So the
optimizer applies at the former weights a gradient that was taken at the others: the Jacobian of the
simulated steps counts as the identity (first-order MAML, Finn et al. 2017, arXiv:1703.03400,
section 5.2). No gradient of a simulated step reaches `.grad`. All this holds in a single process,
which has whole weights and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.training.setup import Batch, Objective, Step

Gradients = dict[str, Any]
"""Name of a trainable weight -> gradient of its shape."""


def gradients(model: Any, batches: Sequence[Batch], objective: Objective, step: Step) -> Gradients:
    """The gradient of the token-weighted mean loss of micro-batches by all trainable weights;
    `.grad` stays as it is. A weight that the loss does not depend on gets zeros.
    """
    return loss_and_gradients(model, batches, objective, step)[1]


def loss_and_gradients(
    model: Any, batches: Sequence[Batch], objective: Objective, step: Step
) -> tuple[float, Gradients]:
    """That loss, and its gradient."""
    import torch

    names, weights, value = list(step.trainable), list(step.trainable.values()), 0.0
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        loss = objective(model, batch, step) * batch.weight
        value += float(loss.detach())
        for place, part in enumerate(torch.autograd.grad(loss, weights, allow_unused=True)):
            if part is not None:
                total[place] += part
    return value, dict(zip(names, total, strict=True))


def add_gradient(trainable: Mapping[str, Any], parts: Mapping[str, Tensor], factor: float) -> None:
    """Add `factor` times a gradient to `.grad`."""
    for name, weight in trainable.items():
        share = factor * parts[name]
        weight.grad = share if weight.grad is None else weight.grad + share


@contextmanager
def same_draws(model: Any) -> Iterator[None]:
    """After the block, the random numbers are those from before it: passes in blocks of their own
    drop the same activations.
    """
    import torch

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def norm_of(parts: Mapping[str, Tensor]) -> float:
    """The L2 norm over all tensors together."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts.values()))


@contextmanager
def restored(trainable: Mapping[str, Any]) -> Iterator[None]:
    """After the block, every weight has the value from before it, to the bit."""
    import torch

    kept = {name: weight.detach().clone() for name, weight in trainable.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in trainable.items():
                weight.copy_(kept[name])


@contextmanager
def simulated(
    trainable: Mapping[str, Any],
    gradients_at: Callable[[int], Mapping[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    max_norm: float | None = None,
    normalised: bool = False,
    visit: Callable[[int], None] | None = None,
) -> Iterator[None]:
    """While open, the weights are those after `steps` steps of gradient descent.

    Args:
        trainable: The weights, by name.
        gradients_at: Number of a simulated step -> its gradients at the present weights.
        steps: 0 leaves the weights as they are.
        learning_rate: Factor of a gradient; below 0 the steps ascend.
        max_norm: Limit of a gradient's norm over all weights.
        normalised: Whether each gradient is divided by that norm instead.
        visit: Called after each step with its number, at the weights behind it.
    """
    import torch

    with restored(trainable):
        for number in range(steps):
            found = gradients_at(number)
            norm = norm_of(found) if normalised or max_norm is not None else 1.0
            scale = learning_rate
            if normalised:
                scale = learning_rate / norm if norm else 0.0
            elif max_norm is not None and norm > max_norm:
                scale = learning_rate * max_norm / norm
            with torch.no_grad():
                for name, weight in trainable.items():
                    weight.sub_(scale * found[name])
            if visit is not None:
                visit(number)
        yield


@contextmanager
def shifted(trainable: Mapping[str, Any], shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, `shifts` are added to the weights."""
    import torch

    with restored(trainable):
        with torch.no_grad():
            for name, weight in trainable.items():
                weight.add_(shifts[name])
        yield


def noise_like(trainable: Mapping[str, Any], share: float) -> dict[str, Tensor]:
    """Gaussian noise for every weight, from torch's generator, with a standard deviation of `share`
    times the root mean square of the tensor.
    """
    import torch

    return {
        name: torch.randn_like(weight) * (share * weight.detach().square().mean().sqrt())
        for name, weight in trainable.items()
    }
