"""What the structure of a class of models lets methods do, as far as a `config.json` tells it: read
when a sweep is planned, without torch.

What is not in the table is found out by measurement when the model is loaded
(`models.structure.missing`), with the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESIDUAL_WRITERS = "residual_writers"
"""Blocks add the outputs of their attention and their MLP to their input."""
LINEAR_MLP = "linear_mlp"
"""What a down-projection adds to the residual stream is linear in it."""
INPUT_EMBEDDINGS = "input_embeddings"
"""Generation can start from embeddings."""
PACKED_ROWS = "packed_rows"
"""Rows that are packed into one sequence do not see each other."""

REASONS = {
    RESIDUAL_WRITERS: "its blocks do not add the outputs of one attention and one MLP to their"
    " input",
    LINEAR_MLP: "a norm stands behind its down-projections, so that what one adds to the residual"
    " stream is not linear in it",
    INPUT_EMBEDDINGS: "its class generates from token ids alone, and soft tokens are embeddings",
    PACKED_ROWS: "rows that are packed into one sequence would see each other",
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
    """What a class of models is known to lack, with the reason; empty where nothing is known."""
    names = set(_LACKING.get(str(config.get("model_type")), frozenset()))
    if config.get("model_type") == "opt" and config.get("do_layer_norm_before") is False:
        names.add(RESIDUAL_WRITERS)
    names |= {LINEAR_MLP} if RESIDUAL_WRITERS in names else set()
    return {name: REASONS[name] for name in sorted(names)}
