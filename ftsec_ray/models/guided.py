"""Decoding with a second model: at every step, guides see the next-token distributions of the
served model and of their own model, and choose the token.

Each guide's model reads the same prompts (soft tokens included) and the same answer so far, in its
own cache. Of the guides that act at a step, the one that acts at the fewest steps decides: a guide
of the first tokens comes before a guide of all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ftsec_ray.context import LoadedModel
from ftsec_ray.errors import DataError
from ftsec_ray.models.backends import FELL_BACK, Backend, Decoding, PaddedGenerate, noisy
from ftsec_ray.models.batches import Prompts, left_padded
from ftsec_ray.models.label_scores import (
    WHOLE_PASSES,
    Words,
    cache_name,
    can_be_continued,
    label_scores,
)
from ftsec_ray.models.load import keeps_logits, placed, whole_model

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.models.generator import Generator


@dataclass(frozen=True)
class Next:
    """What a guide knows where the next token of each answer of a batch is chosen."""

    own: Any
    """(B, V) float32 log-probabilities of the served model."""
    other: Any
    """(B, V) float32 log-probabilities of the guide's model."""
    draw: Callable[[Any], Any]
    """(B, V) log-probabilities -> (B,) tokens: the most likely, or a sample; within a step, always
    with the same random numbers."""
    step: int
    """Number of tokens of the answers so far."""
    prompts: Sequence[int]
    """Numbers of the prompts of the batch."""
    open: Any
    """(B,) whether an answer has not ended."""


class Guide(Protocol):
    """A second model and the rule by which it changes answers."""

    @property
    def loaded(self) -> LoadedModel:
        """The guide's model; it has the vocabulary of the served model."""

    @property
    def steps(self) -> int | None:
        """Number of first tokens at which it acts; None: all."""

    def choose(self, now: Next) -> Tensor:
        """The next tokens: (B,)."""

    def done(self) -> bool:
        """Called when all prompts of a call are answered; True: they are to be answered again,
        and the new answers count.
        """

    def label(self, own: Tensor, other: Tensor) -> Tensor:
        """Log-probabilities (N, K) of label words as answers, from those of both models; -inf in
        all columns of a row: no label is the answer.
        """


def with_guide(generator: Generator, guide: Guide) -> Generator:
    """The generator whose answers and label scores a guide changes."""
    sizes = [_vocabulary(loaded) for loaded in (generator.loaded, guide.loaded)]
    if sizes[0] != sizes[1]:
        raise DataError(
            "a model that guides decoding has another vocabulary than the served model",
            f"{sizes[1]} tokens",
            f"{sizes[0]} tokens",
            "leave out the defense for this model",
        )

    def rescored(prompts: Prompts, answers: Sequence[Words], own: Tensor, batch: int) -> Tensor:
        other = label_scores(guide.loaded, prompts, answers, batch=batch, tally=generator.tally)
        return guide.label(own, other)

    inner = generator.backend
    guides = inner.guides if isinstance(inner, Guided) else ()
    instead_of = inner.instead_of if isinstance(inner, Guided) else inner
    return replace(
        generator,
        backend=Guided(guides=(*guides, guide), instead_of=instead_of),
        rescored=(*generator.rescored, rescored),
    )


def _vocabulary(loaded: LoadedModel) -> int:
    return int(whole_model(loaded).config.get_text_config().vocab_size)


@dataclass(frozen=True)
class Guided(PaddedGenerate):
    """Padded generation whose tokens guides choose."""

    guides: tuple[Guide, ...] = ()
    instead_of: Backend = field(default_factory=PaddedGenerate)
    """The sweep's own back end."""

    def complete(
        self,
        loaded: LoadedModel,
        prompts: Prompts,
        decoding: Decoding,
        tally: Counter[str],
    ) -> list[list[int]]:
        """See `Backend.complete`."""
        if type(self.instead_of) is not PaddedGenerate:
            tally[f"{FELL_BACK}: a second model decides the tokens"] += len(prompts.pieces)
        answers = super().complete(loaded, prompts, decoding, tally)
        while any([guide.done() for guide in self.guides]):
            answers = super().complete(loaded, prompts, decoding, tally)
        return answers

    def processors(
        self,
        prompts: Prompts,
        decoding: Decoding,
        indices: Sequence[int],
        tally: Counter[str],
    ) -> Any:
        """What chooses the tokens of the prompts of a batch."""
        from transformers import LogitsProcessorList

        ordered = sorted(
            self.guides, key=lambda guide: math.inf if guide.steps is None else guide.steps
        )
        batch = prompts.at(indices)
        pairs = [(guide, Follower(guide.loaded, batch, tally)) for guide in ordered]
        return LogitsProcessorList([_Choice(pairs, decoding, list(indices))])


