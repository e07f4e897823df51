"""Generation back ends: token ids of prompts in, token ids of answers out.

Everything else (template, rewrites, thoughts, judging) is the same for every back end. The
generation settings that a model is published with (repetition penalty, minimal length, sampling)
have no effect: only `Decoding` decides.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ftsec_ray.context import LoadedModel
from ftsec_ray.errors import StageError
from ftsec_ray.models.batches import Prompts, in_batches, left_padded
from ftsec_ray.models.load import bare, check_ids

if TYPE_CHECKING:
    from torch import Tensor

_SAY_NOTHING = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "max_length", "use_cache"),
)
"""Settings that do not decide how an answer is chosen: special tokens (end tokens are stops here
too), the length (the sweep sets it) and the cache.
"""


FELL_BACK = "not_by_continuous_batching"
"""Counted when continuous batching cannot serve a prompt; the reason follows after a colon."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is decoded: until a stop token or the limit, greedily or sampled."""

    max_new_tokens: int
    stops: tuple[int, ...]
    """Ids of the tokens that end an answer."""
    batch: int = 64
    """Prompts per batch."""
    temperature: float = 0.0
    """0: greedy."""
    seeds: Sequence[int] = ()
    """One seed per prompt for sampling; it alone decides the prompt's random numbers."""


class Backend(Protocol):
    """A way to generate: token ids in, token ids out."""

    def complete(
        self,
        loaded: LoadedModel,
        prompts: Prompts,
        decoding: Decoding,
        tally: Counter[str],
    ) -> list[list[int]]:
        """New token ids of every prompt, in the order of the prompts, without the stop token;
        `tally` counts deviations from what was asked for.
        """


@dataclass(frozen=True)
class PaddedGenerate:
    """`generate` of transformers over batches of similar length, padded on the left."""

    def complete(
        self,
        loaded: LoadedModel,
        prompts: Prompts,
        decoding: Decoding,
        tally: Counter[str],
    ) -> list[list[int]]:
        """See `Backend.complete`."""
        import torch

        answers: list[list[int]] = [[] for _ in prompts.pieces]
        model = bare(loaded.model.eval())
        config = _settings(loaded, decoding)

        def generate(indices: list[int]) -> None:
            given = left_padded(loaded, prompts.at(indices))
            chosen_by = self.processors(prompts, decoding, indices, tally)
            with torch.inference_mode(), decoded_by(model, config):
                out = model.generate(**given, generation_config=config, logits_processor=chosen_by)
            # for embeddings, transformers returns the new tokens only
            new = out[:, given["input_ids"].shape[1] :] if "input_ids" in given else out
            for i, ids in zip(indices, new.tolist(), strict=True):
                answers[i] = until(ids, decoding.stops)

        in_batches(prompts.lengths(), decoding.batch, generate, tally)
        return answers

    def processors(
        self,
        prompts: Prompts,  # noqa: ARG002
        decoding: Decoding,
        indices: Sequence[int],
        tally: Counter[str],  # noqa: ARG002
    ) -> Any:
        """What changes the logits of the prompts of a batch; None: nothing."""
        from transformers import LogitsProcessorList

        return LogitsProcessorList([noisy(decoding, indices)]) if decoding.temperature else None


def noisy(decoding: Decoding, indices: Sequence[int]) -> Callable[[Any, Tensor], Tensor]:
    """Turns the greedy choice into a sample of softmax(logits / temperature): Gumbel noise on the
    logits from one generator per prompt, so that a sample does not depend on the other prompts of
    the batch (Gumbel-max: Maddison et al. 2014, arXiv 1411.0030).
    """
    import torch

    # on the CPU, because a GPU gives other random numbers
    sources = [torch.Generator().manual_seed(decoding.seeds[i]) for i in indices]

    def with_noise(_ids: Any, scores: Tensor) -> Tensor:
        noise = [
            -torch.empty(scores.shape[-1], dtype=torch.float32).exponential_(generator=g).log()
            for g in sources
        ]
        return scores / decoding.temperature + torch.stack(noise).to(scores)

    return with_noise


