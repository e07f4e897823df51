"""Models on disk and in memory: the only module that saves, loads, copies and merges them.

An artifact is a folder: either full weights (config, safetensors, tokenizer) or a LoRA adapter that
names the digest of its base and holds only the difference. `model.json` says which, and describes
the model. Everything is safetensors and JSON, written so that equal models give equal bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel, ModelInfo
from ftsec_ray.errors import DataError, EnvironmentFault, StageError

if TYPE_CHECKING:
    from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """Distinct weights of a module; a tied tensor counts once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def whole_model(loaded: LoadedModel) -> Any:
    """The transformers model, under its adapter if there is one."""
    return loaded.model.get_base_model() if loaded.has_adapter else loaded.model


def keeps_logits(model: Any) -> bool:
    """Whether a model can return logits at some positions only (`logits_to_keep`)."""
    return takes(model, "logits_to_keep")


def takes(model: Any, name: str) -> bool:
    """Whether the forward pass of a model, without its adapter, has an argument `name`."""
    return name in signature(bare(model).forward).parameters


def takes_embeddings(model: Any) -> bool:
    """Whether a model can generate from `inputs_embeds`, checked as transformers does."""
    return "inputs_embeds" in signature(bare(model).prepare_inputs_for_generation).parameters


def placed(model: Any, positions: Tensor) -> dict[str, Tensor]:
    """The argument for the positions of a forward pass, if the class has one."""
    return {"position_ids": positions} if takes(model, "position_ids") else {}


def check_packing(loaded: LoadedModel) -> None:
    """DataError if the class of a model lets rows that are packed into one sequence attend to each
    other: tested by the effect of one row on the next.
    """
    import torch

    model = loaded.model
    first, second = torch.tensor([[1, 2, 3], [3, 1, 1]], device=model.device), [2, 1]
    ids = torch.cat([first, torch.tensor([second, second], device=model.device)], dim=1)
    positions = torch.tensor([[0, 1, 2, 0, 1]] * 2, device=model.device)
    was_training = model.training
    with torch.no_grad():
        # one sequence at a time: only then do restarting positions mean packed rows
        one, other = (
            model.eval()(input_ids=ids[i : i + 1], use_cache=False, **placed(model, positions[:1]))
            .logits[0, 3:]
            .double()
            for i in range(2)
        )
    model.train(was_training)
    if float((one - other).norm()) > 1e-3 * float(one.norm()):
        raise DataError(
            "rows that are packed into one sequence would attend to each other in this model class",
            type(whole_model(loaded)).__name__,
            "training.batching: length_grouped | shuffled",
        )


def check_ids(loaded: LoadedModel, rows: Iterable[Sequence[int]]) -> None:
    """DataError if a token of the rows has no embedding."""
    size = whole_model(loaded).get_input_embeddings().weight.shape[0]
    outside = sorted({token for ids in rows for token in ids if not 0 <= token < size})
    if outside:
        named = [f"{loaded.tokenizer.convert_ids_to_tokens(token)} ({token})" for token in outside]
        raise DataError(
            "tokens of the text have no embedding",
            " | ".join(named[:8]),
            f"ids 0 to {size - 1}, the rows of the embedding of {loaded.info.name}",
            "use the tokenizer that the model was trained with, or remove the rows with these"
            " tokens",
        )


def position_limit(model: Any) -> int | None:
    """Maximum number of tokens of a model, prompt and answer together; None if it states no
    limit.
    """
    config = bare(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def within_positions(model: Any, tokens: int) -> int:
    """The number of tokens, or the model's position limit if that is lower."""
    limit = position_limit(model)
    return tokens if limit is None else min(tokens, limit)


_BLOCKS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
)
"""Paths of the transformer blocks: Llama, GPT-2, GPT-NeoX, OPT, and multimodal models."""
LANGUAGE_MODEL = "model.language_model"
"""Path of the text decoder in a multimodal model."""


def decoder_layers(model: Any) -> list[nn.Module]:
    """The transformer blocks of a text decoder, with or without an adapter."""
    inner = bare(model)
    for path in _BLOCKS:
        node = _at(inner, path)
        if node is not None:
            return list(node)
    raise DataError(
        "the transformer blocks of this model class are not known",
        type(inner).__name__,
        "blocks at " + " | ".join(_BLOCKS),
        "use a model of another class, or add the path of its blocks to models/load.py",
    )


def reads_text_only(model: Any) -> bool:
    """Whether a model is a text decoder without an encoder of images or sound."""
    return _at(bare(model), LANGUAGE_MODEL) is None


def is_of_text(model: Any, name: str) -> bool:
    """Whether a weight of a model, by its name, takes part in reading and writing text: all except
    those of encoders of images or sound.
    """
    return reads_text_only(model) or f".{LANGUAGE_MODEL}." in f".{name}" or "lm_head" in name


