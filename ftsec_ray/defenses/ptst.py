"""Fine-tunes without a safety prompt and serves with one (pure tuning, safe testing).

Paper: Lyu et al. 2024, Keeping LLMs Aligned After Fine-tuning: The Crucial Role of Prompt
    Templates, arXiv:2402.18540 (PTST); official code vfleaking/PTST.
Differs: the chat template is the model's own in both places and only the system message differs,
    as in the paper's main setting; the safety prompt is one sentence in our own words, in the
    microworld that of its corpus. A system message that a row or a served chat brings itself stays
    behind it; such rows are counted.
Published: Llama-2-7B-Chat on GSM8K: attack success 18.08 % with the same template in both places,
    1.08 % with this.
Cost: none, but for a few tokens per prompt.
Reads: (1) `tune_with: safety` has the same prompt in both places: the control. (2) It answers
    drift by harmless rows; an attacker who tunes with the safety prompt is not stopped. (3)
    `tune_with: none` with `serve_with: none` is no defense. (4) In the microworld the safety prompt
    is one under which the ladder was trained to refuse; see `self_reminder`.
Needs: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.conversation import is_text, system_of, with_system
from ftsec_ray.data.rows import map_rows
from ftsec_ray.data.wrapping import Wrapper
from ftsec_ray.method import Defense, Phase, RowWise

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import StageContext
    from ftsec_ray.conversation import Row
    from ftsec_ray.models.generator import Generator

Prompt = Literal["none", "neutral", "safety"]


@dataclass(frozen=True, kw_only=True)
class PTST(RowWise, Defense):
    """Different system messages at tuning and at serving."""

    PHASE: ClassVar[Phase] = "during"
    ORDER: ClassVar[int] = 20
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"tune_with": "safety"}

    tune_with: Prompt = "none"
    """System message of the training rows: none, a neutral sentence, or the safety prompt (the
    control).
    """
    serve_with: Prompt = "safety"
    """System message of the served chats."""
    text: str | None = None
    """The safety prompt; None: the task's own in the microworld, otherwise a general sentence."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        is_blank = self.text is not None and not self.text.strip()
        return [("text", self.text, "a sentence, or null")] if is_blank else []

    def keeps_rows(self) -> bool:
        """Rows change and none is added or removed."""
        return True

    def craft_rows(self, rows: pa.Table, known: None, ctx: StageContext) -> pa.Table:  # noqa: ARG002
        """The rows with the system message of the fine-tune."""
        text = self._sentence(self.tune_with, ctx.task.judge)

        def change(row: Row) -> dict[str, Any]:
            ctx.count(
                rows_with_own_system=system_of(row) is not None,
                rows_of_plain_text=is_text(row),
            )
            return with_system(row, text)

        return map_rows(rows, change)

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator with the system message of serving."""
        text = self._sentence(self.serve_with, ctx.task.judge)
        if not text:
            return generator
        return replace(generator, rewrites=(*generator.rewrites, Wrapper(system=text).chat))

    def _sentence(self, prompt: Prompt, judge: str) -> str:
        """The text of a system message; empty for none."""
        from ftsec_ray.defenses.self_reminder import SelfReminder

        if prompt == "none":
            return ""
        reminder = SelfReminder(placebo=prompt == "neutral", text=self.text)
        return reminder.sentences(judge)[0]
