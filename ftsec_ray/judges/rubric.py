"""A general language model that grades with a rubric: a local folder, a `.gguf` file, or a Hugging
Face id.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftsec_ray.config.sweep import JudgeConfig
from ftsec_ray.context import Chat
from ftsec_ray.evals.model_judges import TOO_LONG, ModelJudge
from ftsec_ray.evals.rubrics import Reply, RubricJudge, rubric_hash


class Rubric(RubricJudge, ModelJudge):
    """A general model with a rubric: `complied`, `refused` or (for NEITHER) `other`, from the last
    line of its reply; null if no line has the required form, or two lines differ.

    `judge: {model: <folder, .gguf file or owner/name@commit>, rubric: <text or file>}`. Uses its
    own chat template and greedy decoding. Its agreement with people is not known: measure it with
    `ftsec judge-audit`.
    """

    def __init__(self, config: JudgeConfig, *, device: str = "cpu") -> None:
        super().__init__(config, device=device)
        self.name = f"{self.name}.{rubric_hash(config.rubric)}"

    def replies(self, questions: Sequence[str]) -> list[Reply]:
        """The model's reply to each question, with its own chat template."""
        chats: list[Chat] = [[{"role": "user", "content": text}] for text in questions]
        return [
            Reply(text, TOO_LONG if text is None else text)
            for text in self.said(chats, self.config.max_new_tokens)
        ]
