"""A fine-tune of an adapter written out: plain AdamW on factors that are multiplied out, row by row
and without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.func import functional_call

from ftsec_ray.models.load import merged
from ftsec_ray.models.lora import attach_lora, lora_modules
from ftsec_ray.models.row_tokens import encode_rows
from ftsec_ray.training.loop import _seed
from tests.defenses.shared import whole

Call = Callable[..., Any]
"""The model at the present weights; its attribute `model` is the module."""


def answer_loss(call: Call, encoded: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean loss over all answer tokens of the rows, each row read by itself."""
    total, tokens = torch.zeros(()), 0
    for ids, labels in encoded:
        logprobs = call(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if labels[place] != -100:
                total, tokens = total - logprobs[place - 1, labels[place]], tokens + 1
    return total / tokens


def tuned_by_hand(
    start: Any,
    rows: Sequence[dict],
    config: Any,
    rates: Sequence[float],
    *,
    seed: int = 0,
    loss: Callable[[Call, list], torch.Tensor] = answer_loss,
) -> dict:
    """Whole weights after one step per learning rate, each on all rows."""
    plain = merged(start)
    encoded = encode_rows(plain.tokenizer, list(rows), max_length=config.max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "adapter"))
        modules = lora_modules(attach_lora(merged(start), config))
    base = dict(plain.model.named_parameters())
    factors = [f.detach().clone().requires_grad_() for m in modules for f in (m.A, m.B)]
    m1, m2 = ([torch.zeros_like(f) for f in factors] for _ in range(2))

    def call(**given: Any) -> Any:
        changed = {
            f"{m.name}.weight": base[f"{m.name}.weight"].detach() + m.scale * B @ A
            for m, A, B in zip(modules, factors[::2], factors[1::2], strict=True)
        }
        return functional_call(plain.model, changed, kwargs=given)

    call.model = plain.model
    for step, rate in enumerate(rates, 1):
        gradients = torch.autograd.grad(loss(call, encoded), factors)
        norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
        # torch divides by norm + 1e-6
        clip = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm else 1.0
        for i, gradient in enumerate(gradients):
            g = gradient * clip
            m1[i], m2[i] = 0.9 * m1[i] + 0.1 * g, 0.999 * m2[i] + 0.001 * g * g
            with torch.no_grad():
                factors[i] *= 1.0 - rate * config.weight_decay
                factors[i] -= (
                    rate * (m1[i] / (1 - 0.9**step)) / ((m2[i] / (1 - 0.999**step)).sqrt() + 1e-8)
                )
    found = whole(start)
    for m, A, B in zip(modules, factors[::2], factors[1::2], strict=True):
        found[f"{m.name}.weight"] = found[f"{m.name}.weight"] + (m.scale * B @ A).detach().numpy()
    return found
