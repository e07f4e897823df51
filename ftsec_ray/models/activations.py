"""Read and change the hidden states inside a decoder: hooks that are always removed, and
activations at chosen positions.

Prompts are padded on the right, where padding has no effect under causal attention, whatever the
position encoding. A block's output is a tuple in some releases of transformers and a tensor in
others; only this module handles both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ftsec_ray.models.logits import at_positions

if TYPE_CHECKING:
    from torch import Tensor, nn

Change = Callable[["Tensor"], "Tensor"]
"""(B, T, D) -> (B, T, D)"""


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a block's or sub-layer's output."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def changed(
    *,
    inputs: Sequence[tuple[nn.Module, Change]] = (),
    outputs: Sequence[tuple[nn.Module, Change]] = (),
) -> Iterator[None]:
    """Apply changes to the hidden states that enter or leave modules, inside a `with` block."""

    def before(change: Change) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return hook

    def after(change: Change) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return hook

    with ExitStack() as stack:
        for module, change in inputs:
            stack.callback(
                module.register_forward_pre_hook(before(change), with_kwargs=True).remove
            )
        for module, change in outputs:
            stack.callback(module.register_forward_hook(after(change)).remove)
        yield


def right_padded(rows: Sequence[Sequence[int]], *, pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T) int64."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def batches_of(
    rows: Sequence[Sequence[int]], *, pad: int, device: Any, batch: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, ids and mask of batches of similar length, shortest rows first."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        yield indices, *right_padded([rows[i] for i in indices], pad=pad, device=device)


def last_logits(model: Any, rows: Sequence[Sequence[int]], *, pad: int, batch: int = 64) -> Tensor:
    """Next-token logits after every row of token ids, in the order of `rows`: (N, V) float32 on the
    CPU.
    """
    import torch

    logits_of: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices, ids, mask in batches_of(rows, pad=pad, device=model.device, batch=batch):
        last = torch.tensor([len(rows[i]) - 1 for i in indices], device=ids.device)
        positions = (torch.arange(len(indices), device=ids.device), last)
        with torch.no_grad():
            at_last = at_positions(model, *positions, input_ids=ids, attention_mask=mask)
            logits = at_last.map(lambda x, _: x.cpu())
        for row, i in enumerate(indices):
            logits_of[i] = logits[row]
    return torch.stack(logits_of)