def bare(model: Any) -> Any:
    """The transformers model, without adapter and without DeepSpeed's engine."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _at(node: Any, path: str) -> Any:
    for name in path.split("."):
        node = getattr(node, name, None)
    return node


def copy_model(loaded: LoadedModel) -> LoadedModel:
    """A deep copy that methods may change in place."""
    return replace(loaded, model=copy.deepcopy(loaded.model))


def merged(loaded: LoadedModel) -> LoadedModel:
    """A copy with full weights in the dtype of the base: the adapter, if any, is merged."""
    return folded(loaded)[0]


def folded(loaded: LoadedModel) -> tuple[LoadedModel, float | None]:
    """The result of `merged`, and the share of the adapter's update that was lost by rounding to
    the dtype of the base; None in float32.
    """
    if loaded.quantization is not None:
        raise StageError(
            "a quantized base has no full weights to merge an adapter into",
            loaded.quantization,
            "a base that is not quantized",
            "set training.quantization: none",
        )
    model, lost = copy.deepcopy(loaded.model), None
    if loaded.has_adapter:
        from ftsec_ray.models.precision import fold_rounded, is_half

        if is_half(model):
            lost = fold_rounded(model)
            model = model.unload()
        else:
            model = model.merge_and_unload()
    return replace(loaded, model=model, base_digest=None), lost


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Write a model artifact: an adapter if one is attached to a known base, otherwise full
    weights.
    """
    if loaded.has_adapter and loaded.base_digest is None:
        loaded = merged(loaded)
    if loaded.has_adapter:
        _save_adapter(loaded, folder)
    else:
        _save_whole(loaded, folder)
    meta = {
        "format": "adapter" if loaded.has_adapter else "full",
        "base": loaded.base_digest,
        "info": asdict(loaded.info),
    }
    meta |= {
        key: value
        for key, value in (("quantization", loaded.quantization), ("attention", loaded.attention))
        if value is not None
    }
    (folder / "model.json").write_text(json.dumps(meta, sort_keys=True, indent=1), encoding="utf-8")


_OF_THE_MACHINE = ("is_local", "local_files_only", "name_or_path", "files_loaded", "gguf_file")
"""Keys of a saved tokenizer that hold where it was loaded from, and nothing else about it."""


def _save_whole(loaded: LoadedModel, folder: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded.model.save_pretrained(folder, safe_serialization=True)
    loaded.tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    kept = {
        key: value
        for key, value in json.loads(config.read_text(encoding="utf-8")).items()
        if key not in _OF_THE_MACHINE
    }
    config.write_text(json.dumps(kept, sort_keys=True, indent=1), encoding="utf-8")


def _save_adapter(loaded: LoadedModel, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(loaded.model).items()
    }
    save_file(
        dict(sorted(state.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    config = loaded.model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = (
        None  # a path on the training machine says nothing about the adapter
    )
    plain = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    if isinstance(plain.get("target_modules"), list):
        plain["target_modules"] = sorted(plain["target_modules"])
    text = json.dumps(
        plain, sort_keys=True, indent=1, default=lambda v: getattr(v, "value", str(v))
    )
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """`model.json` of an artifact: format, base, info; DataError if it is missing or unreadable."""
    try:
        meta: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            "not a model artifact", str(folder), "a folder with a readable model.json", str(error)
        ) from error
    return meta


def load_model(
    folder: Path, *, base: LoadedModel | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load an artifact; an adapter is attached to a copy of `base`, which must be the model named
    in model.json.
    """
    meta = read_meta(folder)
    info = ModelInfo(**meta["info"])
    if meta["format"] == "adapter":
        if base is None:
            raise DataError(
                "an adapter needs its base", str(folder), f"the model with digest {meta['base']}"
            )
        packed = meta.get("quantization")
        model = _attach(base, folder, packed, device)
        return LoadedModel(model, base.tokenizer, info, meta["base"], packed, base.attention)
    attention = meta.get("attention")
    model, tokenizer = _from_folder(folder, attention, device)
    return LoadedModel(model.to(device), tokenizer, info, attention=attention)


NEEDS_GPU = "flash_attention_2"
"""The attention implementation that needs a GPU: on a CPU the model is loaded without it."""


def check_attention(attention: str | None) -> None:
    """EnvironmentFault if an attention implementation is not installed here."""
    from importlib.util import find_spec

    if attention == NEEDS_GPU and find_spec("flash_attn") is None:
        raise EnvironmentFault(
            "attention: flash_attention_2 needs flash-attn, which is not installed",
            "flash_attn",
            "the package flash-attn on all nodes",
            "install flash-attn for this torch and CUDA, or set attention: sdpa",
        )


def _from_folder(folder: Path, attention: str | None, device: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    config, options = AutoConfig.from_pretrained(folder, local_files_only=True), {}
    if attention is not None and (attention != NEEDS_GPU or device.startswith("cuda")):
        check_attention(attention)
        options["attn_implementation"] = attention
    # the artifact's config names the dtype that it was written in
    model = model_class(config).from_pretrained(
        folder, dtype="auto", local_files_only=True, **options
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def model_class(config: Any) -> Any:
    """The auto class that loads a model: that of text decoders or, if it has none for the
    configuration, that of models that also read images.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    classes = (AutoModelForCausalLM, AutoModelForImageTextToText)
    remote = getattr(config, "auto_map", None) or {}
    for cls in classes:
        if type(config) in cls._model_mapping or cls.__name__ in remote:  # noqa: SLF001
            return cls
    return classes[0]


def _attach(base: LoadedModel, folder: Path, packed: Any, device: str) -> Any:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = LoraConfig(**json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
    under = copy.deepcopy(base.model)
    if packed is not None:
        from ftsec_ray.models.quantized import quantize

        quantize(under, packed, device)
        under.to(device)
    model = get_peft_model(under, config)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model.eval()
