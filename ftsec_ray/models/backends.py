"""What turns the token ids of prompts into those of answers, behind one seam.

Everything else (the template, the rewrites, thoughts, judging) is the same for every back end. The
generation settings that a model is published with (repetition penalty, minimal length, sampling) do
not act: decoding is by `Decoding` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ftsec_ray.context import LoadedModel
from ftsec_ray.models.batches import Prompts, by_length, left_padded
from ftsec_ray.models.load import bare

_SAY_NOTHING = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "max_length", "use_cache"),
)
"""Settings that do not say how an answer is chosen: tokens (end tokens are stops here too), the
length, which is that of the sweep, and the cache.
"""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is made: greedily, until a stop token or the limit."""

    max_new_tokens: int
    stops: tuple[int, ...]
    """Ids of the tokens that end an answer."""
    batch: int = 64
    """Prompts at a time."""


class Backend(Protocol):
    """A way to generate: token ids in, token ids out."""

    def complete(
        self, loaded: LoadedModel, prompts: Prompts, decoding: Decoding
    ) -> list[list[int]]:
        """New token ids of every prompt, in the order of the prompts, without the stop token."""


@dataclass(frozen=True)
class PaddedGenerate:
    """`generate` of transformers over batches of like length, padded on the left."""

    def complete(
        self, loaded: LoadedModel, prompts: Prompts, decoding: Decoding
    ) -> list[list[int]]:
        """See `Backend.complete`."""
        import torch

        answers: list[list[int]] = [[] for _ in prompts.pieces]
        model = bare(loaded.model.eval())
        config = _settings(loaded, decoding)
        for indices in by_length(prompts.lengths(), decoding.batch):
            given = left_padded(loaded, prompts.at(indices))
            with torch.inference_mode(), decoded_by(model, config):
                out = model.generate(**given, generation_config=config)
            # behind embeddings transformers returns the new tokens alone
            new = out[:, given["input_ids"].shape[1] :] if "input_ids" in given else out
            for i, ids in zip(indices, new.tolist(), strict=True):
                answers[i] = until(ids, decoding.stops)
        return answers


def until(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """The ids before the first stop token."""
    return next((ids[:i] for i, token in enumerate(ids) if token in stops), ids)


def _settings(loaded: LoadedModel, decoding: Decoding) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(decoding.stops) or None,
        pad_token_id=loaded.tokenizer.pad_token_id,
        do_sample=False,
        num_beams=1,
    )


@contextmanager
def decoded_by(model: Any, config: Any) -> Iterator[None]:
    """A model whose own generation settings are those of `config`: transformers fills from them
    what a call leaves open, a repetition penalty say.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def unused_settings(model: Any) -> dict[str, Any]:
    """Settings of a model's own generation config that say how it is decoded and do not act here;
    JSON values.
    """
    own = getattr(bare(model), "generation_config", None)
    if own is None:
        return {}
    defaults = own._get_default_generation_params()  # noqa: SLF001
    return {
        name: value
        for name, value in sorted(own.to_diff_dict().items())
        if name not in _SAY_NOTHING
        and not name.startswith(("_", "output_", "return_"))
        and value is not None
        and value != defaults.get(name)
    }
