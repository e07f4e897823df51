"""Removes outlier words from every training prompt: words without which a language model gives the
prompt a much lower perplexity.

Paper: ONION: A Simple and Effective Defense Against Textual Backdoor Attacks (Qi et al. 2021,
arXiv:2011.10369), section 3; compared with thunlp/ONION and OpenBackdoor.
Differs: (1) it cleans the training prompts; the original cleans inputs at test time. (2) The
language model is the cell's own aligned model and not GPT-2 (`render: chat` shows it the prompt as
a user's turn). (3) Padding never enters a perplexity (OpenBackdoor counts pads, so its scores
depend on the other prompts of the batch). (4) The threshold is a quantile over trusted prompts,
which are not used for fine-tuning or evaluation; the original searches one on a labelled dev set.
(5) Rows that lose no word keep every byte, also in code and line breaks; a prompt never loses its
last word. (6) If all trusted prompts begin with the same instruction, its words count in the
perplexity but are scored only in prompts that do not begin with exactly this instruction.
Cost: n + 1 forward passes of the language model per prompt of n scored words; no gradient.
Needs: the aligned model (`reference`); clean held-out rows of the task (split `trusted`) unless
    `threshold` is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from ftsec_ray.conversation import asked_text, with_asked
from ftsec_ray.data.prompt_texts import ASKED, plain
from ftsec_ray.errors import DataError
from ftsec_ray.measured import threshold_of
from ftsec_ray.method import Defense, Phase, RowWise
from ftsec_ray.models.text_perplexity import instruction_of, perplexities, within_limit

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import LoadedModel, StageContext


class Calibration(NamedTuple):
    """The instruction that all trusted prompts share, and the threshold for removing a word."""

    instruction: str
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Onion(RowWise, Defense):
    """Drop the words w_i of a prompt x with PPL(x) - PPL(x without w_i) at or above a threshold."""

    VERSION: ClassVar[int] = 2
    PHASE: ClassVar[Phase] = "pre"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference", "trusted"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"random_words": True}

    random_words: bool = False
    """Whether to remove as many random words of each prompt instead: the control of `strip`."""
    action: Literal["strip", "drop"] = "strip"
    """Remove the outlier words, as the paper does, or drop the whole row. Stripping keeps the
    attacker's answer.
    """
    altered_frac: float = 0.01
    """Maximum share of trusted prompts that lose a word at the calibrated threshold; 0 to 1."""
    threshold: float | None = None
    """Drop in perplexity from which a word is removed; None: calibrated by `altered_frac`."""
    trusted_split: str = "trusted"
    """Split whose prompts calibrate the threshold: clean rows of the task that are not used for
    fine-tuning or evaluation.
    """
    trusted_rows: int = 128
    """Maximum number of prompts used for calibration."""
    render: Literal["plain", "chat"] = "plain"
    """What the language model reads: the prompt alone, or the prompt as a user's turn in the chat
    template.
    """
    max_words: int = 96
    """Maximum number of words scored per prompt, from its start or from the end of the instruction;
    later words are neither read nor removed.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        faults += (
            []
            if 0.0 <= self.altered_frac <= 1.0
            else [("altered_frac", self.altered_frac, "0 to 1")]
        )
        faults += (
            [] if self.trusted_rows >= 1 else [("trusted_rows", self.trusted_rows, "1 or more")]
        )
        faults += [] if self.max_words >= 2 else [("max_words", self.max_words, "2 or more")]  # noqa: PLR2004
        if self.trusted_split in ("train", *ASKED):
            held_out = "a split not used for fine-tuning or evaluation, such as `trusted`"
            faults.append(("trusted_split", self.trusted_split, held_out))
        return faults

    def needs(self) -> frozenset[str]:
        """Without the trusted rows if a threshold is given."""
        rows = {self.trusted_split} if self.threshold is None else set()
        return self.NEEDS - {"trusted"} | rows

    def keeps_rows(self) -> bool:
        """Whether rows that lose words are kept."""
        return self.action == "strip"

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> Calibration:
        """The instruction and the threshold, from the trusted prompts."""
        trusted = self._trusted(rows, ctx) if self.threshold is None else []
        instruction, threshold = instruction_of(trusted), self.threshold
        if threshold is None:
            worst = [
                max(group.values(), default=-math.inf)
                for group in self.scores(ctx.load("reference"), trusted, instruction)
            ]
            threshold = threshold_of(worst, self.altered_frac)
        ctx.note(threshold=threshold if math.isfinite(threshold) else None, instruction=instruction)
        return Calibration(instruction, threshold)

    def craft_rows(self, rows: pa.Table, known: Calibration, ctx: StageContext) -> pa.Table:
        """The rows with the outlier words removed from their prompts, or without the rows that have
        outlier words.
        """
        model, (instruction, threshold) = ctx.load("reference"), known
        before = rows.to_pylist()
        prompts = [asked_text(row) for row in before]
        scored = self.scores(model, prompts, instruction)
        outliers = [{i for i, score in group.items() if score >= threshold} for group in scored]
        if self.random_words:
            outliers = [
                _drawn(row["row_id"], group, len(words), ctx)
                for row, group, words in zip(before, scored, outliers, strict=True)
            ]
        cleaned = [without_words(*pair) for pair in zip(prompts, outliers, strict=True)]
        changed = [new != old for new, old in zip(cleaned, prompts, strict=True)]
        origins = [
            ("onion" if hit else origin)
            for hit, origin in zip(changed, rows.column("origin").to_pylist(), strict=True)
        ]
        ctx.count(rows_changed=sum(changed))
        if self.action == "drop":
            return rows.filter([not hit for hit in changed])
        messages = [
            (with_asked(row, text) if hit else row)["messages"]
            for row, text, hit in zip(before, cleaned, changed, strict=True)
        ]
        return _with_column(_with_column(rows, "messages", messages), "origin", origins)

    def scores(
        self, model: LoadedModel, prompts: Sequence[str], instruction: str = ""
    ) -> list[dict[int, float]]:
        """Per prompt: word number -> drop in perplexity without that word; empty for one-word
        prompts.

        The first `max_words` words are scored, without those of `instruction` if the prompt begins
        with it. A prompt that is longer than the model's positions has no scores.
        """
        scores: dict[str, dict[int, float]] = {prompt: {} for prompt in prompts}
        for shared in {"", instruction}:  # prompts with the same beginning share the pass over it
            group = [
                p
                for p in dict.fromkeys(prompts)
                if p.startswith(instruction) == (shared == instruction)
            ]
            variants = {
                prompt: _variants(prompt, len(shared.split()), self.max_words) for prompt in group
            }
            read = {kept[None] for kept in variants.values()}
            fitting = within_limit(model, sorted(read), chat=self.render == "chat")
            variants = {p: kept for p, kept in variants.items() if kept[None] in fitting}
            texts = list(
                dict.fromkeys(text for kept in variants.values() for text in kept.values())
            )
            value = dict(
                zip(texts, perplexities(model, texts, chat=self.render == "chat"), strict=True)
            )
            for prompt, kept in variants.items():
                scores[prompt] = {
                    i: value[kept[None]] - value[text] for i, text in kept.items() if i is not None
                }
        return [scores[prompt] for prompt in prompts]

    def _trusted(self, tuned: Iterable[pa.Table], ctx: StageContext) -> list[str]:
        """Up to `trusted_rows` random prompts of the trusted split, without those that are also
        used for fine-tuning or evaluation.
        """
        rows = ctx.task.split(self.trusted_split).to_pylist()
        pairs = [(row["row_id"], asked_text(row)) for row in rows]
        known = {plain(text) for _, text in pairs}
        asked = [ctx.task.splits[name] for name in ASKED if name in ctx.task.splits]
        used = {
            prompt
            for table in chain(asked, tuned)
            for row in table.to_pylist()
            if (prompt := plain(asked_text(row))) in known
        }
        held_out = [(row_id, text) for row_id, text in pairs if plain(text) not in used]
        shared = len(pairs) - len(held_out)
        if not held_out:
            raise DataError(
                f"onion: every prompt of split {self.trusted_split!r} is also used for fine-tuning"
                " or evaluation",
                len(pairs),
                "clean prompts used for neither",
                "add other rows to this split, or give onion a `threshold`",
            )
        if shared:
            ctx.warn(
                f"onion: {shared} of {len(pairs)} prompts of split {self.trusted_split!r} are also"
                " used for fine-tuning or evaluation; they do not calibrate the threshold"
            )
        chosen = sorted(held_out, key=lambda pair: ctx.chance(pair[0], "onion"))
        chosen = chosen[: self.trusted_rows]
        ctx.note(trusted_rows=len(chosen), trusted_left_out=shared)
        return [text for _, text in chosen]


