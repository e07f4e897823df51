"""Logits at chosen positions, computed in slices if they are many: with a vocabulary of 262,144
words they take a MiB per position.

Up to `LOGITS_AT_A_TIME` logits of a forward pass are computed at once, by the model itself. Above
that, the model stops before its head: the input of the head is kept, and the head is applied to
slices of it. In training, a slice is computed again in the backward pass, so that only one slice is
in memory at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.models.load import bare

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_AT_A_TIME = 2**26
"""256 MiB of float32."""

Reading = Callable[["Tensor", slice], "Tensor"]
"""(logits (N, V) float32 of a slice of the positions, which slice) -> (N, ...)."""


@dataclass(frozen=True)
class Positions:
    """A model's output at chosen positions."""

    given: Any
    """(N, V) logits, or (N, D) states that `head` turns into logits."""
    head: Callable[[Tensor], Tensor] | None
    at_a_time: int
    """Positions whose logits may be in memory together."""
    output: Any
    """The model's output, without usable logits."""

    def map(self, reading: Reading) -> Tensor:
        """`reading` applied to every position, in order: (N, ...)."""
        import torch
        from torch.utils.checkpoint import checkpoint

        head, total = self.head, len(self.given)
        if head is None:
            return reading(_at_least_float32(self.given), slice(0, total))

        def read(states: Tensor, part: slice) -> Tensor:
            return reading(_at_least_float32(head(states)), part)

        parts = []
        for start in range(0, total, self.at_a_time):
            part = slice(start, min(start + self.at_a_time, total))
            if torch.is_grad_enabled():
                # the head has no randomness
                parts.append(
                    checkpoint(
                        read,
                        self.given[part],
                        part,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                )
            else:
                parts.append(read(self.given[part], part))
        return torch.cat(parts) if parts else read(self.given, slice(0, 0))


def _at_least_float32(logits: Tensor) -> Tensor:
    """Half precision widened to float32; float64 stays, also in a backward pass."""
    import torch

    return logits if logits.dtype is torch.float64 else logits.float()


def fits(model: Any, positions: int) -> bool:
    """Whether the logits of this number of positions may be in memory together."""
    return positions * vocabulary(model) <= LOGITS_AT_A_TIME


def vocabulary(model: Any) -> int:
    """Number of logits per position."""
    return int(bare(model).config.get_text_config().vocab_size)


def at_positions(model: Any, rows: Tensor, columns: Tensor, **inputs: Any) -> Positions:
    """A model's output at (row, column) of a batch.

    Args:
        model: With or without an adapter.
        rows: (N,) int64.
        columns: (N,) int64, counted over the positions that `logits_to_keep` keeps.
        inputs: Arguments of the forward pass.
    """
    batch, width = next(
        inputs[name].shape[:2] for name in ("input_ids", "inputs_embeds") if name in inputs
    )
    kept = inputs.get("logits_to_keep")
    if kept is not None:
        width = kept if isinstance(kept, int) else len(kept)
    at_a_time = max(1, LOGITS_AT_A_TIME // vocabulary(model))
    if not fits(model, batch * width):
        output, states, head = _unread(model, inputs)
        if head is not None:
            return Positions(states[rows, columns], head, at_a_time, output)
    output = model(**inputs)
    return Positions(output.logits[rows, columns], None, at_a_time, output)


def token_nll(model: Any, labels: Tensor, **inputs: Any) -> Tensor:
    """Loss of every label in nats, 0 where the label is -100; a label is aligned with the logits
    that predict it.

    Shapes: labels (B, T) int64 -> (B, T) float32.
    """
    import torch
    from torch.nn.functional import cross_entropy

    rows, columns = (labels != -100).nonzero(as_tuple=True)
    wanted = labels[rows, columns]
    nll = at_positions(model, rows, columns, **inputs).map(
        lambda logits, part: cross_entropy(logits, wanted[part], reduction="none")
    )
    return torch.zeros(labels.shape, dtype=nll.dtype, device=nll.device).index_put(
        (rows, columns), nll
    )


def _unread(
    model: Any, inputs: dict[str, Any]
) -> tuple[Any, Tensor, Callable[[Tensor], Tensor] | None]:
    """A forward pass in which the head sees only the first position: its output, the input of the
    head, and the function from there to logits; None if that is not known.
    """
    linear = bare(model).get_output_embeddings()
    read: list[Tensor] = []
    given: list[Tensor] = []

    def first_only(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        read.append(args[0])
        return (args[0][:, :1], *args[1:])

    def keep(_module: Any, _args: tuple[Any, ...], output: Tensor) -> None:
        given.append(output.detach())

    handles = [linear.register_forward_pre_hook(first_only), linear.register_forward_hook(keep)]
    try:
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    behind = _behind_head(bare(model).config.get_text_config(), given[0], output.logits.detach())
    if behind is None:
        return output, read[0], None
    return output, read[0], lambda states: behind(linear(states))


def _behind_head(config: Any, linear: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What a model class does to the output of its head, determined from its logits: nothing, a
    scale (Granite), or a soft cap (Gemma 2); None for anything else.
    """
    import torch

    scale = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    known: list[Callable[[Tensor], Tensor]] = [lambda x: x]
    known += [lambda x: x / scale] if scale else []
    known += [lambda x: torch.tanh(x / cap) * cap] if cap else []
    for behind in known:
        if torch.allclose(behind(linear), logits, rtol=1e-5, atol=1e-6, equal_nan=True):
            return behind
    return None