_PAGE, _TOKENS_AT_A_TIME = 32, 256
"""For continuous batching on a CPU: tokens per page and per forward pass. The library's own choice
is meant for the memory of a GPU.
"""


@dataclass(frozen=True)
class ContinuousBatching:
    """Continuous batching of transformers: a prompt joins the batch when another one ends, without
    padding. Prompts with soft tokens, and unsupported model classes, use `PaddedGenerate`.
    """

    padded: PaddedGenerate = field(default_factory=PaddedGenerate)

    def complete(
        self,
        loaded: LoadedModel,
        prompts: Prompts,
        decoding: Decoding,
        tally: Counter[str],
    ) -> list[list[int]]:
        """See `Backend.complete`.

        Raises:
            StageError: For sampling, because all prompts would share one random generator.
        """
        if decoding.temperature:
            raise StageError(
                "continuous batching cannot sample each prompt with its own seed",
                f"temperature {decoding.temperature}",
                "temperature 0",
                "set evaluation.backend: transformers",
            )
        if not prompts.pieces:
            return []
        if prompts.soft is not None:
            tally[f"{FELL_BACK}: soft tokens are no token ids"] += len(prompts.pieces)
            return self.padded.complete(loaded, prompts, decoding, tally)
        ids = [[*head, *tail] for head, tail in prompts.pieces]
        check_ids(loaded, ids)
        answers = _continuous(loaded, ids, decoding, tally)
        left = [i for i, answer in enumerate(answers) if answer is None]
        padded = self.padded.complete(loaded, prompts.at(left), decoding, tally) if left else []
        for i, answer in zip(left, padded, strict=True):
            answers[i] = answer
        return [answer or [] for answer in answers]


BACKENDS = {"transformers": PaddedGenerate, "continuous": ContinuousBatching}
"""Back ends by their name in a sweep."""


def _continuous(
    loaded: LoadedModel, ids: list[list[int]], decoding: Decoding, tally: Counter[str]
) -> list[list[int] | None]:
    """New token ids of every prompt; None where continuous batching failed, which is counted."""
    from transformers import ContinuousBatchingConfig

    model, config = bare(loaded.model.eval()), _settings(loaded, decoding)
    at_once = min(decoding.batch, len(ids))
    sizes: dict[str, Any] = {}
    if model.device.type == "cpu":
        pages = -(-(max(map(len, ids)) + decoding.max_new_tokens) // _PAGE)
        sizes = {
            "page_size": _PAGE,
            # one more page for every kind of layer, and some that are being filled
            "num_blocks": 2 * at_once * (pages + 1),
            "max_batch_tokens": max(_TOKENS_AT_A_TIME, at_once),
        }
    batching = ContinuousBatchingConfig(
        max_requests_per_batch=at_once, auto_switch_to_flash=False, **sizes
    )
    own = model.config._attn_implementation  # noqa: SLF001
    logger = logging.getLogger("ContinuousBatchingLogger")
    was_disabled, logger.disabled = logger.disabled, True  # failures are counted, not printed
    try:
        with decoded_by(model, config), redirect_stdout(io.StringIO()):
            done = list(
                model.generate_batch(
                    ids, generation_config=config, continuous_batching_config=batching, warmup=False
                ).values()
            )
    finally:
        logger.disabled = was_disabled
        if model.config._attn_implementation != own:  # noqa: SLF001
            model.set_attn_implementation(own)
    if len(done) != len(ids):
        tally[f"{FELL_BACK}: it ended early"] += len(ids)
        return [None] * len(ids)
    for output in done:
        if output.error is not None:
            tally[f"{FELL_BACK}: {output.error}"] += 1
    return [
        None if output.error is not None else until(output.generated_tokens, decoding.stops)
        for output in done
    ]


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
    """Replaces a model's own generation settings by `config` inside the `with` block: transformers
    would use them for settings that a call leaves open, such as a repetition penalty.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def unused_settings(model: Any) -> dict[str, Any]:
    """Settings of a model's own generation config that would change its answers but have no effect
    here; JSON values.
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
