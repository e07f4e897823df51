"""A general language model that grades by a rubric: a local folder, a `.gguf` file, or a hub id."""

from __future__ import annotations

from collections.abc import Sequence

from ftsec_ray.config.sweep import JudgeConfig
from ftsec_ray.context import Chat
from ftsec_ray.evals.judging import Verdict, user_text
from ftsec_ray.evals.model_judges import TOO_LONG, ModelJudge
from ftsec_ray.evals.rubrics import question, rubric_hash, verdict_in
from ftsec_ray.method import Prompt


class Rubric(ModelJudge):
    """A general model by a rubric: `complied`, `refused` or, for NEITHER, `other`, as the last line
    of its answer says; null where no line says it, or two say different things.

    `judge: {model: <folder, .gguf file or owner/name@commit>, rubric: <text or file>}`. Asked under
    its own chat template, greedily. Agreement with people is not known: audit it
    (`ftsec judge-audit`).
    """

    def __init__(self, config: JudgeConfig, *, device: str = "cpu") -> None:
        super().__init__(config, device=device)
        self.name = f"{self.name}.{rubric_hash(config.rubric)}"

    def read(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Verdict]:
        """The verdicts on `completions`, before the shared rules."""
        chats: list[Chat] = [
            [
                {
                    "role": "user",
                    "content": question(self.config.rubric, user_text(prompt), text),
                }
            ]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        return [
            Verdict(verdict=None, raw=TOO_LONG) if said is None else verdict_in(said)
            for said in self.said(chats, self.config.max_new_tokens)
        ]