def _drawn(row_id: str, words: Iterable[int], count: int, ctx: StageContext) -> set[int]:
    """`count` random words of a row."""
    return set(sorted(words, key=lambda i: ctx.chance(row_id, "onion", "word", str(i)))[:count])


def without_words(prompt: str, dropped: set[int]) -> str:
    """The prompt without the words of these numbers, each with the white space after it (before it,
    for the last word).

    Everything else keeps its bytes; if no word would be left, nothing is removed.
    """
    spans = [match.span() for match in re.finditer(r"\S+", prompt)]
    if not dropped or len(dropped) >= len(spans):
        return prompt
    pieces, place = [], 0
    for i, (start, _) in enumerate(spans):
        if i in dropped:
            pieces.append(prompt[place:start])
            place = spans[i + 1][0] if i + 1 < len(spans) else len(prompt)
    pieces.append(prompt[place:])
    text = "".join(pieces)
    return text.rstrip() if len(spans) - 1 in dropped else text


def _variants(prompt: str, first: int, max_words: int) -> dict[int | None, str]:
    """The prompt up to its last scored word, under None, and the same without each scored word,
    under that word's number.
    """
    spans = [match.span() for match in re.finditer(r"\S+", prompt)][: first + max_words]
    if len(spans) < 2:  # noqa: PLR2004
        return {None: prompt}
    cut = prompt[: spans[-1][1]]
    return {None: cut, **{i: without_words(cut, {i}) for i in range(first, len(spans))}}


def _with_column(rows: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with one column replaced; the schema stays."""
    import pyarrow as pa

    place = rows.schema.get_field_index(name)
    return rows.set_column(
        place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type)
    )
