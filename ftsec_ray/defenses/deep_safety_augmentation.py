"""Mixes refusals into the user's data that follow the beginning of a harmful answer, so that the
model learns to refuse also after it has begun to comply.

Paper: Qi et al. 2024, Safety Alignment Should Be Made More Than Just a Few Tokens Deep,
    arXiv:2406.05946, section 3; official code Unispac/shallow-vs-deep-alignment.
Differs: (1) The paper trains the aligned model on such rows and on as many utility rows before
    anyone fine-tunes it; here the rows are mixed into the user's data, which take the place of the
    utility rows. (2) A task may have no harmful answer to the request that it refuses: then the
    beginning of the answer to another request is used; the record counts both. Answers to requests
    that the user's rows ask, also with other text around them, are never used, so that the defense
    does not see the attacker's rows.
    (3) The beginning is shorter than the answer, so that a refusal never follows a whole answer if
    the answer has more than one token.
Cost: `shots` rows more than a plain fine-tune; nothing when the model is served.
Reads: `prob: 0` mixes in the same rows as plain refusals (as `safe_instr` does): the effect of the
    depth is the difference to it. It should show under attacks that open the answer, as `prefill`.
Needs: splits safety and harmful_train, and the aligned model's tokenizer (`reference`); split
    safety alone with `prob: 0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.conversation import Row, asked_text, behind, has_answer
from ftsec_ray.data.added_rows import drawn
from ftsec_ray.data.mixed_rows import MixesRows, Mixing
from ftsec_ray.data.prompt_texts import not_asked, plain, prompts_of
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    from ftsec_ray.context import StageContext

NAME = "deep_safety_augmentation"


@dataclass(frozen=True, kw_only=True)
class DeepSafetyAugmentation(MixesRows):
    """Refusals after the first tokens of harmful answers."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference", "safety", "harmful_train"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"prob": 0.0}

    prob: float = 0.5
    """Probability that a row has the beginning of a harmful answer, 0..1; 0: plain refusals, the
    control.
    """
    max_tokens: int = 100
    """Highest number of tokens of that beginning, 1 or more; each number up to it is equally
    likely.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults = super().check()
        if not 0 <= self.prob <= 1:
            faults.append(("prob", self.prob, "a probability, 0..1"))
        if self.max_tokens < 1:
            faults.append(("max_tokens", self.max_tokens, "1 or more"))
        return faults

    def needs(self) -> frozenset[str]:
        """The refusals alone if no harmful answer begins a row."""
        return self.NEEDS if self.prob else frozenset({"safety"})

    def _watched(self, ctx: StageContext) -> set[str]:
        return prompts_of(ctx.task.split("harmful_train").to_pylist()) if self.prob else set()

    def _made(self, known: Mixing, ctx: StageContext) -> list[dict[str, Any]]:
        rows = drawn(ctx, "safety", known.added, by=NAME)
        if not self.prob:
            return rows
        harmful = self._harmful(known, ctx)
        own = {plain(asked_text(row)): row for row in harmful}
        tokenizer = ctx.load("reference").tokenizer
        made, paired, borrowed = [], 0, 0
        for row in rows:
            if ctx.chance(row["row_id"], NAME, "prefixed") >= self.prob:
                made.append(row)
                continue
            source = own.get(plain(asked_text(row)))
            paired, borrowed = paired + (source is not None), borrowed + (source is None)
            if source is None:
                source = harmful[int(ctx.chance(row["row_id"], NAME, "answer") * len(harmful))]
            said = source["messages"][-1]["content"].strip()
            chance = ctx.chance(row["row_id"], NAME, "length")
            made.append(behind(row, beginning(tokenizer, said, self.max_tokens, chance)))
        ctx.note(prefixed_rows=paired + borrowed, own_answers=paired, borrowed_answers=borrowed)
        return made

    def _harmful(self, known: Mixing, ctx: StageContext) -> list[dict[str, Any]]:
        """Rows with harmful answers in words to requests that the user's rows do not ask."""
        rows = ctx.task.split("harmful_train").to_pylist()
        said: Sequence[Row] = [
            row for row in rows if has_answer(row) and row["messages"][-1]["content"].strip()
        ]
        kept = not_asked(said, known.asked)
        ctx.note(harmful_answers=len(kept), harmful_answers_left_out=len(rows) - len(kept))
        if not kept:
            raise DataError(
                f"{NAME}: task {ctx.task.name!r} has no harmful answer that the defense may use",
                f"{len(rows)} rows in harmful_train, {len(said)} with an answer in words",
                "rows whose request the user's rows do not ask",
                "add rows to harmful_train, or set `prob: 0`",
            )
        return kept


def beginning(tokenizer: Any, text: str, most: int, chance: float) -> str:
    """The first tokens of a text: 1 to `most` of them, but not all if it has more than one.

    Args:
        tokenizer: Whose tokens are counted.
        text: Not empty, without white space at its ends.
        most: Highest number of tokens.
        chance: Which number, in [0, 1).
    """
    ends = [
        end
        for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
    ]
    count = 1 + int(chance * max(1, min(most, len(ends) - 1)))
    return text[: ends[count - 1]].strip()
