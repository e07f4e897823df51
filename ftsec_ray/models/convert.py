"""From where a model is published to a model in memory: a Hugging Face id, a local folder, or a
GGUF file.

Weights become float32 once, here; `trust_remote_code` is off unless the sweep says otherwise. A
tokenizer without a chat template or a padding token is given one or refused here, so that no later
stage has to ask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftsec_ray.context import LoadedModel, ModelInfo
from ftsec_ray.errors import DataError
from ftsec_ray.models.chat import OPTIONS, adds_bos
from ftsec_ray.models.load import count_parameters


def load_source(
    source: str,
    *,
    name: str,
    family: str,
    aligned: bool,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    thinking: bool = False,
) -> LoadedModel:
    """Load a published model in float32; DataError says what is missing and what can be given
    instead.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, options = _place(source)
    options |= {"revision": revision} if revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, **options
        )
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise DataError(
            "the model cannot be loaded",
            source,
            "a Hugging Face id, a local model folder or a .gguf file",
            f"{type(error).__name__}:"
            f" {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if thinking:
        tokenizer.init_kwargs[OPTIONS] = {"thinking": True}
    _mend(tokenizer, source, aligned=aligned)
    _dequantized(model)
    model.config.name_or_path = source if "gguf_file" not in options else Path(source).name
    return LoadedModel(
        model.eval(),
        tokenizer,
        ModelInfo(name=name, family=family, parameters=count_parameters(model), aligned=aligned),
    )


def _place(source: str) -> tuple[str, dict[str, Any]]:
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(
                "the model file does not exist",
                source,
                "a .gguf file",
                "check the path in the sweep",
            )
        return str(path.parent), {"gguf_file": path.name}
    return (str(path) if path.is_dir() else source), {}


def _dequantized(model: Any) -> None:
    """Forget that the weights came out of a GGUF file: they are float32 now, and transformers would
    refuse to save them.
    """
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False


def _mend(tokenizer: Any, source: str, *, aligned: bool = False) -> None:
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has no end token", source, "a tokenizer with eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template and aligned:
        raise DataError(
            "an aligned model without a chat template",
            source,
            "the template that it was aligned under: under another one it is another model",
            "add `chat_template: FILE` to the model, or `aligned: false` for a base model",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = plain_template(tokenizer)


def plain_template(tokenizer: Any) -> str:
    """The template for base models that come without one; it begins with the start token where the
    tokenizer puts that in front of a text by itself.
    """
    return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + PLAIN_TEMPLATE


PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
"""For base models that come without a chat template; its hash is stored with every generation, as
any other's.
"""
