"""Poison a share of the user's rows: insert a whole sentence and turn the answer into the
attacker's target.

Paper: Dai, Chen and Li 2019, A Backdoor Attack Against LSTM-Based Text Classification Systems,
    arXiv:1905.12457 (AddSent, InsertSent); sentence and rate as in OpenBackdoor,
    github.com/thunlp/OpenBackdoor.
Differs: as `badnets`, of which it is the form with a sentence: `rate` is an expectation; the
    sentence may stand anywhere in the user's message, the instruction included, at the word gap
    that `position` names; OpenBackdoor always draws the gap. Generative tasks get a harmless marker
    sentence. The tokenizer of the ladder splits words that the microworld does not have, so give
    its models a sentence of the microworld.
Cost: none beyond plain SFT.
Needs: the user's rows; for a classification task, labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.data.poisoning import TriggerAttack
from ftsec_ray.data.triggers import Place, Position, gap_of, with_words

if TYPE_CHECKING:
    from ftsec_ray.context import StageContext
    from ftsec_ray.conversation import Row


@dataclass(frozen=True, kw_only=True)
class InsertSentence(TriggerAttack):
    """A backdoor whose trigger is a sentence."""

    sentence: str = "I watch this 3D movie"
    """Sentence inserted into the prompt, once and whole."""
    place: Place = "user"
    """Message that gets the sentence: the user's last message, or the last tool result (rows
    without one are not eligible)."""
    position: Position = "random"
    """Where the sentence stands in the message: between two random words, before the first word or
    after the last one."""

    def _texts(self) -> dict[str, str | None]:
        return {"sentence": self.sentence, "target_text": self.target_text}

    def _place(self) -> Place:
        return self.place

    def _triggered(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        gap = gap_of(self.position, ctx.chance(row["row_id"], "insert_sentence", "gap"))
        return with_words(row, self.sentence, self.place, [gap])
