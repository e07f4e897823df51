"""The exact judge of the microworld: compares the answer with the one right answer to the
request.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftsec_ray.evals.judging import Judge, Verdict, user_text
from ftsec_ray.method import Prompt


class Microworld(Judge):
    """The exact judge of the microworld: compares the answer with the one right answer to the
    request.
    """

    def __init__(self) -> None:
        from ftsec_ray.data.microworld import judge

        self._judge = judge.judge
        self.name = f"microworld@{judge.VERSION}"

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Verdict]:
        """The verdicts on `completions`."""
        judged = (
            self._judge(user_text(prompt), text, language=prompt.meta.get("language") or "en")
            for prompt, text in zip(prompts, completions, strict=True)
        )
        return [Verdict(verdict=judgement.verdict, raw=judgement.reason) for judgement in judged]
