"""From a published model to a model in memory: a Hugging Face id, a local folder, or a GGUF file.

Weights keep the dtype of the source unless the sweep names another; those of a GGUF file become
float32. `trust_remote_code` is off unless the sweep turns it on. A tokenizer without a chat
template or a padding token gets one or is refused here, so that later stages can rely on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ftsec_ray.context import LoadedModel, ModelInfo
from ftsec_ray.errors import DataError, FtsecError, as_data_error, is_out_of_memory
from ftsec_ray.models.chat import adds_bos, render
from ftsec_ray.models.chat_format import OPTIONS, chat_format
from ftsec_ray.models.config_sizes import check_sizes
from ftsec_ray.models.load import NEEDS_GPU, check_attention, count_parameters, model_class
from ftsec_ray.models.published_folder import check_folder
from ftsec_ray.models.weight_files import Weights, gguf_weights


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
    dtype: str = "float32",
    attention: str | None = None,
) -> LoadedModel:
    """Load a published model in a dtype (`auto`: its own); DataError with what is missing and what
    can be given instead.
    """
    from transformers import AutoConfig, AutoTokenizer

    check_attention(attention)
    place, options, weights = _place(source, runs_code=trust_remote_code)
    if attention not in (None, NEEDS_GPU):
        options["attn_implementation"] = attention
    options |= {"revision": revision} if revision else {}
    options |= {"trust_remote_code": trust_remote_code}
    with readable("the model", source, "a Hugging Face id, a local model folder or a .gguf file"):
        refuse_adapter(place, source, revision)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        config = AutoConfig.from_pretrained(place, **options)
        check_config(config, weights, source)
        cls = model_class(config)
        if "gguf_file" not in options:
            _without_pad_outside(config)
            options |= {"config": config, "use_safetensors": True}
        is_own = dtype == "auto" and "gguf_file" in options  # GGUF blocks have no dtype to keep
        model = cls.from_pretrained(place, dtype="float32" if is_own else dtype, **options)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if thinking:
        tokenizer.init_kwargs[OPTIONS] = {"thinking": True}
    _mend(tokenizer, model, source, aligned=aligned)
    _dequantized(model)
    model.config.name_or_path = source if "gguf_file" not in options else Path(source).name
    return LoadedModel(
        model.eval(),
        tokenizer,
        ModelInfo(name=name, family=family, parameters=count_parameters(model), aligned=aligned),
        attention=attention,
    )


@contextmanager
def readable(what: str, source: str, want: str) -> Iterator[None]:
    """Turns every error while a model is read into a DataError, except when memory runs out."""
    try:
        yield
    except FtsecError:
        raise
    except BaseException as error:
        # A damaged tokenizer can make its library panic, which is not an Exception.
        is_panic = type(error).__name__ == "PanicException"
        if not (isinstance(error, Exception) or is_panic) or is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        raise DataError(
            f"{what} cannot be loaded",
            source,
            want,
            f"{type(error).__name__}: {lines[0] if lines else ''}",
        ) from error


def _place(source: str, *, runs_code: bool) -> tuple[str, dict[str, Any], Weights | None]:
    """The path or id that transformers loads, the options for it, and what the weights hold."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(
                "the model file does not exist",
                source,
                "a .gguf file",
                "check the path in the sweep",
            )
        return str(path.parent), {"gguf_file": path.name}, gguf_weights(path)
    if path.is_dir():
        return str(path), {}, checked_folder(path, runs_code=runs_code)
    return source, {}, None


def checked_folder(folder: Path, *, runs_code: bool = False) -> Weights | None:
    """`check_folder` for a stage: its errors become DataErrors."""
    with as_data_error():
        return check_folder(folder, runs_code=runs_code)


