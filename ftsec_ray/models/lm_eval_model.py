"""A generator as a model for lm-eval: its class for transformers models, with this project's
rendering of conversations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ftsec_ray.models.chat import render
from ftsec_ray.models.chat_format import chat_format
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import position_limit
from ftsec_ray.models.logits import vocabulary

LOGITS_OF_A_BATCH = 2**28
"""Logits of one forward pass that lm-eval may ask for: 1 GiB of float32, and it holds about three
times as much.
"""


def as_lm_eval(generator: Generator, *, batch: int) -> Any:
    """An `lm_eval.models.huggingface.HFLM` over the model in memory.

    Chats pass through the generator's rewrites and this project's rendering, answers stand behind
    the generator's prefix and end as they do here, and `cut` counts the prompts that lost their
    beginning. Soft tokens have no effect. The tokenizer is copied, because lm-eval changes it.

    Args:
        generator: The model, without an adapter, its rewrites and its prefix.
        batch: Prompts per forward pass; fewer where their logits would take too much memory.
    """
    from lm_eval.models.huggingface import HFLM

    loaded = generator.loaded

    class InMemory(HFLM):  # type: ignore[misc]  # lm-eval has no types here
        """See `as_lm_eval`."""

        cut = 0

        def apply_chat_template(
            self,
            chat_history: list[dict[str, str]],
            add_generation_prompt: bool = True,  # noqa: FBT001, FBT002 - as lm-eval calls it
        ) -> str:
            """The prompt up to where a trained answer begins; if the answer is already begun, up
            to the end of that beginning.
            """
            chat: list[dict[str, Any]] = [dict(message) for message in chat_history]
            begun = "" if add_generation_prompt else chat.pop()["content"]
            prompt = render(self.tokenizer, generator.rewritten(chat), generate=True)
            if generator.prefix:
                prompt += chat_format(self.tokenizer).glue + generator.prefix
            return prompt + generator.glue + begun

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: FBT001, FBT002
            """As lm-eval, without its progress bar."""
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: FBT001, FBT002
            """As lm-eval, without its progress bar."""
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            most = self.max_length + 1
            sizes = [len(given) + len(answer) for _, given, answer in requests]
            self.cut += sum(size > most for size in sizes)
            # lm-eval holds the logits of every position of a batch
            width = min(max(sizes, default=1), most)
            fitting = LOGITS_OF_A_BATCH // (width * vocabulary(loaded.model))
            self.batch_size_per_gpu = max(1, min(batch, fitting))
            try:
                return super()._loglikelihood_tokens(requests, *args, **kwargs)
            finally:
                self.batch_size_per_gpu = batch

        def tok_batch_encode(
            self,
            strings: Sequence[str],
            *args: Any,
            left_truncate_len: int | None = None,
            **rest: Any,
        ) -> Any:
            # the first characters of a trained answer are generated, not given: as in Generator
            glue = generator.glue
            prompts = [text.removesuffix(glue) for text in strings]
            if left_truncate_len:
                self.cut += sum(len(self.tok_encode(p)) > left_truncate_len for p in prompts)
            return super().tok_batch_encode(
                prompts, *args, left_truncate_len=left_truncate_len, **rest
            )

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs.setdefault("eos_token_id", list(generator.stops()))
            return super()._model_generate(context, *args, **kwargs)

    return InMemory(
        pretrained=loaded.model,
        tokenizer=copy.deepcopy(loaded.tokenizer),
        batch_size=batch,
        max_length=position_limit(loaded.model),
    )
