"""What the structure of a loaded model allows methods to do, measured on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ftsec_ray.errors import DataError
from ftsec_ray.models.families import (
    INPUT_EMBEDDINGS,
    LINEAR_MLP,
    PACKED_ROWS,
    REASONS,
    RESIDUAL_WRITERS,
)
from ftsec_ray.models.load import check_packing, takes_embeddings
from ftsec_ray.models.precision import in_float32
from ftsec_ray.models.residual import residual_stream

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel


def missing(loaded: LoadedModel, needs: Iterable[str]) -> dict[str, str]:
    """The needs that a model does not meet, with the reason."""
    checks: Mapping[str, Callable[[LoadedModel], str | None]] = {
        RESIDUAL_WRITERS: _writers,
        LINEAR_MLP: partial(_writers, linear_mlp=True),
        INPUT_EMBEDDINGS: _embeddings,
        PACKED_ROWS: _packed,
    }
    with in_float32(loaded.model):  # rounding would hide what a block adds
        reasons = {need: checks[need](loaded) for need in sorted(set(needs))}
    return {need: reason for need, reason in reasons.items() if reason is not None}


def check_structure(loaded: LoadedModel, needs: Mapping[str, Iterable[str]]) -> None:
    """DataError if methods of the sweep need a structure that the model does not have.

    Args:
        loaded: The model.
        needs: Name of a method (or setting) -> the structure that it needs.
    """
    lacking = missing(loaded, {need for wanted in needs.values() for need in wanted})
    refused = {name: [lacking[n] for n in wanted if n in lacking] for name, wanted in needs.items()}
    refused = {name: reasons for name, reasons in refused.items() if reasons}
    if refused:
        raise DataError(
            f"methods of the sweep do not work with model {loaded.info.name!r}",
            "; ".join(f"{name}: {reasons[0]}" for name, reasons in sorted(refused.items())),
            "methods that this model class supports",
            f"exclude them for this model: exclude {{model: {loaded.info.name}, attack: ...}}",
        )


def _writers(loaded: LoadedModel, *, linear_mlp: bool = False) -> str | None:
    """Why the writers to the residual stream are not known or, with `linear_mlp`, are followed by a
    norm; None if neither.
    """
    try:
        stream = residual_stream(loaded.model)
    except DataError as error:
        return f"{REASONS[RESIDUAL_WRITERS]} ({error.fix or error.what})"
    has_norm = any(block.mlp.gain is not None for block in stream.blocks)
    return REASONS[LINEAR_MLP] if linear_mlp and has_norm else None


def _embeddings(loaded: LoadedModel) -> str | None:
    return None if takes_embeddings(loaded.model) else REASONS[INPUT_EMBEDDINGS]


def _packed(loaded: LoadedModel) -> str | None:
    try:
        check_packing(loaded)
    except DataError:
        return REASONS[PACKED_ROWS]
    return None
