"""The logit lens: what the hidden states behind every block would predict through the last norm and
the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftsec_ray.errors import DataError
from ftsec_ray.models.load import bare
from ftsec_ray.models.logits import LOGITS_AT_A_TIME, Positions, vocabulary

if TYPE_CHECKING:
    from torch import Tensor

_NORMS = (
    "model.norm",
    "transformer.ln_f",
    "gpt_neox.final_layer_norm",
    "model.decoder.final_layer_norm",
    "model.language_model.norm",
)
"""Paths of the last norm: Llama, GPT-2, GPT-NeoX, OPT, and multimodal models."""


def lens_of(model: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The last norm, (N, D) -> (N, D), and the head, (N, D) -> (N, V); DataError for a class whose
    last norm is not known, or whose head reads states of another width.
    """
    inner = bare(model)
    head = inner.get_output_embeddings()
    width = inner.config.get_text_config().hidden_size
    for path in _NORMS:
        norm: Any = inner
        for name in path.split("."):
            norm = getattr(norm, name, None)
        if norm is not None and head.weight.shape[1] == width:
            return norm, head
    raise DataError(
        "the last norm and the head of this model class are not known",
        type(inner).__name__,
        "a norm at " + " | ".join(_NORMS) + ", and a head on the states behind it",
        "use a model of another class, or add the path of its norm to models/lens.py",
    )


def lens_nll(model: Any, states: Tensor, wanted: Tensor) -> Tensor:
    """Loss of the wanted tokens through the lens, in nats: (N, D), (N,) int64 -> (N,) float32.
    The logits are computed again in the backward pass, so that those of one depth are in memory.
    """
    from torch.nn.functional import cross_entropy

    norm, head = lens_of(model)
    read = Positions(norm(states), head, max(1, LOGITS_AT_A_TIME // vocabulary(model)), None)
    return read.map(lambda logits, part: cross_entropy(logits, wanted[part], reduction="none"))
