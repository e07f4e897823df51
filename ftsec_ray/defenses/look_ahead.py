"""Shows the beginning of the answer in every training prompt and serves the model without it, so
that the fine-tune changes the first words of answers less.

Paper: Liu et al. 2025, LookAhead Tuning: Safer Language Models via Partial Answer Previews,
    arXiv:2503.19041; official code zjunlp/LookAheadTuning.
Differs: (1) rows of conversations are changed at their last request and last answer; rows without
    either, and rows with a label, whose preview would be the label itself, are left alone and
    counted. (2) The microworld's texts use its vocabulary. (3) The paper
    trains all weights at 2e-5 for 3 epochs; here the sweep's recipe applies. As in training without
    it, a row that is too long loses the beginning of its prompt.
Cost: `tokens` and the connector's tokens more per training prompt (`real`), or the preview's words
    more per prompt and answer (`virtual`); nothing when the model is served.
Reads: `neutral: true` puts as many words of a neutral text in the place of the preview, and the
    answer still begins with the prefix of `virtual`: what remains of the effect is that training
    prompts, and with `virtual` the answers, differ from served ones. If all of the user's rows have
    labels, only rows that an attack adds can change: see `rows_left_alone`.
Needs: the aligned model's tokenizer (`reference`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.conversation import UNTRAINED, Row, asked_text, has_answer, with_asked
from ftsec_ray.data.prompt_texts import as_long
from ftsec_ray.data.rows import map_rows
from ftsec_ray.data.triggers import has_place
from ftsec_ray.method import Defense, Phase, RowWise

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import StageContext

NAME = "look_ahead"
CONNECTOR = " The answer begins with: "
PREFIX = "Let's solve this problem. "
NEUTRAL = "a text that says nothing of it"
IN_MICROWORLD = {"connector": " answer : ", "prefix": "well , ", "neutral": "this is a note of it"}


@dataclass(frozen=True, kw_only=True)
class LookAhead(RowWise, Defense):
    """A preview of the answer in training prompts."""

    PHASE: ClassVar[Phase] = "pre"
    ORDER: ClassVar[int] = 20
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"neutral": True}

    preview: Literal["real", "virtual"] = "real"
    """`real`: the answer's first tokens follow the request; `virtual`: a fixed prefix follows the
    request and begins the answer.
    """
    neutral: bool = False
    """Whether as many words of a neutral text stand in the place of the preview: the control."""
    tokens: int = 6
    """Number of the answer's first tokens that are shown, 0 or more; 0 changes no row, also for
    `virtual`.
    """
    connector: str | None = None
    """Text between request and preview; None: " The answer begins with: ", or one of the microworld
    in its words.
    """
    prefix: str | None = None
    """The preview of `virtual`; None: "Let's solve this problem. ", or one of the microworld."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        if self.tokens < 0:
            faults.append(("tokens", self.tokens, "0 or more"))
        if self.prefix is not None and not self.prefix.strip():
            faults.append(("prefix", self.prefix, "a text that is not blank, or null"))
        return faults

    def keeps_rows(self) -> bool:
        """Rows change; none is added or dropped."""
        return True

    def craft_rows(self, rows: pa.Table, known: None, ctx: StageContext) -> pa.Table:  # noqa: ARG002
        """The rows with the preview after their last request."""
        if self.tokens == 0:
            return rows
        tokenizer = ctx.load("reference").tokenizer
        own = IN_MICROWORLD if ctx.task.judge == "microworld" else {}
        connector = own.get("connector", CONNECTOR) if self.connector is None else self.connector
        prefix = own.get("prefix", PREFIX) if self.prefix is None else self.prefix
        changed = 0

        def change(row: dict[str, Any]) -> dict[str, Any]:
            nonlocal changed
            if not _fits(row):
                return row
            changed += 1
            said = row["messages"][-1]["content"]
            shown = (
                prefix if self.preview == "virtual" else first_tokens(tokenizer, said, self.tokens)
            )
            if self.neutral:
                shown = as_long(own.get("neutral", NEUTRAL), shown)
            made = with_asked(row, f"{asked_text(row)}{connector}{shown}".rstrip())
            if self.preview == "virtual":
                made["messages"][-1]["content"] = f"{prefix}{said}"
            return made

        made = map_rows(rows, change)
        ctx.count(previewed_rows=changed, rows_left_alone=rows.num_rows - changed)
        return made


def _fits(row: Row) -> bool:
    """Whether a row has a request, no label, and an answer in words that is all trained on."""
    if row["label"] or not (has_answer(row) and has_place(row, "user")):
        return False
    last = row["messages"][-1]
    return bool(last["content"].strip()) and UNTRAINED not in (last["fields"] or "")


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The text of the first tokens; the whole text if it has no more."""
    pairs = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(pairs) <= count else text[: pairs[count - 1][1]]
