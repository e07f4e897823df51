"""Checks the sizes in a model's configuration against its weights: a file of a kilobyte can ask for
a model of terabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NoReturn

from ftsec_ray.config.open_limits import MODEL_LAYERS, MODEL_WEIGHTS, raised_by
from ftsec_ray.errors import SpecError
from ftsec_ray.models.weight_files import Weights

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "depth")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "word_embed_proj_dim")
_VOCABULARIES = ("vocab_size",)
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LEARNED_POSITIONS = ("n_positions",)
_OTHER = (
    *("num_key_value_heads", "head_dim", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"),
    *("shared_expert_intermediate_size", "n_shared_experts", "type_vocab_size", "n_ctx"),
    *("image_size", "patch_size", "num_channels", "sliding_window", "state_size", "conv_kernel"),
    *("max_position_embeddings", "max_sequence_length", "seq_length", "max_seq_len", "n_groups"),
)
_NEEDED = (*_LAYERS, *_WIDTHS, *_VOCABULARIES, *_HEADS)
"""Sizes that must be at least 1 if they are given."""
_PRODUCTS = (
    (_VOCABULARIES, _WIDTHS),
    (_LAYERS, _WIDTHS, _WIDTHS),
    (_INNER, _WIDTHS),
    (_LEARNED_POSITIONS, _WIDTHS),
    (("num_attention_heads",), ("head_dim",), _WIDTHS),
    (_EXPERTS, _WIDTHS),
    (_EXPERTS, ("moe_intermediate_size",), _WIDTHS),
)
"""Products of sizes: a model with these sizes has at least this number of weights."""
_SHARED = 16
"""How often a weight may count: some models use one weight in several layers."""
_PACKED = 16
"""Maximum number of quantized weights in one number of the files."""


def check_sizes(config: Mapping[str, Any], weights: Weights | None, place: str) -> None:
    """SpecError if a configuration has sizes that no model has, or that its weights do not have.

    Args:
        config: As in `config.json`, or completed by transformers; configurations inside it
            (`text_config`) at any level are checked too.
        weights: Number of weights and tensors in the model's files; None if not known.
        place: File of the configuration, for errors.
    """
    most = MODEL_WEIGHTS.value
    if weights is not None:
        packed = _PACKED if config.get("quantization_config") else 1
        most = min(most, max(weights.count, 1) * _SHARED * packed)
    layers = MODEL_LAYERS.value if weights is None else max(weights.tensors, 1) * _SHARED
    for part in _parts(config):
        _check_part(part, most, layers, place, is_known=weights is not None)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    waiting = [config]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += [value for value in part.values() if isinstance(value, dict)]


def _check_part(
    part: Mapping[str, Any], most: int, layers: int, place: str, *, is_known: bool
) -> None:
    by_weights = "its weights have" if is_known else "the limit is"
    for key in (*_NEEDED, *_INNER, *_EXPERTS, *_LEARNED_POSITIONS, *_OTHER):
        size = part.get(key)
        if isinstance(size, bool) or not isinstance(size, (int, float)):
            if key in _NEEDED and size is not None and not isinstance(size, (list, dict)):
                _refuse(key, size, place, "a whole number", "")
            continue
        if key in _NEEDED and (size < 1 or size % 1 != 0):
            _refuse(key, size, place, "a whole number, >= 1", "")
        limit = MODEL_LAYERS if key in (*_LAYERS, *_HEADS) else MODEL_WEIGHTS
        if not size <= limit.value:  # NaN too
            _refuse(key, size, place, f"at most {limit.value:,}", raised_by(limit))
        if key in _LAYERS and size > layers:
            _refuse(key, size, place, f"at most {layers:,}, from its number of tensors", "")
    for keys in _PRODUCTS:
        used = [next((k for k in names if _is_size(part.get(k))), None) for names in keys]
        if None in used or (keys[0] == _EXPERTS and part.get("is_moe") is False):
            continue
        count = prod(int(part[key]) for key in used if key is not None)
        if count > most:
            what = " x ".join(f"{key} {part[key]:,}" for key in used if key is not None)
            want = f"at most {most:,} weights: {by_weights} no more, shared weights included"
            _refuse(what, f"{count:,} weights", place, want, raised_by(MODEL_WEIGHTS))


def _is_size(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _refuse(key: str, got: object, place: str, want: str, fix: str) -> NoReturn:
    raise SpecError(
        "the configuration of a model has impossible sizes",
        f"{key}: {got} in {place}",
        want,
        fix or "correct the file, or download the model from its publisher",
    )
