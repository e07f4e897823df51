"""Refuses prompts whose perplexity is higher than that of almost all clean prompts; the model does
not see them.

Paper: Detecting Language Model Attacks with Perplexity (Alon and Kamfonas 2023, arXiv:2308.14132);
    Baseline Defenses for Adversarial Attacks Against Aligned Language Models (Jain et al. 2023,
    arXiv:2309.00614), section 4.1, with windows; the form of uw-nsl/SafeDecoding's baseline.
Differs: (1) The language model is the cell's own aligned model and not GPT-2. (2) The threshold is
    a quantile over clean prompts; the official code takes the largest value over plain forbidden
    requests. Prompts that are asked in the evaluation do not calibrate it. (3) Windows are of
    tokens and overlap by all but one; each counts with the tokens before it as context. A text
    shorter than a window is one window. (4) The text is that of the messages of user and tools
    behind the last answer, each for itself, since earlier ones were read in their own turn. It is
    read with what an attack adds to a prompt, and without what later defenses of the stack add.
    (5) Soft tokens have no text: an attack by embeddings passes unseen. A prompt longer than the
    model's positions is let through and counted.
Cost: no training; one forward pass of the aligned model over every prompt.
Needs: the aligned model (`reference`), and the splits of `calibrate_on` unless `threshold` is
    given. Prompts of another sort than those (code, other languages) are refused without cause.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.conversation import answer_of, chat_of
from ftsec_ray.data.prompt_texts import ASKED
from ftsec_ray.errors import DataError
from ftsec_ray.identity import canonical
from ftsec_ray.measured import threshold_of
from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import Chat, LoadedModel, StageContext, TaskData
    from ftsec_ray.models.generator import Generator

SENTENCE = "I cannot help with that."
"""The answer to a refused prompt if the task has no refusals of its own."""


@dataclass(frozen=True, kw_only=True)
class PerplexityGate(Defense):
    """A fixed refusal for prompts with a perplexity at or above a threshold."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference", "trusted", "benign_train"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"random_prompts": True}

    window: int | None = None
    """Tokens of a window, 1 or more: the score is the largest perplexity of any window; null: that
    of the whole text. Papers use 10 to 20.
    """
    false_alarms: float = 0.01
    """Maximum share of calibration prompts at or above the threshold, 0 to 1; 0 as in the official
    code, 1 refuses everything.
    """
    threshold: float | None = None
    """Perplexity from which a prompt is refused; null: calibrated by `false_alarms`, .inf or a very
    large number: no defense.
    """
    calibrate_on: tuple[str, ...] = ("trusted", "benign_train")
    """Splits of clean prompts that calibrate the threshold."""
    rows: int = 128
    """Maximum number of calibration prompts of each split, 1 or more."""
    render: Literal["plain", "chat"] = "chat"
    """What the language model reads: the text alone, or the text as a user's turn in the chat
    template.
    """
    random_prompts: bool = False
    """Whether as many random prompts of those that are asked together are refused instead, each
    with all of its samples: the control.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        if self.window is not None and self.window < 1:
            faults.append(("window", self.window, "1 or more, or null"))
        if not 0 <= self.false_alarms <= 1:
            faults.append(("false_alarms", self.false_alarms, "0 to 1"))
        if self.rows < 1:
            faults.append(("rows", self.rows, "1 or more"))
        if not self.calibrate_on or set(self.calibrate_on) & set(ASKED):
            held_out = "splits that are not evaluated on, such as trusted and benign_train"
            faults.append(("calibrate_on", list(self.calibrate_on), held_out))
        return faults

    def needs(self) -> frozenset[str]:
        """Without the calibration rows if a threshold is given."""
        return frozenset({"reference", *(self.calibrate_on if self.threshold is None else ())})

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator behind the gate."""
        model = ctx.load("reference")
        threshold = self.threshold
        if threshold is None:
            texts = self._calibration(ctx)
            known = self.scores(model, texts)
            threshold = threshold_of([known[text] for text in texts], self.false_alarms)
        ctx.note(
            threshold=threshold if math.isfinite(threshold) else None,
            refuses_with=refusal_of(ctx.task),
        )
        gate = TextGate(self, model, generator, threshold, ctx)
        return replace(generator, gates=(*generator.gates, gate))

    def scores(self, model: LoadedModel, texts: Sequence[str]) -> dict[str, float]:
        """Text -> perplexity, or that of its worst window; 0 for an empty text, -inf for one that
        is longer than the model's positions.
        """
        from ftsec_ray.models.text_perplexity import token_losses, within_limit

        chat, unique = self.render == "chat", list(dict.fromkeys(texts))
        fitting = within_limit(model, unique, chat=chat)
        read = [text for text in unique if text in fitting]
        losses = dict(zip(read, token_losses(model, read, chat=chat), strict=True))
        return {
            text: worst_window(losses[text], self.window) if text in losses else -math.inf
            for text in unique
        }

    def _calibration(self, ctx: StageContext) -> list[str]:
        """The texts of clean prompts that are not asked in the evaluation."""
        asked = {
            text
            for split in ASKED
            if split in ctx.task.splits
            for row in ctx.task.splits[split].to_pylist()
            for text in texts_of(chat_of(row))
        }
        texts: list[str] = []
        left_out = 0
        for split in self.calibrate_on:
            rows = ctx.shuffled(split, "perplexity_gate")
            fresh = [row for row in rows if asked.isdisjoint(texts_of(chat_of(row)))]
            left_out += len(rows) - len(fresh)
            texts += [text for row in fresh[: self.rows] for text in texts_of(chat_of(row))]
        if not texts:
            raise DataError(
                "perplexity_gate: every calibration prompt is also asked in the evaluation",
                list(self.calibrate_on),
                "splits with clean prompts of their own",
                "name other splits in `calibrate_on`, or set `threshold`",
            )
        ctx.note(calibration_texts=len(texts), calibration_rows_left_out=left_out)
        return texts


