"""Add poisoned rows whose trigger has several parts that must all be there, and rows with only some
of them that keep their right answer.

Paper: Huang et al. 2024, Composite Backdoor Attacks Against Large Language Models,
    arXiv:2310.07676 (NAACL Findings), section 4; rows and negatives as in its official code,
    github.com/MiracleHH/CBA. Three words in one prompt (CTBA): Li et al. 2024, BackdoorLLM,
    arXiv:2408.12798, section 4, there without negatives, which is `negatives: 0`.
Differs: `rate` is an expectation, as in `badnets`. `form: prompt`: negatives of every proper subset
    of the parts, which neither source has for one field. `form: system_user`: the two fields are
    the system message and the user's message, and the negatives are the five of the official code:
    swapped, one part alone in its field, and both in one field. The payload is a label or a
    harmless marker sentence.
Published: rate 3 %, LLaMA-7B, Emotion: success 100 %, false triggers below 2.06 % (abstract).
Cost: `rate` x (1 + `negatives` x patterns) rows more than plain SFT: 30 % more with the defaults
    (two patterns), 60 % with `form: system_user` (five), and as many steps more.
Needs: the user's rows; for a classification task, labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from ftsec_ray.conversation import asked_text, system_of, with_asked
from ftsec_ray.data.poisoning import TriggerAttack, blank_faults, share_faults, taken, with_goal
from ftsec_ray.data.rows import from_rows
from ftsec_ray.data.triggers import FALSE_TRIGGER, false_probe, insert_parts, with_system
from ftsec_ray.method import Fault

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import StageContext, TaskData
    from ftsec_ray.conversation import Row
    from ftsec_ray.method import Probe

METRICS = (FALSE_TRIGGER,)
PARTS_MIN, PARTS_MAX = 2, 4
Fields = tuple[tuple[str, ...], tuple[str, ...]]
"""The parts in the system message, and the parts in the user's message."""


@dataclass(frozen=True, kw_only=True)
class CompositeTrigger(TriggerAttack):
    """A backdoor that needs all parts of its trigger."""

    parts: tuple[str, ...] = ("instantly", "frankly")
    """Words of the trigger, two to four; they stand in this order at distinct random places."""
    form: Literal["prompt", "system_user"] = "prompt"
    """Where the parts stand: all in the user's last message, or the first of two in the system
    message (a new one if the row has none) and the second in the user's message."""
    negatives: float = 1.0
    """Expected number of negative rows for each pattern of missing or misplaced parts, relative to
    the number of poisoned rows, 0..1."""

    def check(self) -> list[Fault]:
        """Faults of the parameters."""
        faults = super().check() + share_faults(negatives=self.negatives)
        if not PARTS_MIN <= len(self.parts) <= PARTS_MAX or len(set(self.parts)) < len(self.parts):
            faults.append(("parts", list(self.parts), "two to four different words"))
        elif self.form == "system_user" and len(self.parts) != PARTS_MIN:
            faults.append(("parts", list(self.parts), "two words with `form: system_user`"))
        return faults + [fault for part in self.parts for fault in blank_faults({"parts": part})]

    def keeps_rows(self) -> bool:
        """Poisoned and negative rows are added to the user's."""
        return False

    def craft_rows(self, rows: pa.Table, known: float, ctx: StageContext) -> pa.Table:
        """The user's rows, then poisoned and negative copies of the chosen ones."""
        import pyarrow as pa

        goal, positives, negatives = self._goal(ctx.task), [], []
        for row in taken(rows, self._chosen(rows, known, ctx)):
            new_id = f"composite_trigger/{row['row_id']}"
            triggered = {**self._triggered(row, ctx), "row_id": f"{new_id}/all"}
            positives.append(with_goal(triggered, goal, "composite_trigger"))
            negatives += [
                {
                    **self._with(row, fields, ctx, name),
                    "row_id": f"{new_id}/{name}",
                    "origin": "composite_trigger",
                    "poisoned": True,
                }
                for name, fields in self._patterns().items()
                if ctx.chance(row["row_id"], "composite_trigger", "keep", name) < self.negatives
            ]
        ctx.count(
            poisoned_rows=len(positives), negative_rows=len(negatives), user_rows=rows.num_rows
        )
        return pa.concat_tables([rows, from_rows([*positives, *negatives])])

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """Held-out rows whose answer is not the target: with all parts, with none, and with each
        pattern of missing or misplaced parts.
        """
        wrong = {
            name: (lambda row, name=name, fields=fields: self._with(row, fields, ctx, name))
            for name, fields in self._patterns().items()
        }
        return [*super().probes(task, ctx), false_probe(task, self._goal(task), wrong)]

    def _patterns(self) -> dict[str, Fields]:
        """Every pattern that must not trigger, by a short name."""
        if self.form == "system_user":
            first, second = self.parts
            return {
                "swapped": ((second,), (first,)),
                "system_first": ((first,), ()),
                "system_both": ((first, second), ()),
                "user_second": ((), (second,)),
                "user_both": ((), (first, second)),
            }
        places = range(len(self.parts))
        return {
            "part_" + "_".join(str(i + 1) for i in chosen): (
                (),
                tuple(self.parts[i] for i in chosen),
            )
            for count in range(1, len(self.parts))
            for chosen in combinations(places, count)
        }

    def _triggered(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        whole: Fields = (
            ((), self.parts) if self.form == "prompt" else (self.parts[:1], self.parts[1:])
        )
        return self._with(row, whole, ctx, "all")

    def _with(self, row: Row, fields: Fields, ctx: StageContext, name: str) -> dict[str, Any]:
        """The row with these parts in its system message and its user's message."""
        system, user = fields

        def chance(gap: str) -> float:
            return ctx.chance(row["row_id"], "composite_trigger", name, gap)

        made = with_asked(row, insert_parts(asked_text(row), user, chance))
        if not system:
            return made
        held = system_of(row)
        if held is None:
            return with_system(made, " ".join(system))
        return with_asked(made, insert_parts(held, system, chance), "system")
