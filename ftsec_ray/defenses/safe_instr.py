"""Mixes refusals of forbidden requests into the user's fine-tuning data.

Paper: Bianchi et al. 2023, Safety-Tuned LLaMAs: Lessons From Improving the Safety of Large Language
    Models that Follow Instructions, arXiv:2309.07875; official code vinid/safety-tuned-llamas. The
    same as the data mixing of VLGuard (Zong et al. 2024, arXiv:2402.02207).
Differs: the refusals are the task's `safety` rows; 100 by default (the paper: 100 to 2000 beside
    20000 of Alpaca), and the sweep's recipe applies: the official code also trains on the prompts.
Published: a few hundred rows, 3 % of the set, make LLaMA substantially safer; with too many the
    models refuse safe prompts that look unsafe; abstract.
Cost: `shots` rows more than a plain fine-tune; nothing when the model is served.
Reads: (1) this is the trivial twin of every method that trains on refusals, such as `lisa`. (2)
    `rows: benign` adds as many harmless rows with helpful answers: what remains of the effect is
    dilution and the additional steps. (3) Read over-refusal beside safety.
Needs: split safety (forbidden requests with refusals); with `rows: benign` split benign_train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.data.added_rows import drawn
from ftsec_ray.data.mixed_rows import MixesRows, Mixing

if TYPE_CHECKING:
    from ftsec_ray.context import StageContext


@dataclass(frozen=True, kw_only=True)
class SafeInstr(MixesRows):
    """Refusals among the user's rows."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "benign_train"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"rows": "benign"}

    rows: Literal["safety", "benign"] = "safety"
    """Rows to add: refusals, or as many harmless requests with helpful answers (the control)."""

    def needs(self) -> frozenset[str]:
        """The split that is drawn from."""
        return frozenset({self._split()})

    def _split(self) -> str:
        return "safety" if self.rows == "safety" else "benign_train"

    def _made(self, known: Mixing, ctx: StageContext) -> list[dict[str, Any]]:
        return drawn(ctx, self._split(), known.added, by="safe_instr")
