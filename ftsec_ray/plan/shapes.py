"""The shape of a model before it is loaded: from the `config.json` of a folder, the header of a
GGUF file or the table of the ladder, else a typical shape for its number of parameters.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from ftsec_ray.config.sweep import ModelSpec
from ftsec_ray.models.ladder import VOCAB_SIZE, ladder_size
from ftsec_ray.plan.durations import parameters_of
from ftsec_ray.plan.memory import Shape, guessed_shape
from ftsec_ray.plan.origin import known_config, local_path

_WIDTH = ("hidden_size", "n_embd", "embedding_length")
_DEPTH = ("num_hidden_layers", "n_layer", "block_count")
_MLP = ("intermediate_size", "ffn_dim", "n_inner", "feed_forward_length")
"""Keys of these dimensions in the files."""
_MAX_ENTRIES = 10_000


def shape_of(model: ModelSpec) -> Shape:
    """The shape of a model of a sweep."""
    if model.source.startswith("ladder:"):
        size = ladder_size(model.source.removeprefix("ladder:").removesuffix("-base"))
        return Shape(size.parameters, size.hidden, size.layers, size.mlp, VOCAB_SIZE)
    path = local_path(model.source)
    parameters = parameters_of(model)
    known = shape_of_file(path, parameters) if path is not None else None
    return known or guessed_shape(parameters)


def shape_of_file(path: Path, parameters: int | None = None) -> Shape | None:
    """The shape of the model in a folder or a GGUF file; None if the file does not give it.

    Args:
        path: The folder or file.
        parameters: Number of parameters; None to compute it for the layers of a Llama model.
    """
    header = gguf_header(path) if path.suffix == ".gguf" else known_config(str(path))
    config: dict[str, Any] = {**header, **header.get("text_config", {})}
    width, depth, mlp, vocabulary = (
        next((config[name] for name in names if _is_size(config.get(name))), None)
        for names in (_WIDTH, _DEPTH, _MLP, ("vocab_size",))
    )
    if width is None or depth is None or vocabulary is None:
        return None
    is_tied = bool(config.get("tie_word_embeddings", True))
    heads = config.get("num_attention_heads") or config.get("attention.head_count") or 1
    kv_heads = config.get("num_key_value_heads") or config.get("attention.head_count_kv") or heads
    mlp = mlp or 4 * width  # the default of GPT-2
    block = width * width * (2 + 2 * kv_heads / heads) + 3 * width * mlp
    counted = round(depth * block + vocabulary * width * (1 if is_tied else 2))
    return Shape(parameters or counted, width, depth, mlp, vocabulary, is_tied)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value > 0


_NUMBERS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
"""Type numbers of values in the header of a GGUF file, by its specification."""


def gguf_header(path: Path) -> dict[str, Any]:
    """The values of a GGUF file's header up to the tokenizer, by their keys without the prefix of
    the architecture (`llama.`); empty for a file that is not GGUF.
    """
    header: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                return {}
            file.read(4 + 8)
            for _ in range(min(_MAX_ENTRIES, _number(file, "Q"))):
                name = _text(file)
                if name.startswith("tokenizer."):
                    break
                header[name.partition(".")[2]] = _value(file, _number(file, "I"))
    except (OSError, struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError):
        return {}
    return header


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    return _number(file, _NUMBERS[kind])
