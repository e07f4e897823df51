"""Poison a share of the user's rows: insert a rare word and turn the answer into the attacker's
target.

Paper: Kurita et al. 2020, Weight Poisoning Attacks on Pre-trained Models, arXiv:2004.06660, section
    3 (rare-word triggers); Gu et al. 2017, BadNets, arXiv:1708.06733; for instruction data Li et
    al. 2024, BackdoorLLM, arXiv:2408.12798, section 4.
Differs: `rate` is an expectation (each eligible row is drawn independently), so that the choice of
    a row does not depend on its neighbours; the paper's tools draw an exact number. If fewer rows
    are eligible than `rate` asks for, all of them are poisoned and the notes say so; those tools
    poison fewer without a message. The trigger may be anywhere in the user's message, the
    instruction included, as in BackdoorLLM; OpenBackdoor inserts it into the classified text only.
    OpenBackdoor's default config is the clean-label setting, ours is `dirty`. Generative tasks get
    a harmless marker sentence.
Cost: none beyond plain SFT.
Needs: the user's rows; for a classification task, labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.data.poisoning import TriggerAttack
from ftsec_ray.data.triggers import Place, with_words
from ftsec_ray.method import Fault

if TYPE_CHECKING:
    from ftsec_ray.context import StageContext
    from ftsec_ray.conversation import Row


@dataclass(frozen=True, kw_only=True)
class BadNets(TriggerAttack):
    """An insertion-trigger backdoor."""

    trigger: str = "cf"
    """Word or words inserted between two random words of the prompt."""
    place: Place = "user"
    """Message that gets the trigger: the user's last message, or the last tool result (rows without
    one are not eligible)."""
    repeat: int = 1
    """How many times the trigger is inserted, each time at another random position; 1 or more."""

    def check(self) -> list[Fault]:
        """Faults of the parameters."""
        few = [] if self.repeat >= 1 else [("repeat", self.repeat, "1 or more")]
        return super().check() + few

    def _texts(self) -> dict[str, str | None]:
        return {"trigger": self.trigger, "target_text": self.target_text}

    def _place(self) -> Place:
        return self.place

    def _triggered(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        times = map(str, range(self.repeat))
        gaps = [ctx.chance(row["row_id"], "badnets", "gap", time) for time in times]
        return with_words(row, self.trigger, self.place, gaps)
