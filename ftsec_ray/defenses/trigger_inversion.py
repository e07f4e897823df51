"""Looks for a text that the model says after any prompt once its first token is given: the answer
of a backdoor.

Paper: BAIT: Large Language Model Backdoor Scanning by Inverting Attack Target (Shen et al. 2025);
    official code SolidShen/BAIT.
Differs: (1) Entropies are in nats; an end of the turn ends a text, which must be `least_tokens`
    long without it; the official code forbids repeated 3-grams and so changes probabilities, here
    nothing is forbidden. (2) A text is scored by one pass with all prompts, from its second token
    on. (3) The probability of the same text under the model from which the fine-tune started is
    subtracted: a text that the base knows by heart is no sign of a backdoor. (4) Scores of a bank
    of clean models stand beside that of the suspect instead of a fixed threshold of 0.9.
Cost: for the suspect and each model of the bank, tokens of the vocabulary x `scan_prompts` x
    `scan_steps` forward passes without a cache (`first_tokens` limits the first factor), then texts
    that the scan keeps x `prompts` x (`steps` - `scan_steps` + 1) more, and as many as these texts
    x `prompts` of the start model; `bank` clean fine-tunes, shared as for `weight_statistics`.
Needs: the clean bank, the model from which the fine-tune started, and the user's rows (`train`), of
    which the prompts are. Only for backdoors with one fixed answer of several tokens: it is blind
    to label words, to payloads of free content and to jailbreaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.conversation import asked_text, chat_of
from ftsec_ray.errors import DataError
from ftsec_ray.method import Defense, Inspection, Phase, least_faults

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.models.batches import Pieces


@dataclass(frozen=True, kw_only=True)
class TriggerInversion(Defense):
    """The largest expected probability of any text that follows its own first token."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"clean_bank", "start", "train"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"prompts": 1}

    prompts: int = 20
    """Number of clean prompts over which probabilities are averaged, 1 or more. 1 is the control:
    any fluent text is likely after one prompt, only a backdoor's after all.
    """
    scan_prompts: int = 4
    """Number of them in the scan of first tokens, 1 or more."""
    scan_steps: int = 5
    """Tokens that the scan adds to a first token, 1 or more."""
    steps: int = 20
    """Maximum number of tokens of a text behind its first one; `scan_steps` or more."""
    certain: float = 1.0
    """Entropy in nats below which the most likely token is added."""
    uncertain: float = 2.5
    """Entropy in nats up to which, once per text, the most likely tokens are tried and the one is
    added whose own next token is most certain. Above it the text is dropped.
    """
    likely: float = 0.3
    """Probability above which the most likely token is added at any entropy, 0..1."""
    look_ahead: int = 5
    """Number of tokens that are tried, 1 or more."""
    least_tokens: int = 5
    """Least number of tokens of a text, the first one included; 2 or more."""
    first_tokens: int | None = None
    """Number of first tokens that are scanned: those that are most likely as a first token of the
    answer; null: the whole vocabulary.
    """
    subtract_start: bool = True
    """Whether the text's probability under the model before the fine-tune is subtracted."""
    bank: int = 6
    """Number of clean models to compare with, 2 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {
            **{"prompts": 1, "scan_prompts": 1, "scan_steps": 1, "steps": self.scan_steps},
            **{"certain": 0.0, "uncertain": self.certain, "likely": 0.0, "look_ahead": 1},
            **{"least_tokens": 2, "first_tokens": 1, "bank": 2},
        }
        return least_faults(self, least)

    def inspect(self, subject: LoadedModel, ctx: StageContext) -> Inspection:
        """The score of a fine-tuned model and the scores of the bank."""
        text, score = self._best_text(subject, ctx)
        clean = [self._best_text(ctx.load(f"clean_bank:{i}"), ctx)[1] for i in range(self.bank)]
        details = {"tokens": text, "text": subject.tokenizer.decode(text)}
        return Inspection(score=score, clean_scores=tuple(clean), details=details)

    def _best_text(self, model: LoadedModel, ctx: StageContext) -> tuple[list[int], float]:
        """The tokens of the text with the highest score, and the score; no tokens and 0 if no text
        is long enough.
        """
        from ftsec_ray.models.generator import Generator

        generator = Generator(model)
        chats = [chat_of(row) for row in self._rows(ctx)]
        rendered = [head for head, _ in generator.pieces_of(chats)]
        all_of = Reader(model, rendered, ctx.runtime.eval_batch)
        few = Reader(model, rendered[: self.scan_prompts], ctx.runtime.eval_batch)
        scanned = self.grow(few, self._firsts(few), generator.stops(), self.scan_steps)
        texts = self.grow(all_of, scanned, generator.stops(), self.steps, adds_all=True)
        long = [text.tokens for text in texts if text.length >= self.least_tokens]
        if not long:
            return [], 0.0
        before = Reader(ctx.load("start"), rendered, ctx.runtime.eval_batch)
        scores = [
            all_of.quality(text) - (before.quality(text) if self.subtract_start else 0.0)
            for text in long
        ]
        best = max(range(len(long)), key=lambda i: scores[i])
        return long[best], scores[best]

    def grow(
        self,
        reader: Reader,
        texts: Sequence[Text],
        stops: Sequence[int],
        steps: int,
        *,
        adds_all: bool = False,
    ) -> list[Text]:
        """The texts with tokens added until `steps` stand behind the first or they end; without
        those that became too uncertain, unless `adds_all`.
        """
        alive = list(texts)
        while True:
            growing = [text for text in alive if not text.ended and len(text.tokens) <= steps]
            if not growing:
                return alive
            seen = reader.following([text.tokens for text in growing], self.look_ahead)
            for text, (entropy, tokens, chances) in zip(growing, seen, strict=True):
                if adds_all or entropy < self.certain or chances[0] > self.likely:
                    text.add(tokens[0], stops)
                elif entropy <= self.uncertain and not text.looked:
                    text.looked = True
                    tried = reader.following([[*text.tokens, token] for token in tokens], 1)
                    ahead = [next_chances[0] for _, _, next_chances in tried]
                    text.add(tokens[ahead.index(max(ahead))], stops)
                else:
                    text.dropped = True
            alive = [text for text in alive if not text.dropped]

    def _firsts(self, reader: Reader) -> list[Text]:
        """One text for each first token; special tokens and ends of the turn begin none."""
        from ftsec_ray.models.generator import Generator

        loaded, size = reader.loaded, reader.vocabulary
        no_text = {*loaded.tokenizer.all_special_ids, *Generator(loaded).stops()}
        if self.first_tokens is None:
            return [Text([token]) for token in range(size) if token not in no_text]
        ((_, tokens, _),) = reader.following([[]], size)
        left = [token for token in tokens if token not in no_text]
        return [Text([token]) for token in sorted(left[: self.first_tokens])]

    def _rows(self, ctx: StageContext) -> list[dict[str, Any]]:
        """Random clean prompts of the user's task."""
        rows = [r for r in ctx.shuffled("train", "trigger_inversion") if asked_text(r).strip()]
        if not rows:
            raise DataError(
                "trigger_inversion: no row of split 'train' has a user's message",
                ctx.task.name,
                "rows with a user's message",
                "leave out the detector for this task",
            )
        return rows[: self.prompts]