def refuse_adapter(place: str, source: str, revision: str | None = None) -> None:
    """DataError if a model comes with an adapter: transformers would load the base model that the
    adapter names instead of this model.
    """
    from transformers.utils import find_adapter_config_file

    adapter_config = None
    with suppress(OSError, ValueError):  # loading runs into the same error and reports it
        adapter_config = find_adapter_config_file(place, revision=revision)
    if adapter_config is not None:
        raise DataError(
            "the model contains an adapter",
            source,
            "full weights: an adapter names a base model, which is not part of this model",
            "merge the adapter into its base (`merge_and_unload` of peft) and save the result, or"
            " use the base model",
        )


def check_config(config: Any, weights: Weights | None, source: str) -> None:
    """DataError if the configuration, as transformers completes it, has impossible sizes or sizes
    that the weights do not have.
    """
    with as_data_error():
        check_sizes(config.to_dict(), weights, source)


def _dequantized(model: Any) -> None:
    """Removes the marks of a GGUF file: the weights are plain now, and transformers would refuse to
    save them.
    """
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False


def _without_pad_outside(config: Any) -> None:
    """Removes a padding id outside the embedding (-1 is common): torch would fail on it, or train
    one row less.
    """
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        pad, rows = getattr(part, "pad_token_id", None), config.get_text_config().vocab_size
        if pad is not None and not 0 <= pad < rows:
            part.pad_token_id = None


def _mend(tokenizer: Any, model: Any, source: str, *, aligned: bool) -> None:
    """Completes the tokenizer; DataError if a token that is needed has no embedding."""
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has no end token", source, "a tokenizer with eos_token")
    rows = model.get_input_embeddings().weight.shape[0]
    if not tokenizer.chat_template and aligned:
        raise DataError(
            "an aligned model has no chat template",
            source,
            "the template that it was aligned with: with another one it behaves differently",
            "add `chat_template: FILE` to the model, or `aligned: false` for a base model",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = plain_template(tokenizer)
    needed = {tokenizer.eos_token_id, *_template_ids(tokenizer)}
    needed |= set() if tokenizer.bos_token_id is None else {tokenizer.bos_token_id}
    outside = sorted(token for token in needed if not 0 <= token < rows)
    if outside:
        named = [f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in outside]
        raise DataError(
            "tokens that the chat template or the tokenizer needs have no embedding",
            " | ".join(named),
            f"ids 0 to {rows - 1}, the rows of the model's embedding",
            "resize the embedding to the tokenizer and train the new rows, or use the tokenizer"
            " that the model was trained with",
        )
    if tokenizer.pad_token_id is None or not 0 <= tokenizer.pad_token_id < rows:
        tokenizer.pad_token = tokenizer.eos_token
    _mend_generation(tokenizer, model, rows)


def _mend_generation(tokenizer: Any, model: Any, rows: int) -> None:
    """Removes ids without an embedding from the generation settings: they could not be saved, and
    no answer could end with them.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    if settings.pad_token_id is not None and not 0 <= settings.pad_token_id < rows:
        settings.pad_token_id = tokenizer.pad_token_id
    if isinstance(settings.eos_token_id, list):
        kept = [token for token in settings.eos_token_id if 0 <= token < rows]
        settings.eos_token_id = kept or tokenizer.eos_token_id
    elif settings.eos_token_id is not None and not 0 <= settings.eos_token_id < rows:
        settings.eos_token_id = tokenizer.eos_token_id


def _template_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that the template uses for an open and an answered turn."""
    asked = [{"role": "user", "content": "a"}]
    texts = [
        render(tokenizer, asked, generate=True),
        render(tokenizer, [*asked, {"role": "assistant", "content": "a"}], generate=False),
        chat_format(tokenizer).end,
    ]
    return {
        token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids
    }


def plain_template(tokenizer: Any) -> str:
    """The template for base models without one; it begins with the start token if the tokenizer
    adds that before a text.
    """
    return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + PLAIN_TEMPLATE


PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
"""For base models without a chat template; its hash is stored with every generation, like that of
any other template.
"""