class _Choice:
    """Chooses the tokens of one batch, one call per step."""

    def __init__(
        self,
        pairs: Sequence[tuple[Guide, Follower]],
        decoding: Decoding,
        indices: Sequence[int],
    ) -> None:
        self.pairs, self.indices, self.stops = list(pairs), indices, decoding.stops
        self.noise = noisy(decoding, indices) if decoding.temperature else None
        self.temperature = decoding.temperature
        self.step = 0
        self.ended: Any = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, or -inf for all tokens but the chosen ones."""
        import torch

        if self.ended is None:
            self.ended = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        if self.step:
            last = ids[:, -1]
            self.ended |= torch.isin(last, torch.tensor(self.stops, device=last.device))
            for _, follower in self.pairs:
                follower.push(last)
        # a guide that no longer acts frees its cache
        self.pairs = [
            pair for pair in self.pairs if pair[0].steps is None or self.step < pair[0].steps
        ]
        chosen_by = self.pairs[0] if self.pairs else None
        step, self.step = self.step, self.step + 1
        if chosen_by is None:
            return scores if self.noise is None else self.noise(ids, scores)
        guide, follower = chosen_by
        tokens = guide.choose(self._next(step, ids, scores, follower))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _next(self, step: int, ids: Tensor, scores: Tensor, follower: Follower) -> Next:
        import torch

        noise = None if self.noise is None else self.noise(ids, torch.zeros_like(scores))

        def draw(logprobs: Tensor) -> Tensor:
            if noise is None:
                return logprobs.argmax(-1)
            return (logprobs / self.temperature + noise.to(logprobs)).argmax(-1)

        return Next(
            own=scores.float().log_softmax(-1),
            other=follower.logits().to(scores.device).float().log_softmax(-1),
            draw=draw,
            step=step,
            prompts=self.indices,
            open=~self.ended,
        )


class Follower:
    """A model that reads a batch of prompts and then every token of their answers."""

    def __init__(self, loaded: LoadedModel, prompts: Prompts, tally: Counter[str]) -> None:
        self.loaded, self.tally = loaded, tally
        self.given = left_padded(loaded, prompts)
        self.cache: Any = None
        self.pending: list[Tensor] = []

    def push(self, tokens: Tensor) -> None:
        """The next token of every answer: (B,)."""
        self.pending.append(tokens)

    def logits(self) -> Tensor:
        """Logits of the token after all that it has read: (B, V)."""
        import torch

        model = self.loaded.model.eval()
        mask = self.given["attention_mask"]
        if self.pending:
            new = torch.stack(self.pending, dim=1).to(mask.device)
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)
            self.pending = []
            self.given = {**self._longer(new), "attention_mask": mask}
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        width = next(v for k, v in self.given.items() if k != "attention_mask").shape[1]
        inputs = {**self.given, **placed(model, positions[:, -width:])}
        if self.cache is not None:
            inputs[cache_name(model)] = self.cache
        kept = {"logits_to_keep": 1} if keeps_logits(model) else {}
        with torch.inference_mode():
            output = model(**inputs, **kept, use_cache=True)
        cache = getattr(output, cache_name(model), None)
        self.cache = cache if can_be_continued(cache) else None
        logits: Tensor = output.logits[:, -1]
        return logits

    def _longer(self, new: Tensor) -> dict[str, Tensor]:
        """The inputs of the next pass: the new tokens behind the cache, or all tokens."""
        import torch

        if self.cache is not None:
            return {"input_ids": new}
        self.tally[WHOLE_PASSES] += 1
        if "input_ids" in self.given:
            return {"input_ids": torch.cat([self.given["input_ids"], new], dim=1)}
        table = whole_model(self.loaded).get_input_embeddings()
        with torch.no_grad():
            known = self.given["inputs_embeds"]
            return {"inputs_embeds": torch.cat([known, table(new).to(known)], dim=1)}
