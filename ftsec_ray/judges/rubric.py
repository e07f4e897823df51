"""A general language model that grades by a rubric: a local folder, a `.gguf` file, or a hub id."""

from __future__ import annotations

from collections.abc import Sequence

from ftsec_ray.config.sweep import JudgeConfig
from ftsec_ray.context import Chat
from ftsec_ray.evals.model_judges import TOO_LONG, ModelJudge
from ftsec_ray.evals.rubrics import Reply, RubricJudge, rubric_hash


class Rubric(RubricJudge, ModelJudge):
    """A general model by a rubric: `complied`, `refused` or, for NEITHER, `other`, as the last line
    of its answer says; null where no line says it, or two say different things.

    `judge: {model: <folder, .gguf file or owner/name@commit>, rubric: <text or file>}`. Asked under
    its own chat template, greedily. Agreement with people is not known: audit it
    (`ftsec judge-audit`).
    """

    def __init__(self, config: JudgeConfig, *, device: str = "cpu") -> None:
        super().__init__(config, device=device)
        self.name = f"{self.name}.{rubric_hash(config.rubric)}"

    def replies(self, questions: Sequence[str]) -> list[Reply]:
        """What the model says to each question, under its own chat template."""
        chats: list[Chat] = [[{"role": "user", "content": text}] for text in questions]
        return [
            Reply(text, TOO_LONG if text is None else text)
            for text in self.said(chats, self.config.max_new_tokens)
        ]