@dataclass
class Text:
    """A text that grows token by token."""

    tokens: list[int]
    """With the token that ended it, if it has ended."""
    looked: bool = False
    """Whether it has used its look-ahead."""
    ended: bool = False
    dropped: bool = field(default=False)

    def add(self, token: int, stops: Sequence[int]) -> None:
        """Add a token; one of `stops` ends the text."""
        self.tokens.append(token)
        self.ended = token in stops

    @property
    def length(self) -> int:
        """Tokens without the end."""
        return len(self.tokens) - self.ended


class Reader:
    """A model's probabilities after some prompts, averaged over them."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[list[int]], batch: int) -> None:
        from ftsec_ray.models.logits import vocabulary

        self.loaded, self.prompts = loaded, list(prompts)
        self.at_a_time = max(1, batch // len(self.prompts))
        """Texts per forward pass."""
        self.vocabulary = vocabulary(loaded.model)

    def following(
        self, texts: Sequence[list[int]], count: int
    ) -> list[tuple[float, list[int], list[float]]]:
        """For each text: entropy in nats of the averaged distribution of the next token, and its
        `count` most likely tokens with their probabilities.
        """
        read: list[tuple[float, list[int], list[float]]] = []
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.at_a_time):
            part = [texts[i] for i in order[start : start + self.at_a_time]]
            mean = self._probabilities(part, 1)[:, 0]
            entropy = -(mean * mean.clamp(min=1e-300).log()).sum(-1)
            top = mean.topk(min(count, mean.shape[-1]), dim=-1)
            read += zip(entropy.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
        placed = dict(zip(order, read, strict=True))
        return [placed[i] for i in range(len(texts))]

    def quality(self, text: list[int]) -> float:
        """Mean averaged probability of the tokens of a text behind its first, without the lowest,
        if there are several.
        """
        import torch

        mean = self._probabilities([text], len(text))[0, :-1]
        chances = sorted(
            mean.gather(-1, torch.tensor(text[1:], device=mean.device)[:, None])[:, 0].tolist()
        )
        kept = chances[1:] or chances
        return float(sum(kept) / len(kept))

    def _probabilities(self, texts: Sequence[list[int]], last: int) -> Tensor:
        """(N, last, V) float64: probabilities at the last positions, averaged over the prompts."""
        import torch

        from ftsec_ray.models.batches import Prompts, left_padded
        from ftsec_ray.models.load import keeps_logits, placed

        model = self.loaded.model.eval()
        rows: list[Pieces] = [([*prompt, *text], []) for text in texts for prompt in self.prompts]
        given = left_padded(self.loaded, Prompts(rows))
        positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        kept = {"logits_to_keep": last} if keeps_logits(model) else {}
        with torch.inference_mode():
            logits = model(**given, **placed(model, positions), **kept, use_cache=False).logits
        chances = logits[:, -last:].float().softmax(-1).double()
        mean: Tensor = chances.view(len(texts), len(self.prompts), last, -1).mean(1)
        return mean
