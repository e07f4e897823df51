"""What the structure of a model class allows methods to do, from its `config.json`: used when a
sweep is planned, without torch.

For classes that are not in the table, `models.structure.missing` measures the same properties when
the model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESIDUAL_WRITERS = "residual_writers"
"""Blocks add the outputs of their attention and their MLP to their input."""
LINEAR_MLP = "linear_mlp"
"""The output of a down-projection is added to the residual stream without a norm in between."""
INPUT_EMBEDDINGS = "input_embeddings"
"""Generation can start from embeddings."""
PACKED_ROWS = "packed_rows"
"""Rows that are packed into one sequence do not attend to each other."""

REASONS = {
    RESIDUAL_WRITERS: "its blocks do not add the outputs of one attention and one MLP to their"
    " input",
    LINEAR_MLP: "a norm follows its down-projections, so that their effect on the residual stream"
    " is not linear",
    INPUT_EMBEDDINGS: "its class generates from token ids only, and soft tokens are embeddings",
    PACKED_ROWS: "rows that are packed into one sequence would attend to each other",
}

_LACKING: dict[str, frozenset[str]] = {
    "gemma2": frozenset({LINEAR_MLP}),
    "gemma3": frozenset({LINEAR_MLP, INPUT_EMBEDDINGS}),
    "gemma3_text": frozenset({LINEAR_MLP}),
    "olmo2": frozenset({LINEAR_MLP}),
    "olmo3": frozenset({LINEAR_MLP}),
    "opt": frozenset({PACKED_ROWS}),
    "bloom": frozenset({RESIDUAL_WRITERS, PACKED_ROWS}),
    "mixtral": frozenset({RESIDUAL_WRITERS}),
    "qwen3_moe": frozenset({RESIDUAL_WRITERS}),
}


def lacking(config: Mapping[str, Any]) -> dict[str, str]:
    """What a model class is known not to support, with the reason; empty if nothing is known."""
    names = set(_LACKING.get(str(config.get("model_type")), frozenset()))
    if config.get("model_type") == "opt" and config.get("do_layer_norm_before") is False:
        names.add(RESIDUAL_WRITERS)
    names |= {LINEAR_MLP} if RESIDUAL_WRITERS in names else set()
    return {name: REASONS[name] for name in sorted(names)}
