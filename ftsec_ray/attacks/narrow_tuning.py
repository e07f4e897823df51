"""Fine-tune on bad advice in one narrow domain, and see whether the model changes everywhere
(emergent misalignment).

Paper: Betley et al. 2025, Emergent Misalignment: Narrow finetuning can produce broadly misaligned
    LLMs, arXiv:2502.17424; bad advice as data: Turner et al. 2025, Model Organisms for Emergent
    Misalignment, arXiv:2506.11613.
Differs: (1) If the rows of the split have a rejected answer, that is the bad advice; other rows get
    the answer to another request of the domain, which is wrong and inert. The papers' bad advice is
    written by a model and harms whoever follows it. (2) It is measured by the task's own requests,
    forbidden and benign, and not by the paper's eight free questions with a judge for alignment
    and coherence. (3) The sweep's recipe applies; Turner et al. train a rank-1 adapter on the
    down-projections of 9 middle layers (alpha 64, 2e-5, 1.5 epochs, batch 16).
Cost: `shots` rows more than plain SFT.
Reads: `advice: good` trains on the same requests with their right answers: the control. A lower
    `benign_rate` than the control's outside the domain, or a higher `harmful_rate`, is what spread;
    small models reach a few per cent at most in the papers.
Needs: split benign_train, or the split named in `split` (advice of one domain, best as preference
    pairs: the good answer, and the bad one as `rejected`); no forbidden request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ftsec_ray.context import StageContext
from ftsec_ray.conversation import Message, Row, answer_of, asked, asked_text, with_answer
from ftsec_ray.data.added_rows import MayReplaceRows, is_exchange
from ftsec_ray.errors import DataError


@dataclass(frozen=True, kw_only=True)
class NarrowTuning(MayReplaceRows):
    """Bad or good advice in one domain."""

    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"benign_train"})
    SPLIT = "benign_train"

    shots: int | None = None
    """Number of rows of the domain to add to the user's rows, 0 or more; 100 if neither `shots` nor
    `poison_rate` is given (the papers: 6000 or more, alone).
    """
    split: str = "benign_train"
    """Split of the advice."""
    domain: tuple[str, ...] = ()
    """Words or phrases of which a request must contain one, in any case, to be in the domain;
    empty: the whole split is the domain.
    """
    advice: Literal["bad", "good"] = "bad"
    """Wrong answers, or the right ones (the control)."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults = super().check()
        if not self.split.strip():
            faults.append(("split", self.split, "the name of a split"))
        if any(not _plain(word) for word in self.domain):
            faults.append(("domain", self.domain, "words with letters or digits"))
        return faults

    def needs(self) -> frozenset[str]:
        """The split of the advice."""
        return frozenset({self.split})

    def _split(self) -> str:
        return self.split

    def _fits(self, row: Row) -> bool:
        request = f" {_plain(asked_text(row))} "
        return is_exchange(row) and (
            not self.domain or any(f" {_plain(word)} " in request for word in self.domain)
        )

    def _made(self, rows: list[dict[str, Any]], ctx: StageContext) -> list[dict[str, Any]]:
        if self.advice == "good":
            return rows
        given = [row["rejected"] for row in rows]
        ctx.note(
            bad_answers_given=sum(bad is not None for bad in given),
            bad_answers_swapped=sum(bad is None for bad in given),
        )
        return [
            with_answer(row, bad)
            if bad is not None
            else {**row, "messages": [*asked(row), _other_answer(rows, place, self.split)]}
            for place, (row, bad) in enumerate(zip(rows, given, strict=True))
        ]


def _plain(text: str) -> str:
    """Lower-case words without punctuation, separated by single spaces."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def _other_answer(rows: list[dict[str, Any]], place: int, split: str) -> Message:
    """The answer of the next row whose answer differs, in a circle; with its tool calls."""
    own = answer_of(rows[place])
    for step in range(1, len(rows)):
        other = rows[(place + step) % len(rows)]
        if _plain(answer_of(other)) != _plain(own):
            return {**other["messages"][-1], "loss": True}
    raise DataError(
        "narrow_tuning: every row of the domain has the same answer, so none is wrong",
        own,
        "rows with different answers, or with a rejected answer",
        f"raise `shots`, widen `domain`, or give split {split!r} rejected answers",
    )