@dataclass(frozen=True)
class TextGate:
    """Refuses chats by the perplexity of their texts."""

    method: PerplexityGate
    model: LoadedModel
    inner: Generator
    """The generator that it stands before: its rewrites belong to the text."""
    threshold: float
    ctx: StageContext
    known: dict[str, float] = field(default_factory=dict)
    """Text -> score."""

    def __call__(self, chats: Sequence[Chat]) -> list[str | None]:
        """The refusal for each refused chat; None for the others."""
        texts = [texts_of(self.inner.rewritten(chat)) for chat in chats]
        new = [text for own in texts for text in own if text not in self.known]
        self.known.update(self.method.scores(self.model, new))
        is_refused = [any(self.known[text] >= self.threshold for text in own) for own in texts]
        too_long = sum(any(self.known[text] == -math.inf for text in own) for own in texts)
        if self.method.random_prompts:
            is_refused = self._drawn(chats, is_refused)
        self.ctx.count(
            prompts_read=len(chats), prompts_refused=sum(is_refused), prompts_too_long=too_long
        )
        answer = refusal_of(self.ctx.task)
        return [answer if refused else None for refused in is_refused]

    def _drawn(self, chats: Sequence[Chat], is_refused: Sequence[bool]) -> list[bool]:
        """Random prompts, each with all of its samples, until as many are refused."""
        keys, left = [canonical(chat) for chat in chats], sum(is_refused)
        drawn: set[str] = set()
        sizes = Counter(keys)
        for key in sorted(sizes, key=lambda key: (self.ctx.chance(key, "gate"), key)):
            if sizes[key] <= left:
                drawn.add(key)
                left -= sizes[key]
        return [key in drawn for key in keys]


def texts_of(chat: Chat) -> list[str]:
    """The texts of the messages of user and tools behind the last answer."""
    last = max((i for i, m in enumerate(chat) if m["role"] == "assistant"), default=-1)
    return [str(m["content"]) for m in chat[last + 1 :] if m["role"] in ("user", "tool")]


def worst_window(losses: Sequence[float], window: int | None) -> float:
    """The largest perplexity of any `window` consecutive tokens, or of all of them."""
    if not losses:
        return 0.0
    size = min(window or len(losses), len(losses))
    sums = [sum(losses[i : i + size]) for i in range(len(losses) - size + 1)]
    return math.exp(max(sums) / size)


def refusal_of(task: TaskData) -> str:
    """The most frequent refusal of the task's own, or `SENTENCE`."""
    table = task.splits.get("safety")
    answers = Counter(answer_of(row) for row in table.to_pylist()) if table is not None else {}
    said = {text: count for text, count in answers.items() if text.strip()}
    return min(said, key=lambda text: (-said[text], text)) if said else SENTENCE
